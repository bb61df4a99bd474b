"""Rotary positions for GPUs, alone and behind a per-head norm.

Contract: a program takes a few heads of one token, so results do not depend on the batch. Angles are
position · frequency in float32, as the op's body forms them. `turn` is the one rotation that every
kernel with a rotary part calls.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fourfold.core.device import Feature
from fourfold.kernels.triton.early import after_previous, also_early, launch
from fourfold.ops.registry import Kernel

HEADS = 4  # heads a program
# Sums must round alike in every kernel that makes the same numbers: nothing is contracted.
EXACT = {"enable_fp_fusion": False}


@triton.jit
def turn(x, position, inv_freq, half, HALF: tl.constexpr, INVERSE: tl.constexpr):
    """Interleaved pairs `x [rows, 2·HALF]` float32 of one token, turned by its angles; the first `half`
    pairs are real."""
    i = tl.arange(0, HALF)
    frequency = tl.load(inv_freq + i, mask=i < half, other=0.0).to(tl.float32)
    angle = (position.to(tl.float32) * frequency)[None, :]
    cos, sin = tl.cos(angle), tl.sin(angle)
    if INVERSE:
        sin = -sin
    even, odd = tl.split(tl.reshape(x, (x.shape[0], HALF, 2)))
    pairs = tl.join(even * cos - odd * sin, even * sin + odd * cos)
    return tl.reshape(pairs, (x.shape[0], 2 * HALF))


@triton.jit
def _rotate(
    x,
    positions,
    inv_freq,
    out,
    COUNT,
    DIM,
    half,
    eps,
    NORM: tl.constexpr,
    INVERSE: tl.constexpr,
    HERE: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK: tl.constexpr,
    HALF: tl.constexpr,
    EARLY: tl.constexpr,
):
    """Heads of one token: divided by their RMS (NORM), the last 2·half dims turned.

    HERE: `out` is `x`. A number that is stored depends on all that are read at its place: on its head's
    sum of squares, or on its own pair.
    """
    after_previous(EARLY)
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    live = (head < COUNT)[:, None]
    row = (token * COUNT + head)[:, None] * DIM
    d = tl.arange(0, BLOCK)[None, :]
    r = DIM - 2 * half + tl.arange(0, 2 * HALF)[None, :]
    part = tl.load(x + row + r, mask=live & (r < DIM), other=0.0)
    if NORM or not HERE:
        whole = tl.load(x + row + d, mask=live & (d < DIM), other=0.0)
    if NORM:
        wide = whole.to(tl.float32)
        scale = tl.rsqrt(tl.sum(wide * wide, axis=1) / DIM + eps)[:, None]
        whole = (wide * scale).to(x.dtype.element_ty)
        part = (part.to(tl.float32) * scale).to(x.dtype.element_ty)
    turned = turn(part.to(tl.float32), tl.load(positions + token), inv_freq, half, HALF, INVERSE)
    if NORM or not HERE:
        tl.store(out + row + d, whole, mask=live & (d < DIM - 2 * half))
    tl.store(out + row + r, turned.to(x.dtype.element_ty), mask=live & (r < DIM))


def run_rotate(
    x: Tensor,
    positions: Tensor,
    inv_freq: Tensor,
    inverse: bool,
    eps: float | None,
    early: bool = False,
    here: bool = False,
) -> Tensor:
    """`x [T, …, d]` with its last dims turned; with `eps`, each d-vector normalised first. `here`: in
    x's memory, if it is contiguous."""
    x = x.contiguous()
    out = x if here else torch.empty_like(x)
    if not x.numel():
        return out
    tokens, dim, half = x.shape[0], x.shape[-1], inv_freq.shape[0]
    count = x.numel() // (tokens * dim)
    heads = min(HEADS, triton.next_power_of_2(count))
    _rotate[(tokens, -(-count // heads))](
        x, positions, inv_freq, out, count, dim, half, eps or 0.0,
        NORM=eps is not None, INVERSE=inverse, HERE=here, HEADS=heads,
        BLOCK=triton.next_power_of_2(dim), HALF=triton.next_power_of_2(half), EARLY=early,
        num_warps=min(heads, 4), **EXACT, **launch(early),
    )  # fmt: skip
    return out


def rotate(
    x: Tensor, positions: Tensor, inv_freq: Tensor, inverse: bool = False, early: bool = False
) -> Tensor:
    """The op `rotate` (ops/rope.py)."""
    return run_rotate(x, positions, inv_freq, inverse, None, early, here=True)


KERNELS = also_early(Kernel("rotate", "triton", rotate, frozenset({Feature.TRITON})))

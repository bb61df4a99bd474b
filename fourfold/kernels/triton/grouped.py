"""Inverse rotary and the block-diagonal output projection for GPUs, in three forms.

    einsum        the definition: products of the model's dtype. FP8 weights are read as they are stored
                  and become numbers of the model's dtype in registers; for many tokens once, in memory
    fp8_batched   activations rounded to FP8 per 128 behind the rotary, one FP8 launch over all groups
    fp8_loop      the same rounding, one FP8 linear layer a group

The two FP8 forms round what the definition does not and are for `--kernel wo_a=NAME`; weights
that are not FP8 blocks take the definition's way in them too.

As in linear.py the weight is the left operand, K is cut into chunks by the shape alone and chunks are
added in order: a token's result does not depend on the batch.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from fourfold.core.device import Feature
from fourfold.core.tensor import QuantTensor, Weight, dense
from fourfold.kernels.triton.linear import (
    as_fp8,
    decode_fp8,
    linear,
    quantize_activations,
)
from fourfold.kernels.triton.rope import run_rotate
from fourfold.ops.registry import Kernel

PROGRAMS = 132  # chunks × tiles of 128 rows wanted for one pass over the weight
FEW_TOKENS = 128  # up to here every chunk has programs of its own and FP8 weights stay FP8
BLOCK = 128  # rows and inputs of an FP8 weight that share a scale
PLAIN, DECODED, FP8 = (tl.constexpr(n) for n in range(3))  # what the weight is to the product


@triton.jit
def block_scale(scales, index, E8M0: tl.constexpr):
    """The float32 scale of one block."""
    if E8M0:
        raw = tl.load(scales + index).to(tl.int32)
        value = tl.where(raw == 0, 0x00400000, raw << 23).to(tl.float32, bitcast=True)
    else:
        value = tl.load(scales + index)
    return value


@triton.jit
def _dequantize_wo_a(codes, scales, out, ROWS, K, SCALES, E8M0: tl.constexpr, BLOCK: tl.constexpr):
    """out = the numbers of one block of BLOCK rows and inputs."""
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    k = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = (row < ROWS)[:, None] & (k < K)[None, :]
    place = row.to(tl.int64)[:, None] * K + k[None, :]
    scale = block_scale(scales, tl.program_id(0) * SCALES + tl.program_id(1), E8M0)
    value = decode_fp8(tl.load(codes + place, mask=inside, other=0)) * scale
    tl.store(out + place, value.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _wo_a(
    w,
    scales,
    x,
    x_scale,
    out,
    T,
    N,
    R,
    K,
    SCALES,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
    SPLIT: tl.constexpr,
    FORM: tl.constexpr,
    E8M0: tl.constexpr,
    FNUZ: tl.constexpr,
    WHOLE: tl.constexpr,
    BLOCK: tl.constexpr,
    TN: tl.constexpr,
    TK: tl.constexpr,
    TT: tl.constexpr,
):
    """A [TN rows of one group, TT tokens] tile of outᵀ; with SPLIT of one chunk [CHUNKS, T, N].

    `x [T, groups · K]`, for FORM FP8 codes with `x_scale [T, groups · K/BLOCK]`. CHUNK counts blocks of
    BLOCK inputs; WHOLE: K is a multiple of BLOCK.
    """
    tiles = tl.cdiv(R, TN)
    group = tl.program_id(0) // tiles
    row = (tl.program_id(0) % tiles) * TN + tl.arange(0, TN)
    # Rows and tokens beyond the last are the last again; they are not stored.
    n = group * R + tl.minimum(row, R - 1)
    t = tl.program_id(1).to(tl.int64) * TT + tl.arange(0, TT)
    token = tl.minimum(t, T - 1)
    width = N // R * K
    k = tl.arange(0, TK)
    w_place = w + n.to(tl.int64)[:, None] * K + k[None, :]
    x_place = x + token[None, :] * width + (group * K + k)[:, None]
    total = tl.zeros((TN, TT), dtype=tl.float32)
    first = tl.program_id(2) if SPLIT else 0
    last = first + 1 if SPLIT else CHUNKS
    steps = tl.cdiv(K, TK)
    each: tl.constexpr = CHUNK * (BLOCK // TK)
    for chunk in range(first, last):
        acc = tl.zeros((TN, TT), dtype=tl.float32)
        for step in range(chunk * each, tl.minimum((chunk + 1) * each, steps)):
            if WHOLE:
                a = tl.load(w_place + step * TK)
                b = tl.load(x_place + step * TK)
            else:
                inside = k < K - step * TK
                a = tl.load(w_place + step * TK, mask=inside[None, :], other=0.0)
                b = tl.load(x_place + step * TK, mask=inside[:, None], other=0.0)
            if FORM == PLAIN:
                acc = tl.dot(a, b, acc, input_precision="ieee")
            else:
                s_w = block_scale(scales, n // BLOCK * SCALES + step * TK // BLOCK, E8M0)[:, None]
                if FORM == DECODED:
                    number = (decode_fp8(a) * s_w).to(x.dtype.element_ty)
                    acc = tl.dot(number, b, acc, input_precision="ieee")
                else:
                    groups = width // BLOCK
                    s_x = tl.load(x_scale + token * groups + (group * K + step * TK) // BLOCK)
                    if FNUZ:
                        s_x *= 4.0
                    acc = tl.fma(tl.dot(a, b), s_w * s_x[None, :], acc)
        if CHUNKS == 1 or SPLIT:
            total = acc
        else:
            total += acc
    place = t[None, :] * N + (group * R + row)[:, None]
    if SPLIT:
        place += tl.program_id(2).to(tl.int64) * T * N
    kept = (row < R)[:, None] & (t < T)[None, :]
    tl.store(out + place, total.to(out.dtype.element_ty), mask=kept)


@triton.jit
def _add_wo_a(parts, out, COUNT, CHUNKS: tl.constexpr, BLOCK: tl.constexpr):
    """`out[i] = parts[0, i] + parts[1, i] + …` in that order."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.load(parts + i, mask=i < COUNT, other=0.0)
    for chunk in tl.static_range(1, CHUNKS):
        total += tl.load(parts + chunk * COUNT + i, mask=i < COUNT, other=0.0)
    tl.store(out + i, total.to(out.dtype.element_ty), mask=i < COUNT)


@dataclass(frozen=True)
class Shape:
    """A launch: rows of a tile, inputs a step, warps and pipeline stages."""

    rows: int
    inputs: int
    warps: int
    stages: int


def shape_for(form: int, tile: int, wide: bool) -> Shape:
    """For `tile` tokens; within 64 KiB of shared memory. `wide` is float32."""
    if wide:
        return Shape(64, 32, 4, 2)
    if form == FP8.value:
        return Shape(64, 128, 4, 3 if tile <= 64 else 2)
    if form == DECODED.value:
        return Shape(64, 128, 4, 3 if tile <= 32 else 2)
    return Shape(128, 64, 8, 3) if tile > 64 else Shape(64, 64, 4, 3)


def chunking(tiles: int, blocks: int) -> tuple[int, int]:
    """(blocks of inputs a chunk, chunks) for a weight of `tiles` of 128 rows: of its shape alone."""
    wanted = min(max(PROGRAMS // tiles, 1), blocks)
    size = -(-blocks // wanted)
    return size, -(-blocks // size)


def _is_fp8(weight: Weight) -> bool:
    return isinstance(weight, QuantTensor) and weight.scheme.name == "fp8_block"


def _dense(weight: Weight, dtype: torch.dtype) -> Tensor:
    """The weight's numbers in `dtype`."""
    if not isinstance(weight, QuantTensor) or not _is_fp8(weight):
        return dense(weight, dtype).contiguous()
    rows, size = weight.shape
    out = torch.empty(rows, size, dtype=dtype, device=weight.device)
    _dequantize_wo_a[(-(-rows // BLOCK), -(-size // BLOCK))](
        weight.codes, weight.scale, out, rows, size, weight.scale.shape[1],
        E8M0=weight.scale.dtype == torch.uint8, BLOCK=BLOCK, num_warps=8,
    )  # fmt: skip
    return out


def _product(
    w: Tensor, scales: Tensor, x: Tensor, x_scale: Tensor, form: int, dtype: torch.dtype, fnuz: bool
) -> Tensor:
    """`x [T, groups, K]` by groups of rows of `w [N, K]` → `[T, N]` in `dtype`."""
    tokens, groups, size = x.shape
    rows = w.shape[0]
    rank = rows // groups
    chunk, chunks = chunking(groups * -(-rank // BLOCK), -(-size // BLOCK))
    split = tokens <= FEW_TOKENS and chunks > 1
    out = torch.empty(tokens, rows, dtype=dtype, device=x.device)
    parts = out
    if split:
        parts = torch.empty(chunks, tokens, rows, dtype=torch.float32, device=x.device)
    tile = min(max(triton.next_power_of_2(tokens), 16), 128)
    shape = shape_for(form, tile, x.dtype == torch.float32)
    grid = (groups * -(-rank // shape.rows), -(-tokens // tile), chunks if split else 1)
    _wo_a[grid](
        w, scales, x, x_scale, parts, tokens, rows, rank, size, -(-size // BLOCK),
        CHUNK=chunk, CHUNKS=chunks, SPLIT=split, FORM=form, E8M0=scales.dtype == torch.uint8,
        FNUZ=fnuz, WHOLE=size % BLOCK == 0, BLOCK=BLOCK, TN=shape.rows, TK=shape.inputs, TT=tile,
        num_warps=shape.warps, num_stages=shape.stages,
    )  # fmt: skip
    if split:
        count = out.numel()
        _add_wo_a[(-(-count // 1024),)](parts, out, count, CHUNKS=chunks, BLOCK=1024, num_warps=4)
    return out


def einsum(attended: Tensor, weight: Weight, positions: Tensor, inv_freq: Tensor) -> Tensor:
    """The op `wo_a` (ops/linear.py): products of the model's dtype."""
    tokens, dtype = attended.shape[0], attended.dtype
    if not tokens:
        return torch.empty(0, weight.shape[0], dtype=dtype, device=attended.device)
    turned = run_rotate(attended, positions, inv_freq, True, None, here=True)
    x = turned.view(tokens, -1, weight.shape[1])
    if isinstance(weight, QuantTensor) and _is_fp8(weight) and tokens <= FEW_TOKENS:
        return _product(weight.codes, weight.scale, x, x, DECODED.value, dtype, False)
    w = _dense(weight, dtype)
    return _product(w, w, x, x, PLAIN.value, dtype, False)


def fp8_batched(
    attended: Tensor, weight: Weight, positions: Tensor, inv_freq: Tensor, fnuz: bool = False
) -> Tensor:
    """`wo_a` with FP8 activations, one launch for all groups."""
    tokens, size = attended.shape[0], weight.shape[1]
    if not isinstance(weight, QuantTensor) or not _is_fp8(weight) or size % BLOCK or not tokens:
        return einsum(attended, weight, positions, inv_freq)
    turned = run_rotate(attended, positions, inv_freq, True, None, here=True)
    codes, scale = quantize_activations(turned.flatten(1), fnuz)
    x = as_fp8(codes, fnuz).view(tokens, -1, size)
    w = as_fp8(weight.codes, fnuz)
    return _product(w, weight.scale, x, scale, FP8.value, attended.dtype, fnuz)


def fp8_loop(
    attended: Tensor, weight: Weight, positions: Tensor, inv_freq: Tensor, fnuz: bool = False
) -> Tensor:
    """`wo_a` with FP8 activations, one linear layer a group."""
    tokens, heads, dim = attended.shape
    rows, size = weight.shape
    rank = rows * size // (heads * dim)
    if not isinstance(weight, QuantTensor) or not _is_fp8(weight) or rank % BLOCK:
        return einsum(attended, weight, positions, inv_freq)
    turned = run_rotate(attended, positions, inv_freq, True, None, here=True).view(tokens, -1, size)
    out = torch.empty(tokens, rows, dtype=attended.dtype, device=attended.device)
    blocks = rank // BLOCK
    for group in range(rows // rank):
        part = replace(
            weight,
            codes=weight.codes[group * rank : (group + 1) * rank],
            scale=weight.scale[group * blocks : (group + 1) * blocks],
            shape=(rank, size),
            quantize_activations=True,
        )
        own = linear(turned[:, group], part, fnuz=fnuz)
        out[:, group * rank : (group + 1) * rank] = own
    return out


_OCP = frozenset({Feature.TRITON, Feature.FP8_OCP})
_FNUZ = frozenset({Feature.TRITON, Feature.FP8_FNUZ})
# Never chosen by themselves: they are behind "einsum", which needs less.
KERNELS = (
    Kernel("wo_a", "einsum", einsum, frozenset({Feature.TRITON}), priority=10),
    Kernel("wo_a", "fp8_batched", fp8_batched, _OCP, priority=2),
    Kernel("wo_a", "fp8_loop", fp8_loop, _OCP, priority=1),
    Kernel("wo_a", "fp8_batched_fnuz", partial(fp8_batched, fnuz=True), _FNUZ, priority=2),
    Kernel("wo_a", "fp8_loop_fnuz", partial(fp8_loop, fnuz=True), _FNUZ, priority=1),
)

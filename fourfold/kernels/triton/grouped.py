"""Inverse rotary and the block-diagonal output projection for GPUs, in three forms.

    triton        the definition: products of the model's dtype. FP8 weights are read as they are stored
                  and become numbers of the model's dtype in registers; for many tokens once, in memory
    fp8_batched   activations rounded to FP8 per 128 behind the rotary, one FP8 launch over all groups
    fp8_groups    the same rounding, one FP8 linear layer a group

The two FP8 forms round what the definition does not and are for `--kernel grouped_output=NAME`; weights
that are not FP8 blocks take the definition's way in them too.

As in linear.py the weight is the left operand in tiles of 128 rows, K is cut into chunks by the shape
alone and chunks are added in order: a token's result does not depend on the batch. Only the rotary dims
are turned beforehand, into a buffer of their own; the product takes those inputs from there.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from fourfold.core.device import Feature
from fourfold.core.tensor import QuantTensor, Weight, dense
from fourfold.kernels.triton.linear import linear, quantize_activations
from fourfold.kernels.triton.rope import EXACT, run_rotate, turn
from fourfold.ops.registry import Kernel

ROWS = 128  # weight rows a tile
PROGRAMS = 264  # chunks × row tiles wanted for one pass over the weight
SPLIT_TOKENS = 64  # up to here every chunk has programs of its own and FP8 weights stay FP8
SCALE_BLOCK = 128  # rows and inputs of an FP8 weight that share a scale


@triton.jit
def _turn_rotary(
    x, positions, inv_freq, out, COUNT, DIM, half, HEADS: tl.constexpr, HALF: tl.constexpr
):
    """out [T, H, 2·half] = the last dims of each head, turned back."""
    token = tl.program_id(0).to(tl.int64)
    head = token * COUNT + tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    live = (tl.program_id(1) * HEADS + tl.arange(0, HEADS) < COUNT)[:, None]
    r = tl.arange(0, 2 * HALF)[None, :]
    mask = live & (r < 2 * half)
    part = tl.load(x + head[:, None] * DIM + (DIM - 2 * half) + r, mask=mask, other=0.0)
    turned = turn(part.to(tl.float32), tl.load(positions + token), inv_freq, half, HALF, True)
    tl.store(out + head[:, None] * 2 * half + r, turned.to(x.dtype.element_ty), mask=mask)


@triton.jit
def _decode_fp8(codes):
    """The float32 numbers of E4M3 codes: their seven bits are the top of a float32 of 2^−120 the size."""
    wide = codes.to(tl.int32)
    bits = ((wide & 0x80) << 24) | ((wide & 0x7F) << 20)
    return bits.to(tl.float32, bitcast=True) * 1.329227995784916e36


@triton.jit
def _scale(scales, index, mask, E8M0: tl.constexpr):
    if E8M0:
        raw = tl.load(scales + index, mask=mask, other=127).to(tl.int32)
        value = tl.where(raw == 0, 0x00400000, raw << 23).to(tl.float32, bitcast=True)
    else:
        value = tl.load(scales + index, mask=mask, other=1.0)
    return value


@triton.jit
def _activations(x, rotary, t, live, group, k, block, HEADS, K, DIM, half, ALIGNED: tl.constexpr,
                 TK: tl.constexpr):  # fmt: skip
    """Inputs k of a group, [TK, TT]: rotary ones from their own buffer, the others from `x`.

    ALIGNED: a block of inputs is all rotary or not at all.
    """
    mask = live[None, :] & (k < K)[:, None]
    n = DIM - 2 * half
    per_group = K // DIM
    if ALIGNED:
        first = block * TK % DIM
        head = group * per_group + block * TK // DIM
        turns = first >= n
        source = tl.where(turns, rotary, x)
        stride = tl.where(turns, HEADS * 2 * half, HEADS * DIM)
        begin = tl.where(turns, head * 2 * half + first - n, head * DIM + first)
        place = t[None, :] * stride + (begin + tl.arange(0, TK))[:, None]
        value = tl.load(source + place, mask=mask, other=0.0)
    else:
        d = k % DIM
        head = group * per_group + k // DIM
        turns = (d >= n)[:, None]
        place = t[None, :] * (HEADS * DIM) + (head * DIM + d)[:, None]
        value = tl.load(x + place, mask=mask & (d < n)[:, None], other=0.0)
        place = t[None, :] * (HEADS * 2 * half) + (head * 2 * half + d - n)[:, None]
        value = tl.where(turns, tl.load(rotary + place, mask=mask & turns, other=0.0), value)
    return value


@triton.jit
def _grouped(
    w,
    scales,
    x,
    rotary,
    out,
    T,
    N,
    R,
    K,
    DIM,
    half,
    BLOCKS,
    SCALES,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
    SPLIT: tl.constexpr,
    FP8: tl.constexpr,
    E8M0: tl.constexpr,
    ALIGNED: tl.constexpr,
    SCALE: tl.constexpr,
    TN: tl.constexpr,
    TK: tl.constexpr,
    TT: tl.constexpr,
):
    """A [TN rows of one group, TT tokens] tile of outᵀ; with SPLIT of one chunk [CHUNKS, T, N]."""
    tiles = tl.cdiv(R, TN)
    group = tl.program_id(0) // tiles
    row = (tl.program_id(0) % tiles) * TN + tl.arange(0, TN)
    n = group * R + row
    t = tl.program_id(1).to(tl.int64) * TT + tl.arange(0, TT)
    live = t < T
    total = tl.zeros((TN, TT), dtype=tl.float32)
    first = tl.program_id(2) if SPLIT else 0
    last = first + 1 if SPLIT else CHUNKS
    heads = N // R * (K // DIM)
    for chunk in range(first, last):
        acc = tl.zeros((TN, TT), dtype=tl.float32)
        for block in range(chunk * CHUNK, tl.minimum((chunk + 1) * CHUNK, BLOCKS)):
            k = block * TK + tl.arange(0, TK)
            inside = (row < R)[:, None] & (k < K)[None, :]
            a = tl.load(w + n.to(tl.int64)[:, None] * K + k[None, :], mask=inside, other=0)
            if FP8:
                index = n // SCALE * SCALES + block * TK // SCALE
                a = _decode_fp8(a) * _scale(scales, index, row < R, E8M0)[:, None]
                a = a.to(x.dtype.element_ty)
            b = _activations(x, rotary, t, live, group, k, block, heads, K, DIM, half, ALIGNED, TK)
            acc = tl.dot(a, b, acc, input_precision="ieee")
        total += acc
    place = t[None, :] * N + n[:, None]
    if SPLIT:
        place += tl.program_id(2).to(tl.int64) * T * N
    kept = (row < R)[:, None] & live[None, :]
    tl.store(out + place, total.to(out.dtype.element_ty), mask=kept)


@triton.jit
def _grouped_fp8(
    w,
    scales,
    codes,
    x_scale,
    out,
    T,
    N,
    R,
    K,
    BLOCKS,
    SCALES,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
    SPLIT: tl.constexpr,
    E8M0: tl.constexpr,
    FNUZ: tl.constexpr,
    TN: tl.constexpr,
    TK: tl.constexpr,
    TT: tl.constexpr,
):
    """As `_grouped`, of FP8 activations `codes [T, groups · K]` with a scale for each 128 of them."""
    tiles = tl.cdiv(R, TN)
    group = tl.program_id(0) // tiles
    row = (tl.program_id(0) % tiles) * TN + tl.arange(0, TN)
    n = group * R + row
    t = tl.program_id(1).to(tl.int64) * TT + tl.arange(0, TT)
    live = t < T
    width = N // R * K
    total = tl.zeros((TN, TT), dtype=tl.float32)
    first = tl.program_id(2) if SPLIT else 0
    last = first + 1 if SPLIT else CHUNKS
    for chunk in range(first, last):
        acc = tl.zeros((TN, TT), dtype=tl.float32)
        for block in range(chunk * CHUNK, tl.minimum((chunk + 1) * CHUNK, BLOCKS)):
            k = block * TK + tl.arange(0, TK)
            inside = (row < R)[:, None] & (k < K)[None, :]
            a = tl.load(w + n.to(tl.int64)[:, None] * K + k[None, :], mask=inside, other=0)
            place = t[None, :] * width + (group * K + k)[:, None]
            b = tl.load(codes + place, mask=live[None, :] & (k < K)[:, None], other=0)
            if FNUZ:
                product = tl.dot(
                    a.to(tl.float8e4b8, bitcast=True), b.to(tl.float8e4b8, bitcast=True)
                )
                product *= 4.0
            else:
                product = tl.dot(
                    a.to(tl.float8e4nv, bitcast=True), b.to(tl.float8e4nv, bitcast=True)
                )
            s_w = _scale(scales, n // TK * SCALES + block, row < R, E8M0)
            s_x = tl.load(
                x_scale + t * (width // TK) + group * BLOCKS + block, mask=live, other=0.0
            )
            acc += product * s_w[:, None] * s_x[None, :]
        total += acc
    place = t[None, :] * N + n[:, None]
    if SPLIT:
        place += tl.program_id(2).to(tl.int64) * T * N
    kept = (row < R)[:, None] & live[None, :]
    tl.store(out + place, total.to(out.dtype.element_ty), mask=kept)


@triton.jit
def _add(parts, out, COUNT, CHUNKS: tl.constexpr, BLOCK: tl.constexpr):
    """`out[i] = parts[0, i] + parts[1, i] + …` in that order."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for chunk in tl.static_range(CHUNKS):
        total += tl.load(parts + chunk * COUNT + i, mask=i < COUNT, other=0.0)
    tl.store(out + i, total.to(out.dtype.element_ty), mask=i < COUNT)


def chunking(tiles: int, blocks: int) -> tuple[int, int]:
    """(blocks of inputs a chunk, chunks) for a weight of `tiles` row tiles: of its shape alone."""
    wanted = min(max(PROGRAMS // tiles, 1), blocks)
    size = -(-blocks // wanted)
    return size, -(-blocks // size)


def launch_options(tile: int, wide: bool) -> dict[str, int]:
    """Warps and pipeline stages for a token tile; two stages fit 64 KiB of shared memory."""
    return {"num_warps": 8 if tile > 64 else 4, "num_stages": 2 if tile > 64 or wide else 3}


def _is_fp8(weight: Weight) -> bool:
    return isinstance(weight, QuantTensor) and weight.scheme.name == "fp8_block"


def _turned_rotary(attended: Tensor, positions: Tensor, inv_freq: Tensor) -> Tensor:
    tokens, heads, dim = attended.shape
    half = inv_freq.shape[0]
    out = torch.empty(tokens, heads, 2 * half, dtype=attended.dtype, device=attended.device)
    block = min(16, triton.next_power_of_2(heads))
    _turn_rotary[(tokens, -(-heads // block))](
        attended, positions, inv_freq, out, heads, dim, half,
        HEADS=block, HALF=triton.next_power_of_2(half), num_warps=4, **EXACT,
    )  # fmt: skip
    return out


def _finish(parts: Tensor, out: Tensor, chunks: int) -> Tensor:
    if parts is not out:
        count = out.numel()
        _add[(-(-count // 1024),)](parts, out, count, CHUNKS=chunks, BLOCK=1024, num_warps=4)
    return out


def grouped_output(attended: Tensor, weight: Weight, positions: Tensor, inv_freq: Tensor) -> Tensor:
    """The op `grouped_output` (ops/linear.py): products of the model's dtype."""
    attended = attended.contiguous()
    tokens, heads, dim = attended.shape
    rows, size = weight.shape
    rank = rows * size // (heads * dim)
    out = torch.empty(tokens, rows, dtype=attended.dtype, device=attended.device)
    if not tokens:
        return out
    fp8 = _is_fp8(weight) and tokens <= SPLIT_TOKENS
    plain = weight.codes if fp8 else dense(weight, attended.dtype)
    wide = attended.dtype == torch.float32
    block = 32 if wide else 64
    blocks = -(-size // block)
    tiles = rows // rank * -(-rank // ROWS)
    chunk, chunks = chunking(tiles, blocks)
    split = tokens <= SPLIT_TOKENS and chunks > 1
    parts = out
    if split:
        parts = torch.empty(chunks, tokens, rows, dtype=torch.float32, device=out.device)
    tile = min(max(triton.next_power_of_2(tokens), 16), 128)
    half = inv_freq.shape[0]
    _grouped[(tiles, -(-tokens // tile), chunks if split else 1)](
        plain, weight.scale if fp8 else plain, attended,
        _turned_rotary(attended, positions, inv_freq), parts, tokens, rows, rank, size, dim, half,
        blocks, -(-size // SCALE_BLOCK), CHUNK=chunk, CHUNKS=chunks, SPLIT=split, FP8=fp8,
        E8M0=fp8 and weight.scale.dtype == torch.uint8, SCALE=SCALE_BLOCK,
        ALIGNED=dim % block == 0 and 2 * half % block == 0,
        TN=ROWS, TK=block, TT=tile, **launch_options(tile, wide),
    )  # fmt: skip
    return _finish(parts, out, chunks)


def fp8_batched(
    attended: Tensor, weight: Weight, positions: Tensor, inv_freq: Tensor, fnuz: bool = False
) -> Tensor:
    """`grouped_output` with FP8 activations, one launch for all groups."""
    tokens, heads, dim = attended.shape
    rows, size = weight.shape
    if not _is_fp8(weight) or size % SCALE_BLOCK or not tokens:
        return grouped_output(attended, weight, positions, inv_freq)
    turned = run_rotate(attended, positions, inv_freq, True, None)
    codes, scale = quantize_activations(turned.flatten(1), fnuz)
    rank = rows * size // (heads * dim)
    out = torch.empty(tokens, rows, dtype=attended.dtype, device=attended.device)
    blocks = size // SCALE_BLOCK
    tiles = rows // rank * -(-rank // ROWS)
    chunk, chunks = chunking(tiles, blocks)
    split = tokens <= SPLIT_TOKENS and chunks > 1
    parts = out
    if split:
        parts = torch.empty(chunks, tokens, rows, dtype=torch.float32, device=out.device)
    tile = min(max(triton.next_power_of_2(tokens), 16), 64)
    _grouped_fp8[(tiles, -(-tokens // tile), chunks if split else 1)](
        weight.codes, weight.scale, codes, scale, parts, tokens, rows, rank, size, blocks, blocks,
        CHUNK=chunk, CHUNKS=chunks, SPLIT=split, E8M0=weight.scale.dtype == torch.uint8,
        FNUZ=fnuz, TN=ROWS, TK=SCALE_BLOCK, TT=tile, **launch_options(tile, wide=False),
    )  # fmt: skip
    return _finish(parts, out, chunks)


def fp8_groups(
    attended: Tensor, weight: Weight, positions: Tensor, inv_freq: Tensor, fnuz: bool = False
) -> Tensor:
    """`grouped_output` with FP8 activations, one linear layer a group."""
    tokens, heads, dim = attended.shape
    rows, size = weight.shape
    rank = rows * size // (heads * dim)
    if not _is_fp8(weight) or rank % SCALE_BLOCK:
        return grouped_output(attended, weight, positions, inv_freq)
    turned = run_rotate(attended, positions, inv_freq, True, None).view(tokens, -1, size)
    out = torch.empty(tokens, rows, dtype=attended.dtype, device=attended.device)
    blocks = rank // SCALE_BLOCK
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
# Never chosen by themselves: they are behind "triton", which needs less.
KERNELS = (
    Kernel("grouped_output", "triton", grouped_output, frozenset({Feature.TRITON}), priority=10),
    Kernel("grouped_output", "fp8_batched", fp8_batched, _OCP, priority=2),
    Kernel("grouped_output", "fp8_groups", fp8_groups, _OCP, priority=1),
    Kernel(
        "grouped_output", "fp8_batched_fnuz", partial(fp8_batched, fnuz=True), _FNUZ, priority=2
    ),
    Kernel("grouped_output", "fp8_groups_fnuz", partial(fp8_groups, fnuz=True), _FNUZ, priority=1),
)

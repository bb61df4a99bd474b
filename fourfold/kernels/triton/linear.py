"""Linear layers for GPUs: FP8 blocks and plain weights, one form for every batch size.

    outᵀ [N, T] = W [N, K] · xᵀ [K, T]        the weight is the left operand, tokens are columns

K is cut into chunks by the shape (N, K) alone. A chunk is summed 128 inputs after 128 inputs, chunks are
added in order, whether one program walks through all of them (many tokens) or each chunk has a program
of its own and a second kernel adds them (few tokens, where the weight must be read by many programs at
once). The left operand's tile is always 128 rows, so a token's result does not depend on the batch.

FP8: codes go to the matrix unit as they are; after each 128 inputs the product is multiplied by the
token's and the block's scale (powers of two in the released checkpoints) and added in float32, which
also restarts the unit's narrow accumulator.
"""

from __future__ import annotations

from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from fourfold.core.device import Feature
from fourfold.core.tensor import QuantTensor, Weight
from fourfold.ops.linear import round_activations
from fourfold.ops.registry import Kernel

BLOCK_N = 128
BLOCK_K = 128
PROGRAMS = 264  # chunks × row tiles wanted for one pass over a weight: two for each multiprocessor
SPLIT_TOKENS = 64  # up to here every chunk has programs of its own


@triton.jit
def _quantize_activations(x, codes, scale, K, GROUPS, FNUZ: tl.constexpr, GROUP: tl.constexpr):
    """One program a (token, group): codes = x / 2^e as E4M3, scale = 2^e.

    e is the smallest integer with max(amax, 1e-4) ≤ 448·2^e, from the bits of amax.
    """
    token, group = tl.program_id(0), tl.program_id(1)
    offset = group * GROUP + tl.arange(0, GROUP)
    inside = offset < K
    values = tl.load(x + token.to(tl.int64) * K + offset, mask=inside, other=0.0).to(tl.float32)
    amax = tl.maximum(tl.max(tl.where(values == values, tl.abs(values), 0.0)), 1e-4)
    bits = tl.minimum(amax, 3.0e38).to(tl.int32, bitcast=True)
    exponent = ((bits >> 23) & 0xFF) - 127 - 8 + ((bits & 0x7FFFFF) > 0x600000).to(tl.int32)
    inverse = ((127 - exponent) << 23).to(tl.float32, bitcast=True)
    scaled = tl.minimum(tl.maximum(values * inverse, -448.0), 448.0)
    scaled = tl.where(values == values, scaled, 0.0)
    if FNUZ:
        raw = (scaled * 0.5).to(tl.float8e4b8).to(tl.uint8, bitcast=True)
    else:
        raw = scaled.to(tl.float8e4nv).to(tl.uint8, bitcast=True)
    raw = tl.where(raw == 0x80, 0, raw).to(tl.uint8)
    tl.store(codes + token.to(tl.int64) * K + offset, raw, mask=inside)
    tl.store(scale + token * GROUPS + group, ((exponent + 127) << 23).to(tl.float32, bitcast=True))


@triton.jit
def _block_scale(scales, index, E8M0: tl.constexpr):
    if E8M0:
        raw = tl.load(scales + index).to(tl.int32)
        value = tl.where(raw == 0, 0x00400000, raw << 23).to(tl.float32, bitcast=True)
    else:
        value = tl.load(scales + index)
    return value


@triton.jit
def _fp8_linear(
    w,
    w_scale,
    x,
    x_scale,
    out,
    T,
    N,
    K,
    BLOCKS,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
    SPLIT: tl.constexpr,
    E8M0: tl.constexpr,
    FNUZ: tl.constexpr,
    TN: tl.constexpr,
    TK: tl.constexpr,
    TT: tl.constexpr,
):
    """A [TN rows, TT tokens] tile of outᵀ; with SPLIT of one chunk's partial sums [CHUNKS, T, N]."""
    tile_n, tile_t = tl.program_id(0), tl.program_id(1)
    n = tile_n * TN + tl.arange(0, TN)
    t = tile_t * TT + tl.arange(0, TT)
    k = tl.arange(0, TK)
    total = tl.zeros((TN, TT), dtype=tl.float32)
    first = tl.program_id(2) if SPLIT else 0
    last = first + 1 if SPLIT else CHUNKS
    for chunk in range(first, last):
        acc = tl.zeros((TN, TT), dtype=tl.float32)
        for block in range(chunk * CHUNK, tl.minimum((chunk + 1) * CHUNK, BLOCKS)):
            kk = block * TK + k
            inside = kk < K
            a = tl.load(
                w + n.to(tl.int64)[:, None] * K + kk[None, :],
                mask=(n < N)[:, None] & inside[None, :],
                other=0,
            )
            b = tl.load(
                x + t.to(tl.int64)[None, :] * K + kk[:, None],
                mask=(t < T)[None, :] & inside[:, None],
                other=0,
            )
            if FNUZ:
                product = tl.dot(
                    a.to(tl.float8e4b8, bitcast=True), b.to(tl.float8e4b8, bitcast=True)
                )
                product *= 4.0
            else:
                product = tl.dot(
                    a.to(tl.float8e4nv, bitcast=True), b.to(tl.float8e4nv, bitcast=True)
                )
            s_w = _block_scale(w_scale, tile_n * BLOCKS + block, E8M0)
            s_x = tl.load(x_scale + t * BLOCKS + block, mask=t < T, other=0.0)
            acc += product * (s_w * s_x)[None, :]
        total += acc
    place = t.to(tl.int64)[None, :] * N + n[:, None]
    if SPLIT:
        place += tl.program_id(2).to(tl.int64) * T * N
    tl.store(out + place, total.to(out.dtype.element_ty), mask=(n < N)[:, None] & (t < T)[None, :])


@triton.jit
def _plain_linear(
    w,
    x,
    out,
    T,
    N,
    K,
    BLOCKS,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
    SPLIT: tl.constexpr,
    TN: tl.constexpr,
    TK: tl.constexpr,
    TT: tl.constexpr,
):
    """As `_fp8_linear`, for operands of one plain dtype."""
    n = tl.program_id(0) * TN + tl.arange(0, TN)
    t = tl.program_id(1) * TT + tl.arange(0, TT)
    k = tl.arange(0, TK)
    total = tl.zeros((TN, TT), dtype=tl.float32)
    first = tl.program_id(2) if SPLIT else 0
    last = first + 1 if SPLIT else CHUNKS
    for chunk in range(first, last):
        acc = tl.zeros((TN, TT), dtype=tl.float32)
        for block in range(chunk * CHUNK, tl.minimum((chunk + 1) * CHUNK, BLOCKS)):
            kk = block * TK + k
            inside = kk < K
            a = tl.load(
                w + n.to(tl.int64)[:, None] * K + kk[None, :],
                mask=(n < N)[:, None] & inside[None, :],
                other=0.0,
            )
            b = tl.load(
                x + t.to(tl.int64)[None, :] * K + kk[:, None],
                mask=(t < T)[None, :] & inside[:, None],
                other=0.0,
            )
            acc = tl.dot(a, b, acc, input_precision="ieee")
        total += acc
    place = t.to(tl.int64)[None, :] * N + n[:, None]
    if SPLIT:
        place += tl.program_id(2).to(tl.int64) * T * N
    tl.store(out + place, total.to(out.dtype.element_ty), mask=(n < N)[:, None] & (t < T)[None, :])


@triton.jit
def _add_chunks(parts, out, COUNT, CHUNKS: tl.constexpr, BLOCK: tl.constexpr):
    """`out[i] = parts[0, i] + parts[1, i] + …` in that order."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for chunk in range(CHUNKS):
        total += tl.load(parts + chunk * COUNT + i, mask=i < COUNT, other=0.0)
    tl.store(out + i, total.to(out.dtype.element_ty), mask=i < COUNT)


def chunking(rows: int, blocks: int) -> tuple[int, int]:
    """(blocks of 128 inputs a chunk, chunks) for a weight of `rows` outputs: of its shape alone."""
    tiles = -(-rows // BLOCK_N)
    wanted = min(max(PROGRAMS // tiles, 1), blocks)
    size = -(-blocks // wanted)
    return size, -(-blocks // size)


def _is_fp8(weight: QuantTensor) -> bool:
    """Whether `_fp8_linear` computes what the weight asks for."""
    return weight.scheme.name == "fp8_block" and weight.quantize_activations


def launch_options(tile: int, wide: bool) -> dict[str, int]:
    """Warps and pipeline stages for a token tile; two stages fit 64 KiB of shared memory."""
    return {"num_warps": 8 if tile > 64 else 4, "num_stages": 2 if tile > 64 or wide else 3}


def plain_block(wide: bool) -> int:
    """Inputs of a plain weight taken at once: 32 in float32 (`wide`), 64 in bfloat16."""
    return 32 if wide else 64


def _token_tile(tokens: int) -> int:
    return min(max(triton.next_power_of_2(tokens), 16), 128)


def quantize_activations(x: Tensor, fnuz: bool = False) -> tuple[Tensor, Tensor]:
    """Codes uint8 `[T, K]` and scales float32 `[T, ceil(K/128)]` (powers of two) of x `[T, K]`."""
    tokens, size = x.shape
    groups = -(-size // BLOCK_K)
    codes = torch.empty(tokens, size, dtype=torch.uint8, device=x.device)
    scale = torch.empty(tokens, groups, dtype=torch.float32, device=x.device)
    if tokens:
        _quantize_activations[(tokens, groups)](
            x, codes, scale, size, groups, FNUZ=fnuz, GROUP=BLOCK_K, num_warps=1
        )
    return codes, scale


def linear(x: Tensor, weight: Weight, unrounded: bool = False, fnuz: bool = False) -> Tensor:
    """The op `linear` (ops/linear.py) for contiguous weights of FP8 blocks, bfloat16 or float32."""
    out_dtype = torch.float32 if unrounded else x.dtype
    if isinstance(weight, QuantTensor) and not _is_fp8(weight):
        # No released checkpoint has such a linear layer: exact, and slow.
        x = round_activations(x, weight)
        weight = weight.dequantize(torch.float32)
    x = x.contiguous()
    tokens, size = x.shape
    rows = weight.shape[0]
    out = torch.empty(tokens, rows, dtype=out_dtype, device=x.device)
    if not tokens:
        return out
    wide = x.dtype == torch.float32
    block = BLOCK_K if isinstance(weight, QuantTensor) else plain_block(wide)
    blocks = -(-size // block)
    chunk, chunks = chunking(rows, blocks)
    split = tokens <= SPLIT_TOKENS and chunks > 1
    target = (
        torch.empty(chunks, tokens, rows, dtype=torch.float32, device=x.device) if split else out
    )
    tile = _token_tile(tokens)
    grid = (-(-rows // BLOCK_N), -(-tokens // tile), chunks if split else 1)
    shape = {"CHUNK": chunk, "CHUNKS": chunks, "SPLIT": split, "TN": BLOCK_N, "TT": tile}
    if isinstance(weight, QuantTensor):
        codes, scale = quantize_activations(x, fnuz)
        _fp8_linear[grid](
            weight.codes,
            weight.scale,
            codes,
            scale,
            target,
            tokens,
            rows,
            size,
            blocks,
            **shape,
            E8M0=weight.scale.dtype == torch.uint8,
            FNUZ=fnuz,
            TK=BLOCK_K,
            **launch_options(tile, wide=False),
        )
    else:
        _plain_linear[grid](
            weight,
            x,
            target,
            tokens,
            rows,
            size,
            blocks,
            **shape,
            TK=plain_block(wide),
            **launch_options(tile, wide),
        )
    if split:
        count = tokens * rows
        _add_chunks[(-(-count // 1024),)](target, out, count, CHUNKS=chunks, BLOCK=1024)
    return out


KERNELS = (
    Kernel("linear", "triton", linear, frozenset({Feature.TRITON, Feature.FP8_OCP})),
    Kernel(
        "linear",
        "triton_fnuz",
        partial(linear, fnuz=True),
        frozenset({Feature.TRITON, Feature.FP8_FNUZ}),
    ),
)

"""Linear layers on sm_90: the products of triton/linear.py with warp-group instructions.

Contract: bit for bit what triton/linear.py computes: products of 128 bytes of K, added in its order, for
any number of tokens. Copies to shared memory run ahead through the end of every chunk, where a compiler's
own pipeline empties; those of the weight start before the kernel ahead has ended.

Few tokens take projections.py's one launch. Measured on one H200 against the portable kernel, quantising
included: [1024, 4096] FP8 9.5 µs at 128 tokens (12.3); [4096, 8192] FP8 40 µs at 256 (57), 692 TFLOP/s at
8,192 (about 350); BF16 420 to 475 TFLOP/s; the output head 4.36 TB/s at 1 token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.experimental.gluon.language as gl
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from fourfold.core.device import Feature
from fourfold.core.tensor import QuantTensor, Weight
from fourfold.kernels.nvidia import projections
from fourfold.kernels.nvidia.overlap import after_previous
from fourfold.kernels.nvidia.projections import ROWS, WARPS, block_scale, copy_tokens
from fourfold.kernels.triton import linear as portable
from fourfold.kernels.triton.linear import Operands
from fourfold.kernels.triton.shared import shared_expert as portable_expert
from fourfold.ops.registry import Kernel

GROUP = 16  # blocks of rows that the programs of one wave share


@gluon.jit(do_not_specialize=["T", "N", "BLOCKS", "RANK"])
def _linear_tiles(
    w, w_scale, x, x_scale, out, T, N, BLOCKS, RANK,
    CHUNK: gl.constexpr, CHUNKS: gl.constexpr, SPLIT: gl.constexpr, FP8: gl.constexpr,
    E8M0: gl.constexpr, TN: gl.constexpr, TT: gl.constexpr, NW: gl.constexpr,
    STAGES: gl.constexpr, GROUP: gl.constexpr,
):  # fmt: skip
    """A [TN rows, TT tokens] tile of outᵀ; with SPLIT of one chunk's partial sums [CHUNKS, T, N].

    Neighbours in the grid share rows of the weight; each RANK of those see K inputs of their own. Plain
    products run one block behind their issue; FP8 products are waited for, since their scales are applied
    outside the unit.
    """
    TK: gl.constexpr = 128 if FP8 else 64
    AHEAD: gl.constexpr = STAGES - 1 if FP8 else STAGES - 2
    dtype: gl.constexpr = w.dtype.element_ty
    bits: gl.constexpr = 8 if FP8 else 16
    mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [NW, 1], [16, TT, 256 // bits])
    columns: gl.constexpr = gl.SliceLayout(0, mma)
    layout: gl.constexpr = gl.BlockedLayout([1, 128 // bits], [4, 8], [NW, 1], [1, 0])
    flat: gl.constexpr = gl.BlockedLayout([1], [32], [NW], [0])
    plain: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    shared: gl.constexpr = gl.NVMMASharedLayout(128, bits, 2)
    buf_w = gl.allocate_shared_memory(dtype, [STAGES, TN, TK], shared)
    buf_x = gl.allocate_shared_memory(dtype, [STAGES, TT, TK], shared)
    buf_s = gl.allocate_shared_memory(gl.float32, [STAGES, TT], plain)

    tiles_n, tiles_t = gl.cdiv(N, TN), gl.cdiv(T, TT)
    width = GROUP * tiles_t
    first = gl.program_id(0) // width * GROUP
    rows = gl.minimum(tiles_n - first, GROUP)
    tile_n = first + gl.program_id(0) % width % rows
    tile_t = gl.program_id(0) % width // rows
    begin, end = 0, CHUNKS
    if SPLIT:
        begin = gl.program_id(1)
        end = begin + 1
        out += begin.to(gl.int64) * T * N
    stop = gl.minimum(end * CHUNK, BLOCKS)
    K = BLOCKS * TK
    # Rows and tokens beyond the last are the last again; they are not stored.
    n = gl.minimum(tile_n * TN + gl.arange(0, TN, layout=gl.SliceLayout(1, layout)), N - 1)
    k = gl.arange(0, TK, layout=gl.SliceLayout(0, layout))
    w_ptr = gl.multiple_of(w + n.to(gl.int64)[:, None] * K + k[None, :], [1, 16])
    w_scale += (tile_n * TN // 128) * BLOCKS
    for s in gl.static_range(AHEAD):
        block = begin * CHUNK + s
        if block < stop:
            async_copy.async_copy_global_to_shared(buf_w.index(block % STAGES), w_ptr + block * TK)
    if FP8:
        s_w = block_scale(w_scale, begin * CHUNK, E8M0)
    T = after_previous(T)
    t = gl.minimum(tile_t * TT + gl.arange(0, TT, layout=gl.SliceLayout(1, layout)), T - 1)
    x += tile_n * TN // RANK * K
    x_ptr = gl.multiple_of(x + t.to(gl.int64)[:, None] * (N // RANK * K) + k[None, :], [1, 16])
    s_ptr = x_scale + gl.minimum(tile_t * TT + gl.arange(0, TT, layout=flat), T - 1)
    for s in gl.static_range(AHEAD):
        block = begin * CHUNK + s
        if block < stop:
            copy_tokens(x_ptr, s_ptr, buf_x, buf_s, block, T, TK, STAGES, FP8)
        async_copy.commit_group()
    zero = gl.zeros([TN, TT], gl.float32, layout=mma)
    total = gl.zeros([TN, TT], gl.float32, layout=mma)
    for chunk in range(begin, end):
        acc = gl.zeros([TN, TT], gl.float32, layout=mma)
        for block in range(chunk * CHUNK, gl.minimum((chunk + 1) * CHUNK, BLOCKS)):
            async_copy.wait_group(AHEAD - 1)
            fence_async_shared()
            gl.thread_barrier()
            a, b = buf_w.index(block % STAGES), buf_x.index(block % STAGES).permute((1, 0))
            if FP8:
                product = warpgroup_mma(a, b, zero, use_acc=False, is_async=True)
            else:
                product = warpgroup_mma(a, b, acc, is_async=True)
                acc = warpgroup_mma_wait(1, deps=(product,))
            ahead = block + AHEAD
            if ahead < stop:
                stage = ahead % STAGES
                async_copy.async_copy_global_to_shared(buf_w.index(stage), w_ptr + ahead * TK)
                copy_tokens(x_ptr, s_ptr, buf_x, buf_s, ahead, T, TK, STAGES, FP8)
            async_copy.commit_group()
            if FP8:
                scale = gl.expand_dims(buf_s.index(block % STAGES).load(columns) * s_w, 0)
                s_w = block_scale(w_scale, gl.minimum(block + 1, BLOCKS - 1), E8M0)
                acc = gl.fma(warpgroup_mma_wait(0, deps=(product,)), scale, acc)
        if not FP8:
            acc = warpgroup_mma_wait(0, deps=(acc,))
        if SPLIT or CHUNKS == 1:
            total = acc
        else:
            total += acc
    async_copy.wait_group(0)
    o_layout: gl.constexpr = gl.BlockedLayout([TN // 16, 1], [16, 2], [1, NW], [0, 1])
    value = gl.convert_layout(total.to(out.dtype.element_ty), o_layout)
    row = tile_n * TN + gl.arange(0, TN, layout=gl.SliceLayout(1, o_layout))
    token = tile_t * TT + gl.arange(0, TT, layout=gl.SliceLayout(0, o_layout))
    gl.store(
        out + token.to(gl.int64)[None, :] * N + row[:, None],
        value,
        mask=(row < N)[:, None] & (token < T)[None, :],
    )


@dataclass(frozen=True)
class Shape:
    """How products are cut: tokens a tile, and blocks that shared memory holds."""

    tokens: int
    stages: int


def tile_shape(tokens: int, fp8: bool) -> Shape:
    """The cut for a number of tokens."""
    if tokens <= 64:
        return Shape(max(triton.next_power_of_2(tokens), 8), 4 if fp8 else 6)
    return Shape(128, 3 if fp8 else 4)


def products(o: Operands, target: Tensor) -> bool:
    """Write `target` if these products take the operands; see `Operands`."""
    tokens, size = o.x.shape
    rows = o.w.shape[0]
    if size % o.block or o.x.dtype == torch.float32 or (o.w.data_ptr() | o.x.data_ptr()) % 16:
        return False
    shape = tile_shape(tokens, o.fp8)
    grid = (-(-rows // ROWS) * -(-tokens // shape.tokens), o.chunks if o.split else 1)
    _linear_tiles[grid](
        o.w, o.w_scale, o.x, o.x_scale, target, tokens, rows, size // o.block, rows,
        CHUNK=o.chunk, CHUNKS=o.chunks, SPLIT=o.split, FP8=o.fp8,
        E8M0=o.w_scale.dtype == torch.uint8, TN=ROWS, TT=shape.tokens, NW=WARPS,
        STAGES=shape.stages, GROUP=GROUP, num_warps=WARPS, launch_pdl=True,
    )  # fmt: skip
    return True


def plain_groups(
    x: Tensor, weight: Tensor, out: Tensor, groups: int, chunk: int, chunks: int
) -> None:
    """`out [T, N]` = BF16 `x [T, groups·K]` by groups of rows of `weight [N, K]`, for many tokens.

    Sums of `chunk` steps of 64 inputs, and of `chunks` of them in order.
    """
    (rows, size), tokens = weight.shape, x.shape[0]
    shape = tile_shape(tokens, False)
    _linear_tiles[(-(-rows // ROWS) * -(-tokens // shape.tokens), 1)](
        weight, weight, x, x, out, tokens, rows, size // 64, rows // groups,
        CHUNK=chunk, CHUNKS=chunks, SPLIT=False, FP8=False, E8M0=False, TN=ROWS, TT=shape.tokens,
        NW=WARPS, STAGES=shape.stages, GROUP=GROUP, num_warps=WARPS, launch_pdl=True,
    )  # fmt: skip


def linear(x: Tensor, weight: Weight, unrounded: bool = False) -> Tensor:
    """The op `linear` (ops/linear.py)."""
    if projections.fits(x, (weight,), (unrounded,)):
        return projections.linears(x, (weight,), (unrounded,))[0]
    return portable.linear(x, weight, unrounded, products=products)


def linears(
    ops: object, x: Tensor, weights: Sequence[Weight], unrounded: Sequence[bool]
) -> tuple[Tensor, ...]:
    """The op `linears` (ops/linear.py): few tokens in one launch."""
    if projections.fits(x, weights, unrounded):
        return projections.linears(x, weights, unrounded)
    return portable.linears(ops, x, weights, unrounded, products=products)


def norm_linears(
    ops: Any,
    x: Tensor,
    norm: Tensor,
    eps: float,
    weights: Sequence[Weight],
    unrounded: Sequence[bool],
) -> tuple[Tensor, ...]:
    """The op `norm_linears` (ops/linear.py)."""
    codes = [w for w in weights if isinstance(w, QuantTensor) and portable.is_fp8(w)]
    if len(codes) < len(weights) or x.dtype != torch.bfloat16 or x.shape[1] % 128 or not len(x):
        return linears(ops, ops.rms_norm(x, norm, eps), weights, unrounded)
    return projections.norm_linears(x, norm, eps, codes, unrounded, products)


def shared_expert(
    ops: Any, gate: Tensor, up: Tensor, w2: Weight, limit: float, dtype: torch.dtype
) -> Tensor:
    """The op `shared_expert` (ops/moe.py)."""
    if projections.fits_activation(gate, up, w2, dtype):
        return projections.shared_expert(gate, up, w2, limit)
    return portable_expert(ops, gate, up, w2, limit, dtype, products=products)


_NEEDS = frozenset({Feature.TRITON, Feature.FP8_OCP, Feature.WGMMA})
KERNELS = tuple(
    Kernel(op, "sm90", run, _NEEDS, priority=20)
    for op, run in (
        ("linear", linear),
        ("linears", linears),
        ("norm_linears", norm_linears),
        ("shared_expert", shared_expert),
    )
)

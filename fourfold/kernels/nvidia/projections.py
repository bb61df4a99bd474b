"""Several linear layers of one input in one launch on sm_90, for the few tokens of a decode step.

    x ─ round ─ codes, scales ─┬─ every chunk of every tile of every FP8 weight ──┐   one launch: the last
      └────────────────────────┴─ … of every plain weight ────────────────────────┴─ program of a tile to
                                                                                     arrive adds its chunks
Contract: bit for bit what triton/linear.py computes for each weight alone: chunks follow from a weight's
shape, and are added in their order, whoever adds them. Programs count their arrivals in memory that the
rounding launch ahead has set to zero: nothing outlives a call, and calls on other streams do not meet.

Copies of the weights start while the rounding launch still runs. Shared memory is cut so that all
programs are resident at once where that is possible.

Measured on one H200, both launches, cold weights, against a launch or three for each weight (µs at 1, 8 and
64 tokens): all products with a layer's input, with compressor and indexer 10.8, 11.3, 19.1 (39.9, 41.6,
48.2), with a compressor alone 7.8, 8.3, 14.0 (23.5, 24.1, 28.6), with neither 5.6, 6.0, 11.1 (12.2, 12.7,
16.4); router and shared expert 9.2, 9.4, 17.4 (19.8, 20.3, 28.0); wq_b with the indexer's 14.7, 14.1, 19.3
(21.1, 19.8, 26.8); wo_b 12.7, 12.9, 19.9 (14.5, 14.1, 18.8).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.experimental.gluon.language as gl
import triton.language as tl
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from fourfold.core.tensor import QuantTensor, Weight
from fourfold.kernels.nvidia.overlap import after_previous, begin_beside_previous
from fourfold.kernels.triton.linear import (
    BLOCK_K,
    MOST_CHUNKS,
    Products,
    as_fp8,
    chunking,
    finish,
    is_fp8,
    operands,
    plain_block,
    to_fp8,
)
from fourfold.kernels.triton.norm import row_warps
from fourfold.kernels.triton.rope import EXACT
from fourfold.kernels.triton.shared import activated

ROWS, WARPS = 64, 4  # of a tile
MOST_TOKENS = 64  # of a launch
MOST_WEIGHTS = 8
PROCESSORS, SHARED_MEMORY = 132, 227 * 1024  # of an H100 or H200, in bytes a processor
RESERVED = 1024  # bytes a program has besides


@triton.jit(do_not_specialize=["T"])
def _round_inputs(
    x, codes, scale, arrivals, T, K, COUNT, PLACES: tl.constexpr, GROUP: tl.constexpr
):  # fmt: skip
    """One group of one token, as `to_fp8` rounds it; the first program zeroes COUNT arrivals."""
    token = begin_beside_previous(tl.program_id(0))
    group = tl.program_id(1)
    offset = group * GROUP + tl.arange(0, GROUP)
    place = token.to(tl.int64) * K + offset
    values = tl.load(x + place).to(tl.float32)
    raw, factor = to_fp8(tl.reshape(values, (1, GROUP)), False)
    tl.store(codes + place, tl.reshape(raw, (GROUP,)))
    tl.store(scale + group * T + token + tl.arange(0, 1), factor)
    if token + group == 0:
        each = tl.arange(0, PLACES)
        tl.store(arrivals + each, 0, mask=each < COUNT)


@triton.jit(do_not_specialize=["T"])
def _norm_inputs(
    x, norm, codes, scale, arrivals, T, K, COUNT, eps, PLACES: tl.constexpr, GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """One token, normalised and rounded; the first program zeroes COUNT arrivals."""
    k = tl.arange(0, BLOCK)
    gain = tl.load(norm + k, mask=k < K, other=0.0).to(tl.float32)
    token = begin_beside_previous(tl.program_id(0))
    place = token.to(tl.int64) * K + k
    value = tl.load(x + place, mask=k < K, other=0.0).to(tl.float32)
    factor = tl.rsqrt(tl.sum(value * value) / K + eps)
    normed = (value * factor * gain).to(x.dtype.element_ty).to(tl.float32)
    raw, exponent = to_fp8(tl.reshape(normed, (BLOCK // GROUP, GROUP)), False)
    group = tl.arange(0, BLOCK // GROUP)
    tl.store(codes + place, tl.reshape(raw, (BLOCK,)), mask=k < K)
    tl.store(scale + group * T + token, exponent, mask=group * GROUP < K)
    if token == 0:
        each = tl.arange(0, PLACES)
        tl.store(arrivals + each, 0, mask=each < COUNT)


@triton.jit(do_not_specialize=["T"])
def _activate_inputs(
    gate, up, codes, scale, arrivals, T, K, COUNT, LIMIT, PLACES: tl.constexpr,
    GROUP: tl.constexpr,
):  # fmt: skip
    """One group of one token's activation, rounded; the first program zeroes COUNT arrivals."""
    token = begin_beside_previous(tl.program_id(0))
    group = tl.program_id(1)
    place = token.to(tl.int64) * K + group * GROUP + tl.arange(0, GROUP)
    values = activated(gate, up, place, place >= 0, LIMIT, True)
    raw, factor = to_fp8(tl.reshape(values, (1, GROUP)), False)
    tl.store(codes + place, tl.reshape(raw, (GROUP,)))
    tl.store(scale + group * T + token + tl.arange(0, 1), factor)
    if token + group == 0:
        each = tl.arange(0, PLACES)
        tl.store(arrivals + each, 0, mask=each < COUNT)


@gluon.jit
def copy_tokens(
    x, s_x, buf_x, buf_s, block, T, TK: gl.constexpr, STAGES: gl.constexpr, FP8: gl.constexpr
):
    """Start the copy of one block of inputs of each token, and of their scales."""
    async_copy.async_copy_global_to_shared(buf_x.index(block % STAGES), x + block * TK)
    if FP8:
        async_copy.async_copy_global_to_shared(buf_s.index(block % STAGES), s_x + block * T)


@gluon.jit
def block_scale(scales, index, E8M0: gl.constexpr):
    """The float32 scale of one block."""
    if E8M0:
        raw = gl.load(scales + index).to(gl.int32)
        value = gl.where(raw == 0, 0x00400000, raw << 23).to(gl.float32, bitcast=True)
    else:
        value = gl.load(scales + index)
    return value


@gluon.jit
def _chunk(
    w, w_scale, rows, x, x_scale, tile, begin, stop, BLOCKS, T,
    FP8: gl.constexpr, E8M0: gl.constexpr, TN: gl.constexpr, TT: gl.constexpr,
    NW: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Blocks `begin … stop` of one tile's sum, `[TN, TT]`. BLOCKS are those of a row."""
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
    # Rows and tokens beyond the last are the last again; they are not stored.
    n = gl.minimum(tile * TN + gl.arange(0, TN, layout=gl.SliceLayout(1, layout)), rows - 1)
    k = gl.arange(0, TK, layout=gl.SliceLayout(0, layout))
    K = BLOCKS * TK
    w_ptr = gl.multiple_of(w + (n.to(gl.int64)[:, None] * K + k[None, :]), [1, 16])
    w_scale += (tile * TN // 128) * BLOCKS
    for s in gl.static_range(AHEAD):
        block = begin + s
        if block < stop:
            async_copy.async_copy_global_to_shared(buf_w.index(block % STAGES), w_ptr + block * TK)
    if FP8:
        s_w = block_scale(w_scale, begin, E8M0)
    T = after_previous(T)
    t = gl.minimum(gl.arange(0, TT, layout=gl.SliceLayout(1, layout)), T - 1)
    x_ptr = gl.multiple_of(x + (t[:, None] * K + k[None, :]), [1, 16])
    s_ptr = x_scale + gl.minimum(gl.arange(0, TT, layout=flat), T - 1)
    for s in gl.static_range(AHEAD):
        block = begin + s
        if block < stop:
            copy_tokens(x_ptr, s_ptr, buf_x, buf_s, block, T, TK, STAGES, FP8)
        async_copy.commit_group()
    zero = gl.zeros([TN, TT], gl.float32, layout=mma)
    acc = gl.zeros([TN, TT], gl.float32, layout=mma)
    for block in range(begin, stop):
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
    async_copy.wait_group(0)
    return acc


@gluon.jit
def finish_tile(
    acc, out, parts, arrival, rows, tile, chunk, chunks, T, size,
    TN: gl.constexpr, TT: gl.constexpr, NW: gl.constexpr, MOST: gl.constexpr,
):  # fmt: skip
    """Store a tile that is one chunk; of several, a part, and the sum if it is the last to arrive.

    `out [T, rows]`; `parts` are `size` numbers apart.
    """
    layout: gl.constexpr = gl.BlockedLayout([TN // 16, 1], [16, 2], [1, NW], [0, 1])
    row = tile * TN + gl.arange(0, TN, layout=gl.SliceLayout(1, layout))
    token = gl.arange(0, TT, layout=gl.SliceLayout(0, layout))
    place = token[None, :] * rows + row[:, None]
    kept = (row < rows)[:, None] & (token < T)[None, :]
    value = gl.convert_layout(acc, layout)
    if chunks == 1:
        gl.store(out + place, value.to(out.dtype.element_ty), mask=kept)
    else:
        gl.store(parts + (chunk * size + place), value, mask=kept)
        gl.thread_barrier()
        before = gl.atomic_add(arrival, 1, sem="acq_rel", scope="gpu")
        if before == chunks - 1:
            total = gl.zeros([TN, TT], gl.float32, layout=layout)
            for each in gl.static_range(MOST):
                # What the cache of this processor holds of others' parts is older than them.
                total += gl.load(
                    parts + (each * size + place), mask=kept & (each < chunks), other=0.0,
                    cache_modifier=".cg",
                )  # fmt: skip
            gl.store(out + place, total.to(out.dtype.element_ty), mask=kept)


@gluon.jit(do_not_specialize=["T", "BLOCKS"])
def _projections(
    codes, scales, code_rows, code_chunk, plains, plain_rows, plain_chunk,
    x_codes, x_scale, x, out_codes, out_plain, parts, arrivals, T, BLOCKS,
    CODES: gl.constexpr, PLAINS: gl.constexpr, E8M0: gl.constexpr, TN: gl.constexpr,
    TT: gl.constexpr, NW: gl.constexpr, STAGES: gl.constexpr, MOST: gl.constexpr,
):  # fmt: skip
    """Program p is one chunk of one tile of one weight: the plain ones first, then those of codes.

    A chunk is `*_chunk` steps of 128 bytes of K. Outputs of a kind stand behind each other, weight by
    weight `[T, rows]`, and so do all parts `[chunks, T, rows]` and arrivals, one a tile.
    """
    program = gl.program_id(0)
    first, tiles_before = 0, 0
    local, chunk, rows, arrival = 0, 0, 0, 0
    parts_before = gl.to_tensor(0)
    parts_at, out_at = gl.to_tensor(0), gl.to_tensor(0)
    if PLAINS > 0:
        w = plains[0]
        out_before = gl.to_tensor(0)
        for j in gl.static_range(PLAINS):
            tiles, count = gl.cdiv(plain_rows[j], TN), gl.cdiv(BLOCKS * 2, plain_chunk[j])
            if program >= first:
                w, rows, chunk = plains[j], plain_rows[j], plain_chunk[j]
                local, arrival = program - first, tiles_before
                out_at, parts_at = out_before, parts_before
            first += tiles * count
            tiles_before += tiles
            out_before += T * plain_rows[j]
            parts_before += T * plain_rows[j] * count
    plain_programs = first
    c, s = codes[0], scales[0]
    out_before = gl.to_tensor(0)
    for j in gl.static_range(CODES):
        tiles, count = gl.cdiv(code_rows[j], TN), gl.cdiv(BLOCKS, code_chunk[j])
        if program >= first:
            c, s, rows, chunk = codes[j], scales[j], code_rows[j], code_chunk[j]
            local, arrival = program - first, tiles_before
            out_at, parts_at = out_before, parts_before
        first += tiles * count
        tiles_before += tiles
        out_before += T * code_rows[j]
        parts_before += T * code_rows[j] * count
    tiles = gl.cdiv(rows, TN)
    tile, number = local % tiles, local // tiles
    begin = number * chunk
    if program >= plain_programs:
        acc = _chunk(
            c, s, rows, x_codes, x_scale, tile, begin, gl.minimum(begin + chunk, BLOCKS), BLOCKS, T,
            True, E8M0, TN, TT, NW, STAGES,
        )  # fmt: skip
        finish_tile(
            acc, out_codes + out_at, parts + parts_at, arrivals + arrival + tile, rows, tile, number,
            gl.cdiv(BLOCKS, chunk), T, T * rows, TN, TT, NW, MOST,
        )  # fmt: skip
    if PLAINS > 0:  # noqa: SIM102
        if program < plain_programs:
            acc = _chunk(
                w, s, rows, x, x_scale, tile, begin, gl.minimum(begin + chunk, BLOCKS * 2),
                BLOCKS * 2, T, False, E8M0, TN, TT, NW, STAGES,
            )  # fmt: skip
            finish_tile(
                acc, out_plain + out_at, parts + parts_at, arrivals + arrival + tile, rows, tile,
                number, gl.cdiv(BLOCKS * 2, chunk), T, T * rows, TN, TT, NW, MOST,
            )  # fmt: skip


@dataclass(frozen=True)
class Job:
    """One weight: its rows, steps a chunk, chunks, and tiles."""

    rows: int
    chunk: int
    chunks: int

    @property
    def tiles(self) -> int:
        return -(-self.rows // ROWS)


def _job(weight: Weight) -> Job:
    rows, size = weight.shape
    block = BLOCK_K if isinstance(weight, QuantTensor) else plain_block(weight.dtype)
    return Job(rows, *chunking(rows, -(-size // block)))


def stages_for(programs: int, tokens: int) -> int:
    """Steps that shared memory holds: as many as let all programs be resident at once, 4 to 6."""
    if tokens > 32:
        return 4
    each = SHARED_MEMORY // max(-(-programs // PROCESSORS), 1) - RESERVED
    return min(max(each // ((ROWS + tokens) * BLOCK_K + 4 * tokens), 4), 6)


def _aligned(tensor: Tensor) -> bool:
    return tensor.is_contiguous() and tensor.data_ptr() % 16 == 0


def fits(x: Tensor, weights: Sequence[Weight], unrounded: Sequence[bool]) -> bool:
    """Whether one launch computes all of these products."""
    return _fits(x.shape, x.dtype, weights, unrounded)


def _fits(
    shape: Sequence[int], dtype: torch.dtype, weights: Sequence[Weight], unrounded: Sequence[bool]
) -> bool:
    tokens, size = shape
    if not 0 < tokens <= MOST_TOKENS or size % BLOCK_K or dtype != torch.bfloat16:
        return False
    codes = [w for w in weights if isinstance(w, QuantTensor)]
    plains = [w for w in weights if isinstance(w, Tensor)]
    if not codes or len(weights) > MOST_WEIGHTS or len({w.scale.dtype for w in codes}) > 1:
        return False
    kinds = {(isinstance(w, Tensor), wide) for w, wide in zip(weights, unrounded, strict=True)}
    return (
        len(kinds) == len({plain for plain, _ in kinds})
        and all(is_fp8(w) and _aligned(w.codes) and w.scale.is_contiguous() for w in codes)
        and all(w.dtype == dtype and _aligned(w) for w in plains)
        and sum(_job(w).chunks * w.shape[0] for w in weights) * tokens < 1 << 31
    )


def _split(buffer: Tensor, jobs: Sequence[Job], tokens: int) -> list[Tensor]:
    """The output `[T, rows]` of each job."""
    outputs, at = [], 0
    for job in jobs:
        outputs.append(buffer[at : at + tokens * job.rows].view(tokens, job.rows))
        at += tokens * job.rows
    return outputs


@dataclass(frozen=True)
class Rounded:
    """FP8 codes `[T, K]` and scales `[K/128, T]` of an input, and zeroed `arrivals`, one a tile."""

    codes: Tensor
    scale: Tensor
    arrivals: Tensor

    @staticmethod
    def empty(tokens: int, size: int, tiles: int, device: torch.device) -> Rounded:
        groups = size // BLOCK_K
        return Rounded(
            torch.empty(tokens, size, dtype=torch.uint8, device=device),
            torch.empty(groups, tokens, dtype=torch.float32, device=device),
            torch.empty(tiles, dtype=torch.int32, device=device),
        )


def _project(
    rounded: Rounded, x: Tensor | None, weights: Sequence[Weight], unrounded: Sequence[bool]
) -> tuple[Tensor, ...]:
    """The products of an input, as codes and for plain weights as `x`."""
    tokens, size = rounded.codes.shape
    device = rounded.codes.device
    codes = [w for w in weights if isinstance(w, QuantTensor)]
    plains = [w for w in weights if isinstance(w, Tensor)]
    a, b = [_job(w) for w in codes], [_job(w) for w in plains]
    wide = {isinstance(w, Tensor): u for w, u in zip(weights, unrounded, strict=True)}
    tile = max(triton.next_power_of_2(tokens), 8)
    programs = sum(job.tiles * job.chunks for job in (*a, *b))
    x_codes = as_fp8(rounded.codes, False)
    out_codes, out_plain = (
        torch.empty(
            tokens * sum(job.rows for job in jobs),
            dtype=torch.float32 if wide.get(plain) else torch.bfloat16,
            device=device,
        )
        for jobs, plain in ((a, False), (b, True))
    )
    kept = sum(job.rows * job.chunks for job in (*a, *b)) * tokens
    parts = torch.empty(kept, dtype=torch.float32, device=device)
    _projections[(programs,)](
        tuple(as_fp8(w.codes, False) for w in codes), tuple(w.scale for w in codes),
        tuple(job.rows for job in a), tuple(job.chunk for job in a), tuple(plains),
        tuple(job.rows for job in b), tuple(job.chunk for job in b),
        x_codes, rounded.scale, x_codes if x is None else x, out_codes, out_plain, parts,
        rounded.arrivals, tokens, size // BLOCK_K,
        CODES=len(a), PLAINS=len(b), E8M0=codes[0].scale.dtype == torch.uint8, TN=ROWS, TT=tile,
        NW=WARPS, STAGES=stages_for(programs, tile), MOST=MOST_CHUNKS, num_warps=WARPS,
        launch_pdl=True,
    )  # fmt: skip
    of_codes, of_plain = iter(_split(out_codes, a, tokens)), iter(_split(out_plain, b, tokens))
    return tuple(next(of_codes if isinstance(w, QuantTensor) else of_plain) for w in weights)


def linears(x: Tensor, weights: Sequence[Weight], unrounded: Sequence[bool]) -> tuple[Tensor, ...]:
    """The op `linears` (ops/linear.py) for what `fits`."""
    x = x.contiguous()
    tokens, size = x.shape
    tiles = sum(_job(weight).tiles for weight in weights)
    rounded = Rounded.empty(tokens, size, tiles, x.device)
    _round_inputs[(tokens, size // BLOCK_K)](
        x, rounded.codes, rounded.scale, rounded.arrivals, tokens, size, tiles,
        PLACES=triton.next_power_of_2(tiles), GROUP=BLOCK_K, num_warps=1, launch_pdl=True,
    )  # fmt: skip
    return _project(rounded, x, weights, unrounded)


def norm_linears(
    x: Tensor,
    norm: Tensor,
    eps: float,
    weights: Sequence[QuantTensor],
    unrounded: Sequence[bool],
    products: Products,
) -> tuple[Tensor, ...]:
    """The op `norm_linears` (ops/linear.py) for bfloat16 `x [T, K]`, K whole groups, and FP8 weights."""
    x = x.contiguous()
    tokens, size = x.shape
    tiles, block = sum(_job(weight).tiles for weight in weights), triton.next_power_of_2(size)
    rounded = Rounded.empty(tokens, size, tiles, x.device)
    _norm_inputs[(tokens,)](
        x, norm, rounded.codes, rounded.scale, rounded.arrivals, tokens, size, tiles, eps,
        PLACES=triton.next_power_of_2(tiles), GROUP=BLOCK_K, BLOCK=block,
        num_warps=row_warps(size), launch_pdl=True, **EXACT,
    )  # fmt: skip
    if fits(x, weights, unrounded):
        return _project(rounded, x, weights, unrounded)
    codes = as_fp8(rounded.codes, False)
    return tuple(
        finish(
            operands(weight, codes, rounded.scale),
            torch.float32 if wide else x.dtype,
            False,
            products,
        )
        for weight, wide in zip(weights, unrounded, strict=True)
    )


def fits_activation(gate: Tensor, up: Tensor, w2: Weight, dtype: torch.dtype) -> bool:
    """Whether `shared_expert` takes these."""
    plain = (gate.dtype, up.dtype) == (torch.float32, torch.float32)
    return (
        plain
        and gate.is_contiguous()
        and up.is_contiguous()
        and _fits(gate.shape, dtype, (w2,), (True,))
    )


def shared_expert(gate: Tensor, up: Tensor, w2: Weight, limit: float) -> Tensor:
    """The op `shared_expert` (ops/moe.py) for what `fits_activation`."""
    tokens, inner = gate.shape
    tiles = _job(w2).tiles
    rounded = Rounded.empty(tokens, inner, tiles, gate.device)
    _activate_inputs[(tokens, inner // BLOCK_K)](
        gate, up, rounded.codes, rounded.scale, rounded.arrivals, tokens, inner, tiles, limit,
        PLACES=triton.next_power_of_2(tiles), GROUP=BLOCK_K, num_warps=1, launch_pdl=True,
    )  # fmt: skip
    return _project(rounded, None, (w2,), (True,))[0]

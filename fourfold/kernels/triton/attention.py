"""Sparse attention for GPUs: one arithmetic for decode, prefill and every batch.

A token's rows are cut into spans of ROWS rows by their place in the token's own order and by nothing
else: window rows by distance from the query, compressed rows by their place in the list (or by row
number). Where a row is stored, what else is in the batch and where a chunk was cut do not enter.

    span s:   S = q · rowsᵀ,  M_s = ⌈max S⌉,  P = 2^(S − M_s),  l_s = Σ P,  O_s = P · rows
    merge:    M' = max(M, M_s),  (l, O) = (l, O) · 2^(M − M') + (l_s, O_s) · 2^(M_s − M')

Scores are in units of log2 e. Spans merge in order, beginning with the sink (M = ⌈sink⌉, O = 0). M is
always an integer, so the factors of a merge are exact powers of two. A program walks all spans of a
token (many tokens) or writes its spans' O_s and a second kernel merges them (few tokens); both use
`_merge`, so the bits are the same.

Heads are the rows of the matrix products; the d dims are cut into chunks held side by side, so that a
span's O_s need not stand beside the whole of O. Rows are decoded once, by integer arithmetic, to
bfloat16, which holds every FP8 row exactly; P is rounded to bfloat16 for its product (relative error
2^-9 a weight) and summed unrounded. With float32 queries everything stays float32.

It does not know how rows were made, or that a list of rows came from an indexer.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fourfold.core.batch import ForwardBatch
from fourfold.core.config import ModelConfig
from fourfold.core.device import Feature
from fourfold.core.errors import KernelError
from fourfold.core.row_format import FP8_GROUP, RowKind
from fourfold.core.rows import RowPages
from fourfold.ops.registry import Kernel

LOG2_E = 1.4426950408889634
SPLIT_TOKENS = 32  # up to here a token's spans have programs of their own
SPLIT_BYTES = 128 << 20  # and only if all their results together take no more
UNPACKED_BYTES = 512 << 20  # most that compressed rows decoded beforehand may take
PROGRAMS = 132  # for few tokens, at most: a program's memory fills a multiprocessor
MERGE_HEADS = 4  # heads a program of the merging kernel
# One binary serves every batch: nothing is compiled once more because a size is 1 or divides by 16.
INTEGERS = ("T", "H", "K", "BLOCKS", "STRIDE", "PARTS")
INDEXES = (
    "sink", "listed", "positions", "sequence_ids", "computed", "cu_seqlens", "state_slots",
    "block_table",
)  # fmt: skip


@triton.jit
def _decode_fp8(codes, CAST: tl.constexpr):
    """E4M3 codes → float32, exactly. CAST: the device's own conversion, where it reads OCP codes."""
    if CAST:
        value = codes.to(tl.float8e4nv, bitcast=True).to(tl.float32)
    else:
        # The code's fields are float32's, but for the exponent's bias: 2^120 too small.
        wide = codes.to(tl.int32)
        value = (((wide & 0x80) << 24) | ((wide & 0x7F) << 20)).to(tl.float32, bitcast=True)
        value *= 1.329227995784916e36
    return value


@triton.jit
def _decode_e8m0(code):
    wide = code.to(tl.int32)
    return tl.where(wide == 0, 0x00400000, wide << 23).to(tl.float32, bitcast=True)


@triton.jit
def _token(
    positions, sequence_ids, computed, state_slots, t, K, BLOCKS,
    RATIO: tl.constexpr, RPP: tl.constexpr, LISTED: tl.constexpr,
):  # fmt: skip
    """Where a token is: position, sequence, first position of its run, ring page, compressed rows."""
    p = tl.load(positions + t).to(tl.int32)
    sequence = tl.load(sequence_ids + t)
    before = tl.load(computed + sequence).to(tl.int32)
    state = tl.load(state_slots + sequence)
    rows = p * 0
    if RATIO > 0:
        rows = tl.minimum((p + 1) // RATIO, BLOCKS * RPP)
        if LISTED:
            rows = tl.minimum(rows, K)
    return p, sequence, before, state, rows


@triton.jit
def _spans(p, rows, WINDOW: tl.constexpr, ROWS: tl.constexpr):
    """(first, end) of the spans with rows in them: window rows before position 0 do not exist."""
    first = tl.maximum(WINDOW - 1 - p, 0) // ROWS
    return first, (WINDOW + ROWS - 1) // ROWS + tl.cdiv(rows, ROWS)


@triton.jit
def _window_rows(
    own, ring, token, t, span, T, WINDOW: tl.constexpr, ROWS: tl.constexpr, RING: tl.constexpr,
    DATA: tl.constexpr, SCALE: tl.constexpr, RING_PAGE: tl.constexpr, DENSE: tl.constexpr,
    TWICE: tl.constexpr,
):  # fmt: skip
    """Data and scale pointers `[ROWS]` of a span of window rows, and which of them exist.

    With TWICE they are those of own rows; the ring's pointers follow, and which rows are own ones.
    """
    p, sequence, before, state, _ = token
    i = span * ROWS + tl.arange(0, ROWS)
    oldest = p - WINDOW + 1  # position of window row 0
    exists = i >= tl.maximum(tl.where(state < 0, before, 0) - oldest, 0)
    if WINDOW % ROWS:
        exists &= i < WINDOW
    if DENSE:
        data = own + (t + sequence * (WINDOW - 1) + i) * DATA
        return data, data, exists, data, data, exists
    else:
        mine = i >= before - oldest
        row = tl.where(mine, (t + i) - (WINDOW - 1), 0)
        # The ring holds a whole window, so a row's place wraps at most once.
        offset = (tl.maximum(oldest, -WINDOW) + RING) % RING + i
        offset = tl.where(mine, 0, tl.where(offset >= RING, offset - RING, offset))
        home = ring + tl.maximum(state, 0) * RING_PAGE
        data, scale = own + row * DATA, own + T.to(tl.int64) * DATA + row * SCALE
        there, power = home + offset * DATA, home + RING * DATA + offset * SCALE
        if not TWICE:
            data, scale = tl.where(mine, data, there), tl.where(mine, scale, power)
        return data, scale, exists, there, power, mine


@triton.jit
def _compressed_rows(
    pages, listed, block_table, token, t, span, K, BLOCKS, STRIDE, LISTED: tl.constexpr,
    ROWS: tl.constexpr, RPP: tl.constexpr, DATA: tl.constexpr, SCALE: tl.constexpr,
    PAGE: tl.constexpr, DENSE: tl.constexpr,
):  # fmt: skip
    """As `_window_rows`, for the span'th ROWS compressed rows a token sees."""
    _, sequence, _, _, rows = token
    c = span * ROWS + tl.arange(0, ROWS)
    exists = c < rows
    if LISTED:
        c = tl.load(listed + t * K + c, mask=exists, other=-1).to(tl.int32)
        exists &= (c >= 0) & (c < BLOCKS * RPP)
    if DENSE:
        data = pages + (sequence * BLOCKS * RPP + tl.where(exists, c, 0)) * DATA
        scale = data
    else:
        j = tl.where(exists, c, 0).to(tl.uint32)
        page = tl.load(block_table + sequence * STRIDE + j // RPP, mask=exists, other=-1)
        exists &= page >= 0
        base = pages + tl.maximum(page, 0) * PAGE
        offset = (j % RPP).to(tl.int32)
        data, scale = base + offset * DATA, base + RPP * DATA + offset * SCALE
    return data, scale, exists, data, scale, exists


@triton.jit
def _fetch(first, ring, mine, present, TWICE: tl.constexpr):
    """What is at `first`, or with TWICE at `ring` where not `mine`; 0 where not `present`.

    Pointers into two tensors may be chosen between only where the compiler can follow that (AMD's
    cannot), hence two loads.
    """
    value = tl.load(first, mask=present & mine if TWICE else present, other=0)
    if TWICE:
        value = tl.where(mine, value, tl.load(ring, mask=present & ~mine, other=0))
    return value


@triton.jit
def _chunk(
    rows, c: tl.constexpr, D: tl.constexpr, N: tl.constexpr, GROUP: tl.constexpr,
    FP8: tl.constexpr, WIDE: tl.constexpr, CAST: tl.constexpr, TWICE: tl.constexpr,
    DC: tl.constexpr,
):  # fmt: skip
    """Dims c·DC … of a span's rows `[ROWS, DC]`: zero where there is no row or no such dim."""
    data, scale, exists, ring, ring_scale, mine = rows
    dim = c * DC + tl.arange(0, DC)
    here, own = exists[:, None], mine[:, None]
    place, ring_place = data[:, None] + dim[None, :], ring[:, None] + dim[None, :]
    if not FP8:
        if (c + 1) * DC > D:
            here &= (dim < D)[None, :]
        value = _fetch(place, ring_place, own, here, TWICE)
        value = value.to(tl.float32) if WIDE else value.to(tl.bfloat16)
    else:
        value = tl.zeros((data.shape[0], DC), tl.float32)
        if c * DC < N:
            if (c + 1) * DC > N:
                here &= (dim < N)[None, :]
            value = _decode_fp8(_fetch(place, ring_place, own, here, TWICE), CAST)
            power = tl.zeros((data.shape[0], DC), tl.float32)
            for g in tl.static_range((DC + GROUP - 1) // GROUP):
                group = c * DC // GROUP + g
                inside = exists & (group * GROUP < N)
                raw = _fetch(scale + group, ring_scale + group, mine, inside, TWICE)
                if DC <= GROUP:
                    power += _decode_e8m0(raw)[:, None]
                else:
                    member = (dim // GROUP == group)[None, :]
                    power = tl.where(member, _decode_e8m0(raw)[:, None], power)
            value *= power
        if (c + 1) * DC > N:
            there = exists[:, None]
            if c * DC < N or (c + 1) * DC > D:
                there &= ((dim >= N) & (dim < D))[None, :]
            words = tl.pointer_type(tl.uint16)
            place = (data + N).to(words)[:, None] + (dim - N)[None, :]
            ring_place = (ring + N).to(words)[:, None] + (dim - N)[None, :]
            raw = _fetch(place, ring_place, own, there, TWICE)
            bits = (raw.to(tl.int32) << 16).to(tl.float32, bitcast=True)
            value = tl.where((dim < N)[None, :], value, bits) if c * DC < N else bits
        if not WIDE:
            value = value.to(tl.bfloat16)
    return value


@triton.jit
def _merge_factors(m, total, m_s, l_s):
    """Merged maximum and sum, and the factors of what was and of what is added."""
    top = tl.maximum(m, m_s)
    a, b = tl.exp2(m - top), tl.exp2(m_s - top)
    return top, tl.fma(total, a, l_s * b), a, b


@triton.jit
def _merge(acc, o, a, b):
    wide = tl.zeros_like(acc)
    return tl.fma(acc, a[:, None] + wide, o * b[:, None])


@triton.jit
def _begin(sink, h, H):
    """Maximum and sum of the sink alone, `[heads]`."""
    logit = tl.load(sink + h, mask=h < H, other=0.0).to(tl.float32) * 1.4426950408889634
    m = tl.maximum(tl.ceil(logit), -1.0e30)
    return m, tl.exp2(logit - m)


@triton.jit
def _span(
    queries, source, FACTOR, D: tl.constexpr, N: tl.constexpr, GROUP: tl.constexpr,
    FP8: tl.constexpr, WIDE: tl.constexpr, CAST: tl.constexpr,
    TWICE: tl.constexpr, HT: tl.constexpr, ROWS: tl.constexpr, DC: tl.constexpr,
    CHUNKS: tl.constexpr,
):  # fmt: skip
    """One span: its maximum and sum `[HT]`, and O_s as CHUNKS tiles `[HT, DC]`."""
    chunks = ()
    scores = tl.zeros((HT, ROWS), tl.float32)
    for c in tl.static_range(CHUNKS):
        rows = _chunk(source, c, D, N, GROUP, FP8, WIDE, CAST, TWICE, DC)
        scores = tl.dot(queries[c], tl.trans(rows), scores, input_precision="ieee")
        chunks += (rows,)  # type: ignore[assignment]
    scores = tl.where(source[2][None, :], scores * FACTOR, float("-inf"))
    m_s = tl.maximum(tl.ceil(tl.max(scores, 1)), -1.0e30)
    weight = tl.exp2(scores - m_s[:, None])
    l_s = tl.sum(weight, 1)
    if not WIDE:
        weight = weight.to(tl.bfloat16)
    made = ()
    for c in tl.static_range(CHUNKS):
        made += (tl.dot(weight, chunks[c], input_precision="ieee"),)  # type: ignore[assignment]
    return m_s, l_s, made


@triton.jit
def _add(state, span, CHUNKS: tl.constexpr):
    """(M, l, O) of all spans so far with one more merged in."""
    m, total, a, b = _merge_factors(state[0], state[1], span[0], span[1])
    merged = ()
    for c in tl.static_range(CHUNKS):
        merged += (_merge(state[2][c], span[2][c], a, b),)  # type: ignore[assignment]
    return m, total, merged


@triton.jit
def _store_span(
    parts, sums, span, part, h, H, D: tl.constexpr, DC: tl.constexpr, CHUNKS: tl.constexpr
):
    tl.store(sums + part * 2 * H + h, span[0], mask=h < H)
    tl.store(sums + part * 2 * H + H + h, span[1], mask=h < H)
    for c in tl.static_range(CHUNKS):
        dim = c * DC + tl.arange(0, DC)
        place = (part * H + h)[:, None] * D + dim[None, :]
        tl.store(parts + place, span[2][c], mask=(h < H)[:, None] & (dim < D)[None, :])


@triton.jit(do_not_specialize=INTEGERS, do_not_specialize_on_alignment=INDEXES)
def _attend(
    q, sink, own, ring, pages, listed, positions, sequence_ids, computed, state_slots, block_table,
    out, sums, T, H, K, BLOCKS, STRIDE, PARTS, FACTOR,
    WINDOW: tl.constexpr, RATIO: tl.constexpr, LISTED: tl.constexpr, FP8: tl.constexpr,
    WIDE: tl.constexpr, CAST: tl.constexpr, SPLIT: tl.constexpr, D: tl.constexpr,
    N: tl.constexpr, GROUP: tl.constexpr, RING: tl.constexpr, RPP: tl.constexpr,
    DATA: tl.constexpr, SCALE: tl.constexpr, RING_PAGE: tl.constexpr, PAGE: tl.constexpr,
    DENSE: tl.constexpr, TWICE: tl.constexpr, HT: tl.constexpr, ROWS: tl.constexpr,
    DC: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    """HT heads of one token over all its spans; with SPLIT over every n-th, unmerged.

    `out [T, H, D]`, or with SPLIT `[T, PARTS, H, D]` float32 and `sums [T, PARTS, 2, H]` (M_s, l_s).
    """
    t = tl.program_id(0).to(tl.int64)
    h = tl.program_id(1) * HT + tl.arange(0, HT)
    token = _token(positions, sequence_ids, computed, state_slots, t, K, BLOCKS, RATIO, RPP, LISTED)
    first, end = _spans(token[0], token[4], WINDOW, ROWS)
    windows = (WINDOW + ROWS - 1) // ROWS
    begin, compressed, step = first, first * 0 + windows, 1
    if SPLIT:
        step = tl.num_programs(2)
        begin = first + tl.program_id(2)
        # The first of this program's spans that lies beyond the window.
        compressed = begin + tl.cdiv(tl.maximum(windows - begin, 0), step) * step
    queries = ()
    acc = ()
    for c in tl.static_range(CHUNKS):
        dim = c * DC + tl.arange(0, DC)
        place = (t * H + h)[:, None] * D + dim[None, :]
        query = tl.load(q + place, mask=(h < H)[:, None] & (dim < D)[None, :], other=0.0)
        queries += (query.to(tl.float32) if WIDE else query,)  # type: ignore[assignment]
        acc += (tl.zeros((HT, DC), tl.float32),)  # type: ignore[assignment]
    m, total = _begin(sink, h, H)
    for span in range(begin, windows, step):
        source = _window_rows(
            own, ring, token, t, span, T, WINDOW, ROWS, RING, DATA, SCALE, RING_PAGE, DENSE, TWICE
        )
        one = _span(
            queries, source, FACTOR, D, N, GROUP, FP8, WIDE, CAST, TWICE and not DENSE, HT, ROWS,
            DC, CHUNKS,
        )  # fmt: skip
        if SPLIT:
            _store_span(out, sums, one, t * PARTS + span, h, H, D, DC, CHUNKS)
        else:
            m, total, acc = _add((m, total, acc), one, CHUNKS)
    if RATIO > 0:
        for span in range(compressed, end, step):
            source = _compressed_rows(
                pages, listed, block_table, token, t, span - windows, K, BLOCKS, STRIDE, LISTED,
                ROWS, RPP, DATA, SCALE, PAGE, DENSE,
            )  # fmt: skip
            one = _span(
                queries, source, FACTOR, D, N, GROUP, FP8, WIDE, CAST, False, HT, ROWS, DC, CHUNKS,
            )  # fmt: skip
            if SPLIT:
                _store_span(out, sums, one, t * PARTS + span, h, H, D, DC, CHUNKS)
            else:
                m, total, acc = _add((m, total, acc), one, CHUNKS)
    if not SPLIT:
        for c in tl.static_range(CHUNKS):
            dim = c * DC + tl.arange(0, DC)
            place = (t * H + h)[:, None] * D + dim[None, :]
            inside = (h < H)[:, None] & (dim < D)[None, :]
            tl.store(out + place, (acc[c] / total[:, None]).to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=INTEGERS, do_not_specialize_on_alignment=INDEXES)
def _merge_spans(
    parts, sums, sink, positions, sequence_ids, computed, state_slots, out, H, K, BLOCKS, PARTS,
    WINDOW: tl.constexpr, RATIO: tl.constexpr, LISTED: tl.constexpr, RPP: tl.constexpr,
    D: tl.constexpr, ROWS: tl.constexpr, HT: tl.constexpr, DP: tl.constexpr,
):  # fmt: skip
    """What `_attend` does with its spans, for HT heads of one token, from their stored results."""
    t = tl.program_id(0).to(tl.int64)
    h = tl.program_id(1) * HT + tl.arange(0, HT)
    d = tl.arange(0, DP)
    inside = (h < H)[:, None] & (d < D)[None, :]
    p, _, _, _, rows = _token(
        positions, sequence_ids, computed, state_slots, t, K, BLOCKS, RATIO, RPP, LISTED
    )
    first, end = _spans(p, rows, WINDOW, ROWS)
    m, total = _begin(sink, h, H)
    acc = tl.zeros((HT, DP), tl.float32)
    for span in tl.range(first, end, num_stages=4):
        part = t * PARTS + span
        m_s = tl.load(sums + part * 2 * H + h, mask=h < H, other=0.0)
        l_s = tl.load(sums + part * 2 * H + H + h, mask=h < H, other=0.0)
        o = tl.load(parts + (part * H + h)[:, None] * D + d[None, :], mask=inside, other=0.0)
        m, total, a, b = _merge_factors(m, total, m_s, l_s)
        acc = _merge(acc, o, a, b)
    place = (t * H + h)[:, None] * D + d[None, :]
    tl.store(out + place, (acc / total[:, None]).to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=INTEGERS, do_not_specialize_on_alignment=INDEXES)
def _unpack(
    source, block_table, sequence_ids, computed, cu_seqlens, state_slots, out, T, BLOCKS, STRIDE,
    KIND: tl.constexpr, WINDOW: tl.constexpr, RATIO: tl.constexpr, RING: tl.constexpr,
    RPP: tl.constexpr, DATA: tl.constexpr, SCALE: tl.constexpr, PAGE: tl.constexpr,
    D: tl.constexpr, N: tl.constexpr, GROUP: tl.constexpr, CAST: tl.constexpr,
    ROWS: tl.constexpr, DC: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    """FP8 rows of one KIND (0: own, 1: ring, 2: pages) in bfloat16, each sequence's side by side.

    Window rows: sequence s has WINDOW − 1 from the ring, then its own, from cu_seqlens[s] +
    s · (WINDOW − 1) on. Compressed rows: row j of sequence s is row s · BLOCKS · RPP + j.
    """
    i = tl.arange(0, ROWS)
    s = tl.program_id(0).to(tl.int64)
    first, end, step = tl.program_id(1), tl.program_id(1) + 1, tl.num_programs(1)
    if KIND == 2:
        length = tl.load(cu_seqlens + s + 1) - tl.load(cu_seqlens + s)
        total = ((tl.load(computed + s) + length) // RATIO).to(tl.int32)
        total = tl.minimum(total, BLOCKS * RPP)
        end = tl.cdiv(total, ROWS)
    for block in range(first, end, step):
        if KIND == 0:
            row = s * ROWS + i
            exists = row < T
            sequence = tl.load(sequence_ids + row, mask=exists, other=0)
            place = row + (sequence + 1) * (WINDOW - 1)
            base, offset, page_rows = source + row * 0, row, T.to(tl.int64)
        elif KIND == 1:
            row = block * ROWS + i
            position = tl.load(computed + s) - (WINDOW - 1) + row
            state = tl.load(state_slots + s)
            exists = (row < WINDOW - 1) & (position >= 0) & (state >= 0)
            place = tl.load(cu_seqlens + s) + s * (WINDOW - 1) + row
            base, page_rows = source + tl.maximum(state, 0) * PAGE + row * 0, RING
            offset = tl.where(exists, position % RING, 0)
        else:
            row = block * ROWS + i
            exists = row < total
            page = tl.load(block_table + s * STRIDE + row // RPP, mask=exists, other=-1)
            exists &= page >= 0
            place = s * BLOCKS * RPP + row
            base, page_rows = source + tl.maximum(page, 0) * PAGE, RPP
            offset = row % RPP
        data, scale = base + offset * DATA, base + page_rows * DATA + offset * SCALE
        for c in tl.static_range(CHUNKS):
            dim = c * DC + tl.arange(0, DC)
            source_rows = data, scale, exists, data, scale, exists
            rows = _chunk(source_rows, c, D, N, GROUP, True, False, CAST, False, DC)
            target = out + place[:, None] * D + dim[None, :]
            tl.store(target, rows, mask=exists[:, None] & (dim < D)[None, :])


@dataclass(frozen=True)
class Shape:
    """How a program is cut: most heads, rows of a span, dims of a chunk, warps, pipeline stages.

    `cast`: the device converts OCP codes itself. `twice`: own rows and the ring's are loaded apart.
    """

    heads: int
    rows: int
    chunk: int
    warps: int
    stages: int
    cast: bool = False
    twice: bool = True


# Shared memory at d = 512: up to 73,728 B (NVIDIA) or 8,192 B (AMD), no spills on AMD.
COMPACT = Shape(heads=32, rows=32, chunk=128, warps=4, stages=1)
# A warp group multiplies 64 rows at once: all heads of one token, rows decoded once.
WARP_GROUPS = Shape(heads=64, rows=64, chunk=64, warps=8, stages=3, cast=True, twice=False)
FLOAT32 = Shape(heads=16, rows=16, chunk=128, warps=4, stages=1)
PLAIN_CHUNK = 128  # dims of a chunk where rows need no decoding
UNPACK_ROWS = 32


def _geometry(
    own: RowPages, ring: RowPages, pages: RowPages | None, listed: Tensor | None, ratio: int
) -> dict[str, Any]:
    """The constants that say where rows lie."""
    format = own.format
    fp8 = format.kind is RowKind.FP8_GROUPS
    if format.kind is RowKind.FP8_WHOLE or any(
        each is not None and each.format != format for each in (ring, pages)
    ):
        raise KernelError(f"rows of the ring and of pages must be stored as {format}")
    return {
        "RATIO": ratio if pages is not None else 0,
        "LISTED": listed is not None and pages is not None,
        "FP8": fp8,
        "D": format.dim,
        "N": format.nope_dim if fp8 else format.dim,
        "GROUP": FP8_GROUP,
        "RING": ring.rows_per_page,
        "RPP": pages.rows_per_page if pages is not None else 1,
        "DATA": format.data_bytes if fp8 else format.dim,
        "SCALE": format.scale_bytes,
        "RING_PAGE": ring.storage.stride(0),
        "PAGE": pages.storage.stride(0) if pages is not None else 0,
    }


def _most_parts(
    geometry: dict[str, Any], window: int, rows: int, listed: Tensor | None, batch: ForwardBatch
) -> int:
    """Spans a token can have, by the tensors' shapes."""
    compressed = batch.block_table.shape[1] * geometry["RPP"] if geometry["RATIO"] else 0
    if geometry["LISTED"] and listed is not None:
        compressed = min(compressed, listed.shape[1])
    return -(-window // rows) - (-compressed // rows)


def _unpacking_pays(tokens: int, geometry: dict[str, Any], batch: ForwardBatch) -> bool:
    """Whether rows are seen often enough to decode them beforehand, and fit: by shapes alone."""
    rows = batch.num_sequences * batch.block_table.shape[1] * geometry["RPP"]
    fits = rows * geometry["D"] * 2 <= UNPACKED_BYTES
    return fits and tokens >= 16 * batch.num_sequences and rows <= 64 * tokens


def _unpacked(
    own: RowPages,
    ring: RowPages,
    pages: RowPages | None,
    batch: ForwardBatch,
    window: int,
    geometry: dict[str, Any],
    shape: Shape,
) -> tuple[Tensor, Tensor]:
    """Window and compressed rows in bfloat16, as `_unpack` orders them."""
    sequences, blocks, dim = batch.num_sequences, batch.block_table.shape[1], geometry["D"]
    make = partial(torch.empty, dtype=torch.bfloat16, device=own.device)
    rows = make(own.rows_per_page + sequences * (window - 1), dim)
    compressed = make(sequences * blocks * geometry["RPP"] if pages is not None else 0, dim)
    chunk = min(max(triton.next_power_of_2(dim), 16), 128)
    tiles = -(-own.rows_per_page // UNPACK_ROWS)
    kinds = [(own, rows, (tiles, 1)), (ring, rows, (sequences, -(-window // UNPACK_ROWS)))]
    if pages is not None and compressed.numel():
        programs = min(-(-PROGRAMS * 8 // sequences), -(-blocks * geometry["RPP"] // UNPACK_ROWS))
        kinds.append((pages, compressed, (sequences, programs)))
    same = ("RATIO", "RING", "RPP", "DATA", "SCALE", "D", "N", "GROUP")
    # The run's own rows lie in one page, whose size would make a variant for every batch.
    page_bytes = (0, geometry["RING_PAGE"], geometry["PAGE"])
    for kind, (source, target, grid) in enumerate(kinds):
        _unpack[grid](
            source.storage, batch.block_table, batch.sequence_ids, batch.num_computed_tokens,
            batch.cu_seqlens_q, batch.state_slots, target, own.rows_per_page, blocks,
            batch.block_table.stride(0), KIND=kind, WINDOW=window, PAGE=page_bytes[kind],
            CAST=shape.cast, ROWS=UNPACK_ROWS, DC=chunk, CHUNKS=-(-dim // chunk), num_warps=4,
            **{name: geometry[name] for name in same},
        )  # fmt: skip
    return rows, compressed


def sparse_attention(
    q: Tensor,
    sink: Tensor,
    own: RowPages,
    ring: RowPages,
    pages: RowPages | None,
    listed: Tensor | None,
    batch: ForwardBatch,
    window: int,
    ratio: int,
    shape: Shape = COMPACT,
    split: bool | None = None,
    dense: bool | None = None,
) -> Tensor:
    """The op `sparse_attention` (ops/attention.py). `listed` holds distinct visible rows before its −1s.

    `split` (spans in programs of their own) and `dense` (FP8 rows decoded beforehand) force one of the
    launch forms; None takes the faster. Raises `KernelError` where the three kinds of rows differ in
    format, or a ring does not hold a window.
    """
    q = q.contiguous()
    tokens, heads, dim = q.shape
    out = torch.empty_like(q)
    if not tokens:
        return out
    geometry = _geometry(own, ring, pages, listed, ratio)
    if geometry["RING"] < window:
        raise KernelError(f"a ring of {geometry['RING']} rows does not hold a window of {window}")
    wide = not (q.dtype == torch.bfloat16 and own.storage.dtype in (torch.bfloat16, torch.uint8))
    shape = FLOAT32 if wide else shape
    tile = min(max(triton.next_power_of_2(heads), 16), shape.heads)
    parts = _most_parts(geometry, window, shape.rows, listed, batch)
    if split is None:
        small = tokens * parts * heads * dim * 4 <= SPLIT_BYTES
        split = parts > 1 and tokens * -(-heads // tile) <= SPLIT_TOKENS and small
    if dense is None:
        dense = _unpacking_pays(tokens, geometry, batch)
    dense = dense and geometry["FP8"] and not wide
    sources = own.storage, ring.storage, own.storage if pages is None else pages.storage
    if dense:
        rows, compressed = _unpacked(own, ring, pages, batch, window, geometry, shape)
        sources = rows, ring.storage, compressed
        geometry |= {"FP8": False, "DATA": dim, "SCALE": 0, "N": dim, "RING_PAGE": 0, "PAGE": 0}
    if not geometry["FP8"]:
        # A stage of these rows takes twice the shared memory, and chunks no registers for decoding.
        stages, widest = min(shape.stages, 2), shape.chunk if wide else PLAIN_CHUNK
        shape = replace(shape, chunk=widest, stages=stages)
    chunk = min(max(triton.next_power_of_2(dim), 16), shape.chunk)
    pointers = (batch.positions, batch.sequence_ids, batch.num_computed_tokens, batch.state_slots)
    lists = listed.contiguous() if listed is not None else batch.positions
    sizes = (heads, lists.shape[-1], batch.block_table.shape[1])
    target, sums, programs = out, out, 1
    if split:
        target = torch.empty(tokens, parts, heads, dim, dtype=torch.float32, device=q.device)
        sums = torch.empty(tokens, parts, 2, heads, dtype=torch.float32, device=q.device)
        programs = min(parts, max(PROGRAMS // (tokens * -(-heads // tile)), 1))
    _attend[(tokens, -(-heads // tile), programs)](
        q, sink, *sources, lists, *pointers, batch.block_table, target, sums, own.rows_per_page,
        *sizes, batch.block_table.stride(0), parts, dim**-0.5 * LOG2_E, WINDOW=window, WIDE=wide,
        CAST=shape.cast, TWICE=shape.twice, SPLIT=split, DENSE=dense, HT=tile, ROWS=shape.rows, DC=chunk,
        CHUNKS=-(-dim // chunk), **geometry, num_warps=shape.warps, num_stages=shape.stages,
    )  # fmt: skip
    if split:
        _merge_spans[(tokens, -(-heads // MERGE_HEADS))](
            target, sums, sink, *pointers, out, *sizes, parts, WINDOW=window,
            RATIO=geometry["RATIO"], LISTED=geometry["LISTED"], RPP=geometry["RPP"], D=dim,
            ROWS=shape.rows, HT=MERGE_HEADS, DP=triton.next_power_of_2(dim), num_warps=4,
        )  # fmt: skip
    return out


def _supports(config: ModelConfig) -> str | None:
    if config.head_dim > 512:
        return f"takes head_dim up to 512, not {config.head_dim}"
    if config.nope_head_dim % 2:
        return f"needs an even number of unrotated dims, not {config.nope_head_dim}"
    return None


KERNELS = (
    Kernel(
        "sparse_attention",
        "triton",
        sparse_attention,
        frozenset({Feature.TRITON, Feature.BF16_MATRIX}),
        supports=_supports,
    ),
    Kernel(
        "sparse_attention",
        "triton_wgmma",
        partial(sparse_attention, shape=WARP_GROUPS),
        frozenset({Feature.TRITON, Feature.BF16_MATRIX, Feature.WGMMA}),
        priority=20,
        supports=_supports,
    ),
)

"""Sparse attention for GPUs: one arithmetic for decode, prefill and every batch.

A token's rows are cut into spans of ROWS rows by their place in the token's own order and by nothing
else: window rows by distance from the query, compressed rows by their place in the list (or by row
number). Where a row is stored, what else is in the batch and where a chunk was cut do not enter.

    span s:   S = q · rowsᵀ,  M_s = ⌈max S⌉,  P = 2^(S − M_s),  l_s = Σ P,  O_s = P · rows
    merge:    M' = max(M, M_s),  (l, O) = (l, O) · 2^(M − M') + (l_s, O_s) · 2^(M_s − M')

Scores are in units of log2 e. Spans merge in order, beginning with the sink (M = ⌈sink⌉, O = 0). M is
always an integer, so the factors of a merge are exact powers of two. A program walks all spans of a
token (many tokens) or writes its spans' O_s and a second kernel merges them (few tokens); both use
`_merge`, so the bits are the same. l_s is a sum of pairs of sums of pairs, whatever program makes it.

Heads are the rows of the matrix products, or with ACROSS their columns, which lets a program take as few
as 16 where a warp group multiplies 64 rows at once: the same products in the same order. The d dims are
cut into chunks held side by side, so that a span's O_s need not stand beside the whole of O. P is rounded
to bfloat16 for its product (relative error 2^-9 a weight) and summed unrounded. With float32 queries
everything stays float32.

It does not know how rows were made or where they lie (triton/attention_rows.py), or that a list of rows
came from an indexer.
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
from fourfold.core.rows import RowPages
from fourfold.kernels.triton.attention_rows import (
    INDEXES,
    INTEGERS,
    compressed_rows,
    decoded,
    geometry_of,
    scales,
    stored,
    unpacked,
    unpacking_pays,
    window_rows,
)
from fourfold.kernels.triton.early import after_previous, launch
from fourfold.ops.registry import Kernel

LOG2_E = 1.4426950408889634
SPLIT_TOKENS = 32  # up to here a token's spans have programs of their own
SPLIT_BYTES = 128 << 20  # and only if all their results together take no more
PROGRAMS = 132  # for few tokens, at most: a program's memory fills a multiprocessor
PLAIN_CHUNK = 128  # dims of a chunk where rows need no decoding


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
def _either_rows(
    own, ring, pages, listed, block_table, token, t, span, T, K, BLOCKS, STRIDE,
    WINDOW: tl.constexpr, ROWS: tl.constexpr, RING: tl.constexpr, DATA: tl.constexpr,
    SCALE: tl.constexpr, RING_PAGE: tl.constexpr, RATIO: tl.constexpr, LISTED: tl.constexpr,
    RPP: tl.constexpr, PAGE: tl.constexpr, DENSE: tl.constexpr,
):  # fmt: skip
    """A span's rows, of the window or compressed: where a compiler follows pointers into either tensor,
    one piece of code serves both."""
    windows = (WINDOW + ROWS - 1) // ROWS
    data, scale, exists, _, _, _ = window_rows(
        own, ring, token, t, span, T, WINDOW, ROWS, RING, DATA, SCALE, RING_PAGE, DENSE, False
    )
    if RATIO > 0:
        exists &= span < windows
        data_c, scale_c, exists_c, _, _, _ = compressed_rows(
            pages, listed, block_table, token, t, span - windows, K, BLOCKS, STRIDE, LISTED, ROWS,
            RPP, DATA, SCALE, PAGE, DENSE,
        )  # fmt: skip
        data = tl.where(span < windows, data, data_c)
        scale = tl.where(span < windows, scale, scale_c)
        exists |= exists_c
    return data, scale, exists, data, scale, exists


@triton.jit
def _sum(weight):
    """Sum of each row of `[H, R]`, R from 16 to 64: of pairs only, whose order no layout changes."""
    H: tl.constexpr = weight.shape[0]
    R: tl.constexpr = weight.shape[1]
    part = tl.sum(tl.reshape(weight, (H, R // 2, 2)), 2)
    part = tl.sum(tl.reshape(part, (H, R // 16, 2, 4)), 2)
    part = tl.sum(tl.reshape(part, (H, R // 16, 2, 2)), 3)
    part = tl.sum(part, 2)
    if R >= 64:
        part = tl.sum(tl.reshape(part, (H, 2, 2)), 2)
    if R >= 32:
        part = tl.sum(part, 1)
    else:
        part = tl.reshape(part, (H,))
    return part


@triton.jit
def _by_head(values, ACROSS: tl.constexpr):
    """`[heads]` along the heads of a tile of O: its rows, or ACROSS its columns."""
    return values[None, :] if ACROSS else values[:, None]


@triton.jit
def _by_dim(values, ACROSS: tl.constexpr):
    return values[:, None] if ACROSS else values[None, :]


@triton.jit
def _merge_factors(m, total, m_s, l_s):
    """Merged maximum and sum, and the factors of what was and of what is added."""
    top = tl.maximum(m, m_s)
    a, b = tl.exp2(m - top), tl.exp2(m_s - top)
    return top, tl.fma(total, a, l_s * b), a, b


@triton.jit
def _merge(acc, o, a, b, ACROSS: tl.constexpr):
    wide = tl.zeros_like(acc)
    return tl.fma(acc, _by_head(a, ACROSS) + wide, o * _by_head(b, ACROSS))


@triton.jit
def _begin(sink, h, H):
    """Maximum and sum of the sink alone, `[heads]`."""
    logit = tl.load(sink + h, mask=h < H, other=0.0).to(tl.float32) * 1.4426950408889634
    logit = tl.where(logit > 3.0e38, 3.0e38, logit)  # the largest sinks in units of log2 e
    m = tl.maximum(tl.ceil(logit), -1.0e30)
    return m, tl.exp2(logit - m)


@triton.jit
def _span(
    queries, source, FACTOR, D: tl.constexpr, N: tl.constexpr, GROUP: tl.constexpr,
    FP8: tl.constexpr, WIDE: tl.constexpr, CAST: tl.constexpr, TWICE: tl.constexpr,
    HT: tl.constexpr, ROWS: tl.constexpr, DC: tl.constexpr, CHUNKS: tl.constexpr,
    FIRST: tl.constexpr, WORDS: tl.constexpr, ACROSS: tl.constexpr,
):  # fmt: skip
    """One span: its maximum and sum `[HT]`, P and the decoded rows, chunk by chunk.

    FIRST: everything is loaded before anything is decoded, and decoded before anything is multiplied.
    """
    word = scales(source, WORDS, TWICE)
    raw = ()
    chunks = ()
    if FIRST:
        for c in tl.static_range(CHUNKS):
            raw += (stored(source, c, D, N, GROUP, FP8, TWICE, WORDS, DC),)  # type: ignore[assignment]
        for c in tl.static_range(CHUNKS):
            chunks += (decoded(raw[c], word, c, D, N, GROUP, FP8, WIDE, CAST, WORDS, DC),)  # type: ignore[assignment]
    scores = tl.zeros((ROWS, HT) if ACROSS else (HT, ROWS), tl.float32)
    for c in tl.static_range(CHUNKS):
        if not FIRST:
            one = stored(source, c, D, N, GROUP, FP8, TWICE, WORDS, DC)
            chunks += (decoded(one, word, c, D, N, GROUP, FP8, WIDE, CAST, WORDS, DC),)  # type: ignore[assignment]
        if ACROSS:
            scores = tl.dot(chunks[c], tl.trans(queries[c]), scores, input_precision="ieee")
        else:
            scores = tl.dot(queries[c], tl.trans(chunks[c]), scores, input_precision="ieee")
    here = _by_dim(source[2], ACROSS)
    scores = tl.where(here, scores * FACTOR, float("-inf"))
    m_s = tl.maximum(tl.ceil(tl.max(scores, 0 if ACROSS else 1)), -1.0e30)
    weight = tl.exp2(scores - _by_head(m_s, ACROSS))
    l_s = _sum(tl.trans(weight) if ACROSS else weight)
    if not WIDE:
        weight = weight.to(tl.bfloat16)
    return m_s, l_s, weight, chunks


@triton.jit
def _product(weight, rows, ACROSS: tl.constexpr):
    """A chunk of O_s: `[HT, DC]`, or ACROSS `[DC, HT]`."""
    if ACROSS:
        made = tl.dot(tl.trans(rows), weight, input_precision="ieee")
    else:
        made = tl.dot(weight, rows, input_precision="ieee")
    return made


@triton.jit
def _add(state, span, CHUNKS: tl.constexpr, ACROSS: tl.constexpr):
    """(M, l, O) of all spans so far with one more merged in."""
    m, total, a, b = _merge_factors(state[0], state[1], span[0], span[1])
    merged = ()
    for c in tl.static_range(CHUNKS):
        o = _product(span[2], span[3][c], ACROSS)
        merged += (_merge(state[2][c], o, a, b, ACROSS),)  # type: ignore[assignment]
    return m, total, merged


@triton.jit
def _store_span(
    parts, sums, span, part, h, mine, H, D: tl.constexpr, DC: tl.constexpr, CHUNKS: tl.constexpr,
    ACROSS: tl.constexpr,
):  # fmt: skip
    tl.store(sums + part * 2 * H + h, span[0], mask=mine)
    tl.store(sums + part * 2 * H + H + h, span[1], mask=mine)
    for c in tl.static_range(CHUNKS):
        dim = c * DC + tl.arange(0, DC)
        place = _by_head((part * H + h) * D, ACROSS) + _by_dim(dim, ACROSS)
        inside = _by_head(mine, ACROSS) & _by_dim(dim < D, ACROSS)
        tl.store(parts + place, _product(span[2], span[3][c], ACROSS), mask=inside)


@triton.jit(do_not_specialize=INTEGERS, do_not_specialize_on_alignment=INDEXES)
def _attend(
    q, sink, own, ring, pages, listed, positions, sequence_ids, computed, state_slots, block_table,
    out, sums, T, H, K, BLOCKS, STRIDE, PARTS, FACTOR,
    WINDOW: tl.constexpr, RATIO: tl.constexpr, LISTED: tl.constexpr, FP8: tl.constexpr,
    WIDE: tl.constexpr, CAST: tl.constexpr, SPLIT: tl.constexpr, D: tl.constexpr,
    N: tl.constexpr, GROUP: tl.constexpr, RING: tl.constexpr, RPP: tl.constexpr,
    DATA: tl.constexpr, SCALE: tl.constexpr, RING_PAGE: tl.constexpr, PAGE: tl.constexpr,
    DENSE: tl.constexpr, TWICE: tl.constexpr, HT: tl.constexpr, ROWS: tl.constexpr,
    DC: tl.constexpr, CHUNKS: tl.constexpr, FIRST: tl.constexpr, WORDS: tl.constexpr,
    ACROSS: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """HT heads of one token over all its spans; with SPLIT over every n-th, unmerged.

    `out [T, H, D]`, or with SPLIT `[T, PARTS, H, D]` float32 and `sums [T, PARTS, 2, H]` (M_s, l_s).
    `out` may be `q`, but not with SPLIT: these heads are this program's alone, and what it stores has
    gone through products with all it read of them.
    """
    after_previous(EARLY)
    t = tl.program_id(0).to(tl.int64)
    h = tl.program_id(1) * HT + tl.arange(0, HT)
    mine = h < H
    token = _token(positions, sequence_ids, computed, state_slots, t, K, BLOCKS, RATIO, RPP, LISTED)
    first, end = _spans(token[0], token[4], WINDOW, ROWS)
    windows = (WINDOW + ROWS - 1) // ROWS
    begin, step = first, 1
    if SPLIT:
        step = tl.num_programs(2)
        begin = first + tl.program_id(2)
    queries = ()
    acc = ()
    for c in tl.static_range(CHUNKS):
        dim = c * DC + tl.arange(0, DC)
        place = (t * H + h)[:, None] * D + dim[None, :]
        query = tl.load(q + place, mask=mine[:, None] & (dim < D)[None, :], other=0.0)
        queries += (query.to(tl.float32) if WIDE else query,)  # type: ignore[assignment]
        acc += (tl.zeros((DC, HT) if ACROSS else (HT, DC), tl.float32),)  # type: ignore[assignment]
    m, total = _begin(sink, h, H)
    if not TWICE:
        for span in range(begin, end, step):
            source = _either_rows(
                own, ring, pages, listed, block_table, token, t, span, T, K, BLOCKS, STRIDE, WINDOW,
                ROWS, RING, DATA, SCALE, RING_PAGE, RATIO, LISTED, RPP, PAGE, DENSE,
            )  # fmt: skip
            one = _span(
                queries, source, FACTOR, D, N, GROUP, FP8, WIDE, CAST, False, HT, ROWS, DC, CHUNKS,
                FIRST, WORDS, ACROSS,
            )  # fmt: skip
            if SPLIT:
                part = t * PARTS + span
                _store_span(out, sums, one, part, h, mine, H, D, DC, CHUNKS, ACROSS)
            else:
                m, total, acc = _add((m, total, acc), one, CHUNKS, ACROSS)
    else:
        for span in range(begin, windows, step):
            source = window_rows(
                own, ring, token, t, span, T, WINDOW, ROWS, RING, DATA, SCALE, RING_PAGE, DENSE,
                True,
            )  # fmt: skip
            one = _span(
                queries, source, FACTOR, D, N, GROUP, FP8, WIDE, CAST, not DENSE, HT, ROWS, DC,
                CHUNKS, FIRST, WORDS, ACROSS,
            )  # fmt: skip
            if SPLIT:
                part = t * PARTS + span
                _store_span(out, sums, one, part, h, mine, H, D, DC, CHUNKS, ACROSS)
            else:
                m, total, acc = _add((m, total, acc), one, CHUNKS, ACROSS)
        if RATIO > 0:
            # The first of this program's spans that lies beyond the window.
            beyond = begin + tl.cdiv(tl.maximum(windows - begin, 0), step) * step
            for span in range(beyond, end, step):
                source = compressed_rows(
                    pages, listed, block_table, token, t, span - windows, K, BLOCKS, STRIDE, LISTED,
                    ROWS, RPP, DATA, SCALE, PAGE, DENSE,
                )  # fmt: skip
                one = _span(
                    queries, source, FACTOR, D, N, GROUP, FP8, WIDE, CAST, False, HT, ROWS, DC,
                    CHUNKS, FIRST, WORDS, ACROSS,
                )  # fmt: skip
                if SPLIT:
                    part = t * PARTS + span
                    _store_span(out, sums, one, part, h, mine, H, D, DC, CHUNKS, ACROSS)
                else:
                    m, total, acc = _add((m, total, acc), one, CHUNKS, ACROSS)
    if not SPLIT:
        for c in tl.static_range(CHUNKS):
            dim = c * DC + tl.arange(0, DC)
            place = _by_head((t * H + h) * D, ACROSS) + _by_dim(dim, ACROSS)
            inside = _by_head(mine, ACROSS) & _by_dim(dim < D, ACROSS)
            value = acc[c] / _by_head(total, ACROSS)
            tl.store(out + place, value.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=INTEGERS, do_not_specialize_on_alignment=INDEXES)
def _merge_spans(
    parts, sums, sink, positions, sequence_ids, computed, state_slots, out, H, K, BLOCKS, PARTS,
    WINDOW: tl.constexpr, RATIO: tl.constexpr, LISTED: tl.constexpr, RPP: tl.constexpr,
    D: tl.constexpr, ROWS: tl.constexpr, HT: tl.constexpr, DP: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """What `_attend` does with its spans, for HT heads of one token, from their stored results."""
    after_previous(EARLY)
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
        acc = _merge(acc, o, a, b, False)
    place = (t * H + h)[:, None] * D + d[None, :]
    tl.store(out + place, (acc / total[:, None]).to(out.dtype.element_ty), mask=inside)


@dataclass(frozen=True)
class Shape:
    """How a program is cut: most heads, rows of a span, dims of a chunk, warps, pipeline stages.

    `cast`: the device converts OCP codes itself. `twice`: own rows and the ring's are loaded apart, and
    window and compressed rows have code of their own. `first`: all of a span's FP8 rows are loaded before
    any is decoded. `across`: heads are the columns of products. `early`: the kernels start early
    (triton/early.py). `merge`: heads and warps of a program of the merging kernel.
    """

    heads: int
    rows: int
    chunk: int
    warps: int
    stages: int
    cast: bool = False
    twice: bool = True
    first: bool = False
    across: bool = False
    early: bool = False
    merge: tuple[int, int] = (4, 4)


# Shared memory at d = 512: up to 73,728 B (NVIDIA) or 8,192 B (AMD), no spills on AMD.
COMPACT = Shape(heads=32, rows=32, chunk=128, warps=4, stages=1)
# A warp group multiplies 64 rows at once: all heads of one token, rows decoded once.
WARP_GROUPS = Shape(64, 64, 64, 8, 3, cast=True, twice=False, first=True, early=True, merge=(1, 4))
# For few tokens: each row is decoded by several programs, and each of them has less to do.
FEW = replace(WARP_GROUPS, heads=16, chunk=128, across=True)
FLOAT32 = Shape(heads=16, rows=16, chunk=128, warps=4, stages=1)


def _most_parts(
    geometry: dict[str, Any], window: int, rows: int, listed: Tensor | None, batch: ForwardBatch
) -> int:
    """Spans a token can have, by the tensors' shapes."""
    compressed = batch.block_table.shape[1] * geometry["RPP"] if geometry["RATIO"] else 0
    if geometry["LISTED"] and listed is not None:
        compressed = min(compressed, listed.shape[1])
    return -(-window // rows) - (-compressed // rows)


def _whole_words(geometry: dict[str, Any]) -> bool:
    """Whether a row's scales are one aligned word of eight bytes."""
    places = (geometry[name] for name in ("DATA", "RING_PAGE", "PAGE"))
    return bool(geometry["SCALE"] == 8 and all(place % 8 == 0 for place in places))


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
    few: Shape | None = None,
    split: bool | None = None,
    dense: bool | None = None,
) -> Tensor:
    """The op `sparse_attention` (ops/attention.py). `listed` holds distinct visible rows before its −1s.

    The result lies where q lay: half a GiB for a prompt's step. Where spans have programs of their own,
    the merging kernel, which reads no queries, writes it.

    `few` is the shape for few tokens, if it is another and their spans are divided. `split` (spans
    in programs of their own) and `dense` (FP8 rows decoded beforehand) force one of the launch forms; None
    takes the faster. Raises `KernelError` where the three kinds of rows differ in format, or a ring does
    not hold a window.
    """
    q = out = q.contiguous()
    tokens, heads, dim = q.shape
    if not tokens:
        return out
    geometry = geometry_of(own, ring, pages, listed, ratio)
    if geometry["RING"] < window:
        raise KernelError(f"a ring of {geometry['RING']} rows does not hold a window of {window}")
    wide = not (q.dtype == torch.bfloat16 and own.storage.dtype in (torch.bfloat16, torch.uint8))
    shape = replace(FLOAT32, early=shape.early) if wide else shape
    tile = min(max(triton.next_power_of_2(heads), 16), shape.heads)
    parts = _most_parts(geometry, window, shape.rows, listed, batch)
    if split is None:
        small = tokens * parts * heads * dim * 4 <= SPLIT_BYTES
        split = parts > 1 and tokens * -(-heads // tile) <= SPLIT_TOKENS and small
    if dense is None:
        dense = unpacking_pays(tokens, geometry, batch)
    dense = dense and geometry["FP8"] and not wide
    sources = own.storage, ring.storage, own.storage if pages is None else pages.storage
    if dense:
        rows, compressed = unpacked(own, ring, pages, batch, window, geometry, shape.cast)
        sources = rows, ring.storage, compressed
        geometry |= {"FP8": False, "DATA": dim, "SCALE": 0, "N": dim, "RING_PAGE": 0, "PAGE": 0}
    if not geometry["FP8"]:
        # A stage of these rows takes twice the shared memory, and chunks no registers for decoding.
        stages, widest = min(shape.stages, 2), shape.chunk if wide else PLAIN_CHUNK
        shape = replace(shape, chunk=widest, stages=stages, first=False)
    elif shape.first:
        # Fewer heads than a warp group multiplies are multiplied otherwise: all forms or none are FEW.
        fits = few is not None and tokens * -(-heads // few.heads) * parts <= PROGRAMS
        if few is not None and fits and split and tile == shape.heads:
            shape, tile = few, few.heads
        shape = replace(shape, stages=1)
    chunk = min(max(triton.next_power_of_2(dim), 16), shape.chunk)
    groups = -(-heads // tile)
    pointers = (batch.positions, batch.sequence_ids, batch.num_computed_tokens, batch.state_slots)
    lists = listed.contiguous() if listed is not None else batch.positions
    sizes = (heads, lists.shape[-1], batch.block_table.shape[1])
    target, sums, programs = out, out, 1
    if split:
        target = torch.empty(tokens, parts, heads, dim, dtype=torch.float32, device=q.device)
        sums = torch.empty(tokens, parts, 2, heads, dtype=torch.float32, device=q.device)
        programs = min(parts, max(PROGRAMS // (tokens * groups), 1))
    _attend[(tokens, groups, programs)](
        q, sink, *sources, lists, *pointers, batch.block_table, target, sums, own.rows_per_page,
        *sizes, batch.block_table.stride(0), parts, dim**-0.5 * LOG2_E, WINDOW=window, WIDE=wide,
        CAST=shape.cast, TWICE=shape.twice or dense, SPLIT=split, DENSE=dense, HT=tile, ROWS=shape.rows,
        DC=chunk, CHUNKS=-(-dim // chunk), FIRST=shape.first,
        WORDS=shape.first and _whole_words(geometry), ACROSS=shape.across, EARLY=shape.early,
        **geometry, num_warps=shape.warps, num_stages=shape.stages, **launch(shape.early),
    )  # fmt: skip
    if split:
        few_heads, warps = shape.merge
        _merge_spans[(tokens, -(-heads // few_heads))](
            target, sums, sink, *pointers, out, *sizes, parts, WINDOW=window,
            RATIO=geometry["RATIO"], LISTED=geometry["LISTED"], RPP=geometry["RPP"], D=dim,
            ROWS=shape.rows, HT=few_heads, DP=triton.next_power_of_2(dim), EARLY=shape.early,
            num_warps=warps, **launch(shape.early),
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
        partial(sparse_attention, shape=WARP_GROUPS, few=FEW),
        frozenset({Feature.TRITON, Feature.BF16_MATRIX, Feature.WGMMA, Feature.EARLY_LAUNCH}),
        priority=20,
        supports=_supports,
    ),
)

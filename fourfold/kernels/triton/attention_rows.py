"""Rows as sparse attention reads them: where they lie, what is stored there, and their numbers.

    own rows       one page of this step's rows         ring    a page for each state slot
    pages          compressed rows, found through the block table, by a list or all of them

A chunk of a span's rows is first loaded as stored (`stored`) and then decoded (`decoded`), so that all
loads of a span can be on their way before the first is needed. Where a sequence's rows are read by many
queries, `unpacked` decodes them beforehand. FP8 rows are decoded to bfloat16, which holds them exactly.

It does not know queries, weights or what a span is for.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fourfold.core.batch import ForwardBatch
from fourfold.core.errors import KernelError
from fourfold.core.row_format import FP8_GROUP, RowKind
from fourfold.core.rows import RowPages

UNPACKED_BYTES = 512 << 20  # most that compressed rows decoded beforehand may take
UNPACK_PROGRAMS = 1056  # wanted for compressed rows: eight for each multiprocessor
UNPACK_ROWS = 32
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
def window_rows(
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
def compressed_rows(
    pages, listed, block_table, token, t, span, K, BLOCKS, STRIDE, LISTED: tl.constexpr,
    ROWS: tl.constexpr, RPP: tl.constexpr, DATA: tl.constexpr, SCALE: tl.constexpr,
    PAGE: tl.constexpr, DENSE: tl.constexpr,
):  # fmt: skip
    """As `window_rows`, for the span'th ROWS compressed rows a token sees."""
    _, sequence, _, _, rows = token
    c = span * ROWS + tl.arange(0, ROWS)
    exists = (c >= 0) & (c < rows)
    if LISTED:
        # Not masked by what positions say: this load must not wait for theirs.
        c = tl.load(listed + t * K + c, mask=(c >= 0) & (c < K), other=-1).to(tl.int32)
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
def stored(
    rows, c: tl.constexpr, D: tl.constexpr, N: tl.constexpr, GROUP: tl.constexpr,
    FP8: tl.constexpr, TWICE: tl.constexpr, WORDS: tl.constexpr, DC: tl.constexpr,
):  # fmt: skip
    """Dims c·DC … of a span's rows as stored: numbers or codes, rotary words, scale bytes by group."""
    data, scale, exists, ring, ring_scale, mine = rows
    dim = c * DC + tl.arange(0, DC)
    here, own = exists[:, None], mine[:, None]
    place, ring_place = data[:, None] + dim[None, :], ring[:, None] + dim[None, :]
    codes, rotary, powers = place, place, ()
    if not FP8:
        if (c + 1) * DC > D:
            here &= (dim < D)[None, :]
        codes = _fetch(place, ring_place, own, here, TWICE)
    else:
        if c * DC < N:
            if (c + 1) * DC > N:
                here &= (dim < N)[None, :]
            codes = _fetch(place, ring_place, own, here, TWICE)
            if not WORDS:
                for g in tl.static_range((DC + GROUP - 1) // GROUP):
                    group = c * DC // GROUP + g
                    inside = exists & (group * GROUP < N)
                    powers += (_fetch(scale + group, ring_scale + group, mine, inside, TWICE),)  # type: ignore[assignment]
        if (c + 1) * DC > N:
            there = exists[:, None]
            if c * DC < N or (c + 1) * DC > D:
                there &= ((dim >= N) & (dim < D))[None, :]
            words = tl.pointer_type(tl.uint16)
            place = (data + N).to(words)[:, None] + (dim - N)[None, :]
            ring_place = (ring + N).to(words)[:, None] + (dim - N)[None, :]
            rotary = _fetch(place, ring_place, own, there, TWICE)
    return codes, rotary, powers


@triton.jit
def scales(rows, WORDS: tl.constexpr, TWICE: tl.constexpr):
    """The eight scale bytes of each row in one word (WORDS: there are eight, and aligned)."""
    word = rows[5]
    if WORDS:
        words = tl.pointer_type(tl.int64)
        word = _fetch(rows[1].to(words), rows[4].to(words), rows[5], rows[2], TWICE)
    return word


@triton.jit
def decoded(
    raw, word, c: tl.constexpr, D: tl.constexpr, N: tl.constexpr, GROUP: tl.constexpr,
    FP8: tl.constexpr, WIDE: tl.constexpr, CAST: tl.constexpr, WORDS: tl.constexpr,
    DC: tl.constexpr,
):  # fmt: skip
    """Numbers of a chunk that `stored` has loaded: zero where there is no row or no such dim."""
    codes, rotary, powers = raw
    dim = c * DC + tl.arange(0, DC)
    if not FP8:
        value = codes.to(tl.float32) if WIDE else codes.to(tl.bfloat16)
    else:
        value = codes
        if c * DC < N:
            value = _decode_fp8(codes, CAST)
            power = tl.zeros((value.shape[0], DC), tl.float32)
            for g in tl.static_range((DC + GROUP - 1) // GROUP):
                group = c * DC // GROUP + g
                byte = (word >> (8 * group)) & 0xFF if WORDS else powers[g]
                if DC <= GROUP:
                    power += _decode_e8m0(byte)[:, None]
                else:
                    member = (dim // GROUP == group)[None, :]
                    power = tl.where(member, _decode_e8m0(byte)[:, None], power)
            value *= power
        if (c + 1) * DC > N:
            bits = (rotary.to(tl.int32) << 16).to(tl.float32, bitcast=True)
            value = tl.where((dim < N)[None, :], value, bits) if c * DC < N else bits
        if not WIDE:
            value = value.to(tl.bfloat16)
    return value


@triton.jit
def chunk(
    rows, c: tl.constexpr, D: tl.constexpr, N: tl.constexpr, GROUP: tl.constexpr,
    FP8: tl.constexpr, WIDE: tl.constexpr, CAST: tl.constexpr, TWICE: tl.constexpr,
    DC: tl.constexpr,
):  # fmt: skip
    """Dims c·DC … of a span's rows `[ROWS, DC]`, loaded and decoded."""
    raw = stored(rows, c, D, N, GROUP, FP8, TWICE, False, DC)
    return decoded(raw, rows[5], c, D, N, GROUP, FP8, WIDE, CAST, False, DC)


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
            rows = chunk(source_rows, c, D, N, GROUP, True, False, CAST, False, DC)
            target = out + place[:, None] * D + dim[None, :]
            tl.store(target, rows, mask=exists[:, None] & (dim < D)[None, :])


def geometry_of(
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


def unpacking_pays(tokens: int, geometry: dict[str, Any], batch: ForwardBatch) -> bool:
    """Whether rows are seen often enough to decode them beforehand, and fit: by shapes alone."""
    rows = batch.num_sequences * batch.block_table.shape[1] * geometry["RPP"]
    fits = rows * geometry["D"] * 2 <= UNPACKED_BYTES
    return fits and tokens >= 16 * batch.num_sequences and rows <= 64 * tokens


def unpacked(
    own: RowPages,
    ring: RowPages,
    pages: RowPages | None,
    batch: ForwardBatch,
    window: int,
    geometry: dict[str, Any],
    cast: bool,
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
        programs = min(
            -(-UNPACK_PROGRAMS // sequences), -(-blocks * geometry["RPP"] // UNPACK_ROWS)
        )
        kinds.append((pages, compressed, (sequences, programs)))
    same = ("RATIO", "RING", "RPP", "DATA", "SCALE", "D", "N", "GROUP")
    # The run's own rows lie in one page, whose size would make a variant for every batch.
    page_bytes = (0, geometry["RING_PAGE"], geometry["PAGE"])
    for kind, (source, target, grid) in enumerate(kinds):
        _unpack[grid](
            source.storage, batch.block_table, batch.sequence_ids, batch.num_computed_tokens,
            batch.cu_seqlens_q, batch.state_slots, target, own.rows_per_page, blocks,
            batch.block_table.stride(0), KIND=kind, WINDOW=window, PAGE=page_bytes[kind],
            CAST=cast, ROWS=UNPACK_ROWS, DC=chunk, CHUNKS=-(-dim // chunk), num_warps=4,
            **{name: geometry[name] for name in same},
        )  # fmt: skip
    return rows, compressed

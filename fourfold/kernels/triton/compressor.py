"""Gated pooling for GPUs: one program a row or kept fold and 128 channels, folding token by token.

A row and a kept fold each follow from the saved fold and the run's tokens of at most two windows, so
nothing passes between programs:

    HCA    fold of a token    saved fold if its window began before the run, then the window's tokens
    CSA    current fold       saved `current` likewise, or the window before's first halves;
                              then this window's second halves
           next fold          saved `next` likewise; then this window's first halves

Contract: `fold_step` is the one arithmetic, rounded alike in every kernel: any chunking and any rollback
are bit-equal. Every token index that is loaded is clamped to the batch.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fourfold.core.batch import Emission, ForwardBatch
from fourfold.core.device import Feature
from fourfold.core.row_format import RowKind
from fourfold.core.rows import RowPages
from fourfold.kernels.triton.early import after_previous, also_early, launch
from fourfold.kernels.triton.rows import PLAIN, normed_row, row_shape, row_size, store_row
from fourfold.ops.registry import Kernel

CHANNELS = 128
# A fold must round alike wherever it is compiled: nothing is contracted but explicit tl.fma.
EXACT = {"enable_fp_fusion": False}


@triton.jit
def fold_step(top, total, weighted, gate, value):
    """(max, sum, weighted sum) after one more token; a sum of 0 is an empty fold."""
    top = tl.where(total == 0.0, gate, top)
    rises = gate > top
    power = tl.exp(-tl.abs(gate - top))
    decay = tl.where(rises, power, 1.0)
    lift = tl.where(rises, 1.0, power)
    top = tl.where(rises | (gate != gate), gate, top)
    return top, tl.fma(total, decay, lift), tl.fma(weighted, decay, lift * value)


@triton.jit
def fold_tokens(
    fold, kv, gate, ape, token, phase, count, column, live, STRIDE, STEPS: tl.constexpr
):
    """`fold` after `count` tokens from flat `token` on, the first at place `phase` of its window."""
    top, total, weighted = fold[0], fold[1], fold[2]
    for base in range(0, count, STEPS):
        for step in tl.static_range(STEPS):
            here = live & (base + step < count)
            place = (token + base + step) * STRIDE + column
            g = tl.load(gate + place, mask=here, other=0.0)
            v = tl.load(kv + place, mask=here, other=0.0)
            bias = tl.load(ape + (phase + base + step) * STRIDE + column, mask=here, other=0.0)
            new = fold_step(top, total, weighted, g + bias.to(tl.float32), v)
            top = tl.where(here, new[0], top)
            total = tl.where(here, new[1], total)
            weighted = tl.where(here, new[2], weighted)
    return top, total, weighted


@triton.jit
def _saved(folds, slot, series, column, wanted, W, SERIES: tl.constexpr):
    """A saved fold, or the empty one."""
    place = folds + (tl.maximum(slot, 0) * SERIES + series) * 3 * W + column
    mask = wanted & (slot >= 0)
    top = tl.load(place, mask=mask, other=0.0)
    total = tl.load(place + W, mask=mask, other=0.0)
    return top, total, tl.load(place + 2 * W, mask=mask, other=0.0)


@triton.jit
def folds_after(
    token,
    wants_next,
    kv,
    gate,
    ape,
    folds,
    positions,
    sequence_ids,
    cu_seqlens_q,
    num_computed,
    fold_sources,
    column,
    T,
    W,
    M,
    SERIES: tl.constexpr,
    STEPS: tl.constexpr,
):
    """The current fold and the next one (if wanted, and CSA) after flat `token`; whether it completes
    its window."""
    live = column < W
    token = tl.minimum(tl.maximum(token, 0), T - 1).to(tl.int64)
    position = tl.load(positions + token)
    sequence = tl.load(sequence_ids + token)
    begin = tl.load(cu_seqlens_q + sequence)
    run = tl.load(num_computed + sequence)
    slot = tl.load(fold_sources + sequence).to(tl.int64)
    window = position // M * M
    opens = window <= run  # the run's first window: what was saved belongs to it
    first = tl.maximum(window, run)
    count = (position - first + 1).to(tl.int32)
    here = begin + first - run
    phase = first - window
    stride = SERIES * W
    current = _saved(folds, slot, 0, column, live & opens, W, SERIES)
    upcoming = current
    if SERIES == 2:
        earlier = window - M
        before = tl.maximum(earlier, run)
        left = tl.where(opens, 0, (window - before).to(tl.int32))
        after_saved = (window > run) & (earlier <= run)
        previous = _saved(folds, slot, 1, column, live & after_saved, W, SERIES)
        previous = fold_tokens(
            previous, kv, gate, ape, begin + before - run, before - earlier, left, column, live,
            stride, STEPS,
        )  # fmt: skip
        top = tl.where(opens, current[0], previous[0])
        total = tl.where(opens, current[1], previous[1])
        current = (top, total, tl.where(opens, current[2], previous[2]))
        upcoming = _saved(folds, slot, 1, column, live & opens & wants_next, W, SERIES)
        upcoming = fold_tokens(
            upcoming, kv, gate, ape, here, phase, tl.where(wants_next, count, 0), column, live,
            stride, STEPS,
        )  # fmt: skip
    current = fold_tokens(
        current, kv, gate, ape, here, phase, count, column + (SERIES - 1) * W, live, stride, STEPS
    )
    return current, upcoming, (position + 1) % M == 0


@triton.jit
def store_kept(kept, index, current, upcoming, completes, column, W, SERIES: tl.constexpr):
    """Write a kept fold; where a window is complete, `next` becomes `current` and `next` is empty."""
    live = column < W
    place = kept + index.to(tl.int64) * SERIES * 3 * W + column
    for part in tl.static_range(3):
        if SERIES == 2:
            tl.store(
                place + part * W, tl.where(completes, upcoming[part], current[part]), mask=live
            )
            emptied = tl.where(completes, 0.0, upcoming[part])
            tl.store(place + (3 + part) * W, emptied, mask=live)
        else:
            tl.store(place + part * W, tl.where(completes, 0.0, current[part]), mask=live)


@triton.jit
def _compress(
    kv,
    gate,
    ape,
    folds,
    positions,
    sequence_ids,
    cu_seqlens_q,
    num_computed,
    fold_sources,
    row_tokens,
    kept_tokens,
    rows,
    kept,
    T,
    E,
    W,
    M,
    SERIES: tl.constexpr,
    STEPS: tl.constexpr,
    BLOCK: tl.constexpr,
    EARLY: tl.constexpr,
):
    """Programs 0 … E−1 make a row each, the others a kept fold."""
    after_previous(EARLY)
    program = tl.program_id(0)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    is_row = program < E
    token = tl.load(row_tokens + program, mask=is_row, other=0)
    token += tl.load(kept_tokens + program - E, mask=program >= E, other=0)
    current, upcoming, completes = folds_after(
        token, program >= E, kv, gate, ape, folds, positions, sequence_ids, cu_seqlens_q,
        num_computed, fold_sources, column, T, W, M, SERIES, STEPS,
    )  # fmt: skip
    if is_row:
        value = (current[2] / current[1]).to(rows.dtype.element_ty)
        tl.store(rows + program.to(tl.int64) * W + column, value, mask=column < W)
    else:
        store_kept(kept, program - E, current, upcoming, completes, column, W, SERIES)


@triton.jit
def _store_folds(folds, kept, targets, SIZE, BLOCK: tl.constexpr, EARLY: tl.constexpr):
    """One kept fold to its slot; −1 is nowhere."""
    after_previous(EARLY)
    index = tl.program_id(0).to(tl.int64)
    target = tl.load(targets + index).to(tl.int64)
    if target < 0:
        return
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(kept + index * SIZE + i, mask=i < SIZE)
    tl.store(folds + target * SIZE + i, value, mask=i < SIZE)


@triton.jit(do_not_specialize=["T", "E", "OWN_PAGE"])
def _compress_rows(
    kv,
    gate,
    ape,
    folds,
    positions,
    sequence_ids,
    cu_seqlens_q,
    num_computed,
    fold_sources,
    row_tokens,
    row_positions,
    row_slots,
    kept_tokens,
    norm,
    inv_freq,
    pooled,
    own,
    pages,
    kept,
    T,
    E,
    W,
    M,
    half,
    eps,
    DATA,
    SCALE_BYTES,
    OWN_PAGE,
    page_stride,
    PER_PAGE,
    SERIES: tl.constexpr,
    STEPS: tl.constexpr,
    KIND: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
    HALF: tl.constexpr,
    PADDING: tl.constexpr,
    EARLY: tl.constexpr,
):
    """As `_compress`, whole rows at once, which are then normalised, rotated, encoded and written: to
    the page `own`, and to their slot of `pages`."""
    after_previous(EARLY)
    program = tl.program_id(0)
    column = tl.arange(0, BLOCK)
    is_row = program < E
    token = tl.load(row_tokens + program, mask=is_row, other=0)
    token += tl.load(kept_tokens + program - E, mask=program >= E, other=0)
    current, upcoming, completes = folds_after(
        token, program >= E, kv, gate, ape, folds, positions, sequence_ids, cu_seqlens_q,
        num_computed, fold_sources, column, T, W, M, SERIES, STEPS,
    )  # fmt: skip
    if is_row:
        row = program.to(tl.int64)
        value = (current[2] / current[1]).to(pooled.dtype.element_ty)
        tl.store(pooled + row * W + column, value, mask=column < W)
        tl.debug_barrier()  # the row is read back below, by other lanes
        n = W - 2 * half
        d = tl.arange(0, BLOCK // GROUP)[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
        r = tl.arange(0, 2 * HALF)[None, :]
        r = tl.where(r < 2 * half, r, -1)
        position = tl.load(row_positions + row)
        still, turned = normed_row(
            pooled + row * W, norm, position, inv_freq, d, r, n, W, half, eps, HALF
        )
        scales = DATA * tl.cast(E, tl.int64) + row * SCALE_BYTES
        store_row(own, row * DATA, scales, still, turned, d, r, n, SCALE_BYTES, KIND, GROUP)
        if KIND != PLAIN:  # noqa: SIM102 - one is decided when compiling
            if row == E - 1:
                spare = (DATA + SCALE_BYTES) * tl.cast(E, tl.int64) + tl.arange(0, PADDING)
                tl.store(own + spare, tl.zeros((PADDING,), dtype=tl.uint8), mask=spare < OWN_PAGE)
        slot = tl.load(row_slots + row).to(tl.int64)
        if slot >= 0:
            page = pages + slot // PER_PAGE * page_stride
            offset = slot % PER_PAGE
            scales = tl.cast(PER_PAGE, tl.int64) * DATA + offset * SCALE_BYTES
            store_row(page, offset * DATA, scales, still, turned, d, r, n, SCALE_BYTES, KIND, GROUP)
    else:
        store_kept(kept, program - E, current, upcoming, completes, column, W, SERIES)


def compress(
    kv: Tensor,
    gate: Tensor,
    ape: Tensor,
    folds: Tensor,
    batch: ForwardBatch,
    emission: Emission,
    ratio: int,
    out_dtype: torch.dtype,
    early: bool = False,
) -> tuple[Tensor, Tensor]:
    """The op `compress` (ops/compressor.py)."""
    series, width = folds.shape[1], folds.shape[-1]
    count, keeps = emission.tokens.shape[0], batch.fold_tokens.shape[0]
    rows = torch.empty(count, width, dtype=out_dtype, device=kv.device)
    kept = torch.empty(keeps, series, 3, width, dtype=torch.float32, device=kv.device)
    if count + keeps and batch.num_tokens:
        _compress[(count + keeps, -(-width // CHANNELS))](
            kv.contiguous(), gate.contiguous(), ape, folds, batch.positions, batch.sequence_ids,
            batch.cu_seqlens_q, batch.num_computed_tokens, batch.fold_sources, emission.tokens,
            batch.fold_tokens, rows, kept, batch.num_tokens, count, width, ratio,
            SERIES=series, STEPS=fold_steps(ratio), BLOCK=CHANNELS, EARLY=early, num_warps=4,
            **EXACT, **launch(early),
        )  # fmt: skip
    return rows, kept


def fold_steps(ratio: int) -> int:
    """Tokens whose loads are in flight together: a window of CSA, 16 of HCA's 128."""
    return min(triton.next_power_of_2(ratio), 16)


def store_folds(folds: Tensor, kept: Tensor, targets: Tensor, early: bool = False) -> None:
    """The op `store_folds` (ops/compressor.py)."""
    if targets.shape[0]:
        size = kept[0].numel()
        _store_folds[(targets.shape[0], -(-size // 1024))](
            folds, kept.contiguous(), targets, size, BLOCK=1024, EARLY=early, num_warps=4,
            **launch(early),
        )  # fmt: skip


def compress_rows(
    ops: object,
    kv: Tensor,
    gate: Tensor,
    ape: Tensor,
    norm: Tensor,
    inv_freq: Tensor,
    eps: float,
    pages: RowPages,
    folds: Tensor,
    batch: ForwardBatch,
    emission: Emission,
    ratio: int,
    out_dtype: torch.dtype,
    early: bool = False,
) -> RowPages:
    """The op `compress_rows` (ops/compressor.py) in two launches: folds are written last, as other
    programs read them until then."""
    series, width, format = folds.shape[1], folds.shape[-1], pages.format
    count, keeps, device = emission.tokens.shape[0], batch.fold_tokens.shape[0], kv.device
    plain = format.kind is RowKind.PLAIN
    shape = (1, count, format.dim) if plain else (1, format.page_bytes(count))
    own = torch.empty(shape, dtype=pages.storage.dtype, device=device)
    pooled = torch.empty(count, width, dtype=out_dtype, device=device)
    kept = torch.empty(keeps, series, 3, width, dtype=torch.float32, device=device)
    if count + keeps and batch.num_tokens:
        _compress_rows[(count + keeps,)](
            kv.contiguous(), gate.contiguous(), ape, folds, batch.positions, batch.sequence_ids,
            batch.cu_seqlens_q, batch.num_computed_tokens, batch.fold_sources, emission.tokens,
            emission.positions, emission.slots, batch.fold_tokens, norm, inv_freq, pooled, own,
            pages.storage, kept, batch.num_tokens, count, width, ratio, inv_freq.shape[0], eps,
            row_size(format), format.scale_bytes, own.shape[1], pages.storage.stride(0),
            pages.rows_per_page, SERIES=series, STEPS=fold_steps(ratio),
            PADDING=triton.next_power_of_2(format.data_bytes), **row_shape(format),
            EARLY=early, num_warps=8 if width > 256 else 4, **EXACT, **launch(early),
        )  # fmt: skip
    store_folds(folds, kept, batch.fold_targets, early)
    return RowPages(own, format, count)


_NEEDS = frozenset({Feature.TRITON})
KERNELS = also_early(
    Kernel("compress", "triton", compress, _NEEDS),
    Kernel("store_folds", "triton", store_folds, _NEEDS),
    Kernel("compress_rows", "triton", compress_rows, _NEEDS),
)

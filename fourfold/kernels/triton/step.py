"""What is around the model in a step, on GPUs: every op of ops/step.py is one launch.

An index of a launch is a run, a token, a row, a fold and a candidate at once: program p takes those
numbered p·BLOCK … of each, as far as there are any. What is as long as the context or as wide as the
streams has programs of its own behind those.

Contract: integers, copied numbers, and `uniform`'s: everything equals the bodies to the last bit. Shapes
are not specialised on: a step of another size compiles nothing. At most two compress ratios.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fourfold.core.batch import Emission, ForwardBatch
from fourfold.core.config import ModelConfig
from fourfold.core.device import Feature
from fourfold.core.row_format import rows_per_page
from fourfold.kernels.triton.sampling import uniform_number
from fourfold.ops.registry import Kernel
from fourfold.ops.step import Columns, Seats, Settled, StepLayout

BLOCK = 128
TABLE_BLOCK = 1024  # pages of a block table copied by one program
STREAM_BLOCK = 2048  # numbers of a token's streams
MOST_RATIOS = 2


@triton.jit(do_not_specialize=["S", "R", "T", "V", "L", "WIDTH"])
def _seat(
    slots, sequence_ids, fold_owners, keep_versions, sampling, logits_tokens, ends, stops, random,
    temperature, top_p, top_k, min_p, mine, token_slots, fold_slots, fold_targets, own_ends, own_stops,
    own_random, own_temperature, own_top_p, own_top_k, own_min_p, S, R, T, V, L, WIDTH,
    VERSIONS: tl.constexpr, STOPS: tl.constexpr, STOPS_TILE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    slot = tl.load(slots + i, mask=i < S, other=0)
    tl.store(fold_slots + i, slot * VERSIONS, mask=i < S)
    slot = tl.load(slots + tl.load(sequence_ids + i, mask=i < T, other=0), mask=i < T, other=0)
    tl.store(token_slots + i, slot, mask=i < T)
    slot = tl.load(slots + tl.load(fold_owners + i, mask=i < V, other=0), mask=i < V, other=0)
    version = tl.load(keep_versions + i, mask=i < V, other=0)
    tl.store(fold_targets + i, slot * VERSIONS + version, mask=i < V)

    slot = tl.load(slots + tl.load(sampling + i, mask=i < R, other=0), mask=i < R, other=0)
    tl.store(mine + i, slot, mask=i < R)
    tl.store(own_ends + i, tl.load(ends + slot, mask=i < R, other=0), mask=i < R)
    for first in range(0, STOPS, STOPS_TILE):
        n = first + tl.arange(0, STOPS_TILE)[None, :]
        live = (i < R)[:, None] & (n < STOPS)
        stop = tl.load(stops + slot[:, None] * WIDTH + n, mask=live, other=0)
        tl.store(own_stops + i.to(tl.int64)[:, None] * STOPS + n, stop, mask=live)

    token = tl.load(logits_tokens + i, mask=i < L, other=0)
    sequence = tl.load(sequence_ids + token, mask=i < L, other=0)
    slot = tl.load(slots + sequence, mask=i < L, other=0)
    tl.store(own_random + i, tl.load(random + slot, mask=i < L, other=0), mask=i < L)
    tl.store(own_temperature + i, tl.load(temperature + slot, mask=i < L, other=0.0), mask=i < L)
    tl.store(own_top_p + i, tl.load(top_p + slot, mask=i < L, other=0.0), mask=i < L)
    tl.store(own_top_k + i, tl.load(top_k + slot, mask=i < L, other=0), mask=i < L)
    tl.store(own_min_p + i, tl.load(min_p + slot, mask=i < L, other=0.0), mask=i < L)


@triton.jit
def _computed(slots, lengths, alive, run, mask):
    """(slot, alive, tokens in the state) of runs."""
    slot = tl.load(slots + run, mask=mask, other=0)
    lives = mask & (tl.load(alive + slot, mask=mask, other=0) != 0)
    return slot, lives, tl.load(lengths + slot, mask=lives, other=0)


@triton.jit
def _emit(
    owners, numbers, counts, starts, slots, lengths, alive, table, tokens, positions, targets, i, E,
    PAGES, RATIO: tl.constexpr, PER_PAGE: tl.constexpr,
):  # fmt: skip
    """Candidates for one ratio: `core.batch.place` says what they are."""
    live = i < E
    owner = tl.load(owners + i, mask=live, other=0)
    number = tl.load(numbers + i, mask=live, other=0)
    count = tl.load(counts + i, mask=live, other=1)
    start = tl.load(starts + i, mask=live, other=0)
    slot, lives, base = _computed(slots, lengths, alive, owner, live)
    row = base // RATIO + number
    index = RATIO * row + (RATIO - 1) - base
    page = row // PER_PAGE
    written = lives & (index < count) & (page < PAGES)
    block = tl.load(table + slot * PAGES + page, mask=written, other=-1)
    target = tl.where(written & (block >= 0), (block - page) * PER_PAGE + row, -1)
    tl.store(tokens + i, start + tl.minimum(index, count - 1), mask=live)
    tl.store(positions + i, RATIO * row, mask=live)
    tl.store(targets + i, target, mask=live)


@triton.jit(do_not_specialize=["S", "T", "V", "L", "EA", "EB", "PAGES", "RING", "MAIN", "PARTS"])
def _place(
    slots, token_slots, fold_slots, fold_targets, fold_owners, sequence_ids, offsets, stays, known,
    logits_tokens, random, tokens, lengths, version, alive, table, token_ids, positions, ring_slots,
    computed, own_table, state_slots, sources, targets, uniform, owners_a, numbers_a, counts_a,
    starts_a, tokens_a, positions_a, slots_a, owners_b, numbers_b, counts_b, starts_b, tokens_b,
    positions_b, slots_b, S, T, V, L, EA, EB, PAGES, RING, MAIN, PARTS, VERSIONS: tl.constexpr,
    KNOWN: tl.constexpr, A: tl.constexpr, PER_A: tl.constexpr, B: tl.constexpr, PER_B: tl.constexpr,
    BLOCK: tl.constexpr, TABLE_BLOCK: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    if program >= MAIN:
        run = ((program - MAIN) // PARTS).to(tl.int64)
        slot = tl.load(slots + run)
        p = ((program - MAIN) % PARTS) * TABLE_BLOCK + tl.arange(0, TABLE_BLOCK)
        live = tl.load(alive + slot) != 0
        page = tl.load(table + slot * PAGES + p, mask=(p < PAGES) & live, other=-1)
        tl.store(own_table + run * PAGES + p, page, mask=p < PAGES)
        return
    i = program * BLOCK + tl.arange(0, BLOCK)
    slot, lives, length = _computed(slots, lengths, alive, i, i < S)
    first = tl.load(fold_slots + i, mask=i < S, other=0)
    stands = tl.load(version + slot, mask=lives, other=0)
    tl.store(computed + i, length, mask=i < S)
    tl.store(state_slots + i, tl.where(lives, slot, -1), mask=i < S)
    tl.store(sources + i, tl.where(length > 0, first + stands, -1), mask=i < S)

    owner = tl.load(fold_owners + i, mask=i < V, other=0)
    slot, lives, length = _computed(slots, lengths, alive, owner, i < V)
    target = tl.load(fold_targets + i, mask=i < V, other=0)
    tl.store(targets + i, tl.where(lives, target, -1), mask=i < V)

    owner = tl.load(sequence_ids + i, mask=i < T, other=0)
    offset = tl.load(offsets + i, mask=i < T, other=0)
    slot, lives, length = _computed(slots, lengths, alive, owner, i < T)
    place = length + offset
    stay = lives & (tl.load(stays + i, mask=i < T, other=0) != 0)
    own = tl.load(tokens + slot * VERSIONS + tl.minimum(offset, VERSIONS - 1), mask=i < T, other=0)
    if KNOWN:
        told = tl.load(known + i, mask=i < T, other=-1)
        own = tl.where(told >= 0, told, own)
    tl.store(token_ids + i, own, mask=i < T)
    tl.store(positions + i, place, mask=i < T)
    tl.store(ring_slots + i, tl.where(stay, slot * RING + place % RING, -1), mask=i < T)

    token = tl.load(logits_tokens + i, mask=i < L, other=0)
    owner = tl.load(sequence_ids + token, mask=i < L, other=0)
    slot, lives, length = _computed(slots, lengths, alive, owner, i < L)
    place = length + tl.load(offsets + token, mask=i < L, other=0) + 1
    stream = tl.load(random + i, mask=i < L, other=0)
    tl.store(uniform + i, uniform_number(stream, place), mask=i < L)

    if A > 0:
        _emit(
            owners_a, numbers_a, counts_a, starts_a, slots, lengths, alive, table, tokens_a,
            positions_a, slots_a, i, EA, PAGES, A, PER_A,
        )  # fmt: skip
    if B > 0:
        _emit(
            owners_b, numbers_b, counts_b, starts_b, slots, lengths, alive, table, tokens_b,
            positions_b, slots_b, i, EB, PAGES, B, PER_B,
        )  # fmt: skip


@triton.jit(do_not_specialize=["SIZE"])
def _settle(
    slots, ends, stops, known, counts, cu_seqlens, numbers, rows, valid, row_counts, draft_tokens,
    token_ids, computed, state_slots, sampled, nonfinite, streams, tokens, lengths, version, alive,
    own_streams, answers, last, SIZE, VERSIONS: tl.constexpr, W: tl.constexpr, WIDTH: tl.constexpr,
    STOPS: tl.constexpr, STOPS_TILE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Program (run, part): a part of the run's streams; the first one settles all the rest."""
    run = tl.program_id(0).to(tl.int64)
    slot, count = tl.load(slots + run), tl.load(counts + run)
    number, before = tl.load(numbers + run), tl.load(computed + run)
    live = tl.load(state_slots + run) >= 0
    standing, stands, over = count, count * 0, count < 0
    if number >= 0:
        w = tl.arange(0, WIDTH)
        row = tl.load(rows + number * W + w, mask=w < W, other=0)
        pick = tl.load(sampled + row, mask=w < W, other=0)
        n = tl.arange(0, STOPS_TILE)
        stop = tl.load(stops + number * STOPS + n, mask=n < STOPS, other=-1)
        stopped = tl.max((pick[:, None] == stop[None, :]).to(tl.int32), axis=1) > 0
        before_stop = tl.min(tl.where(stopped & (w < W), w, W), axis=0)
        # Row w's pick against the draft that was fed as row w + 1.
        drafted = w < W - 1
        theirs = tl.load(valid + number * W + w + 1, mask=drafted, other=0) != 0
        token = tl.load(draft_tokens + number * (W - 1) + w, mask=drafted, other=0)
        draft = tl.load(token_ids + token, mask=drafted & theirs, other=-1)
        accepted = tl.min(tl.where(drafted & (pick == draft), W - 1, tl.minimum(w, W - 1)), axis=0)
        room = tl.load(ends + number) - (before + tl.load(known + run))
        taken = 1 + tl.minimum(accepted, before_stop).to(tl.int64)
        taken = tl.maximum(tl.minimum(taken, room), 1)
        over = (before_stop < taken) | (taken >= room)
        standing = count + taken - tl.load(row_counts + number)
        stands = taken - 1
        if tl.program_id(1) == 0:
            tl.store(answers + number * (W + 1), taken)
            tl.store(answers + number * (W + 1) + 1 + w, pick, mask=w < W)
            first = tl.sum(tl.where(w == stands, pick, 0), axis=0)
            tl.store(tokens + slot * VERSIONS, first)
    end = tl.load(cu_seqlens + run) + standing - 1
    if tl.program_id(1) == 0:
        tl.store(last + run, end)
        tl.store(lengths + slot, before + standing)
        tl.store(version + slot, stands)
        bad = tl.load(nonfinite + run) != 0
        tl.store(alive + slot, (live & (bad == 0) & (over == 0)).to(tl.uint8))
    if live:
        i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        stream = tl.load(streams + end * SIZE + i, mask=i < SIZE)
        tl.store(own_streams + slot * SIZE + i, stream, mask=i < SIZE)


@triton.jit(do_not_specialize=["T"])
def _next(
    token_ids, sequence_ids, offsets, counts, known, numbers, rows, sampled, after, following, T,
    W: tl.constexpr, AFTER: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    live = i < T
    run = tl.load(sequence_ids + i, mask=live, other=0)
    offset = tl.load(offsets + i, mask=live, other=0)
    number = tl.load(numbers + run, mask=live, other=-1)
    place = offset - tl.load(known + run, mask=live, other=0) + 1
    token = tl.load(token_ids + (i + 1) % T, mask=live, other=0)
    samples = live & (number >= 0) & (place >= 0)
    row = tl.load(rows + number * W, mask=samples, other=0) + place
    token = tl.where(samples, tl.load(sampled + row, mask=samples, other=0), token)
    if AFTER:
        ends = live & (offset + 1 == tl.load(counts + run, mask=live, other=0))
        told = tl.load(after + run, mask=ends, other=-1)
        token = tl.where(told >= 0, told, token)
    tl.store(following + i, token, mask=live)


@triton.jit(do_not_specialize=["N", "RING"])
def _after(
    tokens, positions, sequence_ids, state_slots, token_ids, own_positions, numbers, own_slots,
    ring_slots, sources, N, RING, BLOCK: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    live = i < N
    token = tl.load(tokens + i, mask=live, other=0)
    position = tl.load(positions + token, mask=live, other=0) + 1
    run = tl.load(sequence_ids + token, mask=live, other=0)
    slot = tl.load(state_slots + run, mask=live, other=-1)
    tl.store(token_ids + i, tl.zeros_like(position), mask=live)
    tl.store(own_positions + i, position, mask=live)
    tl.store(numbers + i, i.to(tl.int64), mask=i <= N)
    tl.store(own_slots + i, slot, mask=live)
    tl.store(ring_slots + i, tl.where(slot >= 0, slot * RING + position % RING, -1), mask=live)
    tl.store(sources + i, tl.zeros_like(position) - 1, mask=live)


@triton.jit(do_not_specialize=["R"])
def _keep(
    tokens, slots, answers, drafts, out, R, K: tl.constexpr, WIDTH: tl.constexpr,
    TILE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    i = (tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)[:, None]
    n = tl.arange(0, TILE)[None, :]
    live = i < R
    slot = tl.load(slots + i, mask=live, other=0)
    draft = tl.load(drafts + i * K + n, mask=live & (n < K), other=0)
    answer = tl.load(answers + i * WIDTH + n, mask=live & (n < WIDTH), other=0)
    tl.store(tokens + slot * (K + 1) + 1 + n, draft, mask=live & (n < K))
    tl.store(out + i * (WIDTH + K) + n, answer, mask=live & (n < WIDTH))
    tl.store(out + i * (WIDTH + K) + WIDTH + n, draft, mask=live & (n < K))


def _parts(device: torch.device, *sizes: int) -> list[Tensor]:
    """int64 tensors of these sizes in one piece of memory, each at a multiple of 128 bytes."""
    places, total = [], 0
    for size in sizes:
        places.append(total)
        total += -(-size // 16) * 16
    whole = torch.empty(total, dtype=torch.int64, device=device)
    return [whole[at : at + size] for at, size in zip(places, sizes, strict=True)]


def _blocks(*sizes: int) -> int:
    return -(-max(sizes) // BLOCK)


def seat_runs(columns: Columns, step: StepLayout, slots: Tensor, stops: int) -> Seats:
    """The op `seat_runs` (ops/step.py)."""
    layout, device = step.layout, slots.device
    runs, sampling = slots.shape[0], step.sampling.shape[0]
    tokens, folds = layout.sequence_ids.shape[0], layout.fold_owners.shape[0]
    rows, width = layout.logits_tokens.shape[0], columns.stops.shape[1]
    stops = min(stops, width)
    sizes = (sampling, tokens, runs, folds, sampling, sampling * stops, rows, rows)
    mine, token_slots, fold_slots, fold_targets, ends, own_stops, random, top_k = _parts(
        device, *sizes
    )
    fractions = torch.empty(3, -(-rows // 32) * 32, dtype=torch.float32, device=device)
    temperature, top_p, min_p = (each[:rows] for each in fractions.unbind(0))
    if tokens:
        _seat[(_blocks(runs, tokens, folds, rows),)](
            slots, layout.sequence_ids, layout.fold_owners, step.keep_versions, step.sampling,
            layout.logits_tokens, columns.ends, columns.stops, columns.random, columns.temperature,
            columns.top_p, columns.top_k, columns.min_p, mine, token_slots, fold_slots, fold_targets,
            ends, own_stops, random, temperature, top_p, top_k, min_p, runs, sampling, tokens, folds,
            rows, width, VERSIONS=columns.versions, STOPS=stops,
            STOPS_TILE=min(triton.next_power_of_2(max(stops, 1)), 8), BLOCK=BLOCK, num_warps=4,
        )  # fmt: skip
    return Seats(
        step, slots, mine, token_slots, fold_slots, fold_targets, ends,
        own_stops.view(sampling, 1, stops), random, temperature, top_p, top_k, min_p,
    )  # fmt: skip


def place_step(
    ops: Any, columns: Columns, seats: Seats, token_ids: Tensor | None
) -> tuple[ForwardBatch, Tensor]:
    """The op `place_step` (ops/step.py)."""
    step, slots = seats.step, seats.slots
    layout, device = step.layout, slots.device
    runs, pages = slots.shape[0], columns.block_table.shape[1]
    tokens, folds = layout.offsets.shape[0], layout.fold_owners.shape[0]
    rows = layout.logits_tokens.shape[0]
    ratios = sorted(layout.candidates)
    counts = [layout.candidates[ratio].owners.shape[0] for ratio in ratios]
    own, positions, ring, computed, states, sources, targets, *emitted = _parts(
        device, tokens, tokens, tokens, runs, runs, runs, folds, *(n for n in counts for _ in "tps")
    )
    uniform = torch.empty(rows, dtype=torch.float64, device=device)
    table = torch.empty(runs, pages, dtype=torch.int64, device=device)
    emissions = {ratio: Emission(*emitted[3 * n : 3 * n + 3]) for n, ratio in enumerate(ratios)}

    def of_ratio(n: int) -> tuple[list[Tensor], int, int, int]:
        """A ratio's tensors, how many candidates, the ratio, its rows a page; some tensors for none."""
        if n >= len(ratios):
            return [slots] * 7, 0, 0, 1
        c, e = layout.candidates[ratios[n]], emissions[ratios[n]]
        tensors = [c.owners, c.numbers, c.counts, c.starts, e.tokens, e.positions, e.slots]
        return tensors, counts[n], ratios[n], rows_per_page(ratios[n])

    if tokens:
        (a, count_a, ratio_a, per_a), (b, count_b, ratio_b, per_b) = of_ratio(0), of_ratio(1)
        main, parts = _blocks(runs, tokens, folds, rows, *counts), -(-pages // TABLE_BLOCK)
        _place[(main + runs * parts,)](
            slots, seats.token_slots, seats.fold_slots, seats.fold_targets, layout.fold_owners,
            layout.sequence_ids, layout.offsets, layout.stays.view(torch.uint8),
            slots if token_ids is None else token_ids, layout.logits_tokens, seats.streams,
            columns.tokens, columns.lengths, columns.version, columns.alive.view(torch.uint8),
            columns.block_table, own, positions, ring, computed, table, states, sources, targets,
            uniform, *a, *b, runs, tokens, folds, rows, count_a, count_b, pages, layout.ring_rows,
            main, max(parts, 1), VERSIONS=columns.versions, KNOWN=token_ids is not None, A=ratio_a,
            PER_A=per_a, B=ratio_b, PER_B=per_b, BLOCK=BLOCK, TABLE_BLOCK=TABLE_BLOCK, num_warps=4,
        )  # fmt: skip
    batch = ForwardBatch(
        token_ids=own, positions=positions, sequence_ids=layout.sequence_ids,
        cu_seqlens_q=layout.cu_seqlens_q, num_computed_tokens=computed, block_table=table,
        state_slots=states, ring_slots=ring, fold_sources=sources, fold_tokens=layout.fold_tokens,
        fold_targets=targets, emissions=emissions, logits_tokens=layout.logits_tokens,
    )  # fmt: skip
    return batch, uniform


def settle_step(
    ops: Any,
    columns: Columns,
    seats: Seats,
    batch: ForwardBatch,
    sampled: Tensor,
    nonfinite: Tensor,
    streams: Tensor,
) -> Settled:
    """The op `settle_step` (ops/step.py)."""
    step, layout, device = seats.step, seats.step.layout, seats.slots.device
    runs, (sampling, width) = seats.slots.shape[0], step.rows.shape
    stops, size = seats.stops.shape[2], columns.streams[0].numel()
    answers = torch.empty(sampling, 1 + width, dtype=torch.int64, device=device)
    last = torch.empty(runs, dtype=torch.int64, device=device)
    if runs:
        _settle[(runs, -(-size // STREAM_BLOCK))](
            seats.slots, seats.ends, seats.stops, step.known, layout.counts, layout.cu_seqlens_q,
            step.numbers, step.rows, step.valid.view(torch.uint8), step.row_counts,
            step.draft_tokens.contiguous(), batch.token_ids, batch.num_computed_tokens,
            batch.state_slots, sampled, nonfinite.view(torch.uint8), streams.contiguous(),
            columns.tokens, columns.lengths, columns.version, columns.alive.view(torch.uint8),
            columns.streams, answers, last, size, VERSIONS=columns.versions, W=width,
            WIDTH=triton.next_power_of_2(width), STOPS=stops,
            STOPS_TILE=triton.next_power_of_2(max(stops, 1)), BLOCK=STREAM_BLOCK, num_warps=4,
        )  # fmt: skip
    return Settled(answers, last)


def next_tokens(
    batch: ForwardBatch, step: StepLayout, sampled: Tensor, after: Tensor | None
) -> Tensor:
    """The op `next_tokens` (ops/step.py)."""
    following, layout, count = torch.empty_like(batch.token_ids), step.layout, batch.num_tokens
    if count:
        _next[(_blocks(count),)](
            batch.token_ids, batch.sequence_ids, layout.offsets, layout.counts, step.known,
            step.numbers, step.rows, sampled, sampled if after is None else after, following, count,
            W=step.rows.shape[1], AFTER=after is not None, BLOCK=BLOCK, num_warps=4,
        )  # fmt: skip
    return following


def step_after(batch: ForwardBatch, tokens: Tensor, ring_rows: int) -> ForwardBatch:
    """The op `step_after` (ops/step.py)."""
    count = tokens.shape[0]
    ids, positions, bounds, slots, ring, sources = _parts(
        tokens.device, count, count, count + 1, count, count, count
    )
    _after[(_blocks(count + 1),)](
        tokens, batch.positions, batch.sequence_ids, batch.state_slots, ids, positions, bounds, slots,
        ring, sources, count, ring_rows, BLOCK=BLOCK, num_warps=4,
    )  # fmt: skip
    nothing = bounds[:0]
    return ForwardBatch(
        token_ids=ids, positions=positions, sequence_ids=bounds[:count], cu_seqlens_q=bounds,
        num_computed_tokens=positions, block_table=nothing.view(count, 0), state_slots=slots,
        ring_slots=ring, fold_sources=sources, fold_tokens=nothing, fold_targets=nothing,
        emissions={}, logits_tokens=bounds[:count],
    )  # fmt: skip


def keep_drafts(tokens: Tensor, slots: Tensor, answers: Tensor, drafts: Tensor) -> Tensor:
    """The op `keep_drafts` (ops/step.py)."""
    count, width = answers.shape
    drafted = drafts.shape[1]
    out = torch.empty(count, width + drafted, dtype=torch.int64, device=tokens.device)
    if count:
        _keep[(_blocks(count),)](
            tokens, slots, answers.contiguous(), drafts.contiguous(), out, count, K=drafted,
            WIDTH=width, TILE=triton.next_power_of_2(max(width, drafted)), BLOCK=BLOCK, num_warps=4,
        )  # fmt: skip
    return out


def _two_ratios(config: ModelConfig) -> str | None:
    ratios = set(config.compress_ratios) - {0}
    return None if len(ratios) <= MOST_RATIOS else f"has {len(ratios)} compress ratios, not two"


_NEEDS = frozenset({Feature.TRITON})
KERNELS = (
    Kernel("seat_runs", "triton", seat_runs, _NEEDS),
    Kernel("place_step", "triton", place_step, _NEEDS, supports=_two_ratios),
    Kernel("settle_step", "triton", settle_step, _NEEDS),
    Kernel("next_tokens", "triton", next_tokens, _NEEDS),
    Kernel("step_after", "triton", step_after, _NEEDS),
    Kernel("keep_drafts", "triton", keep_drafts, _NEEDS),
)

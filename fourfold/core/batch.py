"""One step's work: host integers (`ScheduledBatch`) and the device tensors made of them.

Contract: a `ForwardBatch` is complete and immutable; kernels read metadata from it and from nowhere
else. Tokens of all sequences lie flat, one sequence after another, each a run of consecutive
positions. What follows from the runs' lengths alone is a `Layout`, made on the host; `place` adds, on
the device, where the sequences are, which the host need not know yet. `lower` does both for a batch
that is all host integers. This file knows positions, slots and pages; it does not know requests,
sampling, or who allocated what.

    counts ─ Layout.of ─┐
                        ├─ place ─ ForwardBatch
    positions, slots ───┘

Index tensors are int64 (torch indexing wants it); −1 means "nowhere" in every slot tensor. A sequence
that must leave no trace has state slot −1, no pages and position 0.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fourfold.core.row_format import rows_per_page

Ints = npt.NDArray[np.int64]


# Not frozen: one is made for every sequence in every step, and freezing would triple what it costs.
@dataclass(slots=True, eq=False)
class ScheduledSequence:
    """A run of tokens of one sequence.

    `num_computed_tokens` tokens came before it; `block_ids` are its pages from position 0 on;
    `state_slot` is its ring (−1: no ring, the run starts at 0 and nothing is kept).
    `fold_source` is the fold slot holding the state before the run (−1: empty, position 0).
    `fold_keeps` lists (index of a token in the run, fold slot to keep the state after it in).
    `logits_from` is the first token of the run whose logits are wanted (its length: none).
    """

    token_ids: Sequence[int]
    num_computed_tokens: int = 0
    block_ids: Sequence[int] = ()
    state_slot: int = -1
    fold_source: int = -1
    fold_keeps: Sequence[tuple[int, int]] = ()
    logits_from: int = 0

    def __len__(self) -> int:
        return len(self.token_ids)


@dataclass(frozen=True)
class ScheduledBatch:
    """The sequences of one step."""

    sequences: tuple[ScheduledSequence, ...]

    @property
    def num_tokens(self) -> int:
        return sum(len(s) for s in self.sequences)


@dataclass(frozen=True)
class Emission:
    """Compressed rows that may be completed in this step, for one compress ratio m.

    A run of c tokens has ⌈c/m⌉ candidates, as many as it can complete wherever it starts.
    `tokens [E]`: the flat token that completes each row; `positions [E]`: m·j, where row j is
    rotated; `slots [E]`: where it is written. A candidate that is not completed has slot −1 and some
    token of its run; what is computed for it does not matter.
    """

    tokens: Tensor
    positions: Tensor
    slots: Tensor


@dataclass(frozen=True)
class ForwardBatch:
    """Device tensors of one step. T tokens, S sequences, P pages, V kept folds, L logits rows."""

    # the tokens
    token_ids: Tensor  # [T]
    positions: Tensor  # [T]
    sequence_ids: Tensor  # [T]
    # the sequences
    cu_seqlens_q: Tensor  # [S + 1]
    num_computed_tokens: Tensor  # [S]
    block_table: Tensor  # [S, P], −1 beyond a sequence's pages
    # where state is read and written
    state_slots: Tensor  # [S]
    ring_slots: Tensor  # [T], −1 for tokens that the run's own end overwrites, or without a ring
    fold_sources: Tensor  # [S]
    fold_tokens: Tensor  # [V]
    fold_targets: Tensor  # [V]
    emissions: Mapping[int, Emission]  # by compress ratio
    # what is wanted back
    logits_tokens: Tensor  # [L]

    @property
    def num_tokens(self) -> int:
        return self.token_ids.shape[0]

    @property
    def num_sequences(self) -> int:
        return self.num_computed_tokens.shape[0]

    def runs(self) -> list[tuple[int, int, int]]:
        """(first flat token, end, position of the first) of each sequence, on the host.

        Reads device memory: op bodies may, kernels in a captured graph may not.
        """
        bounds = self.cu_seqlens_q.tolist()
        return list(zip(bounds[:-1], bounds[1:], self.num_computed_tokens.tolist(), strict=True))


@dataclass(frozen=True)
class Candidates:
    """Compressed rows that runs may complete for one ratio: `owners [E]` their sequences, `numbers [E]`
    which of its run's each is, `counts [E]` and `starts [E]` length and first flat token of the run."""

    owners: Tensor
    numbers: Tensor
    counts: Tensor
    starts: Tensor


@dataclass(frozen=True)
class Layout:
    """What a step's runs are by their lengths alone, on the device, and how long the rings are."""

    ring_rows: int
    counts: Tensor  # [S] tokens of each run
    cu_seqlens_q: Tensor  # [S + 1]
    sequence_ids: Tensor  # [T]
    offsets: Tensor  # [T] a token's index in its run
    stays: Tensor  # [T] bool: the run's own end does not overwrite its ring row
    fold_owners: Tensor  # [V] sequence of each kept fold
    fold_tokens: Tensor  # [V]
    logits_tokens: Tensor  # [L]
    candidates: Mapping[int, Candidates]  # by ratio

    @staticmethod
    def of(
        counts: Ints,
        logits_from: Ints,
        keeps: tuple[Ints, Ints],
        ratios: Iterable[int],
        ring_rows: int,
        device: torch.device,
    ) -> Layout:
        """Runs of `counts [S]` tokens, logits wanted from `logits_from [S]` of each on.

        `keeps`: how many folds each sequence keeps `[S]`, and after which token of its run, `[V]`.
        `ratios` are the compress ratios the model has (0 is ignored).
        """
        starts = np.zeros(len(counts) + 1, np.int64)
        np.cumsum(counts, out=starts[1:])
        owners, offsets = _spans(np.zeros_like(counts), counts)
        keepers = np.repeat(np.arange(len(counts)), keeps[0])
        wanted = starts[:-1] + logits_from
        parts = [
            counts,
            starts,
            owners,
            offsets,
            (offsets >= (counts - ring_rows)[owners]).astype(np.int64),
            keepers,
            starts[keepers] + keeps[1],
            _spans(wanted, starts[1:] - wanted)[1],
        ]
        ratios = sorted(set(ratios) - {0})
        for ratio in ratios:
            whose, numbers = _spans(np.zeros_like(counts), -(-counts // ratio))
            parts += [whose, numbers, counts[whose], starts[whose]]
        moved = to_device(parts, device)
        candidates = {m: Candidates(*moved[8 + 4 * n :][:4]) for n, m in enumerate(ratios)}
        return Layout(
            ring_rows,
            counts=moved[0],
            cu_seqlens_q=moved[1],
            sequence_ids=moved[2],
            offsets=moved[3],
            stays=moved[4] > 0,
            fold_owners=moved[5],
            fold_tokens=moved[6],
            logits_tokens=moved[7],
            candidates=candidates,
        )


def place(
    layout: Layout,
    token_ids: Tensor,
    num_computed_tokens: Tensor,
    block_table: Tensor,
    state_slots: Tensor,
    fold_sources: Tensor,
    fold_targets: Tensor,
) -> ForwardBatch:
    """The batch of `layout` for sequences that are where these tensors say; fields as in the batch.

    Device arithmetic only: nothing is read back, and no shape depends on a value.
    """
    owners = layout.sequence_ids
    positions = num_computed_tokens[owners] + layout.offsets
    slots = state_slots[owners]
    # What the run's own end would overwrite is never written.
    stays = layout.stays & (slots >= 0)
    emissions = {
        ratio: _emission(candidates, num_computed_tokens, block_table, ratio)
        for ratio, candidates in layout.candidates.items()
    }
    return ForwardBatch(
        token_ids=token_ids,
        positions=positions,
        sequence_ids=owners,
        cu_seqlens_q=layout.cu_seqlens_q,
        num_computed_tokens=num_computed_tokens,
        block_table=block_table,
        state_slots=state_slots,
        ring_slots=_ring_slots(slots, positions, stays, layout.ring_rows),
        fold_sources=fold_sources,
        fold_tokens=layout.fold_tokens,
        fold_targets=fold_targets,
        emissions=emissions,
        logits_tokens=layout.logits_tokens,
    )


def batch_after(batch: ForwardBatch, tokens: Tensor, ring_rows: int) -> ForwardBatch:
    """Runs of one token each, at the positions after those of the flat `tokens [N]` of `batch`.

    For layers that keep a ring and nothing else: it has no pages and no folds. `token_ids` are 0.
    """
    positions = batch.positions[tokens] + 1
    state_slots = batch.state_slots[batch.sequence_ids[tokens]]
    count = tokens.shape[0]
    numbers = torch.arange(count + 1, device=tokens.device)
    nothing = numbers[:0]
    return ForwardBatch(
        token_ids=torch.zeros_like(positions),
        positions=positions,
        sequence_ids=numbers[:count],
        cu_seqlens_q=numbers,
        num_computed_tokens=positions,
        block_table=nothing.view(count, 0),
        state_slots=state_slots,
        ring_slots=_ring_slots(state_slots, positions, state_slots >= 0, ring_rows),
        fold_sources=torch.full_like(positions, -1),
        fold_tokens=nothing,
        fold_targets=nothing,
        emissions={},
        logits_tokens=numbers[:count],
    )


def lower(
    scheduled: ScheduledBatch, ratios: Sequence[int], ring_rows: int, device: torch.device
) -> ForwardBatch:
    """Lower host integers to device tensors.

    `ratios` are the compress ratios the model has (0 is ignored); `ring_rows` is the ring length.
    `ValueError` if a sequence lacks the page that a row it completes goes to.
    """
    sequences = scheduled.sequences
    counts, computed, state_slots, fold_sources, logits_from, widths, kept = _columns(sequences)
    table = _block_table(sequences, widths)
    _check_pages(computed, counts, table, ratios)
    keeps = _flat(chain.from_iterable([s.fold_keeps for s in sequences])).reshape(-1, 2)
    layout = Layout.of(counts, logits_from, (kept, keeps[:, 0]), ratios, ring_rows, device)
    parts = [
        _flat([s.token_ids for s in sequences]),
        computed,
        table,
        state_slots,
        fold_sources,
        keeps[:, 1],
    ]
    return place(layout, *to_device(parts, device))


def to_device(parts: Sequence[Ints], device: torch.device) -> list[Tensor]:
    """Tensors of the same shapes, moved in one copy; each starts at a multiple of 128 bytes."""
    aligned = 16
    sizes = [part.size for part in parts]
    gaps = [-size % aligned for size in sizes]
    packed = torch.empty(
        sum(sizes) + sum(gaps), dtype=torch.int64, pin_memory=device.type == "cuda"
    )
    numbers, begin = packed.numpy(), 0
    for part, size, gap in zip(parts, sizes, gaps, strict=True):
        numbers[begin : begin + size] = part.ravel()
        begin += size + gap
    moved = packed.to(device, non_blocking=True)
    flat = moved.split([*chain.from_iterable(zip(sizes, gaps, strict=True))])[::2]
    return [
        each if part.ndim == 1 else each.view(part.shape)
        for each, part in zip(flat, parts, strict=True)
    ]


def _columns(sequences: Sequence[ScheduledSequence]) -> Ints:
    """What every sequence has one of, `[7, S]`."""
    rows = [
        (
            len(s.token_ids),
            s.num_computed_tokens,
            s.state_slot,
            s.fold_source,
            s.logits_from,
            len(s.block_ids),
            len(s.fold_keeps),
        )
        for s in sequences
    ]
    return np.ascontiguousarray(_flat(rows).reshape(-1, 7).T)


def _flat(lists: Iterable[Iterable[int]]) -> Ints:
    return np.fromiter(chain.from_iterable(lists), np.int64)


def _spans(first: Ints, counts: Ints) -> tuple[Ints, Ints]:
    """The numbers first[n] … first[n] + counts[n] − 1 of every n, and before them their n."""
    owners = np.repeat(np.arange(len(counts)), counts)
    shift = first + counts - np.cumsum(counts)
    return owners, np.arange(len(owners)) + shift[owners]


def _block_table(sequences: Sequence[ScheduledSequence], widths: Ints) -> Ints:
    """Pages of each sequence, `[S, P]`, −1 beyond its own `widths [S]`."""
    width = int(widths.max(initial=0))
    table = np.full((len(sequences), width), -1, np.int64)
    # Arrays are joined as bytes: the pages of long sequences are too many to visit one by one.
    joined = b"".join(
        [s.block_ids if type(s.block_ids) is array else array("q", s.block_ids) for s in sequences]
    )
    table[np.arange(width) < widths[:, None]] = np.frombuffer(joined, np.int64)
    return table


def _check_pages(computed: Ints, counts: Ints, table: Ints, ratios: Sequence[int]) -> None:
    for ratio in set(ratios) - {0}:
        rows = (computed + counts) // ratio
        lacking = np.full(len(rows), True)
        if table.shape[1]:
            last = (rows - 1).clip(0) // rows_per_page(ratio)
            there = table[np.arange(len(rows)), last.clip(max=table.shape[1] - 1)] >= 0
            lacking = (last >= table.shape[1]) | ~there
        if (lacking & (rows > computed // ratio)).any():
            raise ValueError(
                f"a sequence has too few pages for the rows of ratio {ratio} it completes"
            )


def _ring_slots(slots: Tensor, positions: Tensor, stays: Tensor, ring_rows: int) -> Tensor:
    return torch.where(stays, slots * ring_rows + positions % ring_rows, -1)


def _emission(candidates: Candidates, computed: Tensor, table: Tensor, ratio: int) -> Emission:
    per_page, width = rows_per_page(ratio), table.shape[1]
    base = computed[candidates.owners]
    rows = base // ratio + candidates.numbers
    positions = ratio * rows
    index = positions + (ratio - 1) - base  # in its run
    slots = torch.full_like(rows, -1)
    if width:
        page = rows // per_page
        block = table[candidates.owners, page.clamp(max=width - 1)]
        written = (index < candidates.counts) & (page < width) & (block >= 0)
        slots = torch.where(written, (block - page) * per_page + rows, slots)
    tokens = candidates.starts + torch.minimum(index, candidates.counts - 1)
    return Emission(tokens, positions, slots)

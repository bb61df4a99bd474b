"""One step's work: host integers (`ScheduledBatch`) and the device tensors made of them.

Contract: a `ForwardBatch` is complete and immutable; kernels read metadata from it and from nowhere
else. Tokens of all sequences lie flat, one sequence after another, each a run of consecutive
positions. `lower` is the only way from host integers to tensors. This file knows positions, slots and
pages; it does not know requests, sampling, or who allocated what.

Index tensors are int64 (torch indexing wants it); −1 means "nowhere" in every slot tensor.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

PAGE_TOKENS = 256  # source tokens a page stands for, in every layer

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
    """Compressed rows completed in this step, for one compress ratio m.

    `tokens [E]`: the flat token that completes each row; `positions [E]`: m·j, where row j is
    rotated; `slots [E]`: where it is written.
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
        ring_slots=state_slots * ring_rows + positions % ring_rows,
        fold_sources=torch.full_like(positions, -1),
        fold_tokens=nothing,
        fold_targets=nothing,
        emissions={},
        logits_tokens=numbers[:count],
    )


def rows_per_page(ratio: int) -> int:
    """Compressed rows a page of `PAGE_TOKENS` source tokens holds: 64 for CSA, 2 for HCA."""
    return PAGE_TOKENS // ratio


def lower(
    scheduled: ScheduledBatch, ratios: Sequence[int], ring_rows: int, device: torch.device
) -> ForwardBatch:
    """Lower host integers to device tensors.

    `ratios` are the compress ratios the model has (0 is ignored); `ring_rows` is the ring length.
    `ValueError` if a sequence lacks the page that a row it completes goes to.
    """
    sequences = scheduled.sequences
    counts, computed, state_slots, fold_sources, logits_from, widths, kept = _columns(sequences)
    starts = np.zeros(len(sequences) + 1, np.int64)
    np.cumsum(counts, out=starts[1:])
    owners, positions = _spans(computed, counts)
    table = _block_table(sequences, widths)
    keeps = _flat(chain.from_iterable([s.fold_keeps for s in sequences])).reshape(-1, 2)
    parts = {
        "token_ids": _flat([s.token_ids for s in sequences]),
        "positions": positions,
        "sequence_ids": owners,
        "cu_seqlens_q": starts,
        "num_computed_tokens": computed,
        "block_table": table,
        "state_slots": state_slots,
        "ring_slots": _ring_slots(positions, owners, computed + counts, state_slots, ring_rows),
        "fold_sources": fold_sources,
        "fold_tokens": np.repeat(starts[:-1], kept) + keeps[:, 0],
        "fold_targets": keeps[:, 1],
        "logits_tokens": _spans(starts[:-1] + logits_from, counts - logits_from)[1],
    }
    emissions = {
        ratio: _emission(computed, counts, starts, table, ratio)
        for ratio in sorted(set(ratios) - {0})
    }
    moved = iter(_to_device([*parts.values(), *chain.from_iterable(emissions.values())], device))
    fields: dict[str, Any] = dict(zip(parts, moved, strict=False))
    fields["emissions"] = {m: Emission(next(moved), next(moved), next(moved)) for m in emissions}
    return ForwardBatch(**fields)


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


def _ring_slots(
    positions: Ints, owners: Ints, ends: Ints, state_slots: Ints, ring_rows: int
) -> Ints:
    """Ring slot of each token: position mod ring length, −1 before a run's last `ring_rows` tokens
    and without a ring."""
    stays = (positions >= (ends - ring_rows)[owners]) & (state_slots >= 0)[owners]
    return np.where(stays, state_slots[owners] * ring_rows + positions % ring_rows, -1)


def _emission(
    computed: Ints, counts: Ints, starts: Ints, table: Ints, ratio: int
) -> tuple[Ints, Ints, Ints]:
    """The fields of an `Emission`: every row whose last token is in a run."""
    per_page = rows_per_page(ratio)
    before = computed // ratio
    owners, rows = _spans(before, (computed + counts) // ratio - before)
    pages = rows // per_page
    if pages.max(initial=-1) >= table.shape[1] or (table[owners, pages] < 0).any():
        raise ValueError(f"a sequence has too few pages for the rows of ratio {ratio} it completes")
    tokens = (starts[:-1] - computed)[owners] + ratio * (rows + 1) - 1
    return tokens, ratio * rows, table[owners, pages] * per_page + rows % per_page


def _to_device(parts: Sequence[Ints], device: torch.device) -> list[Tensor]:
    """Tensors of the same shapes, moved in one copy; each starts at a multiple of 128 bytes."""
    aligned = 16
    sizes = [part.size for part in parts]
    gaps = [-size % aligned for size in sizes]
    packed = np.empty(sum(sizes) + sum(gaps), np.int64)
    begin = 0
    for part, size, gap in zip(parts, sizes, gaps, strict=True):
        packed[begin : begin + size] = part.ravel()
        begin += size + gap
    moved = torch.from_numpy(packed).to(device, non_blocking=True)
    flat = moved.split([*chain.from_iterable(zip(sizes, gaps, strict=True))])[::2]
    return [
        each if part.ndim == 1 else each.view(part.shape)
        for each, part in zip(flat, parts, strict=True)
    ]

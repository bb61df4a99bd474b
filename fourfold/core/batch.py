"""One step's work: host integers (`ScheduledBatch`) and the device tensors made of them.

Contract: a `ForwardBatch` is complete and immutable; kernels read metadata from it and from nowhere
else. Tokens of all sequences lie flat, one sequence after another, each a run of consecutive
positions. `lower` is the only way from host integers to tensors. This file knows positions, slots and
pages; it does not know requests, sampling, or who allocated what.

Index tensors are int64 (torch indexing wants it); −1 means "nowhere" in every slot tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

PAGE_TOKENS = 256  # source tokens a page stands for, in every layer


@dataclass(frozen=True)
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


def rows_per_page(ratio: int) -> int:
    """Compressed rows a page of `PAGE_TOKENS` source tokens holds: 64 for CSA, 2 for HCA."""
    return PAGE_TOKENS // ratio


def lower(
    scheduled: ScheduledBatch, ratios: Sequence[int], ring_rows: int, device: torch.device
) -> ForwardBatch:
    """Lower host integers to device tensors.

    `ratios` are the compress ratios the model has (0 is ignored); `ring_rows` is the ring length.
    """
    sequences = scheduled.sequences

    def tensor(values: Sequence[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int64).to(device, non_blocking=True)

    starts = [0]
    for sequence in sequences:
        starts.append(starts[-1] + len(sequence))
    pages = max((len(s.block_ids) for s in sequences), default=0)
    table = [[*s.block_ids, *[-1] * (pages - len(s.block_ids))] for s in sequences]
    keeps = [
        (begin + index, slot)
        for begin, s in zip(starts, sequences, strict=False)
        for index, slot in s.fold_keeps
    ]
    return ForwardBatch(
        token_ids=tensor([t for s in sequences for t in s.token_ids]),
        positions=tensor([s.num_computed_tokens + i for s in sequences for i in range(len(s))]),
        sequence_ids=tensor([n for n, s in enumerate(sequences) for _ in range(len(s))]),
        cu_seqlens_q=tensor(starts),
        num_computed_tokens=tensor([s.num_computed_tokens for s in sequences]),
        block_table=tensor([page for row in table for page in row]).view(len(sequences), pages),
        state_slots=tensor([s.state_slot for s in sequences]),
        ring_slots=tensor([slot for s in sequences for slot in _ring_slots(s, ring_rows)]),
        fold_sources=tensor([s.fold_source for s in sequences]),
        fold_tokens=tensor([token for token, _ in keeps]),
        fold_targets=tensor([slot for _, slot in keeps]),
        emissions={m: _emission(sequences, starts, m, tensor) for m in sorted(set(ratios)) if m},
        logits_tokens=tensor(
            [
                begin + i
                for begin, s in zip(starts, sequences, strict=False)
                for i in range(s.logits_from, len(s))
            ]
        ),
    )


def _ring_slots(sequence: ScheduledSequence, ring_rows: int) -> list[int]:
    """Ring slot of each token of the run: position mod ring length, only the last `ring_rows`."""
    count = len(sequence)
    if sequence.state_slot < 0:
        return [-1] * count
    base = sequence.state_slot * ring_rows
    first = sequence.num_computed_tokens
    return [base + (first + i) % ring_rows if i >= count - ring_rows else -1 for i in range(count)]


def _emission(
    sequences: Sequence[ScheduledSequence],
    starts: Sequence[int],
    ratio: int,
    tensor: Callable[[Sequence[int]], Tensor],
) -> Emission:
    tokens, positions, slots = [], [], []
    per_page = rows_per_page(ratio)
    for begin, sequence in zip(starts, sequences, strict=False):
        first = sequence.num_computed_tokens
        for row in range(first // ratio, (first + len(sequence)) // ratio):
            tokens.append(begin + ratio * (row + 1) - 1 - first)
            positions.append(ratio * row)
            slots.append(sequence.block_ids[row // per_page] * per_page + row % per_page)
    return Emission(tensor(tokens), tensor(positions), tensor(slots))

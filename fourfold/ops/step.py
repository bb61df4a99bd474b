"""What is around the model in a step: from the slot table to the batch, from samples to the slot table.

    columns ─ seat_runs ─ place_step ─▶ model ─▶ samples ─ settle_step ─▶ columns
                                                              └─ next_tokens ─ drafts ─ keep_drafts ─▶

A step is launched while the one before it still runs: which drafts that one accepts, where its sequences
then stand and what their next tokens are stands in the columns first, and the next step is placed by it.

Contract: device arithmetic on tensors whose shapes the host knows; nothing is read back. `settle_step`
and `keep_drafts` write columns, the others are pure. Slots of a step are distinct, but for those that are
not alive, of which nothing is read again. This file does not know requests, pages' owners, or the model.
"""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fourfold.core.batch import ForwardBatch, Layout, batch_after, place, to_device
from fourfold.ops.registry import Case, CaseMaker, Tolerance, op
from fourfold.ops.sampling import random_streams

Key = list[tuple[int, int, bool]]


@dataclass(frozen=True)
class Columns:
    """What the device knows of the sequences in N state slots; k drafts, up to P pages each."""

    tokens: Tensor  # [N, 1 + k] the last known one, then drafts
    lengths: Tensor  # [N] tokens in the state
    version: Tensor  # [N] of the kept folds, the one that stands
    alive: Tensor  # [N] bool
    block_table: Tensor  # [N, P], −1 beyond a sequence's pages
    streams: Tensor  # [N, …] of the last token in the state
    ends: Tensor  # [N] tokens it can ever have
    stops: Tensor  # [N, …] tokens that end it, −1 beyond them
    random: Tensor  # [N] of `random_streams`
    top_k: Tensor  # [N]
    temperature: Tensor  # [N]
    top_p: Tensor  # [N]
    min_p: Tensor  # [N]

    @property
    def versions(self) -> int:
        """Folds kept for a sequence."""
        return self.tokens.shape[1]


@dataclass(frozen=True)
class StepLayout:
    """A step's runs by their lengths: S of them, R of them sampling, with up to W rows of logits each:
    one for the last known token and one for each draft.

    Nothing here depends on where sequences stand: from one decode step to the next it is mostly the
    same, and the tensors are used again.
    """

    layout: Layout
    known: Tensor  # [S] tokens of a run that are not drafts
    keep_versions: Tensor  # [V] the version a kept fold becomes
    sampling: Tensor  # [R] the runs that sample
    numbers: Tensor  # [S] a run's number among those, −1 if it does not sample
    rows: Tensor  # [R, W] their logits rows; some row beyond their own
    valid: Tensor  # [R, W] bool: their own
    row_counts: Tensor  # [R] how many are their own
    draft_tokens: Tensor  # [R, W - 1] flat tokens of their drafts
    all_sample: bool

    @staticmethod
    def of(key: Key, ratios: Seq[int], ring_rows: int, device: torch.device) -> StepLayout:
        """For runs of (tokens, drafts among them, whether it samples)."""
        counts, drafts, samples = np.array(key, np.int64).reshape(-1, 3).T
        known = counts - drafts
        keeps = 1 + drafts
        versions = np.arange(keeps.sum()) - np.repeat(np.cumsum(keeps) - keeps, keeps)
        layout = Layout.of(
            counts,
            np.where(samples > 0, known - 1, counts),
            (keeps, np.repeat(known - 1, keeps) + versions),
            ratios,
            ring_rows,
            device,
        )
        sampling = np.flatnonzero(samples)
        numbers = np.where(samples > 0, np.cumsum(samples) - 1, -1)
        widths = keeps[sampling]
        first = np.cumsum(widths) - widths
        columns = np.arange(widths.max(initial=1))
        rows = np.minimum(first[:, None] + columns, max(int(widths.sum()) - 1, 0))
        valid = columns < widths[:, None]
        parts = [known, versions, sampling, rows, widths, valid.astype(np.int64), numbers]
        moved = to_device(parts, device)
        return StepLayout(
            layout,
            known=moved[0],
            keep_versions=moved[1],
            sampling=moved[2],
            rows=moved[3],
            row_counts=moved[4],
            valid=moved[5] > 0,
            numbers=moved[6],
            draft_tokens=layout.logits_tokens[moved[3][:, 1:]],
            all_sample=len(sampling) == len(key),
        )

    def spread(self, values: Tensor, others: Tensor) -> Tensor:
        """`values [R]` of the sampling runs among `others [S]`, of which the rest's are kept."""
        return values if self.all_sample else others.index_copy(0, self.sampling, values)

    def pick(self, values: Tensor) -> Tensor:
        """Of `values [S, …]` those of the sampling runs."""
        return values if self.all_sample else values[self.sampling]


@dataclass(frozen=True)
class Seats:
    """A step's runs in their slots: what stays the same from one decode step to the next."""

    step: StepLayout
    slots: Tensor  # [S]
    mine: Tensor  # [R] those of sampling runs
    token_slots: Tensor  # [T]
    fold_slots: Tensor  # [S] the first of each
    fold_targets: Tensor  # [V]
    ends: Tensor  # [R]
    stops: Tensor  # [R, 1, …]
    # of the logits rows, [L]
    streams: Tensor
    temperature: Tensor
    top_p: Tensor
    top_k: Tensor
    min_p: Tensor


@dataclass(frozen=True)
class Settled:
    """What stands after a step of S runs, R of them sampling, each with up to W rows.

    `answers [R, 1 + W]`: how many new tokens a run takes, then its picks, of which that many count.
    `last [S]` is each run's last standing token, flat.
    """

    answers: Tensor
    last: Tensor

    @property
    def taken(self) -> Tensor:
        """How many, `[R]`."""
        return self.answers[:, 0]


def _columns(make: CaseMaker, slots: int, drafts: int) -> Columns:
    def fractions(*values: float) -> Tensor:
        return torch.tensor(values, device=make.device).repeat(slots)[:slots].clone()

    width = 5
    table = make.randint(40, slots, width)
    table[:, 3:] = -1
    alive = torch.ones(slots, dtype=torch.bool, device=make.device)
    alive[4] = False
    lengths = torch.tensor([0, 255, 126, 700, 5, 510, 3, 88], device=make.device)[:slots]
    stops = torch.full((slots, 4), -1, device=make.device)
    stops[:, 0] = 7
    stops[3, 1] = 11
    return Columns(
        tokens=make.randint(90, slots, 1 + drafts),
        lengths=lengths.clone(),
        version=make.randint(1 + drafts, slots),
        alive=alive,
        block_table=table,
        streams=make.randn(slots, 2, 24),
        ends=lengths + make.randint(6, slots, low=1),
        stops=stops,
        random=random_streams(make.randint(1 << 40, slots)),
        top_k=make.randint(9, slots),
        temperature=fractions(0.0, 0.7, 1.0),
        top_p=fractions(1.0, 0.9),
        min_p=fractions(0.0, 0.05, 0.1),
    )


def _settings(make: CaseMaker) -> Iterator[tuple[str, Columns, StepLayout, Tensor]]:
    """Columns, a step, and the slots of its runs; slot 4 is not alive."""
    keys: tuple[tuple[str, int, Key, list[int]], ...] = (
        ("decodes", 0, [(1, 0, True)] * 5, [3, 0, 4, 6, 2]),
        ("decodes with drafts", 3, [(4, 3, True)] * 4, [5, 1, 4, 2]),
        (
            "prompts and decodes",
            2,
            [(3, 2, True), (300, 0, False), (130, 0, True), (1, 0, True), (2, 1, True)],
            [3, 0, 6, 4, 1],
        ),
    )
    for name, drafts, key, slots in keys:
        step = StepLayout.of(key, (4, 128), 131, make.device)
        yield name, _columns(make, 8, drafts), step, torch.tensor(slots, device=make.device)


def _seat_cases(make: CaseMaker) -> Iterator[Case]:
    for name, columns, step, slots in _settings(make):
        yield Case(name, {"columns": columns, "step": step, "slots": slots, "stops": 3})


@op(
    _seat_cases,
    tolerance=Tolerance(float32=0.0, bfloat16=0.0),
    differentiable=False,
    batch_invariant=True,
)
def seat_runs(columns: Columns, step: StepLayout, slots: Tensor, stops: int) -> Seats:
    """The runs of a step in `slots [S]`, none of which has more stop tokens than `stops`."""
    layout, mine = step.layout, step.pick(slots)
    fold_slots, rows = slots * columns.versions, slots[layout.sequence_ids[layout.logits_tokens]]
    return Seats(
        step,
        slots,
        mine,
        slots[layout.sequence_ids],
        fold_slots,
        fold_slots[layout.fold_owners] + step.keep_versions,
        columns.ends[mine],
        columns.stops[mine, :stops].unsqueeze(1),
        columns.random[rows],
        columns.temperature[rows],
        columns.top_p[rows],
        columns.top_k[rows],
        columns.min_p[rows],
    )


def _place_cases(make: CaseMaker) -> Iterator[Case]:
    for name, columns, step, slots in _settings(make):
        seats = seat_runs(columns, step, slots, 3)
        known = None
        if name.startswith("prompts"):
            known = make.randint(90, step.layout.offsets.shape[0])
            known[:3], known[-3:] = -1, -1
        yield Case(name, {"columns": columns, "seats": seats, "token_ids": known})


@op(
    _place_cases,
    parts=("uniform",),
    tolerance=Tolerance(float32=0.0, bfloat16=0.0),
    differentiable=False,
    batch_invariant=True,
)
def place_step(
    ops: Any, columns: Columns, seats: Seats, token_ids: Tensor | None
) -> tuple[ForwardBatch, Tensor]:
    """The batch, after all steps launched before, and the `uniform` number of each logits row.

    `token_ids [T]` are those the host knows, −1 for the others (None: it knows none). Sequences that
    are not alive have state slot −1, no pages and position 0. A row samples the token after its own.
    """
    layout, slots = seats.step.layout, seats.slots
    alive = columns.alive[slots]
    computed = torch.where(alive, columns.lengths[slots], 0)
    table = torch.where(alive.unsqueeze(1), columns.block_table[slots], -1)
    sources = torch.where(computed > 0, seats.fold_slots + columns.version[slots], -1)
    targets = torch.where(alive[layout.fold_owners], seats.fold_targets, -1)
    own = columns.tokens[seats.token_slots, layout.offsets.clamp(max=columns.versions - 1)]
    if token_ids is not None:
        own = torch.where(token_ids >= 0, token_ids, own)
    batch = place(layout, own, computed, table, torch.where(alive, slots, -1), sources, targets)
    return batch, ops.uniform(seats.streams, batch.positions[batch.logits_tokens] + 1)


def _placed(
    make: CaseMaker,
) -> Iterator[tuple[str, Columns, Seats, ForwardBatch, Tensor]]:
    """With what was sampled: some drafts stand, some rows stop."""
    from fourfold.ops.sampling import uniform

    @dataclass(frozen=True)
    class Ops:
        uniform: Any

    for case in _place_cases(make):
        columns, seats = case.arguments["columns"], case.arguments["seats"]
        batch, numbers = place_step.body(Ops(uniform), **case.arguments)
        rows = batch.logits_tokens
        # What a draft was drawn for is what the token after its row is.
        sampled = batch.token_ids.roll(-1)[rows]
        sampled = torch.where(numbers < 0.25, sampled + 1, sampled)
        sampled = torch.where(numbers > 0.9, 7, sampled)
        yield case.name, columns, seats, batch, sampled


def _settle_cases(make: CaseMaker) -> Iterator[Case]:
    for name, columns, seats, batch, sampled in _placed(make):
        nonfinite = torch.zeros(batch.num_sequences, dtype=torch.bool, device=make.device)
        nonfinite[1] = True
        yield Case(
            name,
            {
                "columns": columns,
                "seats": seats,
                "batch": batch,
                "sampled": sampled,
                "nonfinite": nonfinite,
                "streams": make.randn(batch.num_tokens, 2, 24),
            },
        )


@op(
    _settle_cases,
    parts=("count_accepted",),
    writes=("columns",),
    tolerance=Tolerance(float32=0.0, bfloat16=0.0),
    differentiable=False,
    batch_invariant=True,
)
def settle_step(
    ops: Any,
    columns: Columns,
    seats: Seats,
    batch: ForwardBatch,
    sampled: Tensor,
    nonfinite: Tensor,
    streams: Tensor,
) -> Settled:
    """Take a step's samples `[L]`: accept drafts up to the sequence's end, move on behind them.

    The token after the last standing one is new in any case, so a run takes at least one. A sequence
    that ended, or met a number that is not finite (`nonfinite [S]`), is not alive from then on.
    `streams [T, …]` are the model's.
    """
    step, slots = seats.step, seats.slots
    layout, computed = step.layout, batch.num_computed_tokens
    picks = sampled[step.rows]
    drafts = torch.where(step.valid[:, 1:], batch.token_ids[step.draft_tokens], -1)
    going = (picks.unsqueeze(-1) != seats.stops).all(-1)
    before_stop = going.cumprod(-1).sum(-1)
    room = seats.ends - step.pick(computed + step.known)
    taken = 1 + torch.minimum(ops.count_accepted(picks, drafts), before_stop)
    taken = torch.minimum(taken, room).clamp(min=1)
    over = (before_stop < taken) | (taken >= room)

    standing = step.spread(step.pick(layout.counts) + taken - step.row_counts, layout.counts)
    last = layout.cu_seqlens_q[:-1] + standing - 1
    alive = batch.state_slots >= 0
    mask = alive.view(-1, *[1] * (streams.dim() - 1))
    columns.streams[slots] = torch.where(mask, streams[last], columns.streams[slots])
    columns.lengths[slots] = computed + standing
    columns.version[slots] = step.spread(taken - 1, torch.zeros_like(standing))
    taken = taken.unsqueeze(1)
    columns.tokens[seats.mine, 0] = picks.gather(1, taken - 1).squeeze(1)
    ended = step.spread(over, torch.zeros_like(nonfinite))
    columns.alive[slots] = alive & ~(nonfinite | ended)
    return Settled(torch.cat([taken, picks], dim=1), last)


def _next_cases(make: CaseMaker) -> Iterator[Case]:
    for name, _, seats, batch, sampled in _placed(make):
        after = None
        if not seats.step.all_sample:
            after = torch.where(seats.step.numbers < 0, 5, -1)
        inputs = {"batch": batch, "step": seats.step, "sampled": sampled, "after": after}
        yield Case(name, inputs)


@op(_next_cases, differentiable=False, batch_invariant=True)
def next_tokens(
    batch: ForwardBatch, step: StepLayout, sampled: Tensor, after: Tensor | None
) -> Tensor:
    """What comes after each token, `[T]`: the run's next one, what was `sampled [L]` in its row, or at
    the end of a run that does not sample, `after [S]` (−1 for the others; None: all sample)."""
    following = batch.token_ids.roll(-1)
    following[batch.logits_tokens] = sampled
    if after is not None:
        ends = batch.cu_seqlens_q[1:] - 1
        following[ends] = torch.where(after >= 0, after, following[ends])
    return following


def _after_cases(make: CaseMaker) -> Iterator[Case]:
    for name, _, seats, batch, _ in _placed(make):
        last = seats.step.pick(batch.cu_seqlens_q[1:] - 1)
        yield Case(name, {"batch": batch, "tokens": last, "ring_rows": 131})


@op(_after_cases, differentiable=False, batch_invariant=True)
def step_after(batch: ForwardBatch, tokens: Tensor, ring_rows: int) -> ForwardBatch:
    """`core.batch.batch_after`: runs of one token each, after the flat `tokens [N]` of `batch`."""
    return batch_after(batch, tokens, ring_rows)


def _keep_cases(make: CaseMaker) -> Iterator[Case]:
    slots = torch.tensor([4, 0, 2], device=make.device)
    yield Case(
        "2 of 3 runs",
        {
            "tokens": make.randint(90, 6, 3),
            "slots": slots,
            "answers": make.randint(90, 3, 4),
            "drafts": make.randint(90, 3, 2),
        },
    )


@op(_keep_cases, writes=("tokens",), differentiable=False, batch_invariant=True)
def keep_drafts(tokens: Tensor, slots: Tensor, answers: Tensor, drafts: Tensor) -> Tensor:
    """Write `drafts [R, k]` behind the last token of `slots [R]` in `tokens [N, 1 + k]`, and return
    them behind `answers [R, 1 + W]`."""
    tokens[slots, 1:] = drafts
    return torch.cat([answers, drafts], dim=1)

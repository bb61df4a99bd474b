"""What the device knows of every running sequence, by state slot.

    enter ─▶ tokens, length, version, parameters ─▶ place (where a run is) ─▶ model, sampling
                            ▲                                                      │
                            └──────────────── settle (what stands) ◀───────────────┘

A step is launched while the one before it still runs. Which drafts that one accepts, where its
sequences then stand and what their next tokens are is known here first, and the next step is placed by
it; the host learns it later. A sequence that has ended (a stop token, its last token, a number that is
not finite) is not `alive` from then on: steps launched before the host knew leave no trace of it.

Contract: device tensors of fixed shape; nothing is read back to the host. It does not know pages'
owners, requests, or the model.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fourfold.core.batch import ForwardBatch, place, to_device
from fourfold.core.request import MAX_STOP_TOKENS
from fourfold.engine.sequence import Sequence
from fourfold.engine.steplayout import StepLayout
from fourfold.ops.registry import KernelPlan
from fourfold.ops.sampling import random_streams

MAX_STOPS = MAX_STOP_TOKENS + 1  # the end-of-sequence token too
MAX_TOP_K = 1 << 31  # no vocabulary is larger


@dataclass(frozen=True)
class Settled:
    """What stands after a step of S runs, R of them sampling, each with up to W rows.

    `taken [R]` of the `picks [R, W]` are new tokens; `last [S]` is each run's last standing token,
    flat.
    """

    taken: Tensor
    picks: Tensor
    last: Tensor


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
    stops: Tensor  # [R, …]
    # of the logits rows, [L]
    streams: Tensor
    temperature: Tensor
    top_p: Tensor
    top_k: Tensor
    min_p: Tensor


class SlotTable:
    """Columns by slot; `width` pages a sequence at most, `streams` the shape of a token's streams.

    One slot more than sequences can have is never alive: what pads a captured step sits there, as many
    as it takes.
    """

    def __init__(
        self,
        num_slots: int,
        num_drafts: int,
        width: int,
        streams: tuple[int, ...],
        dtype: torch.dtype,
        device: torch.device,
    ):
        self.nobody = num_slots
        num_slots += 1

        def integers(*shape: int) -> Tensor:
            return torch.zeros(num_slots, *shape, dtype=torch.int64, device=device)

        def floats() -> Tensor:
            return torch.zeros(num_slots, dtype=torch.float32, device=device)

        self.device, self.versions = device, 1 + num_drafts
        self.tokens = integers(1 + num_drafts)  # the last known one, then drafts
        self.lengths, self.version = integers(), integers()
        self.alive = torch.zeros(num_slots, dtype=torch.bool, device=device)
        self.block_table = torch.full((num_slots, width), -1, device=device)
        # Streams of the last token in the state: images hold them, the MTP layer resumes on them.
        self.streams = torch.zeros(num_slots, *streams, dtype=dtype, device=device)
        self.ends, self.stops = integers(), integers(MAX_STOPS)
        self.random, self.top_k = integers(), integers()
        self.temperature, self.top_p, self.min_p = floats(), floats(), floats()
        self._pages = [0] * num_slots  # how many of a slot's are written
        self._most_stops = 1
        self._seats: Seats | None = None

    def enter(self, sequences: Seq[Sequence]) -> None:
        """Write all columns but streams of sequences that just got their slots."""
        if not sequences:
            return
        rows, fractions = [], []
        for s in sequences:
            p, drafts = s.request.params, self.versions - 1
            tokens = [s.token_ids[-1], *s.drafts[:drafts]]
            tokens += [0] * (self.versions - len(tokens))
            stops = [*s.stop_ids, *[-1] * (MAX_STOPS - len(s.stop_ids))]
            seed = s.seed - (1 << 64) if s.seed >> 63 else s.seed
            top_k = min(max(p.top_k, 0), MAX_TOP_K)
            end = s.num_prompt_tokens + s.max_tokens
            rows.append([s.state_slot, s.num_computed_tokens, end, seed, top_k, *tokens, *stops])
            fractions.append([p.temperature, p.top_p, p.min_p])
            self._pages[s.state_slot] = 0
            self._most_stops = max(self._most_stops, len(s.stop_ids))
        self._seats = None
        columns = np.array(rows, np.int64)
        slots, whole = to_device([columns[:, 0], columns[:, 1:]], self.device)
        exact = torch.tensor(fractions, dtype=torch.float32).to(self.device)
        self.lengths[slots], self.ends[slots] = whole[:, 0], whole[:, 1]
        self.random[slots], self.top_k[slots] = random_streams(whole[:, 2]), whole[:, 3]
        self.tokens[slots] = whole[:, 4 : 4 + self.versions]
        self.stops[slots] = whole[:, 4 + self.versions :]
        self.version[slots] = 0
        self.alive[slots] = True
        self.block_table[slots] = -1
        self.temperature[slots], self.top_p[slots], self.min_p[slots] = exact.unbind(1)

    def extend(self, sequences: Seq[Sequence]) -> None:
        """Write the pages that sequences got since the last time."""
        if not sequences:
            return
        slots: list[int] = []
        places: list[int] = []
        pages: list[int] = []
        for s in sequences:
            begin, end = self._pages[s.state_slot], len(s.block_ids)
            slots += [s.state_slot] * (end - begin)
            places += range(begin, end)
            pages += s.block_ids[begin:]
            self._pages[s.state_slot] = end
        where, index, page = to_device([np.array([slots, places, pages])], self.device)[0]
        self.block_table[where, index] = page

    def seat(self, step: StepLayout, slots: Tensor) -> Seats:
        """The runs of a step in `slots [S]`, which may be the last step's."""
        last = self._seats
        if last is None or last.step is not step or last.slots is not slots:
            last = self._seats = self.seats(step, slots, self._most_stops)
        return last

    def seats(self, step: StepLayout, slots: Tensor, stops: int = MAX_STOPS) -> Seats:
        """The runs of a step in `slots [S]`, none of which has more stop tokens than `stops`."""
        layout, mine = step.layout, step.pick(slots)
        fold_slots, rows = slots * self.versions, slots[layout.sequence_ids[layout.logits_tokens]]
        return Seats(
            step,
            slots,
            mine,
            slots[layout.sequence_ids],
            fold_slots,
            fold_slots[layout.fold_owners] + step.keep_versions,
            self.ends[mine],
            self.stops[mine, :stops].unsqueeze(1),
            self.random[rows],
            self.temperature[rows],
            self.top_p[rows],
            self.top_k[rows],
            self.min_p[rows],
        )

    def place(self, seats: Seats, token_ids: Tensor | None) -> ForwardBatch:
        """The batch, after all steps launched before. `token_ids [T]` are those the host knows, −1 for
        the others (None: it knows none)."""
        layout, slots = seats.step.layout, seats.slots
        alive = self.alive[slots]
        computed = torch.where(alive, self.lengths[slots], 0)
        table = torch.where(alive.unsqueeze(1), self.block_table[slots], -1)
        sources = torch.where(computed > 0, seats.fold_slots + self.version[slots], -1)
        targets = torch.where(alive[layout.fold_owners], seats.fold_targets, -1)
        own = self.tokens[seats.token_slots, layout.offsets.clamp(max=self.versions - 1)]
        if token_ids is not None:
            own = torch.where(token_ids >= 0, token_ids, own)
        return place(layout, own, computed, table, torch.where(alive, slots, -1), sources, targets)

    def settle(
        self,
        seats: Seats,
        batch: ForwardBatch,
        sampled: Tensor,
        nonfinite: Tensor,
        streams: Tensor,
        ops: KernelPlan,
    ) -> Settled:
        """Take a step's samples `[L]`: accept drafts up to the sequence's end, move on behind them.

        The token after the last standing one is new in any case, so a run takes at least one.
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
        self.streams[slots] = torch.where(mask, streams[last], self.streams[slots])
        self.lengths[slots] = computed + standing
        self.version[slots] = step.spread(taken - 1, torch.zeros_like(standing))
        self.tokens[seats.mine, 0] = picks.gather(1, (taken - 1).unsqueeze(1)).squeeze(1)
        ended = step.spread(over, torch.zeros_like(nonfinite))
        self.alive[slots] = alive & ~(nonfinite | ended)
        return Settled(taken, picks, last)

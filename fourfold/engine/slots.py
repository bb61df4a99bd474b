"""What the device knows of every running sequence, by state slot.

    enter ─▶ tokens, length, version, parameters ─▶ place (where a run is) ─▶ model, sampling
                            ▲                                                      │
                            └──────────────── settle (what stands) ◀───────────────┘

A step is launched while the one before it still runs: what that one brings is known here first, and the
next step is placed by it; the host learns it later. A sequence that has ended (a stop token, its last
token, a number that is not finite) is not `alive` from then on: steps launched before the host knew leave
no trace of it.

Contract: device tensors of fixed shape (`Columns`), written here when sequences enter and get pages, and
by the ops of a step (ops/step.py); nothing is read back to the host. It does not know pages' owners,
requests, or the model.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq

import numpy as np
import torch
from torch import Tensor

from fourfold.core.batch import to_device
from fourfold.core.request import MAX_STOP_TOKENS
from fourfold.engine.sequence import Sequence
from fourfold.ops.registry import KernelPlan
from fourfold.ops.sampling import random_streams
from fourfold.ops.step import Columns, Seats, StepLayout

MAX_STOPS = MAX_STOP_TOKENS + 1  # the end-of-sequence token too
# Kernels are compiled for how many stop tokens a step looks at: a step looks at few or at all of them.
STOP_WIDTHS = (2, MAX_STOPS)
MAX_TOP_K = 1 << 31  # no vocabulary is larger


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
        ops: KernelPlan,
    ):
        self.nobody = num_slots
        num_slots += 1

        def integers(*shape: int) -> Tensor:
            return torch.zeros(num_slots, *shape, dtype=torch.int64, device=device)

        def floats() -> Tensor:
            return torch.zeros(num_slots, dtype=torch.float32, device=device)

        self.device, self.versions, self._ops = device, 1 + num_drafts, ops
        self.columns = Columns(
            tokens=integers(1 + num_drafts),
            lengths=integers(),
            version=integers(),
            alive=torch.zeros(num_slots, dtype=torch.bool, device=device),
            block_table=torch.full((num_slots, width), -1, device=device),
            # Images hold them, the MTP layer resumes on them.
            streams=torch.zeros(num_slots, *streams, dtype=dtype, device=device),
            ends=integers(),
            stops=integers(MAX_STOPS),
            random=integers(),
            top_k=integers(),
            temperature=floats(),
            top_p=floats(),
            min_p=floats(),
        )
        self._pages = [0] * num_slots  # how many of a slot's are written
        self._stops = STOP_WIDTHS[0]
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
            if len(s.stop_ids) > self._stops:
                self._stops = MAX_STOPS
        self._seats = None
        numbers = np.array(rows, np.int64)
        slots, whole = to_device([numbers[:, 0], numbers[:, 1:]], self.device)
        exact = torch.tensor(fractions, dtype=torch.float32).to(self.device)
        columns = self.columns
        columns.lengths[slots], columns.ends[slots] = whole[:, 0], whole[:, 1]
        columns.random[slots] = random_streams(whole[:, 2])
        columns.top_k[slots] = whole[:, 3]
        columns.tokens[slots] = whole[:, 4 : 4 + self.versions]
        columns.stops[slots] = whole[:, 4 + self.versions :]
        columns.version[slots] = 0
        columns.alive[slots] = True
        columns.block_table[slots] = -1
        columns.temperature[slots], columns.top_p[slots] = exact[:, 0], exact[:, 1]
        columns.min_p[slots] = exact[:, 2]

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
        self.columns.block_table[where, index] = page

    def seat(self, step: StepLayout, slots: Tensor) -> Seats:
        """The runs of a step in `slots [S]`, which may be the last step's."""
        last = self._seats
        if last is None or last.step is not step or last.slots is not slots:
            last = self._seats = self.seats(step, slots, self._stops)
        return last

    def seats(self, step: StepLayout, slots: Tensor, stops: int = MAX_STOPS) -> Seats:
        """The runs of a step in `slots [S]`, none of which has more stop tokens than `stops`."""
        seats: Seats = self._ops.seat_runs(self.columns, step, slots, stops)
        return seats

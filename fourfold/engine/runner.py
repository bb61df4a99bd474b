"""Carries out a step on the device: saves and restores state, runs the model, samples, drafts.

    launch(runs) ─▶ place ─ model ─ sample ─ settle ─ draft ─▶ Flight ─▶ collect ─▶ what each run brought
                      ▲                        │
                      └─ SlotTable, next step ─┘

Contract: the only place that calls the model. `launch` reads nothing back, so that the next step can be
launched before this one is collected. A run's tokens are the next known ones, or the one sampled last
and its drafts; a sampling run gets one logits row for its last known token and one for each draft. What
is sampled at a position depends on the sequence alone (its tokens, parameters, seed). Draft tokens that
do not stand leave nothing behind that a later step reads: their ring rows and compressed rows lie beyond
every visible position until they are written again, and folds are kept for every draft position.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fourfold.cache.image import Place, StateImage, capture, restore
from fourfold.cache.rows import ring_rows
from fourfold.core.batch import (
    ForwardBatch,
    ScheduledBatch,
    ScheduledSequence,
    lower,
    to_device,
)
from fourfold.core.request import TokenLogprobs
from fourfold.core.row_format import table_width
from fourfold.core.state import ModelState
from fourfold.engine.graphs import DecodeGraphs
from fourfold.engine.sampler import (
    LogprobTensors,
    Sampler,
    WantedLogprobs,
    token_logprobs,
)
from fourfold.engine.scheduler import Saving, Step
from fourfold.engine.sequence import Run, Sequence
from fourfold.engine.slots import SlotTable
from fourfold.engine.steplayout import Layouts
from fourfold.model.parts import ForwardOutput
from fourfold.model.v4 import DeepseekV4
from fourfold.ops.step import Seats, Settled

PROMPT_LOGPROB_ROWS = 256  # rows of logits held at once


class RunResult(NamedTuple):
    """What a run brought: how many of its tokens stand (all but rejected drafts), tokens sampled (none:
    the run did not sample), whether it met a number that is not finite, drafts after the last token, log
    probabilities where asked for, and the image the run was to keep."""

    standing: int
    token_ids: tuple[int, ...] = ()
    nonfinite: bool = False
    drafts: Seq[int] = ()
    logprobs: Seq[TokenLogprobs] = ()
    prompt_logprobs: Seq[TokenLogprobs] = ()
    image: StateImage | None = None


@dataclass(frozen=True)
class Flight:
    """A step that was launched: its runs, and host tensors that fill up.

    `answers [R, 1 + W + k]`: for each sampling run how many tokens it took, what was sampled in its
    rows, its next drafts. `ready` is recorded behind all of them (None: they are there).
    """

    runs: tuple[Run, ...]
    answers: Tensor
    nonfinite: Tensor
    logprobs: WantedLogprobs | None
    prompt_logprobs: dict[int, list[tuple[Seq[int], LogprobTensors]]]  # by run
    images: dict[int, StateImage]  # by run
    ready: torch.cuda.Event | None


class Placed(NamedTuple):
    """A step after the model: `logits [L, V]` float32, `nonfinite [S]` bool, `uniform [L]` float64."""

    seats: Seats
    batch: ForwardBatch
    out: ForwardOutput
    logits: Tensor
    nonfinite: Tensor
    uniform: Tensor


class Finished(NamedTuple):
    """A step after sampling: what was sampled in every row `[L]`, and `Flight.answers`."""

    sampled: Tensor
    answers: Tensor


class Runner:
    """A model, its state, and the device they live on."""

    def __init__(
        self,
        model: DeepseekV4,
        state: ModelState,
        num_slots: int,
        max_model_len: int,
        device: torch.device,
        allowed: Tensor | None,
        num_drafts: int = 0,
    ):
        config = model.config
        self.model, self.state, self.device = model, state, device
        self.num_drafts = num_drafts
        self.ring_rows = ring_rows(config, num_drafts)
        self.allowed = None if allowed is None else allowed.to(device)
        self.sampler = Sampler(model.ops, self.allowed, device)
        self.slots = SlotTable(
            num_slots,
            num_drafts,
            table_width(max_model_len),
            (config.hc_mult, config.hidden_size),
            model.embed.table.dtype,
            device,
            model.ops,
        )
        self.graphs: DecodeGraphs | None = None
        self._layouts = Layouts(config.compress_ratios, self.ring_rows, device)
        self._last_slots: tuple[list[int], Tensor] = ([], torch.zeros(0))

    @torch.inference_mode()
    def save(self, saving: Saving) -> StateImage:
        """A preempted sequence's state, pages included, in host memory."""
        place = self._place(saving.state_slot, saving.fold_version, saving.block_ids)
        place = replace(place, carry=len(saving.block_ids))
        position = saving.sequence.num_computed_tokens
        image = capture(self.state, place, position, self.slots.columns.streams[saving.state_slot])
        return image.to(torch.device("cpu"))

    @torch.inference_mode()
    def image(self, sequence: Sequence) -> StateImage:
        """The state of a sequence with nothing in flight, at its `num_computed_tokens`."""
        return self._image(sequence, sequence.fold_version, sequence.num_computed_tokens)

    @torch.inference_mode()
    def enter(self, step: Step) -> None:
        """Take in sequences that got a slot or pages: write images to the places of those that have
        one, and compute the MTP rows these could not hold."""
        restorings = step.restorings
        self.slots.enter(step.started)
        self.slots.extend(step.extended)
        for each in restorings:
            sequence = each.sequence
            place = self._place(sequence.state_slot, 0, sequence.block_ids)
            streams = self.slots.columns.streams[sequence.state_slot]
            restore(self.state, replace(place, carry=each.carry), each.image, streams)
        if not self.num_drafts or not restorings:
            return
        last = [
            ScheduledSequence(
                [r.sequence.token_ids[r.image.position]],
                r.image.position - 1,
                state_slot=r.sequence.state_slot,
                logits_from=1,
            )
            for r in restorings
        ]
        batch = lower(ScheduledBatch(tuple(last)), (), self.ring_rows, self.device)
        streams = self.slots.columns.streams[batch.state_slots]
        self.model.mtp[0].forward(streams, batch.token_ids, batch, self.state.mtp[0])

    @torch.inference_mode()
    def launch(self, runs: tuple[Run, ...]) -> Flight:
        """Start a step over `runs`, behind all steps launched before."""
        sampling = [run for run in runs if run.samples]
        graph = self.graphs.find(runs) if self.graphs else None
        if graph is not None:
            placed = graph.forward([run.sequence.state_slot for run in runs])
        else:
            seats = self.slots.seat(self._layouts.of(runs), self._slots(runs))
            placed = self.forward(seats, self._known_tokens(runs))
        # Log probabilities are of the logits as the model gave them.
        logits = self.sampler.adjust(placed.logits, sampling) if sampling else placed.logits
        given = placed.logits if logits is placed.logits else placed.logits.clone()
        if graph is not None:
            settled = graph.finish(logits)
        else:
            settled = self.finish(placed, logits, self._known_after(runs))
        logprobs = self.sampler.logprobs(given, sampling, settled.sampled)
        flight = Flight(
            runs,
            self._home(settled.answers[: len(sampling)]),
            self._home(placed.nonfinite[: len(runs)]),
            logprobs and replace(logprobs, tensors=self._all_home(logprobs.tensors)),
            self._prompt_logprobs(runs, placed.out),
            {
                number: self._image(run.sequence, 0, run.begin + run.count)
                for number, run in enumerate(runs)
                if run.keep_image
            },
            torch.cuda.Event() if self.device.type == "cuda" else None,
        )
        if flight.ready is not None:
            flight.ready.record()
        return flight

    def forward(self, seats: Seats, token_ids: Tensor | None) -> Placed:
        """The first half of a step: `token_ids [T]` are those the host knows, −1 for the others (None:
        it knows none). Device work only, the same for the same shapes: it can be captured."""
        ops = self.model.ops
        batch, uniform = ops.place_step(self.slots.columns, seats, token_ids)
        out = self.model.forward(batch, self.state)
        # Logits have numbers of their own that may not be finite.
        ops.check_logits(out.nonfinite, out.logits, batch)
        return Placed(seats, batch, out, out.logits.float(), out.nonfinite, uniform)

    def finish(self, placed: Placed, logits: Tensor, known_after: Tensor | None) -> Finished:
        """The second half: sample from `logits [L, V]`, settle, draft. `known_after [S]`: the next token
        of runs that do not sample, −1 of the others. Device work only, as before."""
        seats, batch, ops = placed.seats, placed.batch, self.model.ops
        if not logits.shape[0]:
            sampled = batch.token_ids[:0]
        else:
            sampled = self.sampler.sample(logits, seats, placed.uniform)
        columns = self.slots.columns
        settled = ops.settle_step(
            columns, seats, batch, sampled, placed.nonfinite, placed.out.streams
        )
        if not self.num_drafts:
            return Finished(sampled, settled.answers)
        drafts = self._draft(placed, sampled, settled, known_after)
        return Finished(
            sampled, ops.keep_drafts(columns.tokens, seats.mine, settled.answers, drafts)
        )

    def collect(self, flight: Flight) -> list[RunResult]:
        """Wait for a step; what each of its runs brought."""
        if flight.ready is not None:
            flight.ready.synchronize()
        answers, nonfinite = flight.answers.tolist(), flight.nonfinite.tolist()
        width = flight.answers.shape[1] - self.num_drafts
        each = iter(answers)
        results = [
            _sampled(run, next(each), width, bad) if run.samples else RunResult(run.count, (), bad)
            for run, bad in zip(flight.runs, nonfinite, strict=True)
        ]
        for number, image in flight.images.items():
            results[number] = results[number]._replace(image=image)
        for number in flight.prompt_logprobs:
            found = self._collect_prompt_logprobs(flight, number)
            results[number] = results[number]._replace(prompt_logprobs=found)
        if flight.logprobs is not None:
            sampling = [number for number, run in enumerate(flight.runs) if run.samples]
            for number, first in zip(sampling, flight.logprobs.first, strict=True):
                if first is not None:
                    results[number] = _with_logprobs(flight, results[number], number, first)
        return results

    def _home(self, tensor: Tensor) -> Tensor:
        """A copy in host memory that fills up when the device comes to it."""
        if self.device.type == "cpu":
            return tensor
        home = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        return home.copy_(tensor, non_blocking=True)

    def _all_home(self, tensors: LogprobTensors) -> LogprobTensors:
        first, second, third, fourth = tensors
        return self._home(first), self._home(second), self._home(third), self._home(fourth)

    def _place(self, slot: int, version: int, block_ids: Seq[int]) -> Place:
        fold_slot = slot * self.slots.versions + version
        return Place(slot, fold_slot, block_ids, self.model.config.sliding_window)

    def _image(self, sequence: Sequence, version: int, position: int) -> StateImage:
        place = self._place(sequence.state_slot, version, sequence.block_ids)
        return capture(self.state, place, position, self.slots.columns.streams[sequence.state_slot])

    def _slots(self, runs: Seq[Run]) -> Tensor:
        """The runs' slots; from one decode step to the next they are mostly the same."""
        slots = [run.sequence.state_slot for run in runs]
        if slots != self._last_slots[0] or not slots:
            moved = to_device([np.array(slots, np.int64)], self.device)[0]
            self._last_slots = (slots, moved)
        return self._last_slots[1]

    def _known_tokens(self, runs: Seq[Run]) -> Tensor | None:
        """Flat token ids of runs that do not just decode, −1 for those that do; None if all do."""
        if all(run.decodes for run in runs):
            return None
        ids: list[int] = []
        for run in runs:
            if run.decodes:
                ids += [-1] * run.count
            else:
                ids += run.sequence.token_ids[run.begin : run.begin + run.count]
        return to_device([np.array(ids, np.int64)], self.device)[0]

    def _known_after(self, runs: Seq[Run]) -> Tensor | None:
        """The token after each run that does not sample, −1 for the others; only the MTP layer asks."""
        if not self.num_drafts or all(run.samples for run in runs):
            return None
        known = [
            -1 if run.samples else run.sequence.token_ids[run.begin + run.count] for run in runs
        ]
        return to_device([np.array(known, np.int64)], self.device)[0]

    def _draft(
        self, placed: Placed, sampled: Tensor, settled: Settled, known_after: Tensor | None
    ) -> Tensor:
        """Guesses at the tokens after each sampling run's last, `[R, k]`: one from the MTP layer over
        the whole batch, on the main model's streams, each further one from the layer's own."""
        mtp, state, batch, ops = self.model.mtp[0], self.state.mtp[0], placed.batch, self.model.ops
        step = placed.seats.step
        following = ops.next_tokens(batch, step, sampled, known_after)
        last = step.pick(settled.last)
        guess = mtp.forward(
            placed.out.streams, following, replace(batch, logits_tokens=last), state
        )
        if not last.shape[0]:
            return following.new_zeros(0, self.num_drafts)
        ids, streams = ops.likeliest(guess.logits, self.allowed), guess.streams[last]
        drafts = [ids]
        for _ in range(1, self.num_drafts):
            batch = ops.step_after(batch, last, self.ring_rows)
            guess = mtp.forward(streams, ids, batch, state)
            ids, streams = ops.likeliest(guess.logits, self.allowed), guess.streams
            last = batch.logits_tokens
            drafts.append(ids)
        return torch.stack(drafts, dim=1)

    def _prompt_logprobs(
        self, runs: Seq[Run], out: ForwardOutput
    ) -> dict[int, list[tuple[Seq[int], LogprobTensors]]]:
        """For the runs that ask for them: prompt tokens after the run's own with their log
        probabilities, in tiles of rows."""
        found: dict[int, list[tuple[Seq[int], LogprobTensors]]] = {}
        begin = 0
        for number, run in enumerate(runs):
            count = run.sequence.request.params.prompt_logprobs
            if count is not None:
                prompt = run.sequence.request.prompt_token_ids
                wanted = prompt[run.begin + 1 : run.begin + 1 + run.count]
                tiles: list[tuple[Seq[int], LogprobTensors]] = []
                for low in range(0, len(wanted), PROMPT_LOGPROB_ROWS):
                    part = wanted[low : low + PROMPT_LOGPROB_ROWS]
                    streams = out.streams[begin + low : begin + low + len(part)]
                    ids = torch.tensor(part).to(self.device)
                    logits = self.model.head(streams)
                    tensors = self.model.ops.token_logprobs(logits, ids, count)
                    tiles.append((part, self._all_home(tensors)))
                found[number] = tiles
            begin += run.count
        return found

    def _collect_prompt_logprobs(self, flight: Flight, number: int) -> list[TokenLogprobs]:
        count = flight.runs[number].sequence.request.params.prompt_logprobs or 0
        tiles = flight.prompt_logprobs.get(number, ())
        return [each for ids, tensors in tiles for each in token_logprobs(ids, tensors, count)]


def _sampled(run: Run, answer: list[int], width: int, nonfinite: bool) -> RunResult:
    """From a row of `Flight.answers`, whose drafts begin at `width`."""
    taken = answer[0]
    standing = run.count - run.num_drafts + taken - 1
    return RunResult(standing, tuple(answer[1 : 1 + taken]), nonfinite, answer[width:])


def _with_logprobs(flight: Flight, result: RunResult, number: int, first: int) -> RunResult:
    assert flight.logprobs is not None
    end = first + len(result.token_ids)
    tensors = flight.logprobs.tensors
    own = (
        tensors[0][first:end],
        tensors[1][first:end],
        tensors[2][first:end],
        tensors[3][first:end],
    )
    count = flight.runs[number].sequence.request.params.logprobs or 0
    return result._replace(logprobs=token_logprobs(result.token_ids, own, count))

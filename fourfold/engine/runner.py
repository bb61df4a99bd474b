"""Carries out a step on the device: saves and restores state, runs the model, samples, drafts.

Contract: the only place that calls the model. A run's tokens are the next known ones, then its drafts;
a sampling run gets one logits row for its last known token and one for each draft. What is sampled at
a position depends on the sequence alone (its tokens, parameters, seed). Draft tokens that do not stand
leave nothing behind that a later step reads: their ring rows and compressed rows lie beyond every
visible position until they are written again, and folds are kept for every draft position.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import replace
from itertools import chain
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fourfold.cache.image import Place, StateImage, capture, restore
from fourfold.cache.rows import ring_rows
from fourfold.core.batch import ForwardBatch, ScheduledBatch, ScheduledSequence, lower
from fourfold.core.request import TokenLogprobs
from fourfold.core.state import ModelState
from fourfold.engine.sampler import Sampler
from fourfold.engine.scheduler import Restoring, Run, Saving
from fourfold.engine.sequence import Sequence
from fourfold.model.parts import ForwardOutput
from fourfold.model.v4 import DeepseekV4

PROMPT_LOGPROB_ROWS = 256  # rows of logits held at once


class RunResult(NamedTuple):
    """What a run brought: how many of its tokens stand (all but rejected drafts), tokens sampled (none:
    the run did not sample), whether its numbers were finite, drafts after the last token, and log
    probabilities where asked for."""

    standing: int
    token_ids: tuple[int, ...] = ()
    finite: bool = True
    drafts: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprobs, ...] = ()
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()


def _standing(runs: Seq[Run], tokens: Seq[tuple[int, ...]]) -> list[int]:
    """How many of each run's tokens stand, given what those that sample have sampled."""
    sampled = iter(tokens)
    return [
        run.count - len(run.drafts) + len(next(sampled)) - 1 if run.samples else run.count
        for run in runs
    ]


class Runner:
    """A model, its state, and the device they live on."""

    def __init__(
        self,
        model: DeepseekV4,
        state: ModelState,
        num_slots: int,
        device: torch.device,
        allowed: Tensor | None,
        num_drafts: int = 0,
    ):
        config, table = model.config, model.embed.table
        self.model, self.state, self.device = model, state, device
        self.num_drafts, self.versions = num_drafts, 1 + num_drafts
        self.ring_rows = ring_rows(config, num_drafts)
        self.allowed = None if allowed is None else allowed.to(device)
        self.sampler = Sampler(model.ops, self.allowed, device)
        # Streams of each slot's last committed token: images hold them, the MTP layer resumes on them.
        shape = (num_slots, config.hc_mult, config.hidden_size)
        self.last_streams = torch.zeros(shape, dtype=table.dtype, device=device)

    @torch.inference_mode()
    def save(self, saving: Saving) -> StateImage:
        """A preempted sequence's state, pages included, in host memory."""
        place = self._place(saving.state_slot, saving.fold_version, saving.block_ids)
        place = replace(place, carry=len(saving.block_ids))
        position = saving.sequence.num_computed_tokens
        image = capture(self.state, place, position, self.last_streams[saving.state_slot])
        return image.to(torch.device("cpu"))

    @torch.inference_mode()
    def image(self, sequence: Sequence) -> StateImage:
        """The state of a running sequence at its `num_computed_tokens`."""
        place = self._place(sequence.state_slot, sequence.fold_version, sequence.block_ids)
        streams = self.last_streams[sequence.state_slot]
        return capture(self.state, place, sequence.num_computed_tokens, streams)

    @torch.inference_mode()
    def restore(self, restorings: Seq[Restoring]) -> None:
        """Write images to their sequences' places, and compute the MTP rows they could not hold."""
        for each in restorings:
            sequence = each.sequence
            place = self._place(sequence.state_slot, sequence.fold_version, sequence.block_ids)
            streams = restore(self.state, replace(place, carry=each.carry), each.image)
            self.last_streams[sequence.state_slot] = streams.to(self.device)
        if not (self.num_drafts and restorings):
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
        streams = self.last_streams[batch.state_slots]
        self.model.mtp[0].forward(streams, batch.token_ids, batch, self.state.mtp[0])

    @torch.inference_mode()
    def run(self, runs: Seq[Run]) -> list[RunResult]:
        """Run the model over `runs` and sample; accepted state is at the sequences' new length."""
        batch = lower(self._scheduled(runs), self._ratios, self.ring_rows, self.device)
        out = self.model.forward(batch, self.state)
        finite = [not bad for bad in self._nonfinite(batch, out).tolist()]
        sampling = [run for run in runs if run.samples]
        tokens, logprobs, sampled = self.sampler.sample(out.logits, sampling)
        standing = _standing(runs, tokens)
        drafts = self._draft(runs, batch, out, sampled, tokens, standing)
        self._remember_streams(runs, batch, out, standing)
        brought = zip(tokens, drafts, logprobs, strict=True)
        results: list[RunResult] = []
        for run, stand, good in zip(runs, standing, finite, strict=True):
            prompt: tuple[TokenLogprobs, ...] = ()
            if run.sequence.request.params.prompt_logprobs is not None:
                prompt = self._prompt_logprobs(run, len(results), batch, out)
            new, guesses, values = next(brought) if run.samples else ((), (), ())
            results.append(RunResult(stand, new, good, guesses, values, prompt))
        return results

    def _nonfinite(self, batch: ForwardBatch, out: ForwardOutput) -> Tensor:
        """Which sequences met a number that is not finite, their logits included."""
        owners = batch.sequence_ids[batch.logits_tokens]
        check = self.model.ops.nonfinite_sequences
        return out.nonfinite | check(out.logits, owners, batch.num_sequences)

    @property
    def _ratios(self) -> tuple[int, ...]:
        return self.model.config.compress_ratios

    def _place(self, slot: int, version: int, block_ids: Seq[int]) -> Place:
        fold_slot = slot * self.versions + version
        return Place(slot, fold_slot, block_ids, self.model.config.sliding_window)

    def _scheduled(self, runs: Seq[Run]) -> ScheduledBatch:
        """The runs as host integers: tokens, where state is read, where folds are kept."""
        sequences = []
        for s, count, samples, _, drafts in runs:
            computed, slot, first = (
                s.num_computed_tokens,
                s.state_slot,
                s.state_slot * self.versions,
            )
            last = count - len(drafts) - 1  # known token
            tokens, keeps = s.token_ids[computed : computed + last + 1], [(last, first)]
            if drafts:
                tokens += drafts
                keeps += [(last + i, first + i) for i in range(1, 1 + len(drafts))]
            source = first + s.fold_version if computed else -1
            wanted = last if samples else count
            sequences.append(
                ScheduledSequence(tokens, computed, s.block_ids, slot, source, keeps, wanted)
            )
        return ScheduledBatch(tuple(sequences))

    def _draft(
        self,
        runs: Seq[Run],
        batch: ForwardBatch,
        out: ForwardOutput,
        sampled: Tensor,
        tokens: Seq[tuple[int, ...]],
        standing: Seq[int],
    ) -> list[tuple[int, ...]]:
        """Guesses at the tokens after each sampling run's last: one from the MTP layer over the whole
        batch, on the main model's streams, each further one from the layer's own."""
        if not self.num_drafts:
            return [()] * len(tokens)
        following = list(chain.from_iterable(map(self._after, runs)))
        next_ids = torch.tensor(following, dtype=torch.int64, device=self.device)
        next_ids[batch.logits_tokens] = sampled
        sampling = [run for run in runs if run.samples]
        rows, row = [], 0
        for run, got in zip(sampling, tokens, strict=True):
            rows.append(row + len(got) - 1)
            row += 1 + len(run.drafts)
        last = batch.logits_tokens[rows]
        mtp, state = self.model.mtp[0], self.state.mtp[0]
        guess = mtp.forward(out.streams, next_ids, replace(batch, logits_tokens=last), state)
        if not tokens:
            return []
        ids = self._likeliest(guess.logits)
        drafts, streams = [ids], guess.streams[last]
        ends = [
            run.sequence.num_computed_tokens + stand
            for run, stand in zip(runs, standing, strict=True)
            if run.samples
        ]
        for number in range(1, self.num_drafts):
            singles = [
                ScheduledSequence([0], end + number - 1, state_slot=run.sequence.state_slot)
                for run, end in zip(sampling, ends, strict=True)
            ]
            single = lower(ScheduledBatch(tuple(singles)), (), self.ring_rows, self.device)
            guess = mtp.forward(streams, ids, single, state)
            ids, streams = self._likeliest(guess.logits), guess.streams
            drafts.append(ids)
        return [tuple(row) for row in torch.stack(drafts, dim=1).tolist()]

    def _likeliest(self, logits: Tensor) -> Tensor:
        if self.allowed is not None:
            logits = logits.masked_fill(~self.allowed, float("-inf"))
        return logits.argmax(-1)

    @staticmethod
    def _after(run: Run) -> list[int]:
        """The known token after each token of a run; 0 where it is sampled or drafted."""
        begin = run.sequence.num_computed_tokens + 1
        known = run.sequence.token_ids[begin : begin + run.count]
        return known + [0] * (run.count - len(known))

    def _remember_streams(
        self, runs: Seq[Run], batch: ForwardBatch, out: ForwardOutput, standing: Seq[int]
    ) -> None:
        counts = np.array([run.count for run in runs])
        rows = counts.cumsum() - counts + standing - 1
        last = out.streams[torch.from_numpy(rows).to(self.device)]
        self.last_streams[batch.state_slots] = last

    def _prompt_logprobs(
        self, run: Run, number: int, batch: ForwardBatch, out: ForwardOutput
    ) -> tuple[TokenLogprobs, ...]:
        """Log probabilities of the prompt tokens after this run's, in tiles of rows."""
        count = run.sequence.request.params.prompt_logprobs or 0
        computed = run.sequence.num_computed_tokens
        wanted = run.sequence.request.prompt_token_ids[computed + 1 : computed + 1 + run.count]
        begin = int(batch.cu_seqlens_q[number])
        found: list[TokenLogprobs] = []
        for low in range(0, len(wanted), PROMPT_LOGPROB_ROWS):
            part = wanted[low : low + PROMPT_LOGPROB_ROWS]
            streams = out.streams[begin + low : begin + low + len(part)]
            found += self.sampler.logprobs(self.model.head(streams), part, count)
        return tuple(found)

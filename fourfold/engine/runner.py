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
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from fourfold.cache.image import Place, StateImage, capture, restore
from fourfold.cache.rows import ring_rows
from fourfold.core.batch import (
    ForwardBatch,
    ScheduledBatch,
    ScheduledSequence,
    batch_after,
    lower,
)
from fourfold.core.request import TokenLogprobs
from fourfold.core.state import ModelState
from fourfold.engine.sampler import Sampler
from fourfold.engine.scheduler import Restoring, Run, Saving
from fourfold.engine.sequence import Sequence
from fourfold.model.parts import ForwardOutput
from fourfold.model.v4 import DeepseekV4

T = TypeVar("T")

PROMPT_LOGPROB_ROWS = 256  # rows of logits held at once


class RunResult(NamedTuple):
    """What a run brought: how many of its tokens stand (all but rejected drafts), tokens sampled (none:
    the run did not sample), whether it met a number that is not finite, drafts after the last token, and
    log probabilities where asked for."""

    standing: int
    token_ids: tuple[int, ...] = ()
    nonfinite: bool = False
    drafts: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprobs, ...] = ()
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()


def _spread(values: Seq[tuple[T, ...]], runs: Seq[Run]) -> Seq[tuple[T, ...]]:
    """The values of the runs that sample, with nothing for the others."""
    if len(values) == len(runs):
        return values
    each = iter(values)
    return [next(each) if run.samples else () for run in runs]


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
        # What a decoding run keeps, by slot: the fold after token i as version i.
        self.keeps = [
            [(i, slot * self.versions + i) for i in range(self.versions)]
            for slot in range(num_slots)
        ]
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
        if not self.num_drafts:
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
        nonfinite = self._nonfinite(batch, out).tolist()
        sampling = [run for run in runs if run.samples]
        tokens, logprobs, sampled = self.sampler.sample(out.logits, sampling)
        drafts = self._draft(runs, batch, out, sampled, tokens)
        rejected = self._rejected(runs, tokens)
        standing = [run.count - gone for run, gone in zip(runs, rejected, strict=True)]
        last = self._last_standing(batch, rejected)
        self.last_streams[batch.state_slots] = out.streams[last]
        prompts = [
            self._prompt_logprobs(run, number, batch, out)
            if run.sequence.request.params.prompt_logprobs is not None
            else ()
            for number, run in enumerate(runs)
        ]
        brought = (_spread(tokens, runs), nonfinite, _spread(drafts, runs), _spread(logprobs, runs))
        return list(map(RunResult._make, zip(standing, *brought, prompts, strict=True)))

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
        for run in runs:
            s, count, drafts = run.sequence, run.count, run.drafts
            computed, slot = s.num_computed_tokens, s.state_slot
            first = slot * self.versions
            last = count - len(drafts) - 1  # known token
            tokens = s.token_ids[computed : computed + last + 1]
            if drafts:
                tokens += drafts
            keeps = [(last, first)] if last else self.keeps[slot][:count]
            source = first + s.fold_version if computed else -1
            wanted = last if run.samples else count
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
    ) -> list[tuple[int, ...]]:
        """Guesses at the tokens after each sampling run's last: one from the MTP layer over the whole
        batch, on the main model's streams, each further one from the layer's own."""
        if not self.num_drafts:
            return [()] * len(tokens)
        mtp, state = self.model.mtp[0], self.state.mtp[0]
        following = self._following(runs, batch, sampled)
        samples = np.flatnonzero(np.array([run.samples for run in runs]))
        last = self._last_standing(batch, self._rejected(runs, tokens))
        last = last[torch.from_numpy(samples).to(self.device)]
        guess = mtp.forward(out.streams, following, replace(batch, logits_tokens=last), state)
        if not tokens:
            return []
        ids, streams = self._likeliest(guess.logits), guess.streams[last]
        drafts = [ids]
        for _ in range(1, self.num_drafts):
            batch = batch_after(batch, last, self.ring_rows)
            guess = mtp.forward(streams, ids, batch, state)
            ids, streams, last = self._likeliest(guess.logits), guess.streams, batch.logits_tokens
            drafts.append(ids)
        return list(map(tuple, torch.stack(drafts, dim=1).tolist()))

    def _following(self, runs: Seq[Run], batch: ForwardBatch, sampled: Tensor) -> Tensor:
        """The token after each token of the batch: the next one, what was sampled, or, after a run
        that does not sample, the next one known."""
        following = batch.token_ids.roll(-1)
        following[batch.logits_tokens] = sampled
        known = [
            (number, run.sequence.token_ids[run.sequence.num_computed_tokens + run.count])
            for number, run in enumerate(runs)
            if not run.samples
        ]
        if known:
            numbers, ids = torch.tensor(known).to(self.device).unbind(1)
            following[batch.cu_seqlens_q[numbers + 1] - 1] = ids
        return following

    def _rejected(self, runs: Seq[Run], tokens: Seq[tuple[int, ...]]) -> Seq[int]:
        """How many of each run's tokens do not stand, given what those that sample have sampled."""
        if not self.num_drafts:
            return [0] * len(runs)
        return [
            len(run.drafts) + 1 - len(got) if got else 0
            for run, got in zip(runs, _spread(tokens, runs), strict=True)
        ]

    def _last_standing(self, batch: ForwardBatch, rejected: Seq[int]) -> Tensor:
        """The flat token of each run after which nothing stands, `[S]`."""
        last = batch.cu_seqlens_q[1:] - 1
        if not self.num_drafts:
            return last
        return last - torch.from_numpy(np.array(rejected)).to(self.device)

    def _likeliest(self, logits: Tensor) -> Tensor:
        if self.allowed is not None:
            logits = logits.masked_fill(~self.allowed, float("-inf"))
        return logits.argmax(-1)

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

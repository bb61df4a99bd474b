"""Sampling of a step's logits rows: parameters to tensors, draft verification, log probabilities.

Contract: every row is sampled as if it were the only one and there were no drafts; a draft stands if it
is what was sampled. All of a request's parameters apply at every draft position, with the drafts before
it taken as context.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from itertools import chain

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fourfold.core.request import SamplingParams, TokenLogprobs
from fourfold.engine.randomness import uniform
from fourfold.engine.scheduler import Run
from fourfold.engine.sequence import Sequence
from fourfold.ops.registry import KernelPlan
from fourfold.ops.sampling import Adjustments, SamplingRows

MAX_TOP_K = 1 << 31  # no vocabulary is larger

Sampled = tuple[list[tuple[int, ...]], list[tuple[TokenLogprobs, ...]], Tensor]


@dataclass(frozen=True)
class _Columns:
    """What is asked of the sequences of a step: numbers, one a sequence, and whether at all."""

    sequences: list[Sequence]
    seeds: npt.NDArray[np.uint64]
    temperature: Tensor
    top_p: Tensor
    top_k: Tensor
    min_p: Tensor
    changes: bool  # some have penalties, biases or barred tokens
    logprobs: bool  # some want log probabilities

    @staticmethod
    def of(sequences: list[Sequence], device: torch.device) -> _Columns:
        params = [s.request.params for s in sequences]
        top_k = [min(max(p.top_k, 0), MAX_TOP_K) for p in params]
        return _Columns(
            sequences,
            np.array([s.seed for s in sequences], np.uint64),
            torch.tensor([p.temperature for p in params], dtype=torch.float32).to(device),
            torch.tensor([p.top_p for p in params], dtype=torch.float32).to(device),
            torch.tensor(top_k, dtype=torch.int64).to(device),
            torch.tensor([p.min_p for p in params], dtype=torch.float32).to(device),
            any(s.changes_logits for s in sequences),
            any(p.logprobs is not None for p in params),
        )


class Sampler:
    """`allowed [V]`: ids the tokenizer knows (None: all)."""

    def __init__(self, ops: KernelPlan, allowed: Tensor | None, device: torch.device):
        self.ops, self.allowed, self.device = ops, allowed, device
        self._columns = _Columns.of([], device)

    def sample(self, logits: Tensor, runs: Seq[Run]) -> Sampled:
        """Tokens of each run (its standing drafts and one more), their log probabilities where asked
        for, and what was sampled in every row of `logits [N, V]`."""
        if not runs:
            return [], [], torch.zeros(0, dtype=torch.int64, device=self.device)
        sequences = [run.sequence for run in runs]
        # From one decode step to the next they are mostly the same.
        if sequences != self._columns.sequences:
            self._columns = _Columns.of(sequences, self.device)
        columns = self._columns
        drafts = [run.drafts for run in runs]
        logits = logits.float()
        adjustments = self._adjustments(runs, drafts) if columns.changes else None
        adjusted = self.ops.adjust_logits(logits, adjustments, self.allowed)
        counts = np.array([1 + len(guessed) for guessed in drafts])
        sampled = self.ops.sample(adjusted, self._rows(columns, counts))
        tokens = self._accept(sampled, sequences, drafts, counts)
        if columns.logprobs:
            return tokens, self._logprobs(logits, runs, drafts, tokens), sampled
        return tokens, [()] * len(tokens), sampled

    def logprobs(self, logits: Tensor, tokens: Seq[int], count: int) -> list[TokenLogprobs]:
        """Log probabilities of `tokens` under `logits [N, V]`, with `count` alternatives."""
        ids = torch.tensor(tokens, dtype=torch.int64, device=logits.device)
        own, rank, top, top_logprobs = self.ops.token_logprobs(logits, ids, count)
        columns = zip(
            tokens, own.tolist(), rank.tolist(), top.tolist(), top_logprobs.tolist(), strict=True
        )
        return [
            TokenLogprobs(token, value, place, tuple(zip(ids, values, strict=True)))
            for token, value, place, ids, values in columns
        ]

    def _rows(self, columns: _Columns, counts: npt.NDArray[np.int64]) -> SamplingRows:
        """Parameters of every row; `counts` rows belong to each sequence."""
        c = columns
        # Row i of a sequence samples the token at its length + i.
        positions = np.array([len(s.token_ids) for s in c.sequences])
        seeds, fields = c.seeds, [c.temperature, c.top_p, c.top_k, c.min_p]
        if len(counts) < counts.sum():
            owners = np.repeat(np.arange(len(counts)), counts)
            first = counts.cumsum() - counts
            positions = (positions - first)[owners] + np.arange(len(owners))
            seeds = seeds[owners]
            on_device = torch.from_numpy(owners).to(self.device)
            fields = [field[on_device] for field in fields]
        temperature, top_p, top_k, min_p = fields
        numbers = torch.from_numpy(uniform(seeds, positions)).to(self.device)
        return SamplingRows(temperature, top_p, top_k, min_p, numbers)

    def _adjustments(self, runs: Seq[Run], drafts: Seq[Seq[int]]) -> Adjustments | None:
        rows: list[int] = []
        tokens: list[int] = []
        repetitions: list[float] = []
        biases: list[float] = []
        row = 0
        for run, guessed in zip(runs, drafts, strict=True):
            if run.sequence.changes_logits:
                for i in range(1 + len(guessed)):
                    changes = changed_logits(run.sequence, guessed[:i])
                    for token, (repetition, bias) in changes.items():
                        rows.append(row + i)
                        tokens.append(token)
                        repetitions.append(repetition)
                        biases.append(bias)
            row += 1 + len(guessed)
        if not rows:
            return None
        return Adjustments(
            torch.tensor(rows).to(self.device),
            torch.tensor(tokens).to(self.device),
            torch.tensor(repetitions, dtype=torch.float32).to(self.device),
            torch.tensor(biases, dtype=torch.float32).to(self.device),
        )

    def _accept(
        self,
        sampled: Tensor,
        sequences: Seq[Sequence],
        drafts: Seq[Seq[int]],
        counts: npt.NDArray[np.int64],
    ) -> list[tuple[int, ...]]:
        """Tokens of each sequence: of its `counts` rows of `sampled`, the standing drafts and the one
        after, up to its end."""
        width = int(counts.max()) - 1
        if not width:
            return [(token,) for token in sampled.tolist()]
        padded = np.full((len(drafts), width), -1)
        padded[np.arange(width) < counts[:, None] - 1] = list(chain.from_iterable(drafts))
        starts = counts.cumsum() - counts
        # Beyond a sequence's own rows, where no draft can stand, any row will do.
        rows = np.minimum(starts[:, None] + np.arange(width + 1), len(sampled) - 1)
        accepted = self.ops.count_accepted(
            sampled[torch.from_numpy(rows).to(self.device)],
            torch.from_numpy(padded).to(self.device),
        )
        ends = (starts + 1 + accepted.cpu().numpy()).tolist()
        flat = sampled.tolist()
        return [
            sequence.until_end(flat[begin:end])
            for sequence, begin, end in zip(sequences, starts.tolist(), ends, strict=True)
        ]

    def _logprobs(
        self, logits: Tensor, runs: Seq[Run], drafts: Seq[Seq[int]], tokens: Seq[tuple[int, ...]]
    ) -> list[tuple[TokenLogprobs, ...]]:
        found: list[tuple[TokenLogprobs, ...]] = []
        begin = 0
        for run, guessed, got in zip(runs, drafts, tokens, strict=True):
            count = run.sequence.request.params.logprobs
            if count is None:
                found.append(())
            else:
                found.append(tuple(self.logprobs(logits[begin : begin + len(got)], got, count)))
            begin += 1 + len(guessed)
        return found


def changed_logits(sequence: Sequence, drafts: Seq[int]) -> dict[int, tuple[float, float]]:
    """Token → (repetition factor, addend) for the row after `drafts`; empty for most requests."""
    params: SamplingParams = sequence.request.params
    changes: dict[int, tuple[float, float]] = {}
    if params.has_penalties:
        output = Counter(sequence.token_ids[sequence.num_prompt_tokens :])
        output.update(drafts)
        # Only the repetition penalty looks at the prompt.
        prompt = sequence.request.prompt_token_ids if params.repetition_penalty != 1.0 else ()
        for token in {*prompt, *output}:
            count = output.get(token, 0)
            addend = -params.frequency_penalty * count - params.presence_penalty * (count > 0)
            changes[token] = (params.repetition_penalty, addend)
    for token, bias in params.logit_bias.items():
        repetition, addend = changes.get(token, (1.0, 0.0))
        changes[token] = (repetition, addend + bias)
    if sequence.num_output_tokens + len(drafts) < params.min_tokens:
        for token in sequence.stop_ids:
            changes[token] = (1.0, float("-inf"))
    return changes

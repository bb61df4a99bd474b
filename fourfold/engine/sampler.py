"""Sampling of a step's logits rows: parameters to tensors, draft verification, log probabilities.

Contract: every row is sampled as if it were the only one and there were no drafts; a draft stands if it
is what was sampled. All of a request's parameters apply at every draft position, with the drafts before
it taken as context.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence as Seq
from itertools import chain

import numpy as np
import torch
from torch import Tensor

from fourfold.core.request import SamplingParams, TokenLogprobs
from fourfold.engine.randomness import uniform
from fourfold.engine.scheduler import Run
from fourfold.engine.sequence import Sequence
from fourfold.ops.registry import KernelPlan
from fourfold.ops.sampling import Adjustments, SamplingRows

Sampled = tuple[list[tuple[int, ...]], list[tuple[TokenLogprobs, ...]], Tensor]


class Sampler:
    """`allowed [V]`: ids the tokenizer knows (None: all)."""

    def __init__(self, ops: KernelPlan, allowed: Tensor | None, device: torch.device):
        self.ops, self.allowed, self.device = ops, allowed, device

    def sample(self, logits: Tensor, runs: Seq[Run]) -> Sampled:
        """Tokens of each run (its standing drafts and one more), their log probabilities where asked
        for, and what was sampled in every row of `logits [N, V]`."""
        if not runs:
            return [], [], torch.zeros(0, dtype=torch.int64, device=self.device)
        drafts = [run.drafts for run in runs]
        logits = logits.float()
        adjusted = self.ops.adjust_logits(logits, self._adjustments(runs, drafts), self.allowed)
        sampled = self.ops.sample(adjusted, self._rows(runs, drafts, logits.shape[-1]))
        accepted = self._accept(sampled, drafts)
        tokens = [run.sequence.until_end(got) for run, got in zip(runs, accepted, strict=True)]
        return tokens, self._logprobs(logits, runs, drafts, tokens), sampled

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

    def _rows(self, runs: Seq[Run], drafts: Seq[Seq[int]], vocabulary: int) -> SamplingRows:
        params = [run.sequence.request.params for run in runs]
        counts = np.array([1 + len(guessed) for guessed in drafts])
        owners = np.repeat(np.arange(len(runs)), counts)
        seeds = np.array([run.sequence.seed for run in runs], np.uint64)
        # Row i of a run samples the token at its sequence's length + i.
        positions = (
            np.array([len(run.sequence.token_ids) for run in runs]) - counts.cumsum() + counts
        )
        numbers = uniform(seeds[owners], positions[owners] + np.arange(len(owners)))

        def column(values: Seq[float], dtype: type = np.float32) -> Tensor:
            return torch.from_numpy(np.array(values, dtype)[owners]).to(self.device)

        return SamplingRows(
            temperature=column([p.temperature for p in params]),
            top_p=column([p.top_p for p in params]),
            top_k=column([min(max(p.top_k, 0), vocabulary) for p in params], np.int64),
            min_p=column([p.min_p for p in params]),
            uniform=torch.from_numpy(numbers).to(self.device),
        )

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

    def _accept(self, sampled: Tensor, drafts: Seq[Seq[int]]) -> list[tuple[int, ...]]:
        """Tokens of each run: of its rows of `sampled`, the standing drafts and the one after."""
        lengths = np.array([len(guessed) for guessed in drafts])
        width = int(lengths.max())
        if not width:
            return [(token,) for token in sampled.tolist()]
        padded = np.full((len(drafts), width), -1)
        padded[np.arange(width) < lengths[:, None]] = list(chain.from_iterable(drafts))
        starts = (1 + lengths).cumsum() - 1 - lengths
        # Beyond a run's own rows, where no draft can stand, any row will do.
        rows = np.minimum(starts[:, None] + np.arange(width + 1), len(sampled) - 1)
        counts = self.ops.count_accepted(
            sampled[torch.from_numpy(rows).to(self.device)],
            torch.from_numpy(padded).to(self.device),
        )
        ends = (starts + 1 + counts.cpu().numpy()).tolist()
        flat = sampled.tolist()
        return [tuple(flat[i:j]) for i, j in zip(starts.tolist(), ends, strict=True)]

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
        for token in {*sequence.request.prompt_token_ids, *output}:
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

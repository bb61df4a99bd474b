"""Sampling of a step's logits rows: parameters to tensors, draft verification, log probabilities.

Contract: every row is sampled as if it were the only one and there were no drafts; a draft stands if it
is what was sampled. All of a request's parameters apply at every draft position, with the drafts before
it taken as context.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence as Seq

import torch
from torch import Tensor

from fourfold.core.request import SamplingParams, TokenLogprobs
from fourfold.engine.randomness import uniform
from fourfold.engine.scheduler import Run
from fourfold.engine.sequence import Sequence
from fourfold.ops.registry import KernelPlan
from fourfold.ops.sampling import Adjustments, SamplingRows

Sampled = tuple[list[tuple[int, ...]], list[tuple[TokenLogprobs, ...]], Tensor]


def drafts_of(run: Run) -> list[int]:
    """The drafts a run verifies."""
    return run.sequence.drafts[: run.count - 1] if run.sequence.is_decoding else []


class Sampler:
    """`allowed [V]`: ids the tokenizer knows (None: all)."""

    def __init__(self, ops: KernelPlan, allowed: Tensor | None, device: torch.device):
        self.ops, self.allowed, self.device = ops, allowed, device

    def sample(self, logits: Tensor, runs: Seq[Run]) -> Sampled:
        """Tokens of each run (its standing drafts and one more), their log probabilities where asked
        for, and what was sampled in every row of `logits [N, V]`."""
        if not runs:
            return [], [], torch.zeros(0, dtype=torch.int64, device=self.device)
        drafts = [drafts_of(run) for run in runs]
        logits = logits.float()
        adjusted = self.ops.adjust_logits(logits, self._adjustments(runs, drafts), self.allowed)
        sampled = self.ops.sample(adjusted, self._rows(runs, drafts))
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

    def _rows(self, runs: Seq[Run], drafts: Seq[Seq[int]]) -> SamplingRows:
        per_row = [
            (run.sequence.request.params, run.sequence.seed, len(run.sequence.token_ids) + i)
            for run, guessed in zip(runs, drafts, strict=True)
            for i in range(1 + len(guessed))
        ]
        numbers = uniform([seed for _, seed, _ in per_row], [at for _, _, at in per_row])

        def column(values: Seq[float], dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.tensor(values, dtype=dtype).to(self.device)

        params = [p for p, _, _ in per_row]
        return SamplingRows(
            temperature=column([p.temperature for p in params]),
            top_p=column([p.top_p for p in params]),
            top_k=column([max(p.top_k, 0) for p in params], torch.int64),
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
            for i in range(1 + len(guessed)):
                changes = changed_logits(run.sequence, guessed[:i])
                for token, (repetition, bias) in changes.items():
                    rows.append(row)
                    tokens.append(token)
                    repetitions.append(repetition)
                    biases.append(bias)
                row += 1
        if not rows:
            return None
        return Adjustments(
            torch.tensor(rows).to(self.device),
            torch.tensor(tokens).to(self.device),
            torch.tensor(repetitions, dtype=torch.float32).to(self.device),
            torch.tensor(biases, dtype=torch.float32).to(self.device),
        )

    def _accept(self, sampled: Tensor, drafts: Seq[Seq[int]]) -> list[tuple[int, ...]]:
        width = max(len(guessed) for guessed in drafts)
        flat = sampled.tolist()
        if not width:
            return [(token,) for token in flat]
        table, begin = [], 0
        for guessed in drafts:
            row = flat[begin : begin + 1 + len(guessed)]
            table.append(row + [-1] * (width + 1 - len(row)))
            begin += 1 + len(guessed)
        padded = [[*guessed, *[-2] * (width - len(guessed))] for guessed in drafts]
        counts = self.ops.count_accepted(
            torch.tensor(table, device=self.device), torch.tensor(padded, device=self.device)
        ).tolist()
        return [tuple(row[: 1 + n]) for row, n in zip(table, counts, strict=True)]

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

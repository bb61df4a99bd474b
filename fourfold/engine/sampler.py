"""Sampling of a step's logits rows: parameters, penalties and masks to tensors, log probabilities.

Contract: every row is sampled as if it were the only one and there were no drafts; a draft stands if it
is what was sampled. All of a request's parameters apply at every draft position, with the drafts before
it taken as context. Nothing is read back to the host here.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

from fourfold.core.request import SamplingParams, TokenLogprobs
from fourfold.engine.sequence import Run, Sequence
from fourfold.ops.registry import KernelPlan
from fourfold.ops.sampling import Adjustments, SamplingRows
from fourfold.ops.step import Seats

LogprobTensors = tuple[Tensor, Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class WantedLogprobs:
    """Log probabilities of what was sampled in the rows of the runs that ask for them: tensors by
    such row, and the number of the first for each sampling run (None: not asked)."""

    tensors: LogprobTensors
    first: tuple[int | None, ...]


class Sampler:
    """`allowed [V]`: ids the tokenizer knows (None: all)."""

    def __init__(self, ops: KernelPlan, allowed: Tensor | None, device: torch.device):
        self.ops, self.allowed, self.device = ops, allowed, device

    def adjust(self, logits: Tensor, runs: Seq[Run]) -> Tensor:
        """`logits [L, V]` after what the requests of the sampling `runs` ask to be changed in them."""
        changes, allowed = self._adjustments(runs), self._allowed(runs, logits.shape[1])
        if changes is None and allowed is None:
            return logits
        count = sum(1 + run.num_drafts for run in runs)
        adjusted: Tensor = self.ops.adjust_logits(logits[:count], changes, allowed)
        return torch.cat([adjusted, logits[count:]])

    def sample(self, logits: Tensor, seats: Seats, numbers: Tensor) -> Tensor:
        """A token for every row of `logits [L, V]` float32, from the rows' `uniform` numbers."""
        known = self.ops.adjust_logits(logits, None, self.allowed)
        rows = SamplingRows(seats.temperature, seats.top_p, seats.top_k, seats.min_p, numbers)
        sampled: Tensor = self.ops.sample(known, rows)
        return sampled

    def logprobs(self, logits: Tensor, runs: Seq[Run], sampled: Tensor) -> WantedLogprobs | None:
        """For the sampling runs that ask for log probabilities; None if nobody does."""
        counts = [run.sequence.request.params.logprobs for run in runs]
        if all(count is None for count in counts):
            return None
        rows: list[int] = []
        first: list[int | None] = []
        for (begin, end), count in zip(_spans(runs), counts, strict=True):
            first.append(None if count is None else len(rows))
            rows += [] if count is None else range(begin, end)
        index = torch.tensor(rows).to(self.device)
        most = max(count for count in counts if count is not None)
        return WantedLogprobs(
            self.ops.token_logprobs(logits[index], sampled[index], most), tuple(first)
        )

    def _adjustments(self, runs: Seq[Run]) -> Adjustments | None:
        if not any(run.sequence.changes_logits for run in runs):
            return None
        rows: list[int] = []
        tokens: list[int] = []
        repetitions: list[float] = []
        biases: list[float] = []
        for run, (begin, end) in zip(runs, _spans(runs), strict=True):
            if not run.sequence.changes_logits:
                continue
            for row in range(begin, end):
                drafts = run.sequence.drafts[: row - begin]
                for token, (repetition, bias) in changed_logits(run.sequence, drafts).items():
                    rows.append(row)
                    tokens.append(token)
                    repetitions.append(repetition)
                    biases.append(bias)
        if not rows:
            return None
        return Adjustments(
            torch.tensor(rows).to(self.device),
            torch.tensor(tokens).to(self.device),
            torch.tensor(repetitions, dtype=torch.float32).to(self.device),
            torch.tensor(biases, dtype=torch.float32).to(self.device),
        )

    def _allowed(self, runs: Seq[Run], vocabulary: int) -> Tensor | None:
        """What masks allow, bool `[L, V]`; None without any."""
        if all(run.sequence.binding_mask is None for run in runs):
            return None
        masks = []
        for run, (begin, end) in zip(runs, _spans(runs), strict=True):
            mask = run.sequence.binding_mask
            if mask is not None:
                bits = mask.allowed(run.sequence.drafts[: end - begin - 1])
                masks.append((range(begin, end), bits))
        count = sum(1 + run.num_drafts for run in runs)
        width = masks[0][1].shape[1]
        packed = np.full((count, width), -1, np.int32)
        for rows, bits in masks:
            packed[rows.start : rows.stop] = bits
        words = torch.from_numpy(packed).to(self.device)
        shifts = torch.arange(32, dtype=torch.int32, device=self.device)
        allowed = ((words.unsqueeze(-1) >> shifts) & 1).flatten(1).bool()
        return allowed[:, :vocabulary]


def _spans(runs: Seq[Run]) -> Iterator[tuple[int, int]]:
    """First logits row and end of each sampling run."""
    ends = list(accumulate(1 + run.num_drafts for run in runs))
    return zip([0, *ends], ends, strict=False)


def token_logprobs(tokens: Seq[int], tensors: LogprobTensors, count: int) -> list[TokenLogprobs]:
    """`tokens` with what `tensors` say of them, row by row, and `count` alternatives each."""
    own, rank, top, top_logprobs = (tensor.tolist() for tensor in tensors)
    return [
        TokenLogprobs(token, value, place, tuple(zip(ids[:count], values[:count], strict=True)))
        for token, value, place, ids, values in zip(
            tokens, own, rank, top, top_logprobs, strict=True
        )
    ]


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

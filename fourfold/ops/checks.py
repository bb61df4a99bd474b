"""Checks that run with the model: which sequences hold numbers that are not finite.

A NaN in any layer's input reaches the token's streams and stays there, through every cast to FP8 that
would hide it; looking at the streams after the last layer sees them all.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from fourfold.core.batch import ForwardBatch, ScheduledBatch, ScheduledSequence, lower
from fourfold.ops.registry import Case, CaseMaker, op


def _cases(make: CaseMaker) -> Iterator[Case]:
    streams = make.randn(5, 4, 16)
    streams[3, 2, 7] = float("nan")
    owners = torch.tensor([0, 0, 1, 2, 2], device=make.device)
    yield Case("third of 3", {"streams": streams, "sequence_ids": owners, "num_sequences": 3})


@op(_cases, differentiable=False)
def nonfinite_sequences(streams: Tensor, sequence_ids: Tensor, num_sequences: int) -> Tensor:
    """Bool `[num_sequences]`: whether any of a sequence's `streams [T, S, D]` is NaN or infinite."""
    bad = ~torch.isfinite(streams).flatten(1).all(-1)
    counts = torch.zeros(num_sequences, dtype=torch.int64, device=streams.device)
    return counts.index_add_(0, sequence_ids, bad.to(torch.int64)) > 0


def _logits_cases(make: CaseMaker) -> Iterator[Case]:
    runs = tuple(ScheduledSequence([0] * n, logits_from=n - 2) for n in (2, 5, 3))
    logits = make.randn(6, 50, dtype=torch.float32)
    logits[4, 49] = float("-inf")
    found = torch.tensor([True, False, False], device=make.device)
    batch = lower(ScheduledBatch(runs), (), 8, make.device)
    yield Case("third of 3", {"found": found, "logits": logits, "batch": batch})


@op(_logits_cases, writes=("found",), differentiable=False, batch_invariant=True)
def check_logits(found: Tensor, logits: Tensor, batch: ForwardBatch) -> None:
    """Set the flag in `found [S]` of every sequence with a number in its `logits [L, V]` that is not
    finite; the others stay as they are."""
    owners = batch.sequence_ids[batch.logits_tokens]
    found |= nonfinite_sequences(logits, owners, batch.num_sequences)

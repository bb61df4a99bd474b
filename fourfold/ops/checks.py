"""Checks that run with the model: which sequences hold numbers that are not finite.

A NaN in any layer's input reaches the token's streams and stays there, through every cast to FP8 that
would hide it; looking at the streams after the last layer sees them all.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

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

"""Weights in training: numbers with gradients, and how a linear layer treats its input.

Contract: stands where the model expects a weight; the ops of train/ops/plan.py are the only ones that
take it. `rounds_input` is what a quantised weight's `quantize_activations` is; `detached` cuts the
gradient to the input.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class TrainWeight:
    """A matrix `[..., N, K]` in the compute dtype, rounded already if it is to be. It changes from
    step to step (train/parameters.py), so that a model need be built only once."""

    value: Tensor
    rounds_input: bool = False
    detached: bool = False

    @property
    def shape(self) -> torch.Size:
        return self.value.shape


def value_of(weight: TrainWeight | Tensor) -> Tensor:
    """The numbers."""
    return weight.value if isinstance(weight, TrainWeight) else weight

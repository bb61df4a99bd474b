"""All routed experts for all tokens: three dense products, experts that were not picked weighted by zero.

Contract: gives what `routed_experts`' body gives up to the order of sums. For few, narrow experts this
is less work for a GPU than gathering each expert's tokens, and no shape depends on the routing.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fourfold.core.tensor import accumulate_dtype
from fourfold.ops.moe import swiglu
from train.ops.rounding import round_activations
from train.ops.weights import TrainWeight, value_of

Triple = tuple[TrainWeight | Tensor, TrainWeight | Tensor, TrainWeight | Tensor]


def shared_expert(
    gate: Tensor, up: Tensor, w2: TrainWeight, limit: float, dtype: torch.dtype
) -> Tensor:
    """The shared expert behind its first products `gate, up [T, I]`: `[T, D]`, unrounded."""
    hidden = swiglu(gate, up, limit).to(dtype)
    if w2.rounds_input:
        hidden = round_activations(hidden)
    return _wide_product(hidden, w2.value)


def routed_experts(
    x: Tensor, ids: Tensor, weights: Tensor, experts: Triple, limit: float
) -> Tensor:
    """Sum of the picked experts of `x [T, D]`, which is rounded already if they want that: `[T, D]`,
    unrounded. `ids, weights [T, k]`."""
    w1, w2, w3 = (value_of(w) for w in experts)
    count, width = w1.shape[:2]
    gate = torch.nn.functional.linear(x, w1.flatten(0, 1))
    up = torch.nn.functional.linear(x, w3.flatten(0, 1))
    wide = accumulate_dtype(x.dtype)
    hidden = swiglu(gate.to(wide), up.to(wide), limit).unflatten(-1, (count, width))
    share = torch.zeros(x.shape[0], count, dtype=weights.dtype, device=x.device)
    share = share.scatter_add(1, ids, weights).to(wide)
    picked = (hidden * share.unsqueeze(-1)).to(x.dtype)
    if isinstance(experts[1], TrainWeight) and experts[1].rounds_input:
        picked = round_activations(picked)
    return _wide_product(picked.flatten(1), w2.transpose(0, 1).flatten(1))


def _wide_product(x: Tensor, weight: Tensor) -> Tensor:
    return torch.nn.functional.linear(x, weight).to(accumulate_dtype(x.dtype))

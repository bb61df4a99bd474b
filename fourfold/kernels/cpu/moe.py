"""Routed experts on a CPU: tokens sorted by expert, so that all but the products is done once for all."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from fourfold.core.device import Feature
from fourfold.core.parameters import EXPERT_ROLES
from fourfold.core.tensor import Weight
from fourfold.kernels.cpu.rounding import rounded_input, rounds
from fourfold.kernels.cpu.weights import as_numbers, matrices, numbers_fit
from fourfold.ops.moe import swiglu
from fourfold.ops.registry import Kernel


def _products(x: Tensor, weight: Weight, bounds: list[int]) -> Tensor:
    """`x [N, K]`, rows `bounds[e] … bounds[e + 1]` times matrix e of `weight [E, M, K]`: `[N, M]`."""
    matrix, out = matrices(weight), x.new_empty(x.shape[0], weight.shape[1])
    for expert, (begin, end) in enumerate(pairwise(bounds)):
        if begin < end:
            torch.mm(x[begin:end], matrix(expert).t(), out=out[begin:end])
    return out


def routed_experts(
    y: Tensor,
    ids: Tensor,
    weights: Tensor,
    w1: Weight,
    w2: Weight,
    w3: Weight,
    limit: float,
    first_expert: int = 0,
    shared: Tensor | None = None,
) -> Tensor:
    """The op `routed_experts` (ops/moe.py)."""
    tokens, topk = ids.shape
    experts = ids.flatten().sub(first_expert)
    sorted_experts, order = experts.sort(stable=True)
    numbers = torch.arange(w1.shape[0] + 1)
    bounds = torch.searchsorted(sorted_experts, numbers).tolist()
    # Picks of experts that are elsewhere lie before the first bound and behind the last.
    mine = order[bounds[0] : bounds[-1]]
    bounds = [bound - bounds[0] for bound in bounds]
    token = mine.div(topk, rounding_mode="floor")
    first = rounded_input(y, w1)[token]
    third = first if rounds(w3) is rounds(w1) else rounded_input(y, w3)[token]
    gate, up = _products(first, w1, bounds), _products(third, w3, bounds)
    hidden = swiglu(gate, up, limit) * weights.flatten()[mine].float().unsqueeze(-1)
    products = _products(rounded_input(hidden.to(y.dtype), w2), w2, bounds)
    results = y.new_zeros(tokens * topk, y.shape[1], dtype=torch.float32)
    results = results.index_copy_(0, mine, products).view(tokens, topk, -1)
    total = results[:, 0]
    for slot in range(1, topk):
        total = total + results[:, slot]
    return total if shared is None else (total + shared).to(y.dtype)


KERNELS = (
    Kernel(
        "routed_experts",
        "cpu",
        routed_experts,
        frozenset({Feature.CPU}),
        supports=numbers_fit(lambda spec: spec.role in EXPERT_ROLES),
        prepare=as_numbers,
        batch_invariant=False,
    ),
)

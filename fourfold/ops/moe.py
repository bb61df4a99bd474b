"""Mixture of experts: routing, the routed experts, the shared expert.

    s = sqrt(softplus(gate y));  ids = top k of s + bias, or a table by token id
    weight = s[ids] / max(Σ s[ids], 1e-20) · routed_scaling_factor
    expert(y) = w2 · round(weight · silu(min(w1 y, L)) · clamp(w3 y, −L, L))

Contract: the bias chooses and never weighs; the clamp is part of the one activation and has no
default; results are summed in top-k slot order. Routing and activation in the accumulation dtype.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fourfold.core.tensor import Weight, accumulate_dtype
from fourfold.ops.linear import linear
from fourfold.ops.registry import Case, CaseMaker, Tolerance, op


def _scores(logits: Tensor) -> Tensor:
    """`sqrt(softplus(x))`; softplus(x) = x above 20."""
    return torch.sqrt(torch.nn.functional.softplus(logits, threshold=20.0))


def _weights(scores: Tensor, ids: Tensor, scaling: float) -> Tensor:
    picked = scores.gather(-1, ids)
    return picked / picked.sum(-1, keepdim=True).clamp(min=1e-20) * scaling


def _topk_cases(make: CaseMaker) -> Iterator[Case]:
    wide = accumulate_dtype(make.dtype)
    logits, bias = make.randn(6, 16, scale=3.0, dtype=wide), make.randn(16, dtype=wide)
    yield Case("6 of 16", {"logits": logits, "bias": bias, "topk": 6, "scaling": 1.5})
    ties = {"logits": logits * 0, "bias": bias * 0, "topk": 3, "scaling": 2.5}
    yield Case("all tied", ties)


@op(_topk_cases)
def route_topk(logits: Tensor, bias: Tensor, topk: int, scaling: float) -> tuple[Tensor, Tensor]:
    """Learned routing: ids int64 `[T, k]` in order of falling score + bias (ties to the lower id), and
    weights `[T, k]` from the scores without bias. `logits [T, E]` float32."""
    scores = _scores(logits)
    order = torch.sort(scores + bias.to(scores.dtype), dim=-1, descending=True, stable=True).indices
    ids = order[:, :topk]
    return ids, _weights(scores, ids, scaling)


def _hash_cases(make: CaseMaker) -> Iterator[Case]:
    wide = accumulate_dtype(make.dtype)
    table = make.randint(16, 40, 3)
    table[5] = 7
    yield Case(
        "3 of 16, one repeated",
        {
            "logits": make.randn(6, 16, dtype=wide),
            "token_ids": torch.tensor([5, 1, 39, 0, 8, 5], device=make.device),
            "table": table,
            "scaling": 1.5,
        },
    )


@op(_hash_cases)
def route_hash(
    logits: Tensor, token_ids: Tensor, table: Tensor, scaling: float
) -> tuple[Tensor, Tensor]:
    """Hash routing: ids `table[token_ids]` `[T, k]` (`table [V, k]`), weights as in learned routing."""
    ids = table[token_ids]
    return ids, _weights(_scores(logits), ids, scaling)


def swiglu(gate: Tensor, up: Tensor, limit: float) -> Tensor:
    """`silu(min(gate, limit)) · clamp(up, −limit, limit)` in the accumulation dtype."""
    return torch.nn.functional.silu(gate.clamp(max=limit)) * up.clamp(-limit, limit)


def _shared_cases(make: CaseMaker) -> Iterator[Case]:
    wide = accumulate_dtype(make.dtype)
    for name, d, i in (("beyond the limit", 64, 96), ("whole groups", 128, 256)):
        yield Case(
            name,
            {
                "gate": make.randn(5, i, scale=24.0, dtype=wide),
                "up": make.randn(5, i, scale=24.0, dtype=wide),
                "w2": make.randn(d, i, scale=0.1),
                "limit": 9.99,  # no input is a bend of the clamp
                "dtype": make.dtype,
            },
        )


@op(_shared_cases, parts=("linear",), tolerance=Tolerance(float32=2e-5))
def shared_expert(
    ops: Any, gate: Tensor, up: Tensor, w2: Weight, limit: float, dtype: torch.dtype
) -> Tensor:
    """The shared expert behind its first products, unrounded: `[T, D]` float32 (float64).

    `gate, up [T, I]` are w1 y and w3 y, unrounded; the activation is rounded to the model's `dtype`.
    """
    out: Tensor = ops.linear(swiglu(gate, up, limit).to(dtype), w2, unrounded=True)
    return out


def _experts_cases(make: CaseMaker) -> Iterator[Case]:
    e, d, i, wide = 6, 64, 32, accumulate_dtype(make.dtype)
    ids = make.randint(e, 7, 3)
    ids[2] = 4
    arguments: dict[str, Any] = {
        "y": make.randn(7, d, scale=4.0),
        "ids": ids,
        "weights": make.randn(7, 3, dtype=wide).abs(),
        "w1": make.randn(e, i, d, scale=0.5),
        "w2": make.randn(e, d, i, scale=0.2),
        "w3": make.randn(e, i, d, scale=0.5),
        "limit": 10.0,
    }
    yield Case("all experts", arguments)
    upper = {k: v[3:] if k in ("w1", "w2", "w3") else v for k, v in arguments.items()}
    yield Case("upper half", {**upper, "first_expert": 3})
    yield Case("with the shared expert's", {**arguments, "shared": make.randn(7, d, dtype=wide)})


@op(_experts_cases, tolerance=Tolerance(float32=2e-5), reads_host=True)
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
    """Sum of the picked experts of `y [T, D]` in slot order, unrounded: `[T, D]` float32 (float64).

    `w1, w3 [E, I, D]`, `w2 [E, D, I]` hold experts `first_expert …`; ids of others contribute nothing.
    The routing weight multiplies the activation before it is rounded for the second product. With
    `shared [T, D]`, unrounded too, it is added to the sum, which is then rounded to y's dtype.
    """
    wide = accumulate_dtype(y.dtype)
    results = torch.zeros(*ids.shape, y.shape[-1], dtype=wide, device=y.device)
    for expert in ids.unique().tolist():
        local = expert - first_expert
        if not 0 <= local < w1.shape[0]:
            continue
        token, slot = (ids == expert).nonzero(as_tuple=True)
        x = y[token]
        hidden = swiglu(
            linear(x, w1[local], unrounded=True), linear(x, w3[local], unrounded=True), limit
        )
        hidden = hidden * weights[token, slot].to(wide).unsqueeze(-1)
        results[token, slot] = linear(hidden.to(y.dtype), w2[local], unrounded=True)
    total = results[:, 0]
    for slot in range(1, ids.shape[1]):
        total = total + results[:, slot]
    return total if shared is None else (total + shared).to(y.dtype)


def _moe_cases(make: CaseMaker) -> Iterator[Case]:
    routed = next(iter(_experts_cases(make))).arguments
    arguments = {k: routed[k] for k in ("y", "ids", "weights", "limit")}
    arguments["experts"] = tuple(routed[k] for k in ("w1", "w2", "w3"))
    arguments["shared"] = make.randn(*routed["y"].shape, dtype=accumulate_dtype(make.dtype))
    yield Case("7 tokens", arguments)


@op(_moe_cases, parts=("routed_experts",), tolerance=Tolerance(float32=2e-5))
def moe(
    ops: Any,
    y: Tensor,
    ids: Tensor,
    weights: Tensor,
    experts: tuple[Weight, Weight, Weight],
    shared: Tensor,
    limit: float,
    first_expert: int = 0,
) -> Tensor:
    """Routed experts (w1, w2, w3) plus the shared expert's unrounded `[T, D]`, in y's dtype."""
    summed: Tensor = ops.routed_experts(y, ids, weights, *experts, limit, first_expert, shared)
    return summed

"""Routing and experts: the failures other engines had, each with a test that catches it."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from fourfold.ops.catalog import OPS
from fourfold.ops.moe import route_hash, route_topk, routed_experts, shared_expert, swiglu
from fourfold.ops.registry import KernelPlan


def logits(tokens: int = 40, experts: int = 16) -> Tensor:
    return torch.randn(tokens, experts, generator=torch.Generator().manual_seed(0)) * 4


def test_hash_layers_have_the_routing_scale_too() -> None:
    """Hash layers without the routing scale came out 5.2 times too small elsewhere."""
    table = torch.randint(16, (100, 3), generator=torch.Generator().manual_seed(1))
    ids, weights = route_hash(logits(), torch.arange(40), table, 2.5)
    assert torch.equal(ids, table[:40])
    assert torch.allclose(weights.sum(-1), torch.full((40,), 2.5))
    _, learned = route_topk(logits(), torch.zeros(16), 3, 2.5)
    assert torch.allclose(learned.sum(-1), torch.full((40,), 2.5))


def test_bias_chooses_and_never_weighs() -> None:
    """The bias used in the weights as well as in the choice."""
    x = logits(1, 8)
    scores = torch.log1p(torch.exp(x)).sqrt()[0]
    bias = torch.zeros(8)
    bias[int(scores.argmin())] = 100.0
    ids, weights = route_topk(x, bias, 2, 1.0)
    assert int(ids[0, 0]) == int(scores.argmin())
    expected = scores[ids[0]] / scores[ids[0]].sum()
    assert torch.allclose(weights[0], expected, atol=1e-6)


def test_ties_go_to_the_lower_expert() -> None:
    ids, _ = route_topk(torch.zeros(3, 16), torch.zeros(16), 5, 1.0)
    assert ids.tolist() == [[0, 1, 2, 3, 4]] * 3


def test_softplus_is_the_identity_above_20_and_survives_extremes() -> None:
    x = torch.tensor([[25.0, -200.0, 1e4, 0.0]])
    _, weights = route_topk(x, torch.zeros(4), 4, 1.0)
    scores = torch.tensor([1e4, 25.0, math.log(2), 0.0]).sqrt()
    assert torch.allclose(weights[0], scores / scores.sum(), atol=1e-6)
    none = route_hash(
        torch.full((1, 4), -200.0), torch.tensor([0]), torch.zeros(1, 2, dtype=torch.int64), 1.0
    )
    assert torch.isfinite(none[1]).all()


def test_nan_scores_still_give_ids_in_range() -> None:
    ids, _ = route_topk(torch.full((2, 8), math.nan), torch.zeros(8), 3, 1.0)
    assert int(ids.min()) >= 0
    assert int(ids.max()) < 8


@pytest.mark.parametrize("which", ["shared", "routed"])
def test_the_swiglu_limit_applies_everywhere_beyond_10(which: str) -> None:
    """The limit missing in the shared expert or anywhere else: inputs beyond 10 make it show."""
    generator = torch.Generator().manual_seed(2)
    y = torch.randn(6, 8, generator=generator) * 20
    w1, w3 = (torch.randn(12, 8, generator=generator) for _ in range(2))
    w2 = torch.randn(8, 12, generator=generator)
    gate, up = y @ w1.T, y @ w3.T
    assert float(gate.max()) > 10
    assert float(up.abs().max()) > 10
    hidden = torch.sigmoid(gate.clamp(max=10)) * gate.clamp(max=10) * up.clamp(-10, 10)
    expected = hidden @ w2.T
    if which == "shared":
        got = shared_expert(KernelPlan.bodies(OPS), gate, up, w2, 10.0, torch.float32)
    else:
        ids, ones = torch.zeros(6, 1, dtype=torch.int64), torch.ones(6, 1)
        got = routed_experts(y, ids, ones, w1[None], w2[None], w3[None], 10.0)
    assert torch.allclose(got, expected, rtol=1e-4, atol=1e-2)


def test_the_gate_is_clamped_from_above_only() -> None:
    gate, up = torch.tensor([-30.0, 30.0]), torch.tensor([5.0, 5.0])
    low, high = swiglu(gate, up, 10.0).tolist()
    assert low == pytest.approx(-30 / (1 + math.exp(30)) * 5, abs=1e-9)
    assert high == pytest.approx(10 / (1 + math.exp(-10)) * 5)


def test_the_limit_has_no_default() -> None:
    with pytest.raises(TypeError):
        swiglu(torch.ones(1), torch.ones(1))  # type: ignore[call-arg]


def test_routed_experts_equal_a_loop_over_tokens_with_repeated_ids_counting_each_time() -> None:
    generator = torch.Generator().manual_seed(3)
    e, d, i = 5, 8, 6
    y = torch.randn(7, d, generator=generator)
    w1, w3 = (torch.randn(e, i, d, generator=generator) for _ in range(2))
    w2 = torch.randn(e, d, i, generator=generator)
    ids = torch.randint(e, (7, 3), generator=generator)
    ids[2] = 4
    weights = torch.rand(7, 3, generator=generator)
    expected = torch.zeros(7, d)
    for t in range(7):
        for k in range(3):
            n = int(ids[t, k])
            expected[t] += w2[n] @ (weights[t, k] * swiglu(w1[n] @ y[t], w3[n] @ y[t], 10.0))
    assert torch.allclose(routed_experts(y, ids, weights, w1, w2, w3, 10.0), expected, atol=1e-4)


def test_shards_of_experts_add_up_to_the_whole() -> None:
    generator = torch.Generator().manual_seed(4)
    w1, w3 = (torch.randn(8, 6, 4, generator=generator, dtype=torch.float64) for _ in range(2))
    w2 = torch.randn(8, 4, 6, generator=generator, dtype=torch.float64)
    y = torch.randn(9, 4, generator=generator, dtype=torch.float64)
    ids = torch.randint(8, (9, 3), generator=generator)
    weights = torch.rand(9, 3, generator=generator, dtype=torch.float64)
    whole = routed_experts(y, ids, weights, w1, w2, w3, 10.0)
    halves = [
        routed_experts(y, ids, weights, w1[s], w2[s], w3[s], 10.0, n)
        for n, s in ((0, slice(0, 4)), (4, slice(4, 8)))
    ]
    assert torch.allclose(sum(halves), whole)

"""Routing, the embedding and the check for NaN in the interpreter: against the bodies, alone and batched."""

from __future__ import annotations

import math

import pytest
import torch

from fourfold.ops.registry import Kernel
from tests.kernels import interpreter
from tests.kernels.interpreter import (
    assert_close,
    assert_equals_body,
    driver,
    interpreted,
    poisoned,
)

pytest.importorskip("triton", reason="Triton is not installed")
pytestmark = pytest.mark.full

OPS = ["route_topk", "route_hash", "nonfinite_sequences", "check_logits", "embed"]


@driver
def test_in_the_interpreter() -> None:
    interpreter.run(__file__)


def kernels() -> dict[str, Kernel]:
    from fourfold.kernels.triton import checks, embed, routing

    return {k.op: k for k in (*routing.KERNELS, *checks.KERNELS, *embed.KERNELS)}


@interpreted
@pytest.mark.parametrize("op", OPS)
def test_equals_the_body(op: str) -> None:
    assert_equals_body(kernels()[op])


def extremes(experts: int) -> torch.Tensor:
    """Rows of logits: ordinary, tiny scores, ties, beyond 20, infinities, NaN."""
    logits = torch.randn(9, experts) * 4
    logits[1], logits[2] = logits[1] - 60, 0.0
    logits[3], logits[4] = logits[3] * 40, -200.0
    logits[5, 3], logits[5, 1] = math.inf, -math.inf
    logits[6, 2], logits[6, 0] = math.nan, math.nan
    logits[7] = math.nan
    return logits


@interpreted
@pytest.mark.parametrize(("experts", "topk"), [(256, 6), (384, 6), (7, 7), (5, 1)])
def test_choice_of_experts_at_the_edges(experts: int, topk: int) -> None:
    """Ties to the lower expert, NaN counts as the largest and never leads outside the table."""
    logits, bias = extremes(experts), torch.randn(experts)
    bias[:4] = 0.5
    for b in (bias, bias * 0):
        with poisoned():
            ids, weights = kernels()["route_topk"].run(logits, b, topk, 1.5)
        expected = interpreter.body("route_topk")(logits, b, topk, 1.5)
        assert torch.equal(ids, expected[0])
        assert_close(weights, expected[1], 1e-5)
        for t in range(9):
            alone = kernels()["route_topk"].run(logits[t : t + 1], b, topk, 1.5)
            assert torch.equal(alone[1].nan_to_num(7.0)[0], weights.nan_to_num(7.0)[t])


@interpreted
def test_small_scores_keep_their_precision() -> None:
    """log(1 + e) computed plainly is 0 from e = 6e-8 down, and every weight with it."""
    logits = -torch.arange(1.0, 65.0).view(1, 64)
    ids, weights = kernels()["route_topk"].run(logits - 20, torch.zeros(64), 4, 1.0)
    expected = torch.exp(-torch.arange(4.0) / 2)
    assert ids.tolist() == [[0, 1, 2, 3]]
    assert torch.allclose(weights[0], expected / expected.sum(), rtol=1e-5)


@interpreted
def test_hash_routing_at_the_edges() -> None:
    logits, table = extremes(16), torch.randint(16, (50, 6))
    names = torch.tensor([0, 49, 3, 3, 7, 8, 9, 10, 11])
    got = kernels()["route_hash"].run(logits, names, table, 2.5)
    expected = interpreter.body("route_hash")(logits, names, table, 2.5)
    assert torch.equal(got[0], expected[0])
    assert_close(got[1], expected[1], 1e-5)


@interpreted
def test_every_kind_of_number_that_is_not_finite_marks_its_sequence_alone() -> None:
    run = kernels()["nonfinite_sequences"].run
    values = (torch.rand(7, 4, 1500) * 3e38).bfloat16()
    values[1, 3, 1499], values[4, 0, 0], values[6, 2, 77] = math.nan, math.inf, -math.inf
    owners = torch.tensor([0, 0, 1, 2, 3, 4, 5])
    assert run(values, owners, 7).tolist() == [True, False, False, True, False, True, False]
    assert run(values[:0], owners[:0], 2).tolist() == [False, False]

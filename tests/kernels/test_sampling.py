"""Sampling in the interpreter: the body's token for every row, thousands of them, ties and edges."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from fourfold.ops.registry import Kernel
from fourfold.ops.sampling import SamplingRows
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

OPS = ["adjust_logits", "uniform", "sample", "count_accepted", "likeliest", "token_logprobs"]


@driver
def test_in_the_interpreter() -> None:
    interpreter.run(__file__)


@driver
@pytest.mark.slow
def test_more_in_the_interpreter() -> None:
    interpreter.run(__file__, "slow")


def kernels() -> dict[str, Kernel]:
    from fourfold.kernels.triton.sampling import KERNELS

    return {k.op: k for k in KERNELS}


def sample(logits: Tensor, rows: SamplingRows) -> Tensor:
    """In blocks so small that a row is several of them."""
    from fourfold.kernels.triton import sampling

    with poisoned():
        return sampling.sample(logits, rows, block=32)


@interpreted
@pytest.mark.parametrize("op", OPS)
def test_equals_the_body(op: str) -> None:
    kernel = kernels()[op]
    small = replace(kernel, run=sample) if op == "sample" else kernel
    assert_equals_body(small, dtypes=(torch.float32,))


def parameters(count: int, generator: torch.Generator) -> SamplingRows:
    """Every combination of what is on and off, at random."""

    def choose(*values: float) -> Tensor:
        return torch.tensor(values)[torch.randint(len(values), (count,), generator=generator)]

    return SamplingRows(
        temperature=choose(0.0, 1.0, 0.7, 2.0, 0.01, 20.0),
        top_p=choose(1.0, 1.0, 0.95, 0.4973, 0.01),
        top_k=choose(0, 0, 1, 7, 50, 1000).long(),
        min_p=choose(0.0, 0.0, 0.05, 0.9, 1.0),
        uniform=torch.rand(count, generator=generator, dtype=torch.float64),
    )


@interpreted
@pytest.mark.parametrize(
    "kind", [pytest.param("flat", marks=pytest.mark.slow), "spread", "tied", "barred", "peaked"]
)
def test_takes_the_bodys_token(kind: str) -> None:
    """Sums of float64 in another order: a different token needs a number within 1e-12 of a boundary, as
    with top_p 0.5 and four equal tokens, where the body's own rounding decides."""
    count, size = 12, 150
    generator = torch.Generator().manual_seed(5)
    logits = torch.randn(count, size, generator=generator) * 3
    if kind == "flat":
        logits = logits * 1e-3 + 100
    elif kind == "tied":
        logits = logits.round()
    elif kind == "barred":
        logits[torch.rand(count, size, generator=generator) < 0.9] = -math.inf
        logits[:, 32:96] = -math.inf
        logits[:, 130] = 0.0
    elif kind == "peaked":
        logits[torch.arange(count), torch.randint(size, (count,), generator=generator)] += 900
    rows = parameters(count, generator)
    expected = interpreter.body("sample")(logits, rows)
    assert torch.equal(sample(logits, rows), expected)


@interpreted
def test_the_first_and_the_last_token_of_the_order() -> None:
    """Numbers 0 and just under 1; tokens that cannot be picked stay unpicked."""
    logits = torch.tensor([[1.0, 3.0, 3.0, -math.inf, 2.0]]).repeat(6, 1)
    rows = SamplingRows(
        temperature=torch.ones(6),
        top_p=torch.tensor([1.0, 1.0, 0.5, 1.0, 1e-9, 1.0]),
        top_k=torch.tensor([0, 0, 0, 2, 0, 3]),
        min_p=torch.zeros(6),
        uniform=torch.tensor([0.0, 1 - 2**-53, 1 - 2**-53, 1 - 2**-53, 0.99, 1 - 2**-53]).double(),
    )
    expected = interpreter.body("sample")(logits, rows)
    assert expected.tolist() == [1, 0, 2, 2, 1, 4]
    assert torch.equal(sample(logits, rows), expected)


@interpreted
def test_rows_that_are_not_finite_give_what_a_sort_puts_first() -> None:
    logits = torch.randn(5, 150)
    logits[0, 77], logits[1, 3], logits[2] = math.nan, math.inf, -math.inf
    logits[3, 140], logits[3, 141] = math.nan, math.inf
    rows = SamplingRows(
        torch.tensor([1.0, 1.0, 1.0, 0.0, 0.5]), torch.ones(5), torch.zeros(5).long(),
        torch.zeros(5), torch.full((5,), 0.5).double(),
    )  # fmt: skip
    assert torch.equal(sample(logits, rows), interpreter.body("sample")(logits, rows))


@interpreted
def test_a_row_does_not_depend_on_the_others() -> None:
    from fourfold.kernels.triton import sampling

    generator = torch.Generator().manual_seed(6)
    logits, rows = torch.randn(5, 100, generator=generator), parameters(5, generator)
    whole = sample(logits, rows)
    for i in range(5):
        each = SamplingRows(*(getattr(rows, f)[i : i + 1] for f in rows.__dataclass_fields__))
        assert torch.equal(sample(logits[i : i + 1], each), whole[i : i + 1])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sampling, "ROW_TILE", 2)
        assert torch.equal(sample(logits, rows), whole)


@interpreted
@pytest.mark.parametrize("count", [0, 1, 20])
def test_logprobs_of_several_blocks_with_ties_and_bars(count: int) -> None:
    from fourfold.kernels.triton import sampling

    generator = torch.Generator().manual_seed(7)
    logits = torch.randn(4, 700, generator=generator)
    logits[1] = logits[1].round()
    logits[2, torch.rand(700, generator=generator) < 0.5] = -math.inf
    logits[2, 9] = 0.0
    tokens = torch.tensor([5, 600, 9, 699])
    with pytest.MonkeyPatch.context() as patch, poisoned():
        patch.setattr(sampling, "LOGPROB_BLOCK", 128)
        got = sampling.token_logprobs(logits, tokens, count)
    assert_close(got, interpreter.body("token_logprobs")(logits, tokens, count), 1e-6)


@interpreted
def test_masks_of_one_row_for_all_and_no_change_at_all() -> None:
    run, logits = kernels()["adjust_logits"].run, torch.randn(3, 50)
    allowed = torch.rand(50) < 0.5
    expected = interpreter.body("adjust_logits")(logits, None, allowed)
    assert torch.equal(run(logits, None, allowed), expected)
    assert run(logits, None, None) is logits

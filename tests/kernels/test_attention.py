"""Sparse attention in the interpreter: against the body; alone, in a batch, chunked, bit for bit."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from fourfold.core.errors import KernelError
from fourfold.core.row_format import RowFormat, RowKind
from fourfold.core.rows import RowPages
from fourfold.ops.attention import sparse_attention as body
from tests.kernels import interpreter
from tests.kernels.cached import PADDING, Cached
from tests.kernels.given import kept
from tests.kernels.interpreter import (
    assert_close,
    assert_equals_body,
    driver,
    interpreted,
    poisoned,
)

pytest.importorskip("triton", reason="Triton is not installed")
pytestmark = pytest.mark.full


@driver
def test_in_the_interpreter() -> None:
    interpreter.run(__file__)


@driver
@pytest.mark.slow
def test_the_rest_in_the_interpreter() -> None:
    interpreter.run(__file__, "slow")


def kernel() -> Any:
    """Small spans, so that a few dozen rows are several of them."""
    from fourfold.kernels.triton import attention

    return partial(attention.sparse_attention, shape=attention.Shape(16, 16, 64, 4, 1))


@interpreted
@pytest.mark.slow
def test_equals_the_body() -> None:
    from fourfold.kernels.triton.attention import KERNELS

    compact = next(k for k in KERNELS if k.name == "triton")
    assert_equals_body(compact, [torch.bfloat16])


@interpreted
@pytest.mark.slow
def test_every_form_equals_the_body() -> None:
    from fourfold.kernels.triton.attention import KERNELS

    for each in KERNELS:
        assert_equals_body(each, [torch.bfloat16])
    compact = next(k for k in KERNELS if k.name == "triton")
    assert_equals_body(replace(compact, run=partial(kernel(), split=True)), [torch.float32])


RATIOS = {"window": 0, "CSA": 4, "HCA": 128}


def sequence(kind: RowKind, name: str, base: int, dtype: torch.dtype, count: int = 36) -> Cached:
    topk = 21 if name == "CSA" else None
    return Cached.make(count, base=base, ratio=RATIOS[name], topk=topk, kind=kind, dtype=dtype)


PLAIN, FP8 = RowKind.PLAIN, RowKind.FP8_GROUPS


@interpreted
@pytest.mark.parametrize(
    ("kind", "name", "base", "dtype"),
    [
        pytest.param(FP8, "CSA", 0, torch.bfloat16, marks=pytest.mark.slow),
        (FP8, "CSA", 3000, torch.bfloat16),
        pytest.param(PLAIN, "CSA", 3000, torch.bfloat16, marks=pytest.mark.slow),
        pytest.param(FP8, "CSA", 40, torch.float32, marks=pytest.mark.slow),
        (PLAIN, "HCA", 3000, torch.float32),
        pytest.param(FP8, "HCA", 100, torch.bfloat16, marks=pytest.mark.slow),
        (FP8, "window", 9, torch.bfloat16),
        pytest.param(PLAIN, "window", 0, torch.float32, marks=pytest.mark.slow),
    ],
)
def test_a_token_does_not_depend_on_chunks_or_batch(
    kind: RowKind, name: str, base: int, dtype: torch.dtype
) -> None:
    """One run; cut in three; single tokens in one batch between padding; alone. Every launch form."""
    cached, run = sequence(kind, name, base, dtype), kernel()
    with poisoned():
        whole: Tensor = run(**cached.step([(base, 36)]), split=False, dense=False)
        expected = body(**cached.step([(base, 36)]))
        assert_close(whole, expected, 2e-5 if dtype == torch.float32 else 1.6e-2)
        chunks = [(base, 9), (base + 9, 20), (base + 29, 7)]
        forms = ((True, False), (False, True), (True, True))
        cut = [
            run(**cached.step([chunk]), split=split, dense=dense)
            for chunk, (split, dense) in zip(chunks, forms, strict=True)
        ]
        assert torch.equal(torch.cat(cut), whole)
        assert torch.equal(run(**cached.step(chunks), split=False, dense=True), whole)
        lanes = [(base + 35, 1), PADDING, (base + 7, 3), (base, 1), PADDING]
        for split in (False, True):
            got = run(**cached.step(lanes), split=split, dense=False)
            assert torch.equal(got[[0, 2, 3, 4, 5]], whole[[35, 7, 8, 9, 0]])
        assert torch.equal(run(**cached.step([(base + 35, 1)]))[0], whole[35])


@interpreted
@pytest.mark.parametrize("name", ["CSA", "window"])
def test_heads_across_and_all_loads_first(name: str) -> None:
    """The forms that warp groups take, cut small: many tokens, few, and spans in programs of their own."""
    from fourfold.kernels.triton import attention

    one = attention.Shape(16, 16, 64, 4, 1, twice=False, first=True, early=True)
    shapes = {"shape": one, "few": replace(one, across=True)}
    cached = sequence(FP8, name, 300, torch.bfloat16)
    lanes = [(335, 1), PADDING, (307, 3), (300, 1)]
    expected = body(**cached.step(lanes))
    with poisoned():
        for split in (False, True):
            got = attention.sparse_attention(**cached.step(lanes), **shapes, split=split)
            live = [0, 2, 3, 4, 5]
            assert_close(got[live], expected[live], 1.6e-2)


@interpreted
def test_not_a_number_stays_in_its_token_and_head() -> None:
    cached = sequence(FP8, "CSA", 200, torch.float32)
    run, arguments = kept(kernel()), cached.step([(200, 6)])
    clean = run(**arguments, split=False)
    arguments["q"][2, 1, 5] = float("nan")
    for split in (False, True):
        got = run(**arguments, split=split)
        assert torch.isnan(got[2, 1]).all()
        got[2, 1] = clean[2, 1]
        assert torch.equal(got, clean)


@interpreted
def test_the_output_lies_where_the_queries_lay() -> None:
    """In every launch form, with more heads than a program takes."""
    cached = Cached.make(5, base=200, heads=19, kind=FP8, topk=21, dtype=torch.bfloat16)
    for split, dense in ((False, False), (True, False), (False, True)):
        arguments = cached.step([(200, 5)])
        expected = body(**arguments)
        got = kernel()(**arguments, split=split, dense=dense)
        assert got.data_ptr() == arguments["q"].data_ptr()
        assert_close(got, expected, 1.6e-2)


@interpreted
def test_a_sink_of_minus_infinity_takes_nothing() -> None:
    cached = sequence(PLAIN, "HCA", 300, torch.float32)
    arguments = cached.step([(300, 3)])
    arguments["sink"] = torch.tensor([float("-inf"), 1e4, -1e4, 0.0])
    for split in (False, True):
        assert_close(kept(kernel())(**arguments, split=split), body(**arguments), 2e-5)


@interpreted
def test_rows_of_two_formats_are_refused() -> None:
    cached = sequence(PLAIN, "CSA", 0, torch.float32)
    arguments = cached.step([(0, 3)])
    other = RowFormat(RowKind.FP8_GROUPS, 80, 16)
    arguments["ring"] = RowPages.zeros(other, 1, 23, torch.device("cpu"))
    with pytest.raises(KernelError, match="must be stored as"):
        kernel()(**arguments)


@interpreted
def test_a_ring_shorter_than_the_window_is_refused() -> None:
    arguments = sequence(PLAIN, "CSA", 0, torch.float32).step([(0, 3)])
    with pytest.raises(KernelError, match="does not hold a window of 40"):
        kernel()(**{**arguments, "window": 40})

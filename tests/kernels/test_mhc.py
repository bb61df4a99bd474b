"""Hyper-connections in the interpreter: against the bodies, alone, in a batch, with every form."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fourfold.ops.mhc import Site, hc_post_pre, sinkhorn
from fourfold.ops.registry import Kernel
from tests.kernels import interpreter
from tests.kernels.given import kept
from tests.kernels.interpreter import assert_close, assert_equals_body, driver, interpreted
from tests.support import BODIES

pytest.importorskip("triton", reason="Triton is not installed")
pytestmark = pytest.mark.full


@driver
def test_in_the_interpreter() -> None:
    interpreter.run(__file__)


@driver
@pytest.mark.slow
def test_more_in_the_interpreter() -> None:
    interpreter.run(__file__, "slow")


def kernels() -> dict[str, Kernel]:
    from fourfold.kernels.triton.mhc import KERNELS

    return {k.op: k for k in KERNELS}


@interpreted
@pytest.mark.parametrize("op", ["hc_pre", "hc_post", "hc_post_pre", "hc_head"])
def test_equals_the_body(op: str) -> None:
    assert_equals_body(kernels()[op])


def inputs(tokens: int, dim: int) -> tuple[tuple[Tensor, ...], Site]:
    streams, z = torch.randn(tokens, 4, dim), torch.randn(tokens, dim)
    post, comb = torch.rand(tokens, 4) * 2, sinkhorn(torch.randn(tokens, 4, 4), 20, 1e-6)
    fn, base = torch.randn(24, 4 * dim) * 0.1, torch.randn(24)
    site = Site(fn, base, torch.ones(3), torch.rand(dim), 1e-6, 1e-6, 20)
    return (z.bfloat16(), streams.bfloat16(), post, comb), site


@interpreted
@pytest.mark.slow
def test_a_token_does_not_depend_on_the_batch_nor_on_the_form() -> None:
    """Bit for bit: alone, in a batch, fused or in two steps, a program for one stream or for all, for one
    tile of tokens or several."""
    from fourfold.kernels.triton import mhc

    arguments, site = inputs(20, 100)
    run = kept(mhc.hc_post_pre)
    whole = run(None, *arguments, site)
    for part in (slice(3, 4), slice(2, 19)):
        some = run(None, *(a[part] for a in arguments), site)
        assert all(torch.equal(a, b[part]) for a, b in zip(some, whole, strict=True))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mhc, "MANY_TOKENS", 0)
        patch.setattr(mhc, "FEW_TOKENS", 0)
        walked = run(None, *arguments, site)
    assert all(torch.equal(a, b) for a, b in zip(walked, whole, strict=True))
    new = kept(mhc.hc_post)(*arguments)
    steps = (new, *mhc.hc_pre(new, site))
    assert all(torch.equal(a, b) for a, b in zip(steps, whole, strict=True))


@interpreted
@pytest.mark.parametrize("tokens", [3, pytest.param(20, marks=pytest.mark.slow)])
def test_streams_that_are_one_memory_are_read_as_several(tokens: int) -> None:
    """As in front of the first layer: the same bits, and the memory stays as it was."""
    from fourfold.kernels.triton import mhc

    (z, streams, post, comb), site = inputs(tokens, 100)
    one = streams[:, :1].clone()
    same, copies = one.expand(-1, 4, -1), one.repeat(1, 4, 1)
    for a, b in zip(mhc.hc_pre(same, site), mhc.hc_pre(copies, site), strict=True):
        assert torch.equal(a, b)
    got = mhc.hc_post_pre(None, z, same, post, comb, site)
    assert torch.equal(one, streams[:, :1])
    for a, b in zip(got, mhc.hc_post_pre(None, z, copies, post, comb, site), strict=True):
        assert torch.equal(a, b)


@interpreted
def test_new_streams_of_many_tokens_lie_where_the_given_ones_lay() -> None:
    from fourfold.kernels.triton import mhc

    for tokens, here in ((3, False), (20, True)):
        (z, streams, post, comb), site = inputs(tokens, 100)
        expected = hc_post_pre.body(BODIES, z, streams, post, comb, site)
        got = mhc.hc_post_pre(None, z, streams, post, comb, site)
        assert (got[0].data_ptr() == streams.data_ptr()) is here
        for a, b in zip(got, expected, strict=True):
            assert_close(a, b, 1.6e-2)


@interpreted
def test_not_a_number_and_huge_streams_stay_with_their_token() -> None:
    from fourfold.kernels.triton import mhc
    from tests.kernels.interpreter import poisoned

    (z, streams, post, comb), site = inputs(9, 70)
    clean = kept(mhc.hc_post_pre)(None, z, streams, post, comb, site)
    streams, z = streams.clone(), z.clone()
    streams[2, 1, 5], z[4, 69], streams[7] = float("nan"), float("inf"), 1e15
    with poisoned():
        got = kept(mhc.hc_post_pre)(None, z, streams, post, comb, site)
    touched = torch.zeros(9, dtype=torch.bool)
    touched[[2, 4, 7]] = True
    for a, b in zip(got, clean, strict=True):
        assert torch.equal(a[~touched], b[~touched])
    expected = hc_post_pre.body(BODIES, z, streams, post, comb, site)
    for a, b in zip(got, expected, strict=True):
        assert_close(a[7], b[7], 1.6e-2)
    assert torch.isnan(got[1][2]).any()
    assert hc_post_pre.name in kernels()


@interpreted
def test_no_tokens() -> None:
    from fourfold.kernels.triton import mhc

    arguments, site = inputs(0, 64)
    assert [t.shape[0] for t in mhc.hc_post_pre(None, *arguments, site)] == [0, 0, 0, 0]

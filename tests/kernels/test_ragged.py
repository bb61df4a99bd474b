"""Batches of 1 to 257 tokens, around every tile's edge, in the interpreter, at reduced widths; and every
portable kernel is met by some interpreted test."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from fourfold.core.device import ARCHS
from fourfold.core.tensor import QuantTensor
from fourfold.ops.moe import routed_experts as experts_body
from fourfold.ops.rope import inverse_frequencies
from fourfold.quant.fp8_block import FP8_BLOCK
from fourfold.quant.mxfp4 import MXFP4
from tests.kernels import interpreter
from tests.kernels.given import kept
from tests.kernels.interpreter import assert_close, body, driver, interpreted, poisoned
from tests.kernels.launches import kernels_of

pytest.importorskip("triton", reason="Triton is not installed")
pytestmark = pytest.mark.full

SIZES = (1, 16, 17, 64, 65, 129, 257)


@driver
@pytest.mark.slow
def test_in_the_interpreter() -> None:
    interpreter.run(__file__, "slow")


def stored(*shape: int, fp4: bool = False) -> QuantTensor:
    scheme = MXFP4 if fp4 else FP8_BLOCK
    codes, scale = scheme.quantize(torch.randn(shape) * shape[-1] ** -0.5, "e8m0")
    scheme.canonicalize(codes)
    return QuantTensor(codes, scale, scheme, shape)


@interpreted
@pytest.mark.slow
@pytest.mark.parametrize("decoded", [False, True])
def test_linear(decoded: bool) -> None:
    from fourfold.kernels.triton.linear import linear

    x, plain = torch.randn(257, 300), torch.randn(72, 300)
    for weight in (stored(72, 300), plain.bfloat16(), plain):
        values = x if weight is plain else x.bfloat16()
        whole = linear(values, weight, decoded=decoded)
        assert_close(whole, body("linear")(values, weight), 1e-5 if weight is plain else 1.6e-2)
        for size in SIZES:
            with poisoned():
                got = linear(values[:size], weight, decoded=decoded)
            assert torch.equal(got, whole[:size]), size


@interpreted
@pytest.mark.slow
@pytest.mark.parametrize("fp4", [True, False])
def test_experts(fp4: bool) -> None:
    from fourfold.kernels.triton.moe import routed_experts

    made = [stored(*shape, fp4=fp4) for shape in ((4, 64, 128), (4, 128, 64), (4, 64, 128))]
    y, ids, weights = (
        torch.randn(257, 128).bfloat16(),
        torch.randint(4, (257, 2)),
        torch.rand(257, 2),
    )
    whole = routed_experts(y, ids, weights, *made, 2.0)
    assert_close(whole, experts_body(y, ids, weights, *made, 2.0), 1.6e-2)
    for size in SIZES:
        with poisoned():
            got = routed_experts(y[:size], ids[:size], weights[:size], *made, 2.0)
        assert torch.equal(got, whole[:size]), size


@interpreted
@pytest.mark.slow
def test_wo_a_and_norm() -> None:
    from fourfold.kernels.triton.grouped import einsum
    from fourfold.kernels.triton.norm import rms_norm

    attended, weight = torch.randn(257, 4, 64).bfloat16(), stored(2 * 40, 128)
    positions, frequencies = torch.arange(257) * 61, inverse_frequencies(32, 1e4, None)
    run, x, norm = kept(einsum), torch.randn(257, 200).bfloat16(), torch.rand(200).bfloat16()
    whole = run(attended, weight, positions, frequencies)
    assert_close(whole, body("wo_a")(attended, weight, positions, frequencies), 1.6e-2)
    normed = rms_norm(x, norm, 1e-6)
    assert_close(normed, body("rms_norm")(x, norm, 1e-6), 1.6e-2)
    for size in SIZES:
        with poisoned():
            got = run(attended[:size], weight, positions[:size], frequencies)
            alike = rms_norm(x[:size], norm, 1e-6)
        assert torch.equal(got, whole[:size]), size
        assert torch.equal(alike, normed[:size]), size


@driver
def test_every_portable_kernels_file_is_interpreted() -> None:
    """The files that hold kernels for every GPU, each by a test that runs it in the interpreter."""
    wanted = {k.run for k in kernels_of(ARCHS["sm_80"])}
    modules = {getattr(run, "func", run).__module__ for run in wanted}
    portable = {m for m in modules if m.startswith("fourfold.kernels.triton.")}
    here = Path(__file__).parent
    texts = [
        file.read_text("utf-8")
        for file in here.glob("test_*.py")
        if file.name != Path(__file__).name
    ]
    interpreting = "\n".join(text for text in texts if "interpreter.run(__file__" in text)
    missing = []
    for module in portable:
        name = module.rpartition(".")[2]
        named = rf'kernels\.triton(\.{name}\b| import [^\n]*\b{name}\b)|"{name}"'
        missing += [] if re.search(named, interpreting) else [name]
    assert len(portable) > 10
    assert not missing

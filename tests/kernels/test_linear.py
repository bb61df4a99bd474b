"""Linear layers, the shared expert and token sorting in the interpreter, against their definitions."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from fourfold.core.tensor import QuantTensor
from fourfold.ops.moe import routed_experts as experts_body
from fourfold.quant.fp8_block import FP8_BLOCK
from fourfold.quant.mxfp4 import MXFP4
from tests.kernels import interpreter
from tests.kernels.interpreter import (
    assert_close,
    assert_equals_body,
    body,
    driver,
    interpreted,
    poisoned,
)

pytest.importorskip("triton", reason="Triton is not installed")
pytestmark = pytest.mark.full


@driver
def test_in_the_interpreter() -> None:
    interpreter.run(__file__)


def fp8(*shape: int, scale_format: str = "e8m0") -> QuantTensor:
    values = torch.randn(shape) * shape[-1] ** -0.5
    return QuantTensor(*FP8_BLOCK.quantize(values, scale_format), FP8_BLOCK, shape)


def fp4(*shape: int) -> QuantTensor:
    codes, scale = MXFP4.quantize(torch.randn(shape) * shape[-1] ** -0.5, "e8m0")
    MXFP4.canonicalize(codes)
    return QuantTensor(codes, scale, MXFP4, shape)


@interpreted
@pytest.mark.parametrize("module", ["linear", "shared", "moe"])
def test_equals_the_body_on_the_ops_cases(module: str) -> None:
    import importlib

    for kernel in importlib.import_module(f"fourfold.kernels.triton.{module}").KERNELS:
        if not kernel.name.endswith("fnuz"):  # this interpreter has no FNUZ types
            assert_equals_body(kernel)


@interpreted
@pytest.mark.parametrize("decoded", [False, True])
@pytest.mark.parametrize("shape", [(200, 300), (64, 1024)], ids=str)
def test_fp8_at_ragged_sizes_alone_and_in_a_batch(shape: tuple[int, int], decoded: bool) -> None:
    """Bit for bit: in a split pass, and with the number of tokens a split ends at set to 0; with codes that
    the device reads, and with codes that integers decode."""
    from fourfold.kernels.triton import linear

    run = partial(linear.linear, decoded=decoded)
    weight, x = fp8(*shape), torch.randn(70, shape[1]).bfloat16()
    weight.codes[:16] = torch.arange(16, dtype=torch.uint8).unsqueeze(
        1
    )  # below the normal codes too
    with poisoned():
        whole = run(x, weight)
    assert_close(whole, body("linear")(x, weight), 1.6e-2)
    for part in (slice(3, 4), slice(3, 20)):
        assert torch.equal(run(x[part], weight), whole[part])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(linear, "FEW_TOKENS", 0)
        with poisoned():
            assert torch.equal(run(x, weight), whole)


@interpreted
def test_codes_made_by_integers_are_those_of_a_cast() -> None:
    from fourfold.kernels.triton import linear

    x = torch.cat([torch.randn(20, 384) * 3, torch.randn(20, 384) * torch.rand(384) ** 9])
    x[3], x[5, 7], x[6, 9] = 0, float("inf"), float("nan")
    made = (linear.quantize_activations(x.bfloat16(), decoded=decoded) for decoded in (True, False))
    for ours, theirs in zip(*made, strict=True):
        assert torch.equal(ours, theirs)


@interpreted
def test_several_layers_of_one_input_are_each_by_itself() -> None:
    from fourfold.kernels.triton import linear

    x, weights = torch.randn(5, 256).bfloat16(), (fp8(384, 256), torch.randn(24, 256).bfloat16())
    weights += (fp4(64, 256), fp8(96, 256, scale_format="f32"))
    unrounded = (False, True, True, True)
    with poisoned():
        got = linear.linears(None, x, weights, unrounded)
    for out, weight, wide in zip(got, weights, unrounded, strict=True):
        assert torch.equal(out, linear.linear(x, weight, wide))


@interpreted
def test_the_shared_expert_alone_and_in_a_batch() -> None:
    from fourfold.kernels.triton import linear, shared

    gate, up = torch.randn(70, 384) * 4, torch.randn(70, 384) * 4
    for weight in (fp8(256, 384), fp8(256, 384, scale_format="f32")):
        with poisoned():
            whole = shared.shared_expert(None, gate, up, weight, 1.0, torch.bfloat16)
        assert_close(whole, body("shared_expert")(gate, up, weight, 1.0, torch.bfloat16), 1.6e-2)
        part = shared.shared_expert(None, gate[9:12], up[9:12], weight, 1.0, torch.bfloat16)
        assert torch.equal(part, whole[9:12])
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(linear, "FEW_TOKENS", 0)
            with poisoned():
                again = shared.shared_expert(None, gate, up, weight, 1.0, torch.bfloat16)
            assert torch.equal(again, whole)


@interpreted
@pytest.mark.parametrize("make", [fp4, fp8], ids=["fp4", "fp8"])
def test_experts_of_a_half_with_absent_ones(make: object) -> None:
    from fourfold.kernels.triton import moe

    assert callable(make)
    y, ids = torch.randn(9, 160).bfloat16(), torch.randint(8, (9, 3))
    weights, experts = torch.rand(9, 3), (make(4, 96, 160), make(4, 160, 96), make(4, 96, 160))
    for decoded in (False, True):
        with poisoned():
            got = moe.routed_experts(y, ids, weights, *experts, 2.0, 3, decoded=decoded)
        assert_close(got, experts_body(y, ids, weights, *experts, 2.0, 3), 1.6e-2)


@interpreted
@pytest.mark.parametrize(("experts", "first"), [(4, 0), (7, 3)])
@pytest.mark.parametrize("tokens", [1, 33, 120])
def test_sorting_equals_a_stable_sort(experts: int, first: int, tokens: int) -> None:
    from fourfold.kernels.triton import moe

    ids = torch.randint(experts + 2 * first, (tokens, 6))
    ids[:, 2] = 3
    for tile in (8, 64):
        with poisoned():
            got = moe.sort_tokens(ids, experts, first, tile)
        expected = moe._sort_many(ids, experts, first, tile, got.tiles.shape[0])
        assert torch.equal(got.order, expected.order)
        assert torch.equal(got.tiles, expected.tiles)

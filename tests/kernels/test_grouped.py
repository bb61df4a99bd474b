"""The grouped output projection in the interpreter: its definition's form, and the two that round more."""

from __future__ import annotations

import pytest
import torch

from fourfold.core.tensor import QuantTensor, Weight
from fourfold.ops.linear import wo_a as body
from fourfold.ops.quantize import dequantize_fp8_groups, quantize_fp8_groups
from fourfold.ops.registry import Kernel
from fourfold.ops.rope import inverse_frequencies, rotate
from fourfold.quant.fp8_block import FP8_BLOCK
from tests.kernels import interpreter
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


def kernels() -> dict[str, Kernel]:
    from fourfold.kernels.triton.grouped import KERNELS

    return {k.name: k for k in KERNELS}


@interpreted
@pytest.mark.parametrize("name", ["einsum", "fp8_batched", "fp8_loop"])
def test_equals_the_body_for_plain_weights(name: str) -> None:
    assert_equals_body(kernels()[name])


def case(
    tokens: int, heads: int, dim: int, rank: int, scale_format: str
) -> tuple[torch.Tensor, QuantTensor, torch.Tensor, torch.Tensor]:
    """Two groups."""
    values = torch.randn(2 * rank, heads // 2 * dim) * 0.1
    weight = QuantTensor(*FP8_BLOCK.quantize(values, scale_format), FP8_BLOCK, tuple(values.shape))
    attended = torch.randn(tokens, heads, dim).bfloat16()
    return attended, weight, torch.arange(tokens) * 997, inverse_frequencies(64, 1e4, None)


SHAPES = [(4, 128, 40, "e8m0"), (4, 128, 128, "f32"), (6, 112, 24, "e8m0")]


@interpreted
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_fp8_weights_are_the_numbers_they_stand_for(shape: tuple[int, int, int, str]) -> None:
    """Against the body, and bit for bit the same as with the weight dequantised beforehand."""
    attended, weight, positions, frequencies = case(5, *shape)
    run = kept(kernels()["einsum"].run)
    with poisoned():
        got = run(attended, weight, positions, frequencies)
    assert_close(got, body(attended, weight, positions, frequencies), 1.6e-2)
    plain = weight.dequantize(torch.bfloat16)
    assert torch.equal(run(attended, plain, positions, frequencies), got)


@interpreted
@pytest.mark.parametrize("name", ["einsum", "fp8_batched", "fp8_loop"])
def test_a_token_does_not_depend_on_the_batch(name: str) -> None:
    attended, weight, positions, frequencies = case(70, 4, 128, 128, "e8m0")
    run = kept(kernels()[name].run)
    whole = run(attended, weight, positions, frequencies)
    for part in (slice(3, 4), slice(2, 40)):
        assert torch.equal(run(attended[part], weight, positions[part], frequencies), whole[part])


@interpreted
@pytest.mark.parametrize("name", ["fp8_batched", "fp8_loop"])
def test_fp8_forms_round_activations_per_128_and_nothing_else(name: str) -> None:
    attended, weight, positions, frequencies = case(6, 4, 128, 128, "e8m0")
    got = kept(kernels()[name].run)(attended, weight, positions, frequencies)
    turned = rotate(attended, positions, frequencies, inverse=True).flatten(1)
    rounded = dequantize_fp8_groups(*quantize_fp8_groups(turned, 128), 128, torch.float32)
    matrix: Weight = weight.dequantize(torch.float32).unflatten(0, (2, -1))
    expected = torch.einsum("tgk,grk->tgr", rounded.unflatten(1, (2, -1)), matrix).flatten(1)
    assert_close(got, expected.bfloat16(), 1.6e-2)
    assert_close(got, body(attended, weight, positions, frequencies), 6e-2)

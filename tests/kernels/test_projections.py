"""What feeds the products of sm_90, in the interpreter: norm, activation, rounding, order, arrivals.

The products themselves need the device's instructions: tests/gpu has them.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fourfold.core.tensor import QuantTensor
from fourfold.ops.moe import swiglu
from fourfold.ops.norm import rms_norm
from fourfold.ops.quantize import power_of_two, quantize_activations
from fourfold.quant.fp8_block import FP8_BLOCK
from tests.kernels import interpreter
from tests.kernels.interpreter import driver, interpreted, poisoned

triton = pytest.importorskip("triton", reason="Triton is not installed")
tl = pytest.importorskip("triton.language", reason="Triton is not installed")
pytest.importorskip("fourfold.kernels.nvidia.projections", reason="Triton has no Gluon")
pytestmark = pytest.mark.full


@driver
def test_in_the_interpreter() -> None:
    interpreter.run(__file__)


def fp8(*shape: int) -> QuantTensor:
    return QuantTensor(*FP8_BLOCK.quantize(torch.randn(shape), "e8m0"), FP8_BLOCK, shape)


@triton.jit
def at_once(value):
    return value


@pytest.fixture
def rounded(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What the products are given, which do not run: no other kernel is ahead in the interpreter."""
    from fourfold.kernels.nvidia import projections

    found: list[Any] = []

    def keep(given: Any, x: Any, weights: Any, unrounded: Any) -> tuple[Tensor, ...]:
        found.append(given)
        return tuple(torch.empty(0) for _ in weights)

    monkeypatch.setattr(projections, "begin_beside_previous", at_once)
    monkeypatch.setattr(projections, "_project", keep)
    return found


def check(given: Any, values: Tensor, tiles: int) -> None:
    """Codes and scales of `values`, and one arrival a tile, zero."""
    codes, exponent = quantize_activations(values)
    differing = given.codes != codes
    assert float(differing.float().mean()) < 2e-3  # a last bit of a norm may turn a tie
    assert torch.equal(given.scale.T, power_of_two(exponent, torch.float32))
    assert torch.equal(given.arrivals, torch.zeros(tiles, dtype=torch.int32))


@interpreted
@pytest.mark.parametrize("tokens", [1, 5])
def test_inputs_are_rounded(tokens: int, rounded: list[Any]) -> None:
    from fourfold.kernels.nvidia import projections

    x = torch.randn(tokens, 384).bfloat16() * 3
    with poisoned():
        projections.linears(x, (fp8(200, 384), torch.randn(24, 384).bfloat16()), (False, True))
    check(rounded[0], x, 4 + 1)


@interpreted
@pytest.mark.parametrize("size", [256, 384])
def test_inputs_are_normalised_and_rounded(size: int, rounded: list[Any]) -> None:
    from fourfold.kernels.nvidia import projections

    x, norm = torch.randn(3, size).bfloat16() * 3, torch.rand(size).bfloat16() + 0.5
    with poisoned():
        projections.norm_linears(x, norm, 1e-6, (fp8(96, size),), (False,), lambda o, t: False)
    check(rounded[0], rms_norm(x, norm, 1e-6), 2)


@interpreted
def test_the_activation_is_rounded(rounded: list[Any]) -> None:
    from fourfold.kernels.nvidia import projections

    gate, up = torch.randn(3, 384) * 4, torch.randn(3, 384) * 4
    with poisoned():
        projections.shared_expert(gate, up, fp8(64, 384), 2.0)
    check(rounded[0], swiglu(gate, up, 2.0).bfloat16(), 1)


def in_order(values: Tensor) -> Tensor:
    """Inputs `[N, K]` as the products of `wo_a` want them: of every 64, 16 q + 4 s + 2 i + h at
    16 s + 8 h + 2 q + i."""
    out = torch.empty_like(values)
    for first in range(0, values.shape[1], 64):
        for k in range(64):
            q, s, i, h = k // 16, k // 4 % 4, k // 2 % 2, k % 2
            out[:, first + 16 * s + 8 * h + 2 * q + i] = values[:, first + k]
    return out


@interpreted
def test_heads_are_turned_back_and_reordered(monkeypatch: pytest.MonkeyPatch) -> None:
    from fourfold.kernels.nvidia import wo_a
    from fourfold.ops.rope import inverse_frequencies, rotate

    monkeypatch.setattr(wo_a, "begin_beside_previous", at_once)
    attended, positions = torch.randn(3, 8, 128).bfloat16(), torch.tensor([0, 5, 70_000])
    frequencies, arrivals = (
        inverse_frequencies(64, 1e4, None),
        torch.full((5,), 7, dtype=torch.int32),
    )
    expected = in_order(rotate(attended, positions, frequencies, inverse=True).flatten(0, 1))
    wo_a._turn(attended, positions, frequencies, arrivals)
    assert float((attended.flatten(0, 1) - expected).abs().max()) < 2e-2
    assert not arrivals.any()


@interpreted
def test_numbers_are_decoded_and_reordered() -> None:
    from fourfold.kernels.nvidia import wo_a

    weight = fp8(256, 384)
    found: list[Tensor] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(wo_a.linear, "plain_groups", lambda x, numbers, *rest: found.append(numbers))
        with poisoned():
            wo_a._many(torch.empty(3, 768).bfloat16(), weight, torch.empty(3, 256).bfloat16())
    assert torch.equal(found[0], in_order(weight.dequantize(torch.bfloat16)))

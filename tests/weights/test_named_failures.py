"""Failures of other engines: a test for each, named after what happened there."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fourfold.core.parameters import EXPERT_ROLES, Role, parameters
from fourfold.core.tensor import QuantTensor, Weight, dense
from fourfold.weights.amplitude import amplitude_report
from fourfold.weights.loader import open_checkpoint
from fourfold.weights.raw import to_float
from tests.weights.written import (
    CONFIG,
    SCALE,
    W1_SCALE,
    WQ_A,
    check_values,
    loaded,
    refused,
    tiny_config,
    write,
)


def test_a_rename_rule_that_swallows_a_neighbour(tmp_path: Path) -> None:
    """Every parameter gets values of its own: 381 of 2,519 once kept what memory held."""
    written = write(CONFIG, "plain", "plain", plain=torch.float64)
    for number, (name, tensor) in enumerate(written.tensors.items()):
        if tensor.is_floating_point():
            tensor.fill_(number + 1)
        written.values[name] = tensor
    weights = loaded(written.save(tmp_path))
    for spec in parameters(CONFIG):
        for number, name in enumerate(spec.checkpoint_names):
            weight = weights[spec.name]
            part = weight[number] if spec.role in EXPERT_ROLES else weight
            assert torch.equal(dense(part, part.dtype), written.tensors[name].to(part.dtype)), name


def test_fp8_copied_without_its_scale(tmp_path: Path) -> None:
    """2,768 times too large: the loader has no way to make a float of codes, refuses a matrix whose
    scale is gone, and the amplitude report sees one that was lost anyhow."""
    written = write(CONFIG, "fp8")
    weights = loaded(written.save(tmp_path))
    assert amplitude_report(weights) == []
    with pytest.raises(TypeError, match="not one between floats"):
        to_float(written.tensors[WQ_A], torch.float32)
    with pytest.raises(TypeError, match="not one between floats"):
        to_float(written.tensors[WQ_A].view(torch.uint8), torch.float32)
    bare = {name: bare_codes(weight) for name, weight in weights.items()}
    quantised = {name for name, weight in weights.items() if isinstance(weight, QuantTensor)}
    assert {outlier.name.partition("[")[0] for outlier in amplitude_report(bare)} == quantised
    del written.tensors[SCALE]
    (tmp_path / "lost").mkdir()
    refused(written.save(tmp_path / "lost"), WQ_A, "F8_E4M3 without a scale", "byte")


def bare_codes(weight: Weight) -> Weight:
    """A weight as an engine reads it that forgets the scale."""
    if not isinstance(weight, QuantTensor):
        return weight
    return weight.codes.view(torch.float8_e4m3fn).float()


def test_e8m0_bytes_cast_as_numbers(tmp_path: Path) -> None:
    """Exponent byte 120 is 2^-7, never 120.0."""
    written = write(CONFIG)
    weights = loaded(written.save(tmp_path))
    weight = weights[WQ_A]
    assert isinstance(weight, QuantTensor)
    assert weight.scale.dtype == torch.uint8
    assert torch.equal(weight.scale, written.tensors[SCALE].view(torch.uint8))
    check_values(weights, written)
    cast = QuantTensor(weight.codes, weight.scale.float(), weight.scheme, weight.shape)
    (outlier,) = amplitude_report({WQ_A: cast})
    assert outlier.value > 1e4 * float(weight.dequantize(torch.float32).std())
    assert WQ_A in str(outlier)


def test_a_scale_that_was_cast_on_disk_is_refused(tmp_path: Path) -> None:
    """Numbers where exponent bytes belong, in a dtype that is no scale's."""
    written = write(CONFIG)
    written.tensors[W1_SCALE] = written.tensors[W1_SCALE].view(torch.uint8).float()
    refused(written.save(tmp_path), "layers.1.ffn.experts.2.w1", "F32")


@pytest.mark.parametrize("prefix", ["layers.1", "layers.1."])
def test_the_prefix_of_the_experts_with_and_without_its_trailing_dot(
    tmp_path: Path, prefix: str
) -> None:
    """The scheme of a layer's experts is looked up by role; a dot more or less loses none."""
    plan = open_checkpoint(write(CONFIG).save(tmp_path), CONFIG)
    for role in sorted(EXPERT_ROLES, key=str):
        assert plan.resolution.decision(prefix, role).scheme == "mxfp4"
    assert plan.resolution.decision(prefix, Role.SHARED_W1).scheme == "fp8_block"


@pytest.mark.parametrize("quantization_config", [None, {"quant_method": "fp8", "fmt": "e4m3"}])
@pytest.mark.parametrize(("experts", "scheme"), [("fp4", "mxfp4"), ("fp8", "fp8_block")])
def test_an_fp4_checkpoint_whose_config_lost_expert_dtype(
    tmp_path: Path, quantization_config: object, experts: str, scheme: str
) -> None:
    """The header decides; absence of the field contradicts nothing, in either direction."""
    config = tiny_config(expert_dtype=None, quantization_config=quantization_config)
    written = write(config, experts)
    weights = loaded(written.save(tmp_path), config)
    weight = weights["layers.1.ffn.experts.w2.weight"]
    assert isinstance(weight, QuantTensor)
    assert weight.scheme.name == scheme
    check_values(weights, written)


def test_a_checkpoint_whose_parameters_are_all_nonzero_and_all_wrong(tmp_path: Path) -> None:
    """That all parameters were set and none is zero proves nothing: here all have their shapes and
    finite values, and every FP8 matrix and every plain one is named by the amplitude report."""
    weights = loaded(write(CONFIG, "fp8").save(tmp_path))
    assert amplitude_report(weights) == []
    wrong: dict[str, Weight] = {}
    for name, weight in weights.items():
        if isinstance(weight, QuantTensor):
            wrong[name] = replace(weight, scale=torch.full_like(weight.scale, 127))  # 2^0
        elif weight.is_floating_point():
            wrong[name] = torch.full(weight.shape, 2.0**15)
    assert all(bool((dense(weight, torch.float32) != 0).any()) for weight in wrong.values())
    assert {outlier.name.partition("[")[0] for outlier in amplitude_report(wrong)} == set(wrong)


def test_one_expert_of_a_stack_with_anothers_values(tmp_path: Path) -> None:
    """Each expert lands in its own place of the stack, scale beside codes."""
    written = write(CONFIG)
    weights = loaded(written.save(tmp_path))
    stack = weights["layers.1.ffn.experts.w1.weight"]
    assert isinstance(stack, QuantTensor)
    for expert in range(4):
        expected = written.values["layers.1.ffn.experts.w1.weight"][expert]
        assert torch.equal(stack[expert].dequantize(torch.float64), expected)
        others = [other for other in range(4) if other != expert]
        assert not any(torch.equal(stack[o].dequantize(torch.float64), expected) for o in others)

"""The amplitude report: what is a sane size, and what is named."""

from __future__ import annotations

from dataclasses import replace

import torch

from fourfold.core.parameters import Role, Storage, parameters
from fourfold.core.tensor import QuantTensor, Weight
from fourfold.quant.fp8_block import FP8_BLOCK
from fourfold.quant.mxfp4 import MXFP4
from fourfold.weights.amplitude import amplitude_report
from tests.weights.written import CONFIG


def test_initialised_weights_are_sane() -> None:
    weights: dict[str, Weight] = {}
    for spec in parameters(CONFIG):
        if spec.storage is Storage.INTEGER:
            weights[spec.name] = torch.zeros(spec.shape, dtype=torch.int64)
        elif spec.storage is Storage.FLOAT:
            weights[spec.name] = torch.zeros(spec.shape)
        elif len(spec.shape) == 1:
            weights[spec.name] = torch.ones(spec.shape)
        else:
            weights[spec.name] = torch.randn(spec.shape) * 0.02
    assert amplitude_report(weights) == []


def test_one_expert_and_a_nan_are_named() -> None:
    spec = next(s for s in parameters(CONFIG) if s.role is Role.EXPERT_W1)
    stack = torch.randn(spec.shape) / 160**0.5
    stack[2] = 0
    report = amplitude_report({spec.name: stack, "norm.weight": torch.full((160,), float("nan"))})
    assert [outlier.name for outlier in report] == [f"{spec.name}[2]", "norm.weight"]
    assert report[0].role is Role.EXPERT_W1
    assert str(report[0]).startswith(f"{spec.name}[2] has gain RMS·sqrt(in) 0, expected 0.003906")


def test_the_band_takes_its_own_scales() -> None:
    """Rows 256 to 384 of 600 are read, with the scales of their blocks and no others."""
    values = torch.randn(600, 160) / 160**0.5
    codes, scale = FP8_BLOCK.quantize(values, "f32")
    weight = QuantTensor(codes, scale, FP8_BLOCK, (600, 160))
    assert amplitude_report({"layers.0.attn.wq_a.weight": weight}) == []
    for row in range(5):
        spoilt = scale.clone()
        spoilt[row] *= 4096
        report = amplitude_report({"layers.0.attn.wq_a.weight": replace(weight, scale=spoilt)})
        assert bool(report) == (row == 2)


def test_fp4_codes_without_their_scale() -> None:
    values = torch.randn(200, 2048) / 2048**0.5
    codes, scale = MXFP4.quantize(values, "e8m0")
    weight = QuantTensor(codes, scale, MXFP4, (200, 2048))
    name = "layers.0.ffn.shared_experts.w1.weight"
    assert amplitude_report({name: weight}) == []
    bare = replace(weight, scale=torch.full_like(scale, 127))
    assert [outlier.name for outlier in amplitude_report({name: bare})] == [name]

"""The amplitude report: what is a sane size, and what is named."""

from __future__ import annotations

import torch

from fourfold.core.parameters import Role, parameters
from fourfold.weights.amplitude import amplitude_report
from tests.weights.written import CONFIG


def test_amplitude_of_odd_weights() -> None:
    spec = next(s for s in parameters(CONFIG) if s.role is Role.EXPERT_W1)
    stack = torch.randn(spec.shape) / 160**0.5
    stack[2] = 0
    report = amplitude_report({spec.name: stack, "norm.weight": torch.full((160,), float("nan"))})
    assert [outlier.name for outlier in report] == [f"{spec.name}[2]", "norm.weight"]
    assert report[0].role is Role.EXPERT_W1
    tall = torch.cat([torch.randn(300, 160), torch.randn(300, 160)]) / 160**0.5
    assert amplitude_report({"head.weight": tall}) == []

"""Weights made on a device are what the loader gives for a synthetic checkpoint, but for the numbers."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from fourfold.core.config import ModelConfig
from fourfold.core.parameters import Role
from fourfold.core.tensor import QuantTensor, Weight, dense
from fourfold.quant.mxfp4 import MXFP4
from fourfold.weights.amplitude import amplitude_report
from fourfold.weights.layout import FORMATS
from fourfold.weights.loader import load, open_checkpoint
from fourfold.weights.names import role_of
from fourfold.weights.random_weights import random_parameters
from tests.support import write_small

CPU = torch.device("cpu")


def described(weights: dict[str, Weight]) -> dict[str, Any]:
    """All of a weight but its numbers."""
    found: dict[str, Any] = {}
    for name, weight in weights.items():
        if isinstance(weight, QuantTensor):
            parts = weight.codes.dtype, weight.scale.dtype, tuple(weight.scale.shape)
            found[name] = (weight.scheme, weight.shape, weight.quantize_activations, *parts)
        else:
            found[name] = (weight.dtype, tuple(weight.shape))
    return found


@pytest.mark.parametrize("name", ["native", "fp8", "bf16", "float32"])
def test_made_weights_are_like_loaded_ones(tmp_path: Path, name: str) -> None:
    directory = write_small(tmp_path / "c", name, hidden_size=128, moe_intermediate_size=128)
    config = ModelConfig.from_directory(directory).config
    loaded = load(open_checkpoint(directory, config), CPU, torch.bfloat16)
    made = random_parameters(config, FORMATS[name], CPU)
    assert described(made) == described(loaded)
    assert amplitude_report(made) == []
    ratios = []
    for key, weight in loaded.items():
        if role_of(key) is Role.TID2EID or math.prod(weight.shape) < 2048:
            continue
        ours, theirs = (
            float(dense(w, torch.float32).square().mean().sqrt()) for w in (made[key], weight)
        )
        if isinstance(weight, QuantTensor) and weight.scheme is not MXFP4:
            # One FP8 scale for 16,384 numbers, from 1/4 to 4 times the middle one: all together.
            ratios.append(math.log2(ours / theirs))
            assert -4.5 < ratios[-1] < 4.5, key
        else:
            assert ours == pytest.approx(theirs, rel=0.1), key
    if ratios:
        assert sum(ratios) / len(ratios) == pytest.approx(0, abs=0.5)


def test_codes_are_canonical_and_routes_distinct() -> None:
    config = ModelConfig.from_dict(_tiny(), "config.json").config
    for name in ("native", "fp8"):
        for key, weight in random_parameters(config, FORMATS[name], CPU, seed=3).items():
            if isinstance(weight, QuantTensor):
                weight.scheme.validate(weight.codes, weight.scale, key)
                kept = weight.codes.clone()
                weight.scheme.canonicalize(weight.codes)
                assert torch.equal(kept, weight.codes), f"{key} has codes of negative zero"
                assert weight.codes.float().std() > 20, f"{key}: codes are not spread"
            elif role_of(key) is Role.TID2EID:
                ordered = weight.sort(dim=-1).values
                assert bool((ordered[:, 1:] > ordered[:, :-1]).all())
                assert int(ordered.min()) == 0
                assert int(ordered.max()) == config.n_routed_experts - 1


def test_a_weight_depends_on_its_name_and_the_seed_alone() -> None:
    data = _tiny()
    whole = ModelConfig.from_dict(data, "config.json").config
    data |= {"num_hidden_layers": 1, "compress_ratios": [0, 0]}
    first = ModelConfig.from_dict(data, "config.json").config
    few, all_of_them = (random_parameters(c, FORMATS["native"], CPU) for c in (first, whole))
    others = random_parameters(first, FORMATS["native"], CPU, seed=1)
    for key, weight in few.items():
        assert torch.equal(dense(weight, torch.float32), dense(all_of_them[key], torch.float32))
        assert not torch.equal(dense(weight, torch.float32), dense(others[key], torch.float32))
    same = [all_of_them[f"layers.{n}.attn.wkv.weight"] for n in range(2)]
    assert not torch.equal(*(dense(weight, torch.float32) for weight in same))


def _tiny() -> dict[str, Any]:
    from fourfold.weights.geometry import config_json, with_storage

    return with_storage(config_json("tiny", 4), "bfloat16", "fp4", True)

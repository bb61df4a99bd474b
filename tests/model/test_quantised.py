"""Quantised checkpoints against their dequantised twins, with a dequantiser of the test's own."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from fourfold.core.tensor import QuantTensor
from fourfold.engine.oneshot import one_shot
from fourfold.ops.linear import linear
from fourfold.ops.quantize import ACTIVATION_GROUP, dequantize_fp8_groups, quantize_fp8_groups
from tests.support import load_small, load_weights, prompts, write_small

FP4 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], dtype=np.float32)


def fp8_table() -> np.ndarray:
    """E4M3 by definition, for all 256 bytes."""
    table = np.zeros(256, dtype=np.float32)
    for code in range(256):
        exponent, mantissa = code >> 3 & 15, code & 7
        value = mantissa * 2.0**-9 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7)
        table[code] = -value if code & 128 else value
    return table


def dequantised_twin(source: Path, target: Path) -> Path:
    """The same checkpoint in float32, computed from the files' bytes with numpy alone."""
    target.mkdir()
    raw: dict[str, tuple[str, list[int], bytes]] = {}
    for file in sorted(source.glob("*.safetensors")):
        blob = file.read_bytes()
        size = struct.unpack_from("<Q", blob)[0]
        for name, entry in json.loads(blob[8 : 8 + size]).items():
            begin, end = (8 + size + o for o in entry["data_offsets"])
            raw[name] = (entry["dtype"], entry["shape"], blob[begin:end])
    out: dict[str, torch.Tensor] = {}
    for name, (dtype, shape, data) in raw.items():
        if name.endswith(".scale"):
            continue
        if dtype == "I64":
            out[name] = torch.from_numpy(np.frombuffer(data, np.int64).reshape(shape).copy())
            continue
        if dtype == "F32":
            values = np.frombuffer(data, np.float32).reshape(shape)
        elif dtype == "BF16":
            values = (np.frombuffer(data, np.uint16).astype(np.uint32) << 16).view(np.float32)
            values = values.reshape(shape)
        else:
            scale_dtype, scale_shape, scale_data = raw[name.removesuffix("weight") + "scale"]
            if scale_dtype == "F8_E8M0":
                scale = np.exp2(np.frombuffer(scale_data, np.uint8).astype(np.float64) - 127)
            else:
                scale = np.frombuffer(scale_data, np.float32)
            scale = scale.reshape(scale_shape)
            codes = np.frombuffer(data, np.uint8).reshape(shape)
            if dtype == "I8":
                pair = np.stack([FP4[codes & 15], FP4[codes >> 4]], axis=-1)
                values = pair.reshape(shape[0], -1) * np.repeat(scale, 32, axis=1)
            else:
                grid = np.repeat(np.repeat(scale, 128, axis=0), 128, axis=1)
                values = fp8_table()[codes] * grid[: shape[0], : shape[1]]
        out[name] = torch.from_numpy(np.array(values, dtype=np.float32))
    save_file(out, target / "model.safetensors")
    config = json.loads((source / "config.json").read_text())
    for key in ("quantization_config", "expert_dtype"):
        config.pop(key, None)
    config["torch_dtype"] = "float32"
    (target / "config.json").write_text(json.dumps(config))
    return target


SHAPES = {"hidden_size": 160, "moe_intermediate_size": 96, "q_lora_rank": 64}


@pytest.mark.parametrize("weights", ["native", "fp8"])
@torch.inference_mode()
def test_a_quantised_checkpoint_equals_its_dequantised_twin(weights: str, tmp_path: Path) -> None:
    """With activation quantisation off, in float32: equal to the last bit. Partial blocks included."""
    source = write_small(tmp_path / "q", weights, seed=3, **SHAPES)
    twin = dequantised_twin(source, tmp_path / "twin")
    tokens = prompts(192, (150, 9), 1)
    quantised = load_small(source, torch.float32, activations=False)
    assert any(isinstance(w, QuantTensor) for w in load_weights(source, torch.float32)[1].values())
    expected = one_shot(load_small(twin, torch.float32), tokens).logits
    assert torch.equal(one_shot(quantised, tokens).logits, expected)


@pytest.mark.full
@torch.inference_mode()
def test_transformers_reads_the_twin_and_agrees_with_the_quantised_original(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", minversion="5.23")
    source = write_small(tmp_path / "q", "native", seed=4, index_n_heads=32, **SHAPES)
    twin = dequantised_twin(source, tmp_path / "twin")
    oracle = transformers.DeepseekV4ForCausalLM.from_pretrained(
        twin, dtype=torch.float32, experts_implementation="eager"
    )
    tokens = prompts(192, (140,), 2)
    expected = oracle(torch.tensor(tokens), use_cache=False).logits[0]
    got = one_shot(load_small(source, torch.float32, activations=False), tokens).logits
    assert float((got - expected).abs().max()) < 1e-4


@torch.inference_mode()
def test_activation_quantisation_differs_by_the_op_bodies_and_nothing_else(tmp_path: Path) -> None:
    """The twin, run with every quantised layer's input rounded by the op's own rounding, is equal."""
    source = write_small(tmp_path / "q", "native", seed=5, **SHAPES)
    config, weights = load_weights(source, torch.float32)
    tokens = prompts(192, (70,), 3)
    plain = one_shot(load_small(source, torch.float32, activations=False), tokens).logits
    on = one_shot(load_small(source, torch.float32), tokens).logits
    assert float((on - plain).abs().max()) > 1e-3
    matrix = weights["layers.0.attn.wq_a.weight"]
    assert isinstance(matrix, QuantTensor)
    x = torch.randn(5, config.hidden_size, generator=torch.Generator().manual_seed(1))
    rounded = dequantize_fp8_groups(
        *quantize_fp8_groups(x, ACTIVATION_GROUP), ACTIVATION_GROUP, torch.float32
    )
    assert torch.equal(linear(x, matrix), rounded @ matrix.dequantize(torch.float32).T)
    assert torch.equal(
        linear(x, matrix.with_activations(False)), x @ matrix.dequantize(torch.float32).T
    )


@torch.inference_mode()
def test_wo_a_activations_are_never_rounded(tmp_path: Path) -> None:
    """`wo_a` is dequantised and multiplied in the model dtype: that is its definition."""
    source = write_small(tmp_path / "q", "native", seed=6, **SHAPES)
    config, weights = load_weights(source, torch.float32)
    on = load_small(source, torch.float32).layers[0].attn
    matrix = weights["layers.0.attn.wo_a.weight"]
    attended = torch.randn(4, config.num_attention_heads, config.head_dim)
    positions = torch.tensor([0, 3, 70, 500])
    a = on.ops.wo_a(attended, on.wo_a, positions, on.inv_freq)
    b = on.ops.wo_a(attended, matrix.dequantize(torch.float32), positions, on.inv_freq)
    assert torch.equal(a, b)


@torch.inference_mode()
def test_nan_in_one_sequence_flags_it_alone(tmp_path: Path) -> None:
    """A NaN is seen although FP8 casts would hide it, and touches no other sequence."""
    model = load_small(write_small(tmp_path / "q", "native", seed=7, **SHAPES), torch.float32)
    tokens = prompts(190, (20, 30), 4)
    clean = one_shot(model, tokens)
    assert clean.nonfinite.tolist() == [False, False]
    table = model.embed.table.clone()
    table[191] = float("nan")
    model.embed.table = table
    broken = one_shot(model, [[*tokens[0][:10], 191, *tokens[0][11:]], tokens[1]])
    assert broken.nonfinite.tolist() == [True, False]
    assert torch.allclose(broken.logits[20:], clean.logits[20:], atol=1e-3)

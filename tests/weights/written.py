"""Checkpoints for these tests, written by the safetensors library, decoded by other arithmetic.

Nothing here uses fourfold's own codecs, names or writer: codes are random bytes, and the values
they stand for are computed with numpy tables. `check_values` compares what was loaded.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import Tensor

from fourfold.core.config import ModelConfig, RopeScaling
from fourfold.core.errors import CheckpointError, FourfoldError, QuantizationError
from fourfold.core.parameters import ParamSpec, Role, Storage, parameters
from fourfold.core.tensor import Weight, dense
from fourfold.weights.loader import load, open_checkpoint

E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])


def tiny_config(**changes: object) -> ModelConfig:
    """Every kind of layer, sizes that leave partial FP8 blocks, one MTP layer."""
    config = ModelConfig(
        vocab_size=96,
        hidden_size=160,
        num_hidden_layers=4,
        num_attention_heads=4,
        head_dim=32,
        qk_rope_head_dim=8,
        q_lora_rank=32,
        o_groups=2,
        o_lora_rank=16,
        sliding_window=8,
        compress_ratios=(0, 4, 128, 4),
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_shared_experts=1,
        moe_intermediate_size=96,
        num_hash_layers=2,
        routed_scaling_factor=1.5,
        swiglu_limit=10.0,
        index_n_heads=2,
        index_head_dim=16,
        index_topk=8,
        hc_mult=4,
        hc_sinkhorn_iters=4,
        hc_eps=1e-6,
        rms_norm_eps=1e-6,
        rope_theta=10000.0,
        compress_rope_theta=160000.0,
        rope_scaling=RopeScaling(factor=16.0, original_max_position_embeddings=65536),
        max_position_embeddings=1024,
        num_nextn_predict_layers=1,
    )
    return dataclasses.replace(config, **changes)


CONFIG = tiny_config()
WQ_A = "layers.1.attn.wq_a.weight"
SCALE = "layers.1.attn.wq_a.scale"
W1 = "layers.1.ffn.experts.2.w1.weight"
W1_SCALE = "layers.1.ffn.experts.2.w1.scale"


def flash_config(**changes: object) -> ModelConfig:
    """The full-size Flash release."""
    ratios = (0, 0, *(4, 128) * 20, 4)
    values = {
        "vocab_size": 129280, "hidden_size": 4096, "num_hidden_layers": 43,
        "num_attention_heads": 64, "head_dim": 512, "qk_rope_head_dim": 64, "q_lora_rank": 1024,
        "o_groups": 8, "o_lora_rank": 1024, "sliding_window": 128, "compress_ratios": ratios,
        "n_routed_experts": 256, "num_experts_per_tok": 6, "moe_intermediate_size": 2048,
        "num_hash_layers": 3, "index_n_heads": 64, "index_head_dim": 128, "index_topk": 512,
        "max_position_embeddings": 1048576,
    }  # fmt: skip
    return tiny_config(**{**values, **changes})


class Written:
    """`tensors`: checkpoint name to tensor; `values`: parameter name to its float64 (or int64)
    values, experts stacked."""

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}
        self.values: dict[str, Tensor] = {}

    def save(self, directory: Path, rename: Callable[[str], str] = str) -> Path:
        """One shard for each layer, and the index."""
        shards: dict[str, dict[str, Tensor]] = {}
        for name, tensor in self.tensors.items():
            head = name.split(".")
            shards.setdefault("-".join(head[:2]) if len(head) > 3 else "top", {})[rename(name)] = (
                tensor
            )
        files, total = {}, 0
        for number, tensors in enumerate(shards.values(), 1):
            file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            safetensors.torch.save_file(tensors, directory / file)
            files.update(dict.fromkeys(tensors, file))
            total += sum(tensor.nbytes for tensor in tensors.values())
        write_index(directory, files, total)
        return directory


def write_index(directory: Path, files: dict[str, str], total: int | None = None) -> None:
    metadata = {} if total is None else {"total_size": total}
    text = json.dumps({"metadata": metadata, "weight_map": files})
    (directory / "model.safetensors.index.json").write_text(text)


def edit_index(directory: Path, edit: Callable[[dict[str, str]], None]) -> None:
    path = directory / "model.safetensors.index.json"
    data = json.loads(path.read_text())
    edit(data["weight_map"])
    path.write_text(json.dumps(data))


def write(
    config: ModelConfig,
    experts: str = "fp4",
    linears: str = "fp8",
    scales: str = "e8m0",
    plain: torch.dtype = torch.bfloat16,
    seed: int = 0,
) -> Written:
    """A checkpoint of `config`. `experts`: fp4, fp8 or plain; `linears`: fp8 or plain; `scales` of
    FP8: e8m0 or f32."""
    make = _Maker(np.random.default_rng(seed), scales, plain)
    result = Written()
    for spec in parameters(config):
        storage = spec.storage
        kind = {Storage.EXPERT: experts, Storage.LINEAR: linears}.get(storage, "plain")
        if storage is Storage.INTEGER:
            ids = make.rng.integers(0, config.n_routed_experts, spec.shape)
            result.tensors[spec.name] = result.values[spec.name] = torch.from_numpy(ids)
            continue
        stack = []
        for name in spec.checkpoint_names:
            tensors, values = make.parameter(name, spec, kind)
            result.tensors.update(tensors)
            stack.append(values)
        result.values[spec.name] = torch.stack(stack).view(spec.shape)
    return result


class _Maker:
    def __init__(self, rng: np.random.Generator, scales: str, plain: torch.dtype) -> None:
        self.rng = rng
        self.scales = scales
        self.plain = plain

    def parameter(self, name: str, spec: ParamSpec, kind: str) -> tuple[dict[str, Tensor], Tensor]:
        """The tensors of one checkpoint weight, and its values in float64."""
        shape = spec.checkpoint_shape
        if kind == "fp8":
            return self._fp8(name, shape)
        if kind == "fp4":
            return self._fp4(name, shape)
        values = torch.from_numpy(self.rng.normal(0, 1 / np.sqrt(shape[-1]), shape))
        if spec.role in (Role.ATTN_NORM, Role.FFN_NORM, Role.NORM):
            values = 1 + values
        stored = values.to(torch.float32 if spec.storage is Storage.FLOAT else self.plain)
        return {name: stored}, stored.double()

    def _fp8(self, name: str, shape: tuple[int, ...]) -> tuple[dict[str, Tensor], Tensor]:
        codes = self.rng.integers(0, 256, shape, dtype=np.uint8)
        codes[(codes & 0x7F) == 0x7F] = 0x30
        blocks = (-(-shape[0] // 128), -(-shape[1] // 128))
        exponent = self.rng.integers(-13, -9, blocks)
        wide = exponent.repeat(128, 0)[: shape[0]].repeat(128, 1)[:, : shape[1]]
        values = torch.from_numpy(codes).view(torch.float8_e4m3fn).double()
        values = values * torch.from_numpy(np.ldexp(1.0, wide))
        weight = torch.from_numpy(codes).view(torch.float8_e4m3fn)
        return {name: weight, name[:-6] + "scale": self._scale(exponent, self.scales)}, values

    def _fp4(self, name: str, shape: tuple[int, ...]) -> tuple[dict[str, Tensor], Tensor]:
        nibbles = self.rng.integers(0, 16, shape, dtype=np.uint8)
        packed = nibbles[:, 0::2] | nibbles[:, 1::2] << 4
        exponent = self.rng.integers(-8, -3, (shape[0], shape[1] // 32))
        values = E2M1[nibbles] * np.ldexp(1.0, exponent.repeat(32, 1))
        weight = torch.from_numpy(packed.view(np.int8))
        return {
            name: weight,
            name[:-6] + "scale": self._scale(exponent, "e8m0"),
        }, torch.from_numpy(values)

    def _scale(self, exponent: np.ndarray, scales: str) -> Tensor:
        if scales == "f32":
            return torch.from_numpy(np.ldexp(1.0, exponent).astype(np.float32))
        return torch.from_numpy((exponent + 127).astype(np.uint8)).view(torch.float8_e8m0fnu)


def save_raw(path: Path, entries: dict[str, tuple[str, list[int], bytes]], pad: str = "") -> None:
    """A safetensors file by hand: name to (dtype, shape, data), the header followed by `pad`."""
    header, position = {}, 0
    for name, (dtype, shape, data) in entries.items():
        header[name] = {
            "dtype": dtype,
            "shape": shape,
            "data_offsets": [position, position + len(data)],
        }
        position += len(data)
    raw = (json.dumps(header, separators=(",", ":")) + pad).encode()
    body = b"".join(data for _, _, data in entries.values())
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + body)


def raw_entries(tensors: dict[str, Tensor]) -> dict[str, tuple[str, list[int], bytes]]:
    """The same tensors for `save_raw`."""
    names = {
        torch.bfloat16: "BF16", torch.float32: "F32", torch.float64: "F64", torch.int64: "I64",
        torch.int8: "I8", torch.uint8: "U8", torch.float8_e4m3fn: "F8_E4M3",
        torch.float8_e8m0fnu: "F8_E8M0",
    }  # fmt: skip
    return {
        name: (
            names[tensor.dtype],
            list(tensor.shape),
            tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes(),
        )
        for name, tensor in tensors.items()
    }


def loaded(directory: Path, config: ModelConfig = CONFIG, **options: object) -> dict[str, Weight]:
    return load(open_checkpoint(directory, config), **{"dtype": torch.float64, **options})


def refused(
    directory: Path, *parts: str, config: ModelConfig = CONFIG, override: str = "auto"
) -> FourfoldError:
    """The error of opening and loading, whose text must hold all `parts`."""
    with pytest.raises((CheckpointError, QuantizationError)) as caught:
        load(open_checkpoint(directory, config, override))
    for part in parts:
        assert part in str(caught.value), caught.value
    return caught.value


def check_values(weights: dict[str, Weight], written: Written) -> None:
    """Every parameter there is, bit for bit what was written."""
    assert list(weights) == [spec.name for spec in parameters(CONFIG)]
    for spec in parameters(CONFIG):
        weight, values = weights[spec.name], written.values[spec.name]
        assert tuple(weight.shape) == spec.shape, spec.name
        found = weight if spec.storage is Storage.INTEGER else dense(weight, torch.float64)
        assert torch.equal(found, values), spec.name

"""Headers of small checkpoints in every storage format, for the tests beside this file."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from fourfold.core.checkpoint import TensorHeader
from fourfold.core.config import ModelConfig
from fourfold.core.parameters import EXPERT_ROLES, Storage, parameters, scale_name
from fourfold.quant.resolve import Resolution

CONFIGS = Path(__file__).parent.parent / "data" / "configs"
FP8 = json.loads((CONFIGS / "flash.json").read_text())["quantization_config"]
Headers = dict[str, TensorHeader]


def small(expert_dtype: str | None = None, quantization: dict | None = None) -> ModelConfig:
    """Flash's config with three layers (SWA, CSA, HCA), an MTP layer and small matrices."""
    return replace(
        ModelConfig.from_file(CONFIGS / "flash.json").config,
        vocab_size=64, hidden_size=256, num_hidden_layers=3, compress_ratios=(0, 4, 128),
        num_attention_heads=4, head_dim=64, qk_rope_head_dim=16, q_lora_rank=256, o_groups=2,
        o_lora_rank=128, index_n_heads=2, index_head_dim=64, n_routed_experts=3,
        num_experts_per_tok=2, moe_intermediate_size=384, num_hash_layers=1,
        expert_dtype=expert_dtype, quantization_config=quantization,
    )  # fmt: skip


def header(name: str, dtype: str, *shape: int, file: str = "model.safetensors") -> Headers:
    return {name: TensorHeader(name, dtype, shape, file)}


def plain(name: str, rows: int, columns: int) -> Headers:
    return header(name, "BF16", rows, columns)


def fp8(name: str, rows: int, columns: int, scale: str = "F8_E8M0") -> Headers:
    blocks = (-(-rows // 128), -(-columns // 128))
    return header(name, "F8_E4M3", rows, columns) | header(scale_name(name), scale, *blocks)


def fp8_f32(name: str, rows: int, columns: int) -> Headers:
    return fp8(name, rows, columns, "F32")


def fp4(name: str, rows: int, columns: int, dtype: str = "I8") -> Headers:
    width = columns if dtype == "F4" else columns // 2
    return header(name, dtype, rows, width) | header(
        scale_name(name), "F8_E8M0", rows, columns // 32
    )


Store = Callable[[str, int, int], Headers]


def checkpoint(
    config: ModelConfig,
    expert: Store = fp4,
    linear: Store = fp8,
    special: dict[str, Store] | None = None,
) -> Headers:
    """All headers of a checkpoint; `special` names single tensors stored in another way."""
    headers: Headers = {}
    for spec in parameters(config):
        store = {Storage.EXPERT: expert, Storage.LINEAR: linear}.get(spec.storage)
        for name in spec.checkpoint_names:
            if store is None:
                headers |= header(name, "BF16", *spec.checkpoint_shape)
                continue
            rows, columns = spec.checkpoint_shape
            headers |= (special or {}).get(name, store)(name, rows, columns)
    return headers


def experts(resolution: Resolution, config: ModelConfig) -> set[tuple[str, str | None]]:
    """The (scheme, scale format) pairs of all routed experts."""
    return {
        (one.scheme, one.scale_format)
        for spec in parameters(config)
        if spec.role in EXPERT_ROLES and (one := resolution.of(spec))
    }


FLASH_HEADERS = {"expert": fp4, "linear": fp8}
BASE_HEADERS = {"expert": fp8_f32, "linear": fp8_f32}
SGLANG_HEADERS = {"expert": fp8, "linear": fp8}
PLAIN_HEADERS = {"expert": plain, "linear": plain}
AGREE = {
    "flash": ("mxfp4", "e8m0"),
    "base": ("fp8_block", "f32"),
    "sglang": ("fp8_block", "e8m0"),
    "plain": ("plain", None),
}
STORED = {
    "flash": FLASH_HEADERS,
    "base": BASE_HEADERS,
    "sglang": SGLANG_HEADERS,
    "plain": PLAIN_HEADERS,
}
QUARK = {
    "quant_method": "quark",
    "global_quant_config": {"weight": {"dtype": "fp4", "qscheme": "per_group", "group_size": 32}},
    "exclude": ["lm_head"],
}
CT_WEIGHTS = {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [128, 128]}
COMPRESSED = {
    "quant_method": "compressed-tensors",
    "config_groups": {"group_0": {"targets": ["Linear"], "weights": CT_WEIGHTS}},
    "ignore": ["re:.*wo_a$"],
}

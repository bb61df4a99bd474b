"""The built-in checkpoint's geometry: every kind of layer and router, the real ratios and window.

Contract: `nano_config` is a config.json without its storage keys; `small_config` the same network
narrow and shallow, for tests and for a quick look on a CPU. Sizes: widths are multiples of what FP4
groups (32) need; the whole checkpoint stays below 8 MB in FP4 and FP8.
"""

from __future__ import annotations

from typing import Any

from fourfold.core.config import ModelConfig
from fourfold.weights.geometry import config_json

VOCAB_SIZE = 1216
PADDING = 1  # fills what is left of a row; nothing is learned from it

NANO: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 256,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "head_dim": 128,
    "qk_rope_head_dim": 32,
    "q_lora_rank": 128,
    "o_groups": 2,
    "o_lora_rank": 64,
    "sliding_window": 128,
    "index_n_heads": 4,
    "index_head_dim": 64,
    "index_topk": 128,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
    "num_hash_layers": 2,
    "routed_scaling_factor": 1.5,
    "max_position_embeddings": 32768,
    "compress_ratios": [0, 4, 128, 4, 128, 4, 0],
    "rope_scaling": {
        "beta_fast": 32,
        "beta_slow": 1,
        "factor": 4,
        "original_max_position_embeddings": 8192,
        "type": "yarn",
    },
}

SMALL: dict[str, Any] = {
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "head_dim": 48,
    "qk_rope_head_dim": 16,
    "q_lora_rank": 32,
    "o_lora_rank": 32,
    "index_head_dim": 32,
    "index_topk": 8,
    "n_routed_experts": 4,
    "moe_intermediate_size": 32,
    "num_hash_layers": 1,
    "compress_ratios": [0, 4, 128, 0],
}


def nano_config(**changes: Any) -> dict[str, Any]:
    """config.json of the built-in checkpoint, sorted by key."""
    return dict(sorted((config_json("tiny") | NANO | changes).items()))


def small_config(**changes: Any) -> dict[str, Any]:
    """The same network, small enough to train on a CPU within a test."""
    return nano_config(**(SMALL | changes))


def model_config(config: dict[str, Any]) -> ModelConfig:
    """The checked form of a config.json."""
    return ModelConfig.from_dict(config, "config.json").config

"""The config.json of each synthetic checkpoint: the released geometries, and a tiny one.

Contract: `config_json(geometry, layers)` gives a released checkpoint's keys and values, cut to its
first layers if asked; `with_storage` adds what config.json says about how the weights are stored.
Plain data; it knows no tensors and no files.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fourfold.core.errors import ConfigError

GEOMETRIES = ("tiny", "flash", "flash-base", "pro")

_COMMON: tuple[tuple[str, Any], ...] = (
    ("architectures", ["DeepseekV4ForCausalLM"]),
    ("attention_bias", False),
    ("attention_dropout", 0.0),
    ("bos_token_id", 0),
    ("compress_rope_theta", 160000),
    ("eos_token_id", 1),
    ("hc_eps", 1e-06),
    ("hc_mult", 4),
    ("hc_sinkhorn_iters", 20),
    ("head_dim", 512),
    ("hidden_act", "silu"),
    ("index_head_dim", 128),
    ("index_n_heads", 64),
    ("initializer_range", 0.02),
    ("max_position_embeddings", 1048576),
    ("model_type", "deepseek_v4"),
    ("n_shared_experts", 1),
    ("norm_topk_prob", True),
    ("num_experts_per_tok", 6),
    ("num_hash_layers", 3),
    ("num_key_value_heads", 1),
    ("num_nextn_predict_layers", 1),
    ("o_lora_rank", 1024),
    ("qk_rope_head_dim", 64),
    ("rms_norm_eps", 1e-06),
    (
        "rope_scaling",
        {
            "beta_fast": 32,
            "beta_slow": 1,
            "factor": 16,
            "original_max_position_embeddings": 65536,
            "type": "yarn",
        },
    ),
    ("rope_theta", 10000),
    ("scoring_func", "sqrtsoftplus"),
    ("sliding_window", 128),
    ("swiglu_limit", 10.0),
    ("tie_word_embeddings", False),
    ("topk_method", "noaux_tc"),
    ("transformers_version", "4.57.1"),
    ("use_cache", True),
    ("vocab_size", 129280),
)


def _flash() -> dict[str, Any]:
    return {
        "hidden_size": 4096,
        "num_hidden_layers": 43,
        "num_attention_heads": 64,
        "q_lora_rank": 1024,
        "o_groups": 8,
        "index_topk": 512,
        "n_routed_experts": 256,
        "moe_intermediate_size": 2048,
        "routed_scaling_factor": 1.5,
        "compress_ratios": [0, 0, *[4, 128] * 20, 4, 0],
    }


def _pro() -> dict[str, Any]:
    return {
        "hidden_size": 7168,
        "num_hidden_layers": 61,
        "num_attention_heads": 128,
        "q_lora_rank": 1536,
        "o_groups": 16,
        "index_topk": 1024,
        "n_routed_experts": 384,
        "moe_intermediate_size": 3072,
        "routed_scaling_factor": 2.5,
        "compress_ratios": [128, 128, *[4, 128] * 29, 4, 0],
    }


def _tiny() -> dict[str, Any]:
    """Every kind of layer and router within a few megabytes.

    The window (64) and the indexer's choice (16 rows of 4 tokens) start to matter within the first
    hundred tokens; q_lora_rank 96 leaves FP8 blocks that are not full.
    """
    scaling = {"beta_fast": 32, "beta_slow": 1, "factor": 16, "type": "yarn"}
    return {
        "vocab_size": 640,
        "hidden_size": 128,
        "num_hidden_layers": 6,
        "num_attention_heads": 8,
        "head_dim": 64,
        "qk_rope_head_dim": 16,
        "q_lora_rank": 96,
        "o_groups": 4,
        "o_lora_rank": 64,
        "sliding_window": 64,
        "index_n_heads": 16,
        "index_head_dim": 32,
        "index_topk": 16,
        "n_routed_experts": 8,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 256,
        "routed_scaling_factor": 1.5,
        "max_position_embeddings": 4096,
        "rope_scaling": scaling | {"original_max_position_embeddings": 256},
        "compress_ratios": [0, 0, 4, 128, 4, 128, 0],
    }


def config_json(geometry: str, layers: int | None = None) -> dict[str, Any]:
    """The config.json of `geometry` without its storage keys, cut to the first `layers` layers.

    `compress_ratios` keeps the entries of those layers and the MTP layer's 0. Raises `ConfigError`.
    """
    if geometry not in GEOMETRIES:
        raise ConfigError(f"geometry must be one of {', '.join(GEOMETRIES)}, found {geometry!r}")
    own = {"tiny": _tiny, "pro": _pro}.get(geometry, _flash)()
    whole = own["num_hidden_layers"]
    if layers is not None and not 1 <= layers <= whole:
        raise ConfigError(f"layers of {geometry} must be 1 to {whole}, found {layers}")
    kept = whole if layers is None else layers
    ratios = [*own["compress_ratios"][:kept], *own["compress_ratios"][whole:]]
    merged = dict(_COMMON) | own | {"num_hidden_layers": kept, "compress_ratios": ratios}
    return dict(sorted(merged.items()))


def with_storage(
    config: Mapping[str, Any], torch_dtype: str, expert_dtype: str | None, quantised: bool
) -> dict[str, Any]:
    """`config` with the keys that say how the weights are stored, replacing any it had."""
    storage = ("torch_dtype", "dtype", "expert_dtype", "quantization_config")
    result = {key: value for key, value in config.items() if key not in storage}
    result["torch_dtype"] = torch_dtype
    if expert_dtype is not None:
        result["expert_dtype"] = expert_dtype
    if quantised:
        result["quantization_config"] = {
            "activation_scheme": "dynamic",
            "fmt": "e4m3",
            "quant_method": "fp8",
            "scale_fmt": "ue8m0",
            "weight_block_size": [128, 128],
        }
    return dict(sorted(result.items()))

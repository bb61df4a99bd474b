"""The released config files and small changes to them, for the tests beside this file."""

import json
from pathlib import Path

import pytest

from fourfold.core.config import ModelConfig, RopeScaling
from fourfold.core.errors import ConfigError

CONFIGS = Path(__file__).parent.parent / "data" / "configs"
YARN = RopeScaling(16.0, 65536, 32.0, 1.0)
FLASH_RATIOS = (0, 0, *(4, 128) * 20, 4)
PRO_RATIOS = (128, 128, *(4, 128) * 29, 4)


def released(name: str) -> dict:
    return json.loads((CONFIGS / f"{name}.json").read_text())


def changed(name: str = "flash", /, drop: tuple[str, ...] = (), **changes) -> dict:
    data = released(name) | changes
    return {key: value for key, value in data.items() if key not in drop}


def read(data: dict) -> ModelConfig:
    return ModelConfig.from_dict(data, "config.json").config


def error(data: dict) -> str:
    with pytest.raises(ConfigError) as caught:
        ModelConfig.from_dict(data, "here/config.json")
    text = str(caught.value)
    assert text.startswith("here/config.json: ")
    assert "\n" not in text
    return text.removeprefix("here/config.json: ")


def hugging_face(**changes) -> dict:
    """The transformers spelling of Flash, written out."""
    dropped = ("compress_ratios", "num_hash_layers", "qk_rope_head_dim", "rope_scaling")
    names = {0: "sliding", 4: "compressed_sparse", 128: "heavily_compressed"}
    data = changed("flash", drop=(*dropped, "torch_dtype", "n_routed_experts"))
    yarn = {
        "rope_type": "yarn", "type": "yarn", "factor": 16, "beta_fast": 32, "beta_slow": 1,
        "original_max_position_embeddings": 65536, "attention_factor": 1.0,
        "rope_theta": 160000, "partial_rotary_factor": 0.125,
    }  # fmt: skip
    return data | {
        "dtype": "bfloat16",
        "num_local_experts": 256,
        "partial_rotary_factor": 0.125,
        "layer_types": [f"{names[ratio]}_attention" for ratio in FLASH_RATIOS],
        "compress_rates": {
            "compressed_sparse_attention": 4,
            "heavily_compressed_attention": 128,
        },
        "mlp_layer_types": ["hash_moe"] * 3 + ["moe"] * 40,
        "rope_parameters": {
            "main": {
                "rope_type": "default",
                "rope_theta": 10000,
                "partial_rotary_factor": 0.125,
            },
            "compress": yarn,
        },
        **changes,
    }

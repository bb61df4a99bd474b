"""The small random models that a selftest runs: every kind of layer, router and weight.

    layers    window alone · 4:1 rows chosen by an indexer · 128:1 rows · 4:1 again · MTP
    routers   by token id in the first two, learned in the others

Contract: weights are made where they are used; no file is read or written. Where kernels promise equal bits
the model runs in bfloat16 at the released widths and results must be equal; elsewhere in float64, so that a
difference beyond its rounding is a fault. Rows are FP8 either way.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from fourfold.core.config import CacheConfig, EngineConfig, ModelConfig
from fourfold.core.device import Device
from fourfold.engine.engine import Engine
from fourfold.engine.kernel_plan import plan_kernels
from fourfold.engine.loading import LoadedModel, random_model
from fourfold.engine.verdicts import Verdicts
from fourfold.weights.geometry import config_json, with_storage
from fourfold.weights.layout import FORMATS

RATIOS = [0, 4, 128, 4]
_KINDS = {"num_hidden_layers": 4, "compress_ratios": [*RATIOS, 0], "num_hash_layers": 2}
_SMALL = {
    "vocab_size": 192,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "head_dim": 32,
    "qk_rope_head_dim": 8,
    "q_lora_rank": 32,
    "o_groups": 2,
    "o_lora_rank": 32,
    "sliding_window": 24,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 32,
    "index_n_heads": 4,
    "index_head_dim": 32,
    "index_topk": 10,
    "max_position_embeddings": 4096,
}
_WIDE = {"vocab_size": 4096, "n_routed_experts": 16}


@dataclass(frozen=True)
class Subject:
    """A model in memory. `exact`: results must have equal bits, else agree within `tolerance`."""

    name: str
    loaded: LoadedModel
    exact: bool
    kernels: tuple[tuple[str, str], ...]
    pages: int

    @property
    def tolerance(self) -> float:
        """How far log probabilities may be apart."""
        return 0.0 if self.exact else 1e-9

    @property
    def config(self) -> ModelConfig:
        return self.loaded.config

    def engine(self, seats: int = 8, allowed: range | None = None, **changes: Any) -> Engine:
        """An engine; a step after the other, eager and without prefix hits unless told."""
        cache: dict[str, Any] = {
            "num_pages": self.pages,
            "enable_prefix_caching": False,
            "kv_cache_dtype": "fp8",
        }
        cache |= changes.pop("cache", {})
        settings = {"enforce_eager": True, "async_scheduling": False, **changes}
        config = _settings(self.exact, self.kernels, max_num_seqs=seats, **settings)
        return Engine(self.loaded, replace(config, cache=CacheConfig(**cache)), allowed)


def _settings(
    exact: bool, kernels: tuple[tuple[str, str], ...], longest: int = 4096, **changes: Any
) -> EngineConfig:
    dtype = "bfloat16" if exact else "float64"
    return EngineConfig(
        "selftest", dtype=dtype, max_model_len=longest, kernels=dict(kernels), **changes
    )


def model_config(weights: str, wide: bool) -> ModelConfig:
    """The configuration of a selftest's model; `weights` as in `FORMATS`."""
    data = config_json("flash") | _KINDS | (_WIDE if wide else _SMALL)
    if not wide:
        data["rope_scaling"] = data["rope_scaling"] | {"original_max_position_embeddings": 256}
    form = FORMATS[weights]
    data = with_storage(data, form.torch_dtype, form.expert_dtype, form.quantised)
    return ModelConfig.from_dict(data, "config.json").config


def make_subject(
    weights: str, device: Device, verdicts: Verdicts, kernels: tuple[tuple[str, str], ...] = ()
) -> Subject:
    """A random model with weights stored as `weights`, as an engine would run it here."""
    wide = device.torch_device.type != "cpu"
    plan, _ = plan_kernels(
        model_config(weights, wide), torch.bfloat16, device, dict(kernels), verdicts=verdicts
    )
    exact = wide and all(choice.batch_invariant for choice in plan.choices)
    config = model_config(weights, wide and exact)
    forced = kernels if exact else ()
    made = partial(random_model, config, FORMATS[weights])
    loaded = made(_settings(exact, forced), device, verdicts=verdicts)
    label = f"{weights}, {'bfloat16' if exact else 'float64'}"
    return Subject(label, loaded, exact, forced, 512 if exact else 64)

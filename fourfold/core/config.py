"""Frozen configuration, resolved once and handed down as an argument.

Contract: `ModelConfig` carries config.json's own names and only values this engine can run; every
class checks itself when built and raises `ConfigError` naming the field, what was expected and what
was found. Torch-free. It does not know files or other spellings of the keys
(core/config_reading.py), how quantised weights are stored (quant/resolve.py), nor any device.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

from fourfold.core.errors import ConfigError
from fourfold.core.frozen import FrozenDict, freeze

if TYPE_CHECKING:
    from fourfold.core.config_reading import ModelConfigReading

LayerKind = Literal["SWA", "CSA", "HCA"]

CSA_RATIO = 4
HCA_RATIO = 128
LAYER_KINDS: Mapping[int, LayerKind] = FrozenDict({0: "SWA", CSA_RATIO: "CSA", HCA_RATIO: "HCA"})
"""Compress ratio of a layer -> its kind: sliding window only, compressed sparse or heavily so."""

MODEL_DTYPES = ("bfloat16", "float32", "float64")
CACHE_DTYPES = ("auto", "fp8", "bfloat16", "float32", "float64")
EXPERT_DTYPES = ("auto", "fp4", "fp8", "fp8_block", "fp8_per_block", "bf16")
"""Values of `--expert-dtype`. `fp8_block` and `fp8_per_block` are other words for `fp8`; `bf16`
says that the routed experts are not quantised."""


def short(value: object, limit: int = 80) -> str:
    """`value` as Python writes it, cut to `limit` characters."""
    text = repr(value)
    return text if len(text) <= limit else text[: limit - 1] + "…"


class FieldError(ConfigError):
    """`field` should be `expected` and is `found`; a reader of files adds where it stands."""

    def __init__(self, field: str, expected: str, found: object) -> None:
        super().__init__(field, expected, found)
        self.field, self.expected, self.found = field, expected, found

    def __str__(self) -> str:
        shown = self.found if isinstance(self.found, Described) else short(self.found)
        return f"{self.field} must be {self.expected}, found {shown}"


class Described(str):
    """A description to print as it is, where the value itself would be too long."""


def expect(ok: bool, name: str, expected: str, found: object) -> None:
    """Raise `FieldError` unless `ok`."""
    if not ok:
        raise FieldError(name, expected, found)


def expect_int(name: str, value: object, minimum: int = 1) -> None:
    """Raise unless `value` is an integer (a bool is none) from `minimum` to the largest int64."""
    ok = isinstance(value, int) and not isinstance(value, bool) and minimum <= value <= sys.maxsize
    kind = {0: "a non-negative integer", 1: "a positive integer"}
    expect(ok, name, kind.get(minimum, f"an integer of at least {minimum}"), value)


def expect_positive(name: str, value: object) -> None:
    """Raise unless `value` is a finite number above zero (a bool is none)."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    ok = number and 0 < cast(float, value) <= sys.float_info.max
    expect(ok, name, "a positive finite number", value)


def expect_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    """Raise unless `value` is one of `choices`."""
    expect(value in choices, name, "one of " + ", ".join(choices), value)


def expect_bool(name: str, value: object) -> None:
    """Raise unless `value` is a bool."""
    expect(isinstance(value, bool), name, "true or false", value)


@dataclass(frozen=True)
class RopeScaling:
    """YaRN of the compressed layers: `factor` over `original_max_position_embeddings` tokens, with
    the correction range given by `beta_fast` and `beta_slow` (rotations); the amplitude is 1."""

    factor: float
    original_max_position_embeddings: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0

    def __post_init__(self) -> None:
        for name in ("factor", "beta_fast", "beta_slow"):
            expect_positive(f"rope_scaling.{name}", getattr(self, name))
            object.__setattr__(self, name, float(getattr(self, name)))
        expect(self.factor >= 1, "rope_scaling.factor", "at least 1", self.factor)
        expect_int(
            "rope_scaling.original_max_position_embeddings", self.original_max_position_embeddings
        )
        expect(
            self.beta_fast >= self.beta_slow,
            "rope_scaling.beta_fast",
            f"at least beta_slow ({self.beta_slow})",
            self.beta_fast,
        )


@dataclass(frozen=True)
class ModelConfig:
    """A DeepSeek-V4 model, in the names of the released config.json.

    `compress_ratios` has exactly `num_hidden_layers` entries (the main layers). `sliding_window`
    and `max_position_embeddings` count tokens, `index_topk` compressed rows.
    `num_nextn_predict_layers` is the number of MTP layers this engine runs, 0 or 1;
    `num_dspark_stages` the number of `mtp.*` stages of a DSpark release, which are left out (both
    are never positive at once). `expert_dtype` and `quantization_config` are kept as found:
    quant/resolve.py interprets them.
    """

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    head_dim: int
    qk_rope_head_dim: int
    q_lora_rank: int
    o_groups: int
    o_lora_rank: int
    sliding_window: int
    compress_ratios: tuple[int, ...]
    n_routed_experts: int
    num_experts_per_tok: int
    n_shared_experts: int
    moe_intermediate_size: int
    num_hash_layers: int
    routed_scaling_factor: float
    swiglu_limit: float
    index_n_heads: int
    index_head_dim: int
    index_topk: int
    hc_mult: int
    hc_sinkhorn_iters: int
    hc_eps: float
    rms_norm_eps: float
    rope_theta: float
    compress_rope_theta: float
    rope_scaling: RopeScaling | None
    max_position_embeddings: int
    num_nextn_predict_layers: int = 0
    num_dspark_stages: int = 0
    torch_dtype: str = "bfloat16"
    bos_token_id: int = 0
    eos_token_id: int = 1
    expert_dtype: str | None = None
    quantization_config: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        if self.quantization_config is not None:
            is_object = isinstance(self.quantization_config, Mapping)
            expect(is_object, "quantization_config", "an object", self.quantization_config)
            object.__setattr__(self, "quantization_config", freeze(self.quantization_config))
        for name in _POSITIVE_INTS:
            expect_int(name, getattr(self, name))
        for name in _NON_NEGATIVE_INTS:
            expect_int(name, getattr(self, name), minimum=0)
        for name in _POSITIVE_NUMBERS:
            expect_positive(name, getattr(self, name))
            object.__setattr__(self, name, float(getattr(self, name)))
        self._check_layers()
        self._check_dimensions()
        expect_choice("torch_dtype", self.torch_dtype, MODEL_DTYPES)
        ok = self.expert_dtype is None or isinstance(self.expert_dtype, str)
        expect(ok, "expert_dtype", "a string", self.expert_dtype)
        ok = self.rope_scaling is None or isinstance(self.rope_scaling, RopeScaling)
        expect(ok, "rope_scaling", "a RopeScaling", self.rope_scaling)

    def _check_layers(self) -> None:
        ratios, layers = self.compress_ratios, self.num_hidden_layers
        expect(isinstance(ratios, tuple), "compress_ratios", "a tuple of integers", ratios)
        for layer, ratio in enumerate(ratios):
            ok = isinstance(ratio, int) and not isinstance(ratio, bool) and ratio in LAYER_KINDS
            expect(ok, f"compress_ratios[{layer}]", "0 (SWA), 4 (CSA) or 128 (HCA)", ratio)
        wanted = f"a list of {layers} ratios, one for each of the num_hidden_layers"
        expect(
            len(ratios) == layers, "compress_ratios", wanted, Described(f"{len(ratios)} entries")
        )
        mtp = self.num_nextn_predict_layers
        expect(mtp <= 1, "num_nextn_predict_layers", "0 or 1", mtp)
        stages = self.num_dspark_stages
        expect(not (mtp and stages), "num_dspark_stages", "0 where an MTP layer runs", stages)

    def _check_dimensions(self) -> None:
        r, groups = self.qk_rope_head_dim, self.o_groups
        expect(r % 2 == 0, "qk_rope_head_dim", "even", r)
        expect(r < self.head_dim, "qk_rope_head_dim", f"below head_dim ({self.head_dim})", r)
        index = self.index_head_dim
        expect(index >= r, "index_head_dim", f"at least qk_rope_head_dim ({r})", index)
        heads = self.num_attention_heads
        wanted = f"a multiple of o_groups ({groups})"
        expect(heads % groups == 0, "num_attention_heads", wanted, heads)
        top_k, experts = self.num_experts_per_tok, self.n_routed_experts
        wanted = f"at most n_routed_experts ({experts})"
        expect(top_k <= experts, "num_experts_per_tok", wanted, top_k)
        for name in ("bos_token_id", "eos_token_id"):
            wanted = f"below vocab_size ({self.vocab_size})"
            expect(getattr(self, name) < self.vocab_size, name, wanted, getattr(self, name))

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], source: str) -> ModelConfigReading:
        """Read the released, the HF-transformers or the reference program's spelling of the keys.

        `source` names the file in messages. Raises `ConfigError`.
        """
        from fourfold.core.config_reading import read_mapping

        return read_mapping(data, source)

    @classmethod
    def from_file(cls, path: str | Path) -> ModelConfigReading:
        """Read one JSON file. Raises `ConfigError` naming it."""
        from fourfold.core.config_reading import read_file

        return read_file(Path(path))

    @classmethod
    def from_directory(cls, directory: str | Path) -> ModelConfigReading:
        """Read a checkpoint directory's `config.json`, else its `inference/config.json`."""
        from fourfold.core.config_reading import read_directory

        return read_directory(Path(directory))

    @property
    def nope_head_dim(self) -> int:
        """The width of a head's unrotated part, which comes first."""
        return self.head_dim - self.qk_rope_head_dim

    def is_hash_layer(self, layer: int) -> bool:
        """Whether main layer `layer` routes by token id (`tid2eid`) instead of a learned choice."""
        return layer < self.num_hash_layers

    def has_indexer(self, ratio: int) -> bool:
        """Whether a layer of this compress ratio selects its rows by an indexer (CSA)."""
        return ratio == CSA_RATIO

    def compressor_series(self, ratio: int) -> int:
        """2 where windows overlap (CSA: each token feeds its own and the next row), else 1."""
        return 2 if ratio == CSA_RATIO else 1

    def layer_kind(self, layer: int) -> LayerKind:
        """The attention kind of main layer `layer`."""
        return LAYER_KINDS[self.compress_ratios[layer]]


_POSITIVE_INTS = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "head_dim",
    "qk_rope_head_dim",
    "q_lora_rank",
    "o_groups",
    "o_lora_rank",
    "sliding_window",
    "n_routed_experts",
    "num_experts_per_tok",
    "n_shared_experts",
    "moe_intermediate_size",
    "index_n_heads",
    "index_head_dim",
    "index_topk",
    "hc_mult",
    "hc_sinkhorn_iters",
    "max_position_embeddings",
)
_NON_NEGATIVE_INTS = (
    "num_hash_layers",
    "num_nextn_predict_layers",
    "num_dspark_stages",
    "bos_token_id",
    "eos_token_id",
)
_POSITIVE_NUMBERS = (
    "routed_scaling_factor",
    "swiglu_limit",
    "hc_eps",
    "rms_norm_eps",
    "rope_theta",
    "compress_rope_theta",
)


@dataclass(frozen=True)
class CacheConfig:
    """Paged caches. `page_size` counts source tokens and is a multiple of every compress ratio, so
    that a page holds whole rows of every layer; `num_pages` None means as many as memory allows.
    Dtype "auto" lets the engine choose by device; "fp8" is the rounded format the model was trained
    with, the others store rows as they are. A state image is kept every `state_interval` tokens; the
    last three fields bound images in device memory, in host memory, and those of preempted requests
    (host memory), in bytes."""

    page_size: int = 256
    kv_cache_dtype: str = "auto"
    index_cache_dtype: str = "auto"
    num_pages: int | None = None
    enable_prefix_caching: bool = True
    state_interval: int = 4096
    device_image_bytes: int = 1 << 30
    host_image_bytes: int = 4 << 30
    preempt_bytes: int = 4 << 30

    def __post_init__(self) -> None:
        expect_int("page_size", self.page_size)
        wanted = f"a multiple of {HCA_RATIO} tokens"
        expect(self.page_size % HCA_RATIO == 0, "page_size", wanted, self.page_size)
        expect_choice("kv_cache_dtype", self.kv_cache_dtype, CACHE_DTYPES)
        expect_choice("index_cache_dtype", self.index_cache_dtype, CACHE_DTYPES)
        if self.num_pages is not None:
            expect_int("num_pages", self.num_pages)
        expect_bool("enable_prefix_caching", self.enable_prefix_caching)
        expect_int("state_interval", self.state_interval)
        for name in ("device_image_bytes", "host_image_bytes", "preempt_bytes"):
            expect_int(name, getattr(self, name), minimum=0)


@dataclass(frozen=True)
class ParallelConfig:
    """Which part of the model this process holds. Both splits run over the same ranks: routed
    experts are split inside each expert (expert size 1) or by expert (expert size = tensor size),
    and one reduction serves routed and shared experts."""

    tensor_parallel_size: int = 1
    expert_parallel_size: int = 1
    rank: int = 0

    def __post_init__(self) -> None:
        tensor, expert = self.tensor_parallel_size, self.expert_parallel_size
        expect_int("tensor_parallel_size", tensor)
        expect_int("expert_parallel_size", expert)
        expect(
            expert in (1, tensor),
            "expert_parallel_size",
            f"1 or tensor_parallel_size ({tensor})",
            expert,
        )
        expect_int("rank", self.rank, minimum=0)
        expect(self.rank < self.world_size, "rank", f"below {self.world_size}", self.rank)

    @property
    def world_size(self) -> int:
        """The number of processes."""
        return self.tensor_parallel_size


@dataclass(frozen=True)
class EngineConfig:
    """Everything the engine is told when it starts.

    `model` is a directory or `org/name[@revision]`; `dtype` "auto" follows the checkpoint's
    `torch_dtype`; `max_model_len` (tokens) None means the model's own limit; a step runs at most
    `max_num_seqs` sequences and `max_num_batched_tokens` tokens; `gpu_memory_utilization` is the
    share of a GPU's memory to use; `kernels` forces a kernel by op name and is empty unless asked.
    `async_scheduling`: whether a step is scheduled while the one before runs (None: where there is a
    GPU to run it). `compile_cache` is a directory of kernels that were compiled ahead of time.
    """

    model: str
    dtype: str = "auto"
    max_model_len: int | None = None
    max_num_seqs: int = 256
    max_num_batched_tokens: int = 8192
    gpu_memory_utilization: float = 0.9
    enforce_eager: bool = False
    async_scheduling: bool | None = None
    compile_cache: str | None = None
    num_speculative_tokens: int = 0
    expert_dtype: str = "auto"
    kernels: Mapping[str, str] = field(default_factory=FrozenDict)
    seed: int = 0
    cache: CacheConfig = field(default_factory=CacheConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)

    def __post_init__(self) -> None:
        expect(isinstance(self.model, str) and self.model != "", "model", "a name", self.model)
        expect_choice("dtype", self.dtype, ("auto", *MODEL_DTYPES))
        if self.max_model_len is not None:
            expect_int("max_model_len", self.max_model_len)
        expect_int("max_num_seqs", self.max_num_seqs)
        expect_int("max_num_batched_tokens", self.max_num_batched_tokens)
        share = self.gpu_memory_utilization
        expect_positive("gpu_memory_utilization", share)
        expect(share <= 1, "gpu_memory_utilization", "at most 1", share)
        expect_bool("enforce_eager", self.enforce_eager)
        if self.async_scheduling is not None:
            expect_bool("async_scheduling", self.async_scheduling)
        drafts = self.num_speculative_tokens
        expect_int("num_speculative_tokens", drafts, minimum=0)
        expect(drafts <= 3, "num_speculative_tokens", "at most 3", drafts)
        expect_choice("expert_dtype", self.expert_dtype, EXPERT_DTYPES)
        object.__setattr__(self, "kernels", freeze(self.kernels))
        expect_int("seed", self.seed, minimum=0)

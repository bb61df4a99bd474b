"""What several tests share: small geometries, models built from checkpoints, states run in chunks."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fourfold.cache.pool import allocate
from fourfold.cache.rows import RowFormats, ring_rows, row_formats
from fourfold.core.batch import ScheduledBatch, ScheduledSequence, lower
from fourfold.core.config import ModelConfig
from fourfold.core.row_format import pages_for
from fourfold.core.tensor import Weight, dtype_name
from fourfold.dist.comm import Comm, SingleComm
from fourfold.model.parts import ForwardOutput
from fourfold.model.v4 import DeepseekV4
from fourfold.ops.catalog import OPS
from fourfold.ops.registry import KernelPlan
from fourfold.weights.loader import load, open_checkpoint
from fourfold.weights.synthetic import write_model

BODIES = KernelPlan.bodies(OPS)
CPU = torch.device("cpu")

SMALL: dict[str, Any] = {
    "architectures": ["DeepseekV4ForCausalLM"],
    "model_type": "deepseek_v4",
    "vocab_size": 192,
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "qk_rope_head_dim": 8,
    "q_lora_rank": 32,
    "o_groups": 2,
    "o_lora_rank": 32,
    "sliding_window": 128,
    "compress_ratios": [0, 4, 128, 4, 0],
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "n_shared_experts": 1,
    "moe_intermediate_size": 32,
    "num_hash_layers": 2,
    "routed_scaling_factor": 1.5,
    "swiglu_limit": 10.0,
    "index_n_heads": 16,
    "index_head_dim": 32,
    "index_topk": 1024,
    "hc_mult": 4,
    "hc_sinkhorn_iters": 20,
    "hc_eps": 1e-6,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000,
    "compress_rope_theta": 160000,
    "rope_scaling": {
        "type": "yarn",
        "factor": 16,
        "original_max_position_embeddings": 256,
        "beta_fast": 32,
        "beta_slow": 1,
    },
    "max_position_embeddings": 4096,
    "num_nextn_predict_layers": 1,
    "scoring_func": "sqrtsoftplus",
    "topk_method": "noaux_tc",
    "norm_topk_prob": True,
    "hidden_act": "silu",
    "attention_bias": False,
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
}


def small_config(**changes: Any) -> ModelConfig:
    """A `ModelConfig` of the small geometry."""
    return ModelConfig.from_dict({**SMALL, **changes}, "config.json").config


def write_small(directory: Path, weights: str, seed: int = 0, **changes: Any) -> Path:
    """A checkpoint of the small geometry, without tokenizer."""
    write_model(directory, {**SMALL, **changes}, weights, seed=seed, tokenizer=False)
    return directory


def load_weights(
    directory: Path, dtype: torch.dtype, activations: bool = True
) -> tuple[ModelConfig, dict[str, Weight]]:
    config = ModelConfig.from_directory(directory).config
    plan = open_checkpoint(directory, config)
    return config, load(plan, CPU, dtype, activation_quantization=activations)


def build(config: ModelConfig, weights: dict[str, Weight], comm: Comm | None = None) -> DeepseekV4:
    return DeepseekV4(config, weights, BODIES, comm or SingleComm())


def load_small(directory: Path, dtype: torch.dtype, activations: bool = True) -> DeepseekV4:
    """The model of a checkpoint, run by the op bodies."""
    return build(*load_weights(directory, dtype, activations))


def prompts(vocab: int, lengths: Sequence[int], seed: int) -> list[list[int]]:
    """Random token ids."""
    rng = random.Random(seed)
    return [[rng.randrange(vocab) for _ in range(n)] for n in lengths]


@dataclass
class Driver:
    """Runs sequences through cached state in whatever pieces a test likes."""

    model: DeepseekV4
    sequences: Sequence[Sequence[int]]
    formats: RowFormats | None = None
    done: list[int] = field(init=False)
    logits: list[list[Tensor]] = field(init=False)

    def __post_init__(self) -> None:
        config, dtype = self.model.config, self.model.embed.table.dtype
        name = dtype_name(dtype)
        formats = self.formats or row_formats(config, name, name, name)
        counts = [pages_for(len(s)) for s in self.sequences]
        pages = list(range(sum(counts)))
        random.Random(7).shuffle(pages)
        self.block_ids = [[pages.pop() for _ in range(n)] for n in counts]
        self.ring = ring_rows(config)
        slots = len(self.sequences)
        self.state = allocate(config, formats, sum(counts), slots, dtype, CPU)
        self.done = [0] * slots
        self.logits = [[] for _ in self.sequences]

    def step(self, counts: Sequence[int]) -> ForwardOutput | None:
        """Run the next `counts[i]` tokens of sequence i (0: it sits this step out)."""
        runs, who = [], []
        for i, wanted in enumerate(counts):
            count = min(wanted, len(self.sequences[i]) - self.done[i])
            if count:
                begin = self.done[i]
                runs.append(
                    ScheduledSequence(
                        self.sequences[i][begin : begin + count],
                        begin,
                        self.block_ids[i],
                        state_slot=i,
                        fold_source=i if begin else -1,
                        fold_keeps=((count - 1, i),),
                    )
                )
                who.append((i, count))
        if not runs:
            return None
        ratios = self.model.config.compress_ratios
        out = self.model.forward(
            lower(ScheduledBatch(tuple(runs)), ratios, self.ring, CPU), self.state
        )
        first = 0
        for i, count in who:
            self.logits[i].append(out.logits[first : first + count])
            self.done[i] += count
            first += count
        return out

    @property
    def unfinished(self) -> bool:
        return any(d < len(s) for d, s in zip(self.done, self.sequences, strict=True))

    def all_logits(self) -> Tensor:
        """Logits of every token of every sequence, as `one_shot` lays them out."""
        return torch.cat([torch.cat(parts) for parts in self.logits])

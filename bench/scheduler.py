"""What the host does for one decode step, with a stub in place of the model.

    python bench/scheduler.py [--sequences 256] [--drafts 0 3] [--context 4096] [--steps 300]

Contract: runs the real `Engine.step` on one thread and prints one JSON object for each number of
drafts: milliseconds of a step, median and 90th percentile, as wall time and as CPU time of the thread.

Counted: scheduling, page accounting and hashing, lowering the batch to tensors (of every model call of
the step, the draft layer's included), the random numbers, tensors of sampling parameters, acceptance
of drafts, committing tokens, and making the `RequestOutput`s.

Not counted, because a stub stands in: the model's and the draft layer's forward pass (they return
tensors made beforehand, for a vocabulary of 16 tokens) and the arithmetic of the sampling ops, which
read 16 logits a row instead of a real vocabulary's; what it costs to *call* those ops is counted. Not
counted either: finishing and starting requests (no request does in the measured steps), images of
state, and the transport to the server's process.

The stub's drafts are right with probability one half at each position, so with three drafts a step
yields 1.9 tokens a sequence on average.
"""

from __future__ import annotations

import argparse
import importlib.metadata as metadata
import json
import os
import platform
import random
import statistics
import time
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from fourfold.core.batch import PAGE_TOKENS, ForwardBatch
from fourfold.core.config import CacheConfig, EngineConfig, ModelConfig
from fourfold.core.device import detect
from fourfold.core.request import Request, SamplingParams
from fourfold.core.state import LayerState, ModelState
from fourfold.engine.engine import Engine
from fourfold.engine.loading import LoadedModel
from fourfold.model.parts import ForwardOutput
from fourfold.ops.catalog import OPS
from fourfold.ops.registry import KernelPlan
from fourfold.weights.geometry import config_json

VOCAB = 16


class StubLayer:
    """The draft layer: logits that guess one half of the tokens right."""

    def __init__(self, answers: StubModel):
        self.model = answers

    def forward(
        self, streams: Tensor, next_token_ids: Tensor, batch: ForwardBatch, state: LayerState
    ) -> ForwardOutput:
        return self.model.output(batch, self.model.guesses)


class StubModel:
    """Has the shape of the model, and returns tensors made beforehand."""

    def __init__(self, config: ModelConfig, rows: int):
        self.config = config
        self.ops = KernelPlan.bodies(OPS)
        self.embed = SimpleNamespace(table=torch.zeros(VOCAB, config.hidden_size))
        self.mtp = [StubLayer(self)]
        generator = torch.Generator().manual_seed(0)
        # All but one token are ruled out, so that the answer is token 2 whatever the parameters.
        self.logits = torch.full((rows, VOCAB), -100.0)
        self.logits[:, 2] = 0.0
        self.guesses = torch.full((rows, VOCAB), -100.0)
        right = torch.randint(2, 4, (rows,), generator=generator)
        self.guesses[torch.arange(rows), right] = 0.0
        self.streams = torch.zeros(rows, config.hc_mult, config.hidden_size)
        self.finite = torch.zeros(rows, dtype=torch.bool)

    def forward(self, batch: ForwardBatch, state: ModelState) -> ForwardOutput:
        return self.output(batch, self.logits)

    def output(self, batch: ForwardBatch, logits: Tensor) -> ForwardOutput:
        return ForwardOutput(
            logits[: batch.logits_tokens.shape[0]],
            self.streams[: batch.num_tokens],
            self.finite[: batch.num_sequences],
        )


@dataclass(frozen=True)
class Setting:
    """What is measured: how many sequences at which context, drafts, steps."""

    sequences: int
    context: int
    drafts: int
    steps: int
    temperature: float


def engine_of(setting: Setting) -> Engine:
    """An engine whose requests are all past their prompts."""
    # The kinds of layers and the page geometry of the real model; the widths only size the state.
    geometry = config_json("tiny") | {"vocab_size": VOCAB, "max_position_embeddings": 1 << 20}
    config = ModelConfig.from_dict(geometry, "config.json").config
    longest = setting.context + (setting.sequences + setting.steps + 40) * (1 + setting.drafts)
    pages = setting.sequences * -(-longest // PAGE_TOKENS)
    engine_config = EngineConfig(
        model="stub",
        dtype="float32",
        max_model_len=longest,
        max_num_seqs=setting.sequences,
        max_num_batched_tokens=8192,
        num_speculative_tokens=setting.drafts,
        cache=CacheConfig(num_pages=pages, state_interval=1 << 30),
    )
    model: Any = StubModel(config, 8192)
    checkpoint: Any = None
    device = detect("cpu")
    loaded = LoadedModel(
        model, config, torch.float32, device, model.ops, checkpoint, (), "stub"
    )
    engine = Engine(loaded, engine_config)
    # All have one prompt, so that only the first one's runs; the others start from its image.
    rng = random.Random(0)
    prompt = tuple(rng.randrange(2, VOCAB) for _ in range(setting.context))
    params = SamplingParams(
        max_tokens=longest - setting.context, temperature=setting.temperature, top_p=0.95
    )
    for number in range(setting.sequences):
        engine.add(Request(str(number), prompt, params))
        engine.step()
        while engine.scheduler.num_waiting:
            engine.step()
    return engine


def measure(setting: Setting) -> dict[str, Any]:
    """Time `steps` decode steps."""
    engine = engine_of(setting)
    for _ in range(20):
        engine.step()
    wall, cpu, tokens = [], [], 0
    for _ in range(setting.steps):
        begin, begin_cpu = time.perf_counter_ns(), time.thread_time_ns()
        outputs = engine.step()
        cpu.append((time.thread_time_ns() - begin_cpu) / 1e6)
        wall.append((time.perf_counter_ns() - begin) / 1e6)
        tokens += sum(len(output.new_token_ids) for output in outputs)
        assert len(outputs) == setting.sequences, "a request ended or did not run"
    return {
        "benchmark": "scheduler",
        "sequences": setting.sequences,
        "context": setting.context,
        "drafts": setting.drafts,
        "temperature": setting.temperature,
        "steps": setting.steps,
        "tokens_per_step": round(tokens / setting.steps, 1),
        "wall_ms": {"median": _round(wall), "p90": _round(wall, 0.9)},
        "cpu_ms": {"median": _round(cpu), "p90": _round(cpu, 0.9)},
        "fourfold": metadata.version("fourfold"),
        "torch": metadata.version("torch"),
        "python": platform.python_version(),
        "machine": platform.machine(),
        "cpus": len(os.sched_getaffinity(0)),
    }


def _round(values: list[float], quantile: float = 0.5) -> float:
    cut = statistics.quantiles(values, n=100)[round(quantile * 100) - 1]
    return round(cut, 3)


def main() -> None:
    """Print one JSON object for each number of drafts."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sequences", type=int, default=256)
    parser.add_argument("--context", type=int, default=4096)
    parser.add_argument("--drafts", type=int, nargs="+", default=[0, 3])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--temperature", type=float, default=1.0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    for drafts in args.drafts:
        setting = Setting(args.sequences, args.context, drafts, args.steps, args.temperature)
        print(json.dumps(measure(setting)), flush=True)


if __name__ == "__main__":
    main()

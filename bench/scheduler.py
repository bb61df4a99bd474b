"""What the host does for one decode step, with a stub in place of the model.

    python bench/scheduler.py [--sequences 256] [--drafts 0 3] [--context 4096] [--steps 300]

Contract: runs the real `Engine.step` on one thread and prints one JSON object for each number of
drafts. Milliseconds a step, median and 90th percentile, as CPU time of the thread (`cpu_ms`, what the
target of 1.5 ms for 256 sequences is about) and as wall time (`wall_ms`); `frames_ms` is the part of
them that goes into the frames for the server's process.

Counted: scheduling, page accounting and hashing, lowering the batch to tensors (for every model call
of the step, the draft layer's included), random numbers, tensors of sampling parameters, acceptance of
drafts, committing tokens, making `RequestOutput`s, and encoding them as frames. Device tensors live on
the CPU, so copying to and from them is counted at the CPU's price.

Not counted, because a stub stands in that returns tensors made beforehand: the forward passes of model
and draft layer, and the ops of sampling (`adjust_logits`, `sample`, `count_accepted`, `check_logits`).
Logits are 16 wide and streams 4 × 8. Not counted either, since it does not happen in the measured
steps: requests that start or end, images of state, penalties, log probabilities, and sending the
frames.

The stub's drafts stand with probability one half each, so that with three drafts a step brings a
sequence 1.9 tokens on average.
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

from fourfold.core.batch import ForwardBatch
from fourfold.core.config import CacheConfig, EngineConfig, ModelConfig
from fourfold.core.device import detect
from fourfold.core.request import Request, SamplingParams
from fourfold.core.row_format import pages_for
from fourfold.core.state import ModelState
from fourfold.engine import wire
from fourfold.engine.engine import Engine
from fourfold.engine.loading import LoadedModel
from fourfold.model.parts import ForwardOutput
from fourfold.ops import step
from fourfold.ops.sampling import uniform
from fourfold.weights.geometry import config_json

VOCAB = 16


class StubModel:
    """Has the shape of the model, its ops and its draft layer, and returns tensors made beforehand."""

    def __init__(self, config: ModelConfig, rows: int, drafts: int):
        self.config, self.ops = config, self
        self.embed = SimpleNamespace(table=torch.zeros(VOCAB, config.hidden_size))
        self.mtp = [SimpleNamespace(forward=self.draft)]
        self.logits = torch.zeros(rows, VOCAB)
        self.streams = torch.zeros(rows, config.hc_mult, config.hidden_size)
        self.flags = torch.zeros(rows, dtype=torch.bool)
        self.tokens = torch.full((rows,), 2)
        halves = torch.rand(rows, max(drafts, 1), generator=torch.Generator().manual_seed(0)) < 0.5
        self.accepted = halves.long().cumprod(-1).sum(-1)

    seat_runs = staticmethod(step.seat_runs.body)
    next_tokens = staticmethod(step.next_tokens.body)
    step_after = staticmethod(step.step_after.body)
    keep_drafts = staticmethod(step.keep_drafts.body)

    def forward(self, batch: ForwardBatch, state: ModelState) -> ForwardOutput:
        return ForwardOutput(
            self.logits[: batch.logits_tokens.shape[0]],
            self.streams[: batch.num_tokens],
            self.flags[: batch.num_sequences],
        )

    def draft(self, streams: Tensor, ids: Tensor, batch: ForwardBatch, state: Any) -> ForwardOutput:
        return self.forward(batch, state)

    def adjust_logits(self, logits: Tensor, adjustments: Any, allowed: Any) -> Tensor:
        return logits

    def uniform(self, streams: Tensor, positions: Tensor) -> Tensor:
        return uniform(streams, positions)

    def sample(self, logits: Tensor, rows: Any) -> Tensor:
        return self.tokens[: logits.shape[0]]

    def count_accepted(self, sampled: Tensor, drafts: Tensor) -> Tensor:
        return torch.minimum(self.accepted[: sampled.shape[0]], (drafts >= 0).sum(-1))

    def check_logits(self, found: Tensor, logits: Tensor, batch: ForwardBatch) -> None:
        return None

    def likeliest(self, logits: Tensor, allowed: Any) -> Tensor:
        return logits.argmax(-1)

    def place_step(self, *arguments: Any) -> Any:
        return step.place_step(self, *arguments)

    def settle_step(self, *arguments: Any) -> Any:
        return step.settle_step(self, *arguments)


@dataclass(frozen=True)
class Setting:
    """What is measured: how many sequences at which context, drafts, steps."""

    sequences: int
    context: int
    drafts: int
    steps: int


def engine_of(setting: Setting) -> Engine:
    """An engine whose requests are all past their prompts."""
    # The kinds of layers and the page geometry of the real model; the widths only size the state.
    widths = {"hidden_size": 8, "head_dim": 16, "qk_rope_head_dim": 8, "index_head_dim": 16}
    geometry = {**config_json("tiny"), **widths, "vocab_size": VOCAB}
    geometry["max_position_embeddings"] = 1 << 20
    config = ModelConfig.from_dict(geometry, "config.json").config
    longest = setting.context + (setting.sequences + setting.steps + 40) * (1 + setting.drafts)
    pages = setting.sequences * pages_for(longest)
    engine_config = EngineConfig(
        model="stub",
        dtype="float32",
        max_model_len=longest,
        max_num_seqs=setting.sequences,
        max_num_batched_tokens=8192,
        num_speculative_tokens=setting.drafts,
        cache=CacheConfig(num_pages=pages, state_interval=1 << 30),
    )
    model: Any = StubModel(config, 8192, setting.drafts)
    checkpoint: Any = None
    device = detect("cpu")
    made = (checkpoint, (), "stub", 0)
    loaded = LoadedModel(model, config, torch.float32, device, model.ops, *made)
    engine = Engine(loaded, engine_config)
    # All have one prompt, so that only the first one's runs; the others start from its image.
    rng = random.Random(0)
    prompt = tuple(rng.randrange(2, VOCAB) for _ in range(setting.context))
    params = SamplingParams(max_tokens=longest - setting.context, temperature=0.8, top_p=0.95)
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
    wall, cpu, frames, tokens = [], [], [], 0
    for number in range(setting.steps):
        begin, begin_cpu = time.perf_counter_ns(), time.thread_time_ns()
        outputs = engine.step()
        stepped = time.thread_time_ns()
        wire.encode(wire.StepDone(number, tuple(outputs)))
        frames.append((time.thread_time_ns() - stepped) / 1e6)
        cpu.append((time.thread_time_ns() - begin_cpu) / 1e6)
        wall.append((time.perf_counter_ns() - begin) / 1e6)
        tokens += sum(len(output.new_token_ids) for output in outputs)
        assert len(outputs) == setting.sequences, "a request ended or did not run"
    return {
        "benchmark": "scheduler",
        "sequences": setting.sequences,
        "context": setting.context,
        "drafts": setting.drafts,
        "steps": setting.steps,
        "tokens_per_step": round(tokens / setting.steps, 1),
        "cpu_ms": _summary(cpu),
        "wall_ms": _summary(wall),
        "frames_ms": _summary(frames),
        "fourfold": metadata.version("fourfold"),
        "torch": metadata.version("torch"),
        "python": platform.python_version(),
        "machine": platform.machine(),
        "cpus": len(os.sched_getaffinity(0)),
    }


def _summary(values: list[float]) -> dict[str, float]:
    cuts = statistics.quantiles(values, n=10)
    return {"median": round(statistics.median(values), 3), "p90": round(cuts[8], 3)}


def main() -> None:
    """Print one JSON object for each number of drafts."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sequences", type=int, default=256)
    parser.add_argument("--context", type=int, default=4096)
    parser.add_argument("--drafts", type=int, nargs="+", default=[0, 3])
    parser.add_argument("--steps", type=int, default=300)
    args = parser.parse_args()
    torch.set_num_threads(1)
    for drafts in args.drafts:
        setting = Setting(args.sequences, args.context, drafts, args.steps)
        print(json.dumps(measure(setting)), flush=True)


if __name__ == "__main__":
    main()

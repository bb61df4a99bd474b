"""A run, or a piece of one: rows in, losses to a log, weights to a file at its end.

Contract: `run` trains from the file it is given, or from scratch, until the schedule or its minutes end,
and always leaves `weights.safetensors`, `log.jsonl` and the tokenizer's files in its directory. On a
GPU every kind of step is captured once and replayed.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import torch
from torch import Tensor

from fourfold.core.config import ModelConfig
from fourfold.text.tokenizer import Tokenizer
from train import files, parameters
from train.data.encode import Encoder
from train.data.mixture import Mixture
from train.evaluate import cases
from train.forced import forced, on_device
from train.geometry import model_config
from train.ops.compare import hyper_connections
from train.ops.plan import Hyper
from train.schedule import Schedule, Step
from train.step import Mode, Tokens, Trainer
from train.supply import supply
from train.tokenizer import write_tokenizer

WEIGHTS, LOG = "weights.safetensors", "log.jsonl"
_BIAS_RATE = 1e-3


@dataclass(frozen=True)
class Options:
    """What a run is asked to do. `minutes` bounds this piece, `steps` the whole run."""

    out: Path
    config: Mapping[str, Any]
    schedule: Schedule
    minutes: float
    resume: Path | None = None
    seed: int = 0
    device: str = "cuda"
    dtype: torch.dtype = torch.bfloat16
    workers: int = 12
    log_every: int = 20
    check_every: float = 60.0  # seconds between looks at held-out questions
    check_count: int = 64
    far: tuple[int, ...] = (2048, 8192)
    mixing: str = "auto"  # "triton", "torch", or triton where it works and agrees


class _Captured:
    """A kind of step, captured once: `__call__` puts a batch in its place and replays it."""

    def __init__(self, trainer: Trainer, tokens: Tokens, mode: Mode, pool: Any):
        self.tokens = Tokens(tokens.ids.clone(), tokens.starts.clone(), tokens.weights.clone())
        self.graph = torch.cuda.CUDAGraph()
        # The capture computes nothing; the warm-up's changes are undone.
        before = trainer.snapshot()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            trainer.step(self.tokens, mode)
        torch.cuda.current_stream().wait_stream(stream)
        trainer.restore(before)
        with torch.cuda.graph(self.graph, pool=pool):
            self.losses = trainer.step(self.tokens, mode)

    def __call__(self, tokens: Tokens) -> dict[str, Tensor]:
        self.tokens.ids.copy_(tokens.ids)
        self.tokens.starts.copy_(tokens.starts)
        self.tokens.weights.copy_(tokens.weights)
        self.graph.replay()
        return self.losses


class _Steps:
    """Runs steps, captured on a GPU."""

    def __init__(self, trainer: Trainer):
        self.trainer = trainer
        self._captured: dict[Step, _Captured] = {}
        self._pool = torch.cuda.graph_pool_handle() if trainer.lr.is_cuda else None

    def __call__(self, tokens: Tokens, step: Step) -> dict[str, Tensor]:
        if self._pool is None:
            return self.trainer.step(tokens, step.mode)
        if step not in self._captured:
            torch.cuda.empty_cache()
            self._captured[step] = _Captured(self.trainer, tokens, step.mode, self._pool)
        return self._captured[step](tokens)

    def keep(self, steps: set[Step]) -> None:
        """Forget the kinds of steps that will not come again."""
        for step in self._captured.keys() - steps:
            del self._captured[step]


def run(options: Options) -> dict[str, float]:
    """Train; the last scores. Progress goes to the log, a JSON object a line."""
    out = options.out
    out.mkdir(parents=True, exist_ok=True)
    config = model_config(dict(options.config))
    if not (out / "tokenizer.json").exists():
        write_tokenizer(out, config.vocab_size, config.max_position_embeddings, options.seed)
    hyper, why = hyper_connections(options.mixing, torch.device(options.device), options.dtype)
    trainer, first = _trainer(options, config, hyper)
    mixture = Mixture(Encoder(Tokenizer.from_directory(out)), options.seed)
    with (out / LOG).open("a", encoding="utf-8") as log:
        _write(log, {"step": first, "mixing": why, "torch": torch.__version__})
        step = _train(options, trainer, mixture, first, log)
        mode = options.schedule.at(max(0, step - 1)).mode
        scores = _check(options, trainer, mixture, mode, step, log)
    files.save(out / WEIGHTS, trainer.masters, step)
    return scores


def _trainer(options: Options, config: ModelConfig, hyper: Hyper) -> tuple[Trainer, int]:
    device, step = torch.device(options.device), 0
    torch.backends.cuda.matmul.allow_tf32 = True
    if options.resume is None:
        masters = parameters.initial(config, options.seed, device)
    else:
        masters, step = files.read(options.resume, device)
    return Trainer(config, masters, options.dtype, hyper), step


def _train(options: Options, trainer: Trainer, mixture: Mixture, first: int, log: TextIO) -> int:
    """From step `first`; the step reached."""
    schedule, begun = options.schedule, time.monotonic()
    numbers = range(first, schedule.steps)
    kinds = [schedule.at(n) for n in numbers]
    drills = [schedule.drill_at(n) for n in numbers]
    jobs = [(n, k.rows, k.length, d) for n, k, d in zip(numbers, kinds, drills, strict=True)]
    rows = supply(options.out, options.seed, jobs, options.workers)
    perform, clock = _Steps(trainer), _Clock(begun)
    trainer.bias_rate.fill_(_BIAS_RATE)
    device = trainer.lr.device
    for number, made in zip(numbers, rows, strict=True):
        kind = schedule.at(number)
        trainer.lr.fill_(schedule.rate_at(number, number - first))
        losses = perform(on_device(made, device), kind)
        clock.tokens += made.ids.size
        if number % options.log_every == 0 or number < first + 3:
            _write(log, _line(number, kind, losses, clock, trainer))
        if clock.since_check() > options.check_every:
            _check(options, trainer, mixture, kind.mode, number, log)
            files.save(options.out / WEIGHTS, trainer.masters, number + 1)
            perform.keep({schedule.at(n) for n in range(number, min(number + 6, schedule.steps))})
            clock.checked = time.monotonic()
        if time.monotonic() - begun > options.minutes * 60:
            return number + 1
    return schedule.steps


class _Clock:
    """Time and tokens since the last line."""

    def __init__(self, begun: float):
        self.begun = self.checked = self.lined = begun
        self.tokens = 0

    def since_check(self) -> float:
        return time.monotonic() - self.checked

    def speed(self) -> float:
        now = time.monotonic()
        speed = self.tokens / max(1e-9, now - self.lined)
        self.lined, self.tokens = now, 0
        return speed


def _line(
    number: int, kind: Step, losses: Mapping[str, Tensor], clock: _Clock, trainer: Trainer
) -> dict[str, Any]:
    values = {name: round(float(loss), 4) for name, loss in losses.items()}
    return {
        "step": number,
        "seconds": round(time.monotonic() - clock.begun, 1),
        "length": kind.length,
        "sparse": kind.mode.sparse,
        "quantised": kind.mode.quantised,
        "rate": round(float(trainer.lr), 6),
        "tokens_per_second": round(clock.speed()),
        **values,
    }


def _check(
    options: Options, trainer: Trainer, mixture: Mixture, mode: Mode, step: int, log: TextIO
) -> dict[str, float]:
    """Held-out questions; far ones are fewer. None are asked with a count of 0."""
    if not options.check_count:
        return {}
    scores: dict[str, float] = {}
    for case in cases(options.far):
        count = options.check_count if not case.length else max(1, options.check_count // 4)
        found = forced(trainer, mixture, [case], count, mode)
        drafts = found.pop("drafts")
        scores |= {name: round(value, 4) for name, value in found.items()}
        scores[f"{case.name}_drafts"] = round(drafts, 4)
    _write(log, {"step": step, "scores": scores})
    return scores


def _write(log: TextIO, line: Mapping[str, Any]) -> None:
    text = json.dumps(line)
    log.write(text + "\n")
    log.flush()

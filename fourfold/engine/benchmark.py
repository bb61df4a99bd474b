"""Measure decode steps and prefill of a model of random weights, through the engine.

    geometry ─► random model ─► Engine ─┬─ 66-token run − 2-token run ─► ms a step
                                        ├─ steps in which all decode ──► ms a step, trace
                                        └─ prompts alone ──────────────► tokens a second

Contract: requests go in and tokens come out as always: scheduling, sampling and copying answers are in
every figure. Prompts are random tokens, greedy, to their full length, without prefix caching. A
document (JSON) carries what was asked, the device and its measured ceilings, the kernel plan and the
results. It prints nothing and knows no files; a callback hears of every result.
"""

from __future__ import annotations

import importlib.metadata as metadata
import random
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from fourfold import kernels
from fourfold.core.config import CacheConfig, EngineConfig, ModelConfig
from fourfold.core.device import detect
from fourfold.core.errors import ConfigError, FourfoldError
from fourfold.core.parameters import parameters
from fourfold.core.request import Request, SamplingParams
from fourfold.core.tensor import dtype_name
from fourfold.engine.ahead import compile_ahead
from fourfold.engine.capacity import engine_row_formats
from fourfold.engine.engine import Engine
from fourfold.engine.loading import LoadedModel, random_model
from fourfold.engine.profile import OpClock, Profile, kernel_families, trace_steps
from fourfold.engine.roofline import (
    Ceilings,
    Cost,
    Work,
    measure,
    step_costs,
    stored_bytes,
    synchronize,
)
from fourfold.weights.geometry import config_json, with_storage
from fourfold.weights.layout import FORMATS, WeightFormat

BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
SHORT = 2  # output tokens of the shorter of two runs whose difference is taken
WARM_STEPS, TRACED_STEPS = 4, 6


class MeasurementError(FourfoldError):
    """What was to be measured did not run to its end."""

    exit_status = 1


Tell = Callable[[dict[str, Any], dict[str, Any]], None]


@dataclass(frozen=True)
class Setting:
    """What to measure on.

    `layers` keeps a geometry's first layers (None: all), `weights` names a `WeightFormat` (None: as
    released). A step runs at most `step_tokens` tokens. `drafts` tokens are drafted a step. Of decode:
    `long_run` is the longer run's output tokens, `steady_steps` how many steps are timed one by one.
    """

    geometry: str = "flash"
    layers: int | None = 8
    weights: str | None = None
    device: str = "auto"
    drafts: int = 0
    enforce_eager: bool = False
    kernels: Mapping[str, str] = field(default_factory=dict)
    step_tokens: int = 8192
    kv_cache_dtype: str = "auto"
    memory: float = 0.9
    seed: int = 0
    long_run: int = 66
    steady_steps: int = 16

    @property
    def format(self) -> WeightFormat:
        """How the weights are stored. Raises `ConfigError`."""
        name = self.weights or ("fp8" if self.geometry == "flash-base" else "native")
        if name not in FORMATS:
            raise ConfigError(f"--weights must be one of {', '.join(FORMATS)}, found {name!r}")
        return FORMATS[name]

    @property
    def model(self) -> ModelConfig:
        """The model's configuration. Raises `ConfigError`."""
        stored = self.format
        data = config_json(self.geometry, self.layers)
        data = with_storage(data, stored.torch_dtype, stored.expert_dtype, stored.quantised)
        return ModelConfig.from_dict(data, "config.json").config

    def engine(self, sequences: int, longest: int) -> EngineConfig:
        """An engine for so many sequences of so many tokens."""
        return EngineConfig(
            model=self.geometry,
            max_model_len=longest,
            max_num_seqs=sequences,
            max_num_batched_tokens=self.step_tokens,
            gpu_memory_utilization=self.memory,
            enforce_eager=self.enforce_eager,
            num_speculative_tokens=self.drafts,
            kernels=self.kernels,
            seed=self.seed,
            cache=CacheConfig(kv_cache_dtype=self.kv_cache_dtype, enable_prefix_caching=False),
        )


class Bench:
    """An engine over a random model, its device's ceilings, and what is known of both."""

    def __init__(self, setting: Setting, sequences: int, longest: int):
        self.setting, self.config = setting, setting.engine(sequences, longest)
        model, device = setting.model, detect(setting.device)
        self.device = device.torch_device
        is_cpu = self.device.type == "cpu"
        self.clock = OpClock() if is_cpu else None
        # Before the weights are there: it needs memory of its own for a moment.
        self.ceilings: Ceilings = measure(device)
        if not is_cpu:
            torch.cuda.empty_cache()
        begin = time.perf_counter()
        watch = self.clock.watch if self.clock else None
        self.loaded: LoadedModel = random_model(model, setting.format, self.config, device, watch)
        synchronize(self.device)
        made = time.perf_counter()
        self.notes = compile_ahead(self.loaded, self.config)
        compiled = time.perf_counter()
        self.engine = Engine(self.loaded, self.config)
        synchronize(self.device)
        ready = time.perf_counter()
        self.seconds = {
            "weights": made - begin,
            "kernels": compiled - made,
            "engine": ready - compiled,
        }
        self.formats = engine_row_formats(self.config, model, dtype_name(self.loaded.dtype))
        self.families = {} if is_cpu else kernel_families(kernels.load(device))
        self._random = random.Random(setting.seed)
        self._requests = 0

    def about(self) -> dict[str, Any]:
        """What every document begins with."""
        loaded, model = self.loaded, self.loaded.config
        size = 4 if model.torch_dtype == "float32" else 2
        stored = sum(stored_bytes(s, self.setting.format, size) for s in parameters(model))
        return {
            "date": time.strftime("%Y-%m-%d %H:%M:%S"),
            "setting": {**asdict(self.setting), "kernels": dict(self.setting.kernels)},
            "compress_ratios": list(model.compress_ratios),
            "device": loaded.device.name,
            "arch": loaded.device.arch.name,
            "versions": {"torch": torch.__version__, "triton": _version("triton")},
            "dtype": dtype_name(loaded.dtype),
            "rows": {
                "main": self.formats.main.kind.value,
                "indexer": self.formats.indexer.kind.value,
            },
            "weight_bytes": loaded.weight_bytes,
            "checkpoint_bytes": stored,
            "start_seconds": self.seconds,
            "engine_notes": [*self.notes, *self.engine.notes],
            "ceilings": asdict(self.ceilings),
            "plan": [asdict(choice) for choice in loaded.kernel_plan.choices],
        }

    def prompts(self, count: int, tokens: int) -> list[tuple[int, ...]]:
        """Random prompts."""
        vocabulary = self.loaded.config.vocab_size
        return [
            tuple(self._random.randrange(2, vocabulary) for _ in range(tokens))
            for _ in range(count)
        ]

    def add(self, prompts: list[tuple[int, ...]], outputs: int) -> list[str]:
        """Queue greedy requests for exactly `outputs` tokens each; their ids."""
        names = []
        params = SamplingParams(max_tokens=outputs, temperature=0.0, ignore_eos=True)
        for prompt in prompts:
            self._requests += 1
            names.append(str(self._requests))
            self.engine.add(Request(names[-1], prompt, params))
        return names

    def run(self, prompts: list[tuple[int, ...]], outputs: int) -> tuple[float, int, int]:
        """Seconds, steps and new tokens from the first step until all have `outputs` tokens."""
        self.add(prompts, outputs)
        synchronize(self.device)
        steps, begin, new = self.engine.stats.num_steps, time.perf_counter(), 0
        for output in self.engine.run():
            if output.error:
                raise MeasurementError(f"the model of random weights failed: {output.error}")
            new += len(output.new_token_ids)
        synchronize(self.device)
        return time.perf_counter() - begin, self.engine.stats.num_steps - steps, new

    def profile(self, run: Callable[[], object], steps: int) -> Profile:
        """Where the time of `run()` goes, which runs `steps` steps."""
        if self.clock:
            return self.clock.profile(run, steps)
        return trace_steps(run, steps, self.families)


def decode(
    setting: Setting,
    batches: tuple[int, ...],
    context: int,
    repeats: int = 2,
    profile: bool = True,
    tell: Tell | None = None,
) -> dict[str, Any]:
    """Decode steps of each of `batches` sequences after prompts of `context` tokens.

    `tell(document, result)` hears of every batch, once it is measured and again once it is profiled.
    Raises `FourfoldError`s.
    """
    most = max(_outputs(setting, batch, context) for batch in batches)
    bench = Bench(setting, max(batches), context + most)
    results: list[dict[str, Any]] = []
    document: dict[str, Any] = {
        "benchmark": "decode",
        **bench.about(),
        "context": context,
        "results": results,
    }
    for batch in batches:
        results.append(_measure(bench, batch, context, repeats))
        if tell is not None:
            tell(document, results[-1])
    # Afterwards: a recorder may go on costing time once it was used.
    for result in results if profile else ():
        prompts = bench.prompts(result["batch"], context)
        result["profile"] = _profile(bench, prompts).as_dict()
        if tell is not None:
            tell(document, result)
    return document


def _outputs(setting: Setting, batch: int, context: int) -> int:
    """Tokens that a request may have to bring while all others start and steps are measured."""
    width = 1 + setting.drafts
    left = setting.step_tokens - batch * width
    if left < 1:
        raise ConfigError(f"{batch} sequences leave no room for prompts in {setting.step_tokens}")
    starting = -(-batch * context // left) + 8
    spare = WARM_STEPS + max(setting.steady_steps, TRACED_STEPS)
    return max(setting.long_run, (starting + spare) * width)


def _measure(bench: Bench, batch: int, context: int, repeats: int) -> dict[str, Any]:
    """Time of a step of `batch` sequences, in both ways, and its floor."""
    setting, width = bench.setting, 1 + bench.setting.drafts
    prompts = bench.prompts(batch, context)
    steady = _steady(bench, prompts)
    bench.run(prompts, SHORT)  # shapes of its own, which may have to be compiled
    found = []
    for _ in range(repeats):
        long, short = bench.run(prompts, setting.long_run), bench.run(prompts, SHORT)
        found.append([a - b for a, b in zip(long, short, strict=True)])
    seconds = statistics.median(took / max(steps, 1) for took, steps, _ in found)
    work = Work(((context + setting.long_run // 2, width),) * batch, batch * width, setting.drafts)
    costs = step_costs(bench.loaded.config, setting.format, bench.formats, work)
    return {
        "batch": batch,
        "ms_per_step": seconds * 1e3,
        "tokens_per_s": statistics.median(new / took for took, _, new in found),
        "ms_per_step_of_each_repeat": [took / max(steps, 1) * 1e3 for took, steps, _ in found],
        "steady_ms_per_step": statistics.median(steady) * 1e3,
        "steady_ms_of_each_step": [took * 1e3 for took in steady],
        **against_floor(bench.ceilings, [costs], seconds),
    }


@contextmanager
def _all_decoding(bench: Bench, prompts: list[tuple[int, ...]]) -> Iterator[None]:
    """Meanwhile every step decodes all of `prompts`."""
    engine, scheduler = bench.engine, bench.engine.scheduler
    names = bench.add(prompts, _outputs(bench.setting, len(prompts), len(prompts[0])))
    while scheduler.num_waiting or not all(s.is_decoding for s in scheduler.running):
        engine.step()
    for _ in range(WARM_STEPS):
        engine.step()
    synchronize(bench.device)
    yield
    for name in names:
        engine.abort(name)
    while engine.has_work:
        engine.step()


def _steady(bench: Bench, prompts: list[tuple[int, ...]]) -> list[float]:
    """Seconds of each of some steps in which all decode."""
    times = []
    with _all_decoding(bench, prompts):
        for _ in range(bench.setting.steady_steps):
            begin = time.perf_counter()
            bench.engine.step()
            times.append(time.perf_counter() - begin)
    return times


def _profile(bench: Bench, prompts: list[tuple[int, ...]]) -> Profile:
    """Where the time of some steps goes in which all decode."""

    def some() -> None:
        for _ in range(TRACED_STEPS):
            bench.engine.step()

    with _all_decoding(bench, prompts):
        return bench.profile(some, TRACED_STEPS)


def prefill(
    setting: Setting, context: int, prompts: int, repeats: int = 2, profile: bool = True
) -> dict[str, Any]:
    """Tokens a second over `prompts` prompts of `context` tokens. Raises `FourfoldError`s."""
    at_once = max(1, setting.step_tokens // context)
    bench = Bench(setting, min(prompts, at_once + 1), context + SHORT)
    made = bench.prompts(prompts, context)
    bench.run(made[:at_once], 1)  # compiles
    before = _memory(bench.device)
    runs = [bench.run(made, 1) for _ in range(repeats)]
    seconds = statistics.median(took for took, _, _ in runs)
    workspace = _peak_memory(bench.device) - before
    works = prefill_works(context, prompts, setting.step_tokens)
    model, stored = bench.loaded.config, setting.format
    costs = [step_costs(model, stored, bench.formats, work) for work in works]
    result = {
        "prompts": prompts,
        "tokens_per_s": prompts * context / seconds,
        "ms_per_step": seconds / runs[0][1] * 1e3,
        "steps": runs[0][1],
        "seconds_of_each_repeat": [took for took, _, _ in runs],
        "workspace_bytes": workspace,
        **against_floor(bench.ceilings, costs, seconds),
    }
    if profile:
        few = prefill_works(context, min(prompts, at_once), setting.step_tokens)
        found = bench.profile(lambda: bench.run(made[:at_once], 1), len(few))
        result["profile"] = found.as_dict()
    return {"benchmark": "prefill", **bench.about(), "context": context, "results": [result]}


def prefill_works(context: int, prompts: int, step_tokens: int) -> list[Work]:
    """The steps that take `prompts` prompts of `context` tokens, as full as they can be."""
    works, runs, room = [], [], step_tokens
    for _ in range(prompts):
        begin = 0
        while begin < context:
            count = min(context - begin, room)
            runs.append((begin, count))
            begin, room = begin + count, room - count
            if not room:
                works.append(runs)
                runs, room = [], step_tokens
    if runs:
        works.append(runs)
    return [Work(tuple(w), sum(b + n == context for b, n in w)) for w in works]


def against_floor(
    ceilings: Ceilings, steps: Sequence[list[Cost]], seconds: float
) -> dict[str, Any]:
    """What `steps` that took `seconds` had to do, part by part, and how near that is to the floor.

    Bytes, operations and times of all steps together.
    """
    parts: dict[tuple[str, str, str], list[float]] = {}
    for costs in steps:
        for cost in costs:
            sums = parts.setdefault((cost.family, cost.part, cost.rate), [0.0] * 4)
            numbers = (cost.bytes, cost.activations, cost.flops, ceilings.floor(cost) * 1e6)
            for place, value in enumerate(numbers):
                sums[place] += value
    names = ("bytes", "activation_bytes", "flops", "floor_us")
    floor = sum(sums[3] for sums in parts.values()) * 1e-6
    return {
        "bytes": sum(sums[0] for sums in parts.values()),
        "flops": sum(sums[2] for sums in parts.values()),
        "floor_ms": floor * 1e3,
        "fraction_of_roofline": floor / seconds,
        "parts": [
            {"family": family, "part": part, "rate": rate, **dict(zip(names, sums, strict=True))}
            for (family, part, rate), sums in sorted(parts.items(), key=lambda each: -each[1][3])
        ],
    }


def _memory(device: torch.device) -> int:
    """Bytes in use on a GPU, and from now on counted for the peak."""
    if device.type == "cpu":
        return 0
    torch.cuda.reset_peak_memory_stats(device)
    return torch.cuda.memory_allocated(device)


def _peak_memory(device: torch.device) -> int:
    return 0 if device.type == "cpu" else torch.cuda.max_memory_allocated(device)


def _version(package: str) -> str | None:
    with suppress(metadata.PackageNotFoundError):
        return metadata.version(package)
    return None

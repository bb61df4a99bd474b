"""Where a step's time goes: by kernel, by op family, by kind, and what lies idle between.

Contract: `trace_steps` records what a GPU runs while steps run and reads the record; `OpClock` takes the
time of every op instead, which says the same where calls return when their work is done (a CPU). Times
are microseconds a step. Recording slows a step; shares are what to read, not sums. A GPU kernel belongs
to the family of the op whose module launches it.
"""

from __future__ import annotations

import inspect
import json
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from fourfold.engine.roofline import FAMILIES, kind, synchronize
from fourfold.ops.registry import Kernel

_LIBRARY = ("gemm", "nvjet", "cutlass", "cublas", "Cijk")  # products of a vendor's library
_KERNELS = "fourfold.kernels."
_LONGEST = 90  # characters of a kernel's name
_MOST_GAPS = 8
_MOST_KERNELS = 40


@dataclass(frozen=True)
class Launch:
    """Launches of one kernel with one grid, a step."""

    name: str
    family: str
    grid: str
    calls: float
    us: float


@dataclass(frozen=True)
class Gap:
    """Time a step in which nothing ran, between these two kernels."""

    after: str
    before: str
    calls: float
    us: float


@dataclass(frozen=True)
class Profile:
    """Microseconds a step: `span_us` from end to end, of which `idle_us` nothing ran."""

    steps: int
    span_us: float
    idle_us: float
    families: dict[str, float]
    launches: float
    kernels: tuple[Launch, ...] = ()
    gaps: tuple[Gap, ...] = ()

    @property
    def kinds(self) -> dict[str, float]:
        """Microseconds by kind."""
        found: defaultdict[str, float] = defaultdict(float)
        for family, us in self.families.items():
            found[kind(family)] += us
        return dict(found)

    def as_dict(self) -> dict[str, Any]:
        """For JSON, the kinds included."""
        return {**asdict(self), "kinds": self.kinds}


def kernel_families(kernels: Sequence[Kernel]) -> dict[str, str]:
    """Name of a GPU kernel → op family, for all that the modules of `kernels` define.

    Where two modules define a name, the one that launches it has it. What a module of kernels that they
    import defines is theirs if it is no other's.
    """
    launched: dict[str, str] = {}
    defined: dict[str, str] = {}
    imported: dict[str, str] = {}
    for kernel in kernels:
        name = inspect.unwrap(getattr(kernel.run, "func", kernel.run)).__module__
        module, family = sys.modules[name], FAMILIES.get(kernel.op, kernel.op)
        source = inspect.getsource(module)
        for own in _functions(module):
            (launched if f"{own}[" in source else defined).setdefault(own, family)
        for value in vars(module).values():
            if inspect.ismodule(value) and value.__name__.startswith(_KERNELS):
                for own in _functions(value):
                    imported.setdefault(own, family)
    return imported | defined | launched


def _functions(module: ModuleType) -> list[str]:
    """Names of the functions that a module defines for a GPU."""
    functions = (getattr(value, "fn", None) for value in vars(module).values())
    return [
        each.__name__
        for each in functions
        if each is not None and getattr(each, "__module__", None) == module.__name__
    ]


def trace_steps(run: Callable[[], object], steps: int, families: dict[str, str]) -> Profile:
    """Record `run()`, which runs `steps` steps, on the current GPU."""
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as recorded:
        run()
        synchronize(torch.device("cuda"))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        recorded.export_chrome_trace(str(path))
        events = json.loads(path.read_text("utf-8"))["traceEvents"]
    return read_trace(events, steps, families)


def read_trace(events: Sequence[dict[str, Any]], steps: int, families: dict[str, str]) -> Profile:
    """A profile from the events of a Chrome trace, those of a GPU among them."""
    wanted = ("kernel", "gpu_memcpy", "gpu_memset")
    ran = sorted((e for e in events if e.get("cat") in wanted), key=lambda e: float(e["ts"]))
    if not ran:
        return Profile(steps, 0.0, 0.0, {}, 0.0)
    found: dict[tuple[str, str, str], list[float]] = {}
    gaps: dict[tuple[str, str], list[float]] = {}
    until, last, idle = float(ran[0]["ts"]), "", 0.0
    for event in ran:
        name, begin, took = str(event["name"]), float(event["ts"]), float(event["dur"])
        family = _family(name, str(event["cat"]), families)
        grid = "×".join(map(str, event.get("args", {}).get("grid", ())))
        _add(found.setdefault((name[:_LONGEST], family, grid), [0.0, 0.0]), took)
        if begin > until:
            idle += begin - until
            _add(gaps.setdefault((last[:_LONGEST], name[:_LONGEST]), [0.0, 0.0]), begin - until)
        if begin + took > until:
            until, last = begin + took, name
    by_family: defaultdict[str, float] = defaultdict(float)
    for (_, family, _), (_, us) in found.items():
        by_family[family] += us
    kernels = sorted(
        (Launch(*key, calls / steps, us / steps) for key, (calls, us) in found.items()),
        key=lambda launch: -launch.us,
    )
    pauses = sorted(
        (Gap(*key, calls / steps, us / steps) for key, (calls, us) in gaps.items()),
        key=lambda gap: -gap.us,
    )
    return Profile(
        steps,
        (until - float(ran[0]["ts"])) / steps,
        idle / steps,
        {family: us / steps for family, us in _falling(by_family)},
        len(ran) / steps,
        tuple(kernels[:_MOST_KERNELS]),
        tuple(pauses[:_MOST_GAPS]),
    )


def _falling(found: Mapping[str, float]) -> list[tuple[str, float]]:
    return sorted(found.items(), key=lambda item: -item[1])


def _add(sums: list[float], us: float) -> None:
    sums[0] += 1
    sums[1] += us


def _family(name: str, category: str, families: dict[str, str]) -> str:
    if category != "kernel":
        return "copy"
    if name in families:
        return families[name]
    # Compilers may append to a function's name.
    begins = [known for known in families if name.startswith(known)]
    if begins:
        return families[max(begins, key=len)]
    if any(word in name for word in _LIBRARY):
        return "library"
    return "torch" if "::" in name else "other"


class OpClock:
    """Takes the time of every op it watches while it is `on`; an op within another counts for itself."""

    def __init__(self) -> None:
        self.on = False
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self.calls: Counter[str] = Counter()
        self._inner: list[float] = []

    def watch(self, op: str, run: Callable[..., Any]) -> Callable[..., Any]:
        """`run`, an op's body or kernel, with its time taken."""

        def timed(*args: Any, **kwargs: Any) -> Any:
            if not self.on:
                return run(*args, **kwargs)
            self._inner.append(0.0)
            begin = time.perf_counter()
            try:
                return run(*args, **kwargs)
            finally:
                took = time.perf_counter() - begin
                self.seconds[op] += took - self._inner.pop()
                self.calls[op] += 1
                if self._inner:
                    self._inner[-1] += took

        return timed

    def profile(self, run: Callable[[], object], steps: int) -> Profile:
        """Take the times of `run()`, which runs `steps` steps. What is in no op is "torch"."""
        self.seconds.clear()
        self.calls.clear()
        self.on, begin = True, time.perf_counter()
        try:
            run()
        finally:
            self.on, took = False, time.perf_counter() - begin
        found: defaultdict[str, float] = defaultdict(float)
        for op, seconds in self.seconds.items():
            found[FAMILIES.get(op, op)] += seconds
        found["torch"] = took - sum(found.values())
        each = 1e6 / steps
        return Profile(
            steps,
            took * each,
            0.0,
            {family: seconds * each for family, seconds in _falling(found)},
            sum(self.calls.values()) / steps,
            tuple(
                Launch(op, FAMILIES.get(op, op), "", self.calls[op] / steps, seconds * each)
                for op, seconds in _falling(self.seconds)[:_MOST_KERNELS]
            ),
        )

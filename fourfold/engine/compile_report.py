"""Compiles what a model needs on a target and tells what came of it: text for a person, JSON for a program.

Contract: every variant that was collected has a row, whether it compiled or not. A spill is told and is
no failure; a variant that needs more than the target has is.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fourfold import __version__
from fourfold.core.config import EngineConfig
from fourfold.core.device import Arch
from fourfold.engine.compile import Collector, Subject, Wanted, steps, token_counts

if TYPE_CHECKING:
    from fourfold.kernels.compile import Compiled

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Row:
    """One variant: who launches it and what became of it."""

    op: str
    compiled: Compiled


@dataclass(frozen=True)
class Report:
    """What was compiled for one target."""

    model: str
    arch: Arch
    plan: str
    rows: tuple[Row, ...]
    seconds: float

    @property
    def failures(self) -> list[Row]:
        return [row for row in self.rows if not row.compiled.ok]

    def table(self) -> str:
        """One line for each op and kernel function: worst cases over its variants."""
        head = f"{'op=kernel':<34} {'function':<24} {'variants':>8} {'shared':>8} {'regs':>5} "
        lines = [head + f"{'scratch':>8} {'failed':>6} {'s':>6}"]
        groups: dict[tuple[str, str], list[Compiled]] = {}
        for row in self.rows:
            groups.setdefault((row.op, row.compiled.variant.name), []).append(row.compiled)
        for (op, function), each in groups.items():
            needs = [c.resources for c in each if c.resources]
            shared = max((n.shared for n in needs), default=0)
            registers = max((n.registers for n in needs), default=0)
            scratch = max((n.scratch for n in needs), default=0)
            failed = sum(not c.ok for c in each)
            seconds = sum(c.seconds for c in each)
            lines.append(
                f"{op:<34} {function:<24} {len(each):>8} {shared:>8} {registers:>5} "
                f"{scratch:>8} {failed:>6} {seconds:>6.1f}"
            )
        return "\n".join(lines)

    def summary(self) -> str:
        """One line, then one for each failure."""
        found = sum(row.compiled.cached for row in self.rows)
        lines = [
            f"{self.arch.name}: {len(self.rows)} variants of {self.model}, {found} of them compiled "
            f"before, {len(self.failures)} failed, in {self.seconds:.1f} s "
            f"(shared memory limit {self.arch.shared_memory:,} bytes)"
        ]
        for row in self.failures:
            variant = row.compiled.variant
            lines.append(f"  failed: {row.op} {variant.name}: {row.compiled.error}")
            lines.append(f"          {variant.describe()}")
        return "\n".join(lines)

    def as_dict(self) -> dict[str, Any]:
        """Everything, for JSON."""
        return {
            "fourfold": __version__,
            "model": self.model,
            "target": self.arch.name,
            "shared_memory_limit": self.arch.shared_memory,
            "plan": self.plan.splitlines(),
            "seconds": self.seconds,
            "variants": [
                {
                    "op": row.op,
                    "function": row.compiled.variant.name,
                    "variant": row.compiled.variant.describe(),
                    "seconds": row.compiled.seconds,
                    "cached": row.compiled.cached,
                    "error": row.compiled.error or None,
                    **(_needs(row.compiled)),
                }
                for row in self.rows
            ],
        }


def matrix(reports: Sequence[Report]) -> str:
    """Kernel × target: how many variants compiled and fit, of how many where that is not all of them."""
    counts: dict[str, dict[str, tuple[int, int]]] = {}
    for report in reports:
        for row in report.rows:
            line = counts.setdefault(f"{row.op} {row.compiled.variant.name}", {})
            good, all_of_them = line.get(report.arch.name, (0, 0))
            line[report.arch.name] = good + row.compiled.ok, all_of_them + 1
    names = [report.arch.name for report in reports]
    width = max(map(len, counts), default=0)
    lines = [" " * width + "".join(f"{name:>10}" for name in names)]
    for kernel, line in counts.items():
        cells = (line.get(name, (0, 0)) for name in names)
        words = ("-" if not n else f"{n}" if good == n else f"{good} of {n}" for good, n in cells)
        lines.append(f"{kernel:<{width}}" + "".join(f"{word:>10}" for word in words))
    return "\n".join(lines)


def _needs(compiled: Compiled) -> dict[str, int]:
    if compiled.resources is None:
        return {}
    found: dict[str, int] = dict(vars(compiled.resources))
    return found


def compile_for(
    subject: Subject,
    arch: Arch,
    engine: EngineConfig,
    cache: Path | None = None,
    processes: int = 1,
    progress: Progress | None = None,
) -> Report:
    """Compile every variant of `subject` on `arch` into `cache` (None: Triton's own place).

    Raises `KernelError` if `cache` is another build's or a forced kernel cannot run on `arch`.
    """
    from fourfold.kernels import store
    from fourfold.kernels.compile_many import compile_all

    began = time.perf_counter()
    collector = Collector(subject, arch, engine)
    counts = token_counts(engine.max_num_batched_tokens)
    wanted: Sequence[Wanted] = collector.collect(steps(engine, counts))
    if cache is not None:
        store.write_manifest(cache, arch)
    done = 0

    def one_done(compiled: Compiled) -> None:
        nonlocal done
        done += 1
        if progress is not None:
            progress(done, len(wanted))

    results = compile_all([w.variant for w in wanted], arch, cache, processes, one_done)
    rows = tuple(Row(w.op, each) for w, each in zip(wanted, results, strict=True))
    took = time.perf_counter() - began
    return Report(subject.name, arch, collector.plan.describe(), rows, took)


def as_json(reports: Sequence[Report]) -> str:
    """One JSON document of all reports."""
    return json.dumps([report.as_dict() for report in reports], ensure_ascii=False)

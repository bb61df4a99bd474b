"""What a selftest found: one `Check` for each thing looked at, a table of them, and a bundle to send.

Contract: plain data; nothing here runs a check. A bundle holds versions, the machine's kind, the kernel plan
and the results, and nothing of the user: no path, no environment variable, no name of host or user.
"""

from __future__ import annotations

import json
import platform
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any


class Outcome(Enum):
    """How a check ended."""

    PASSED = "passed"
    FAILED = "FAILED"
    SKIPPED = "skipped"


@dataclass(frozen=True)
class Check:
    """One check. `detail` says what was found or why it was skipped; `kernel` is the (op, kernel) that a
    failure is the fault of, where that is known."""

    group: str
    name: str
    outcome: Outcome
    detail: str = ""
    seconds: float = 0.0
    kernel: tuple[str, str] | None = None

    def as_dict(self) -> dict[str, Any]:
        return {
            "group": self.group,
            "name": self.name,
            "outcome": self.outcome.name.lower(),
            "detail": self.detail,
            "seconds": round(self.seconds, 3),
            "kernel": None if self.kernel is None else "=".join(self.kernel),
        }


def raised(error: Exception) -> str:
    """An unexpected error in one line."""
    return f"{type(error).__name__}: {next(iter(str(error).strip().splitlines()), '')}"


@dataclass(frozen=True)
class Report:
    """All checks of one run on one device, and the plan that engines get after it."""

    device: str
    arch: str
    quick: bool
    checks: tuple[Check, ...]
    explanation: Mapping[str, Any]
    build: Mapping[str, str]
    seconds: float
    kept: str = ""  # where the verdicts went

    @property
    def failures(self) -> list[Check]:
        return [check for check in self.checks if check.outcome is Outcome.FAILED]

    @property
    def failed_kernels(self) -> dict[tuple[str, str], str]:
        """What was found out about each kernel that failed."""
        return {c.kernel: f"{c.name}: {c.detail}" for c in reversed(self.failures) if c.kernel}

    def table(self) -> str:
        """One line a check, passed ones of a kernel's in one."""
        width = max((len(check.name) for check in self.checks), default=0)
        lines, group = [], None
        for check in self.checks:
            if check.group != group:
                group = check.group
                lines.append(f"{group}:")
            line = f"  {check.name:<{width}}  {check.outcome.value:<7} {check.seconds:>6.1f} s"
            lines.append(f"{line}  {check.detail}".rstrip())
        return "\n".join(lines)

    def summary(self) -> str:
        """The result in a few lines."""
        counts = {o: sum(c.outcome is o for c in self.checks) for o in Outcome}
        lines = [
            f"{self.device} ({self.arch}): {counts[Outcome.PASSED]} passed, "
            f"{counts[Outcome.FAILED]} failed, {counts[Outcome.SKIPPED]} skipped "
            f"in {self.seconds:.0f} s"
        ]
        for op, kernel in self.failed_kernels:
            lines.append(
                f"{op}={kernel} failed and will not be chosen on this device "
                f"(--kernel {op}={kernel} forces it)"
            )
        if self.kept:
            lines.append(self.kept)
        return "\n".join(lines)

    def as_dict(self) -> dict[str, Any]:
        return {
            "device": self.device,
            "arch": self.arch,
            "quick": self.quick,
            "passed": not self.failures,
            "seconds": round(self.seconds, 1),
            "build": dict(self.build),
            "machine": {"system": platform.system(), "machine": platform.machine()},
            "checks": [check.as_dict() for check in self.checks],
            "plan": dict(self.explanation),
        }


_PATH = re.compile(r"(?<![\w.])(?:~|[A-Za-z]:)?(?:[/\\][^\s/\\'\",:;()]+){2,}[/\\]?")


def without_paths(value: Any) -> Any:
    """`value` with every absolute path in its texts cut to its last part: errors quote them."""
    if isinstance(value, str):
        return _PATH.sub(lambda found: "…/" + re.split(r"[/\\]", found[0].rstrip("/\\"))[-1], value)
    if isinstance(value, Mapping):
        return {key: without_paths(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [without_paths(each) for each in value]
    return value


def write_bundle(file: Path, reports: Sequence[Report]) -> None:
    """Write what a maintainer needs, as one JSON file. Raises `OSError`."""
    content = {"fourfold selftest": 1, "reports": [without_paths(r.as_dict()) for r in reports]}
    file.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", "utf-8")

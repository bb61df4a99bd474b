"""What a check of files found: one small value for each thing, and how serious all of it is.

Contract: plain data, torch-free. A finding says what is wrong, where, and what to do about it; who
found it and how it is shown is not known here.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum


class Severity(Enum):
    """NOTE: worth knowing, nothing to do. WARNING: it runs, perhaps not as meant. ERROR: it will not
    run, or not rightly."""

    NOTE = "note"
    WARNING = "warning"
    ERROR = "error"


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing found.

    `message` is what is wrong, for someone who reads `tensor` and `file` beside it. `tensor` is a
    name as the file spells it, `file` a name inside the checkpoint's directory, `offset` a byte of
    that file; None where there is none. `fix` is what to do, empty where that is nothing.
    """

    severity: Severity
    message: str
    tensor: str | None = None
    file: str | None = None
    offset: int | None = None
    fix: str = ""

    @property
    def where(self) -> str:
        """File and byte, as messages write them; empty if there is no file."""
        byte = "" if self.offset is None else f", byte {self.offset}"
        return f"{self.file}{byte}" if self.file else ""

    def __str__(self) -> str:
        place = ": ".join(part for part in (self.where, self.tensor) if part)
        fix = f" ({self.fix})" if self.fix else ""
        return f"{self.severity.value}: {place + ': ' if place else ''}{self.message}{fix}"


def exit_status(findings: Iterable[Finding]) -> int:
    """0 if nothing is wrong, 1 if there are warnings, 2 if there are errors."""
    status = {Severity.NOTE: 0, Severity.WARNING: 1, Severity.ERROR: 2}
    return max((status[finding.severity] for finding in findings), default=0)

"""An explanation (explain.py) for a person.

Contract: tells everything that the data hold, one line an op with its reason, and what was rejected below
it; adds nothing of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def text(told: Mapping[str, Any]) -> str:
    """The whole of one explanation."""
    parts = [
        _head(told),
        *_kernels(told),
        "",
        _verdict("bit equality", told["bit_equality"], "holds", "is not promised"),
        _verdict("graphs", told["graphs"], "decode steps are captured", "none"),
        "",
        *_fp8(told["fp8"]),
        *_buffers(told["buffers"]),
        "",
        "which rule decided how tensors are stored (--tensors lists all of them):",
        *(f"  {line}" for line in told["quantisation"]),
        "",
        *_selftest(told["selftest"]),
    ]
    return "\n".join(parts).rstrip()


def _head(told: Mapping[str, Any]) -> str:
    return (
        f"{told['model']} on {told['target']} ({told['device']}), {told['dtype']}, "
        f"fourfold {told['fourfold']}\n"
    )


def _kernels(told: Mapping[str, Any]) -> list[str]:
    lines = [f"{'op':<22} {'kernel':<14} why"]
    for each in told["kernels"]:
        lines.append(f"{each['op']:<22} {each['kernel']:<14} {each['reason']}")
        for other in each["rejected"]:
            lines.append(f"{'':<22} rejected {other['kernel']}: {other['reason']}")
        for other in each["others"]:
            lines.append(f"{'':<22} not {other['kernel']}: {other['reason']}")
    return lines


def _verdict(what: str, told: Mapping[str, Any], yes: str, no: str) -> str:
    holds = told.get("holds", told.get("captured"))
    return f"{what}: {yes if holds else no}: {told['reason']}"


def _fp8(told: Mapping[str, Any]) -> list[str]:
    dialect = told["dialect"]
    here = "not used by this device" if dialect == "none" else f"{dialect.upper()} dialect here"
    return [f"FP8: in memory {told['memory']}; {here}: {told['reading']}"]


def _buffers(told: Mapping[str, Any]) -> list[str]:
    lines = []
    for title, entries in told.items():
        lines += ["", f"{title}:"]
        for entry in entries:
            read = f"  read by {entry['op']}={entry['kernel']}" if entry.get("op") else ""
            size = f" ({entry['bytes_per_row']} bytes a row)" if "bytes_per_row" in entry else ""
            lines.append(f"  {entry['format']}{size}{read}")
            lines.append(f"      {entry['what']}")
    return lines


def _selftest(told: Mapping[str, Any]) -> list[str]:
    lines = [f"selftest: {when}" for when in told["counts"]]
    lines += [f"selftest: {note}" for note in told["notes"]]
    return lines or ["selftest: not run on this device with this build"]


def tensor_line(told: Mapping[str, Any]) -> str:
    """One weight."""
    shape = "×".join(map(str, told["shape"]))
    return f"{told['name']} [{shape}]: {told['format']}; {told['decided_by']}: {told['reason']}"

"""What `fourfold selftest` found out about kernels on this machine, kept between processes.

    <user's cache>/fourfold/selftest/<architecture>-<device>.json

Contract: one file a device. It holds for one build (this project's kernels and definitions, torch, Triton,
Python): what another build found out is left aside with a line that says so, as is a file that cannot be
read; neither ever stops an engine. A kernel that failed is not chosen unless it is forced. For a GPU that is
not here, the files of all devices of its architecture count. This file does not know how kernels are checked.
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import fourfold
from fourfold.core.device import Device
from fourfold.core.env import user_cache
from fourfold.core.frozen import FrozenDict

FORMAT = 1
_SOURCES = ("core", "ops", "quant", "kernels")  # what a kernel's result depends on
_FIELDS = ("format", "device", "build", "failed", "when")


@dataclass(frozen=True)
class Verdicts:
    """`failed` says of (op, kernel) how it failed, in words that follow "it"; `notes` are lines for a
    person about files left aside; `when` are the times of the selftests that count."""

    failed: Mapping[tuple[str, str], str] = field(default_factory=FrozenDict)
    notes: tuple[str, ...] = ()
    when: tuple[str, ...] = ()


def this_build() -> dict[str, str]:
    """What a kernel's results depend on beside the device."""
    digest, here = hashlib.sha256(), Path(fourfold.__file__).parent
    for file in sorted(path for part in _SOURCES for path in (here / part).rglob("*.py")):
        digest.update(file.relative_to(here).as_posix().encode() + file.read_bytes())
    return {
        "fourfold": fourfold.__version__,
        "source": digest.hexdigest()[:16],
        "torch": torch.__version__,
        "triton": _installed("triton"),
        "python": f"{sys.version_info.major}.{sys.version_info.minor}",
    }


def _installed(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"


def directory() -> Path:
    """Where the files are."""
    return user_cache() / "fourfold" / "selftest"


def told_as(device: str, why: str) -> str:
    """How a failure is told where a kernel is rejected for it."""
    return f"failed selftest on {device}: {why}"


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") or "unnamed"


def verdict_file(device: Device) -> Path:
    """The file of one device."""
    return directory() / f"{device.arch.name}-{_slug(device.name)}.json"


def write_verdicts(device: Device, failed: Mapping[tuple[str, str], str]) -> str:
    """Keep what was found out about `device` in place of what was known; a line that says where, or
    that it could not be kept."""
    file = verdict_file(device)
    content = {
        "format": FORMAT,
        "device": device.name,
        "build": this_build(),
        "when": datetime.now(UTC).isoformat(timespec="seconds"),
        "failed": {f"{op}={kernel}": why for (op, kernel), why in sorted(failed.items())},
    }
    partial = file.with_suffix(".part")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(json.dumps(content, indent=1) + "\n", "utf-8")
        partial.replace(file)
    except OSError as error:
        return f"the result could not be kept in {file}: {error.strerror}"
    return f"kept in {file}"


def read_verdicts(device: Device) -> Verdicts:
    """What counts for `device` now. Never raises."""
    if device.torch_device.type == "meta":
        pattern = f"{device.arch.name}-*.json"
    else:
        pattern = verdict_file(device).name
    try:
        files = sorted(directory().glob(pattern))
    except OSError as error:
        return Verdicts(notes=(f"selftest results in {directory()} are not readable: {error}",))
    failed: dict[tuple[str, str], str] = {}
    notes, when = [], []
    for file in files:
        content = _content(file)
        if isinstance(content, str):
            notes.append(f"{file.name}: {content}; fourfold selftest makes it anew")
            continue
        when.append(f"{content['device']}, {content['when']}")
        for name, why in content["failed"].items():
            op, _, kernel = name.partition("=")
            failed[op, kernel] = told_as(content["device"], why)
    return Verdicts(FrozenDict(failed), tuple(notes), tuple(when))


def _content(file: Path) -> Mapping[str, Any] | str:
    """A file's content, or why it is left aside."""
    try:
        content = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError):
        return "this selftest result cannot be read and is ignored"
    if not isinstance(content, dict) or not set(_FIELDS) <= set(content):
        return "this selftest result is not one of ours and is ignored"
    if content["format"] != FORMAT or not _is_words(content["failed"]):
        return "this selftest result is not one of ours and is ignored"
    build = content["build"] if _is_words(content["build"]) else {}
    differing = [
        f"{name} {build.get(name)} and not {now}"
        for name, now in this_build().items()
        if build.get(name) != now
    ]
    if differing:
        return f"this selftest result is of another build ({', '.join(differing)}) and is ignored"
    return content


def _is_words(value: object) -> bool:
    return isinstance(value, dict) and all(isinstance(v, str) for v in value.values())

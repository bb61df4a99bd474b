"""A directory of compiled kernels that a later process finds: whose it is, and counting what it misses.

    DIR/fourfold.json      which build made it, for which target
    DIR/<hash>/…           Triton's own files

Contract: a directory belongs to one build (this project's kernels, Triton, Python) and one target; another
build's is refused, naming what differs, because it would be compiled anew without a word. This file knows
neither ops nor models.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton import knobs
from triton.runtime.cache import triton_key

from fourfold.core.device import Arch
from fourfold.core.errors import KernelError

MANIFEST = "fourfold.json"


def this_build(arch: Arch) -> dict[str, str]:
    """What a compiled kernel depends on beside its own arguments."""
    digest = hashlib.sha256()
    here = Path(__file__).parent
    for file in sorted(here.rglob("*.py")):
        digest.update(file.relative_to(here).as_posix().encode() + file.read_bytes())
    compiler = hashlib.sha256(triton_key().encode()).hexdigest()
    return {
        "target": arch.name,
        "kernels": digest.hexdigest()[:16],
        "triton": triton.__version__,
        "compiler": compiler[:16],
        "python": f"{sys.version_info.major}.{sys.version_info.minor}",
    }


def write_manifest(directory: Path, arch: Arch) -> None:
    """Make `directory` a store of this build for `arch`, or raise `KernelError` if it is another's."""
    directory.mkdir(parents=True, exist_ok=True)
    file = directory / MANIFEST
    if file.exists():
        check(directory, arch)
    file.write_text(json.dumps(this_build(arch), indent=1) + "\n", "utf-8")


def check(directory: Path, arch: Arch) -> None:
    """Raise `KernelError` unless `directory` was made by this build for `arch`."""
    try:
        made: Mapping[str, Any] = json.loads((directory / MANIFEST).read_text("utf-8"))
    except FileNotFoundError:
        raise KernelError(
            f"{directory} is no cache of compiled kernels: it has no {MANIFEST} "
            "(fourfold compile makes one)"
        ) from None
    except ValueError as error:
        raise KernelError(f"{directory / MANIFEST} is not valid JSON: {error}") from None
    differing = [
        f"{name} {made.get(name, 'nothing')!s} and not {value}"
        for name, value in this_build(arch).items()
        if made.get(name) != value
    ]
    if differing:
        raise KernelError(
            f"the compiled kernels in {directory} are of another build: made with "
            + ", ".join(differing)
        )


def use(directory: Path, arch: Arch) -> None:
    """Make Triton look for compiled kernels in `directory`, for the rest of the process.

    Raises `KernelError` if it is another build's.
    """
    check(directory, arch)
    knobs.cache.dir = str(directory)


@dataclass
class Compilations:
    """How many kernels were compiled, and how many found compiled, with their names."""

    compiled: list[str]
    found: list[str]


@contextmanager
def counted() -> Iterator[Compilations]:
    """Count compilations inside the block."""
    counts = Compilations([], [])

    def listen(*, src: Any, cache_hit: bool, **told: Any) -> None:
        (counts.found if cache_hit else counts.compiled).append(src.name)

    with knobs.compilation.scope():
        knobs.compilation.listener = listen
        yield counts

"""Compiles many variants, on all cores.

    compile_all ─ looks up, and compiles a few, in threads of this process
                └ shares the rest among helpers ─ stdin: what to compile, one Python literal
                                                 └ stdout: a line of JSON for each variant that is done

Contract: every variant comes back as a `Compiled`, in the order given. A compiler that takes its process
down fails the variant it was at, alone. A helper is an interpreter of its own and not one of
`multiprocessing`, which would run the caller's main module again.
"""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import astuple
from pathlib import Path
from typing import Any

from triton import knobs

from fourfold.core.device import ARCHS, Arch
from fourfold.kernels.compile import Compiled, Resources, compile_heard, compile_variant
from fourfold.kernels.variants import Variant

FEW = 8  # variants that are compiled sooner than another process has started
_THREADS = 4  # more wait for the interpreter's lock, which the compiler holds for half of its work
# A helper imports from where this process imports.
_BOOT = (
    "import sys; sys.path[:] = sys.argv[1:]; "
    "from fourfold.kernels.compile_many import help_out; help_out()"
)

Number = tuple[int, Variant]


def compile_all(
    variants: Iterable[Variant],
    arch: Arch,
    cache: Path | None = None,
    processes: int = 1,
    done: Callable[[Compiled], None] = lambda compiled: None,
    here: int = 0,
) -> list[Compiled]:
    """Compile `variants` into `cache` (None: where Triton looks), as far as it lacks them.

    The first `here` that have to be compiled are compiled by this process, which a crashing compiler
    then takes with it; 0 leaves everything to helpers. `done` is told of each as it is finished.
    """
    left = list(enumerate(variants))
    results: dict[int, Compiled] = {}
    lock = threading.Lock()

    def keep(number: int, compiled: Compiled) -> None:
        with lock:
            results[number] = compiled
            done(compiled)

    with knobs.cache.scope():
        if cache:
            knobs.cache.dir = str(cache)
        place = str(knobs.cache.dir)
        if here:
            left = _in_threads(left, arch, here, keep)
    shares = [left[n::processes] for n in range(min(processes, len(left)))]
    with ThreadPoolExecutor(len(shares) or 1) as pool:
        for _ in pool.map(lambda share: _in_helpers(share, arch, place, keep), shares):
            pass
    return [results[number] for number in range(len(results))]


def _in_threads(
    work: Sequence[Number], arch: Arch, few: int, keep: Callable[[int, Compiled], None]
) -> list[Number]:
    """Look all of them up until `few` were compiled; those that are left then."""
    heard = threading.local()
    fresh: list[int] = []
    left: list[Number] = []

    def one(job: Number) -> None:
        number, variant = job
        if len(fresh) >= few:
            left.append(job)
            return
        heard.hits = []
        compiled = compile_heard(variant, arch, heard.hits)
        if not compiled.cached:
            fresh.append(number)
        keep(number, compiled)

    with knobs.compilation.scope(), ThreadPoolExecutor(_THREADS) as pool:
        knobs.compilation.listener = lambda **told: heard.hits.append(told["cache_hit"])
        for _ in pool.map(one, work):
            pass
    return left


def _in_helpers(
    work: Sequence[Number], arch: Arch, cache: str, keep: Callable[[int, Compiled], None]
) -> None:
    """Compile `work` in a helper, and in another one what a helper that died has left."""
    while work:
        told = 0
        with tempfile.TemporaryFile() as errors:
            for compiled in _told([variant for _, variant in work], arch, cache, errors):
                keep(work[told][0], compiled)
                told += 1
            work = work[told:]
            if work:
                number, variant = work[0]
                words = f"the compiler crashed: {_last_words(errors)}"
                keep(number, Compiled(variant, arch.name, 0.0, error=words))
                work = work[1:]


def _told(variants: Sequence[Variant], arch: Arch, cache: str, errors: Any) -> Iterator[Compiled]:
    """What a helper says of `variants`, one after another, for as long as it lives."""
    # Variants are tuples of names and numbers: Python literals.
    task = repr((arch.name, cache, [astuple(variant) for variant in variants]))
    with subprocess.Popen(
        [sys.executable, "-c", _BOOT, *sys.path],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=errors,
    ) as helper:
        assert helper.stdin
        assert helper.stdout
        try:
            helper.stdin.write(task.encode())
            helper.stdin.close()
        except BrokenPipeError:
            return  # it died at once
        for variant, line in zip(variants, helper.stdout, strict=False):
            seconds, needs, error, cached, digest = json.loads(line)
            found = Resources(*needs) if needs else None
            yield Compiled(variant, arch.name, seconds, found, error, cached, digest)


def _last_words(errors: Any) -> str:
    """The last line of what a helper wrote to its standard error."""
    errors.seek(0)
    lines = [line.strip() for line in errors.read().decode(errors="replace").splitlines()]
    return next((line for line in reversed(lines) if line), "it said nothing")


def help_out() -> None:
    """What a helper does: compile what stdin holds, and tell of each on stdout."""
    name, cache, variants = ast.literal_eval(sys.stdin.buffer.read().decode())
    knobs.cache.dir = cache
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as out:
        os.dup2(2, 1)  # what the compiler prints is none of it
        for each in variants:
            told = compile_variant(Variant(*each), ARCHS[name])
            needs = astuple(told.resources) if told.resources else None
            line = json.dumps((told.seconds, needs, told.error, told.cached, told.digest))
            out.write(line + "\n")
            out.flush()

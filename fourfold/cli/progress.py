"""Progress, for a person who waits."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable


class Progress:
    """A bar of bytes done."""

    def __init__(self, what: str, quiet: bool):
        from tqdm import tqdm

        self.bar = tqdm(
            unit="B", unit_scale=True, desc=what, disable=quiet or not sys.stderr.isatty()
        )

    def __call__(self, done: int, total: int) -> None:
        """`done` of `total` bytes."""
        self.bar.total = total
        self.bar.update(done - self.bar.n)
        if done >= total:
            self.bar.close()


class LoadReport:
    """Tells how far loading has come: a bar where a person looks, else a line every few seconds."""

    def __init__(self, write: Callable[[str], None], every: float = 5.0):
        self._write, self._every = write, every
        self._bar = Progress("loading", quiet=False) if sys.stderr.isatty() else None
        self._began = self._told = time.monotonic()

    def __call__(self, part: str, done: int, total: int) -> None:
        """`done` of `total` bytes are loaded, `part` the latest."""
        if self._bar is not None:
            self._bar(done, total)
            return
        now = time.monotonic()
        if now - self._told < self._every and done < total:
            return
        self._told = now
        rate = done / max(now - self._began, 1e-3)
        left = f"{(total - done) / rate:.0f} s left" if rate else "no rate yet"
        self._write(
            f"loading {part}: {done / 1e9:.2f} of {total / 1e9:.2f} GB, {rate / 1e9:.2f} GB/s, {left}"
        )

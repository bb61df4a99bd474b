"""What each step of a run is: how long its rows are, how it computes, how fast it learns.

Contract: everything follows from the step's number and the number of steps, so that a run in pieces is
the run in one, but for a warm-up after each start.

    progress   0 .... 0.12 ........................ 0.7 ....... 0.85 ........... 1
    rows       2048   2048, every third step 8192 or 16384
    indexer    watches, at every length chooses the rows
    rounding   none                                             FP4, FP8
    drill      half until 0.1, a tenth until 0.6: texts to repeat (train/data/repeat.py)
    rate       full until 0.7, then down to 2 % along a cosine

An indexer learns from attention over all rows first, long texts included: once it chooses, attention
shows it nothing of rows that it leaves out. The drill ends early: whoever has just repeated a text goes on
with the next sentence where one was asked for.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from train.step import Mode

SHORT = 2048
LONG = (8192, 16384)
DRILL = ((0.1, 0.5), (0.6, 0.1))  # until when, what share of the tokens
LONG_FROM = 0.12
SPARSE_FROM = 0.7
QUANTISED_FROM = 0.85
DECAY_FROM = 0.7
FINAL_RATE = 0.02
WARM_UP = 60  # steps after each start


@dataclass(frozen=True)
class Step:
    """One step: `rows` of `length` tokens."""

    rows: int
    length: int
    mode: Mode


@dataclass(frozen=True)
class Schedule:
    """A run of `steps` steps of `tokens` tokens each; `short` and `long` are the rows' lengths."""

    steps: int
    tokens: int = 65536
    rate: float = 3e-3
    short: int = SHORT
    long: tuple[int, ...] = LONG

    def at(self, step: int) -> Step:
        """What step number `step` is."""
        progress = step / self.steps
        length = self.short
        if progress >= LONG_FROM and step % 3 == 2 and self.long:
            length = self.long[step // 3 % len(self.long)]
        mode = Mode(progress >= SPARSE_FROM, progress >= QUANTISED_FROM)
        # Long rows cost more memory: half as many tokens.
        tokens = self.tokens if length == self.short else self.tokens // 2
        return Step(max(1, tokens // length), length, mode)

    def drill_at(self, step: int) -> float:
        """The share of texts to repeat."""
        progress = step / self.steps
        return next((share for until, share in DRILL if progress < until), 0.0)

    def rate_at(self, step: int, since_start: int) -> float:
        """The learning rate, `since_start` steps after this process began."""
        progress = max(0.0, (step / self.steps - DECAY_FROM) / (1 - DECAY_FROM))
        cosine = 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))
        decayed = FINAL_RATE + (1 - FINAL_RATE) * cosine
        return self.rate * decayed * min(1.0, (since_start + 1) / WARM_UP)

"""Says when an engine is stuck, and where it was.

Contract: pure bookkeeping of what a client heard, on a clock it is given; whoever owns it calls `tick`
at a steady pace. Silence is counted in ticks, not in time: a client that was itself held up has not
listened, and must not blame the engine. It does not know how anything is heard, nor what to do.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from fourfold.core.client import StepInfo

BEAT_SECONDS = 0.5  # between two signs of life of an engine's process


@dataclass(frozen=True)
class WatchdogLimits:
    """Seconds: between two looks; of silence while there is work (None: it sends no signs of life);
    of one step, long enough for a GPU that compiles its kernels first."""

    tick: float = 0.25
    silence: float | None = 4.0
    step: float = 600.0


class Watchdog:
    """What is known of an engine's steps."""

    def __init__(self, limits: WatchdogLimits, clock: Callable[[], float] = time.monotonic):
        self._limits, self._clock = limits, clock
        self._silent_ticks = 0
        self._last_heard = self._changed = clock()
        self.step: StepInfo | None = None  # the latest that began
        self.in_step = False
        self.num_steps = 0  # those that are over

    @property
    def step_age(self) -> float:
        """Seconds since the latest step began or, if it is over, ended."""
        return self._clock() - self._changed

    @property
    def silence(self) -> float:
        """Seconds since anything was heard."""
        return self._clock() - self._last_heard

    def heard(self) -> None:
        """Anything came from the engine."""
        self._silent_ticks = 0
        self._last_heard = self._clock()

    def begun(self, step: StepInfo) -> None:
        """A step begins; the one before it is over."""
        self.num_steps = step.number - 1
        self.step, self.in_step, self._changed = step, True, self._clock()

    def done(self, num_steps: int) -> None:
        """A step is over."""
        self.num_steps, self.in_step, self._changed = num_steps, False, self._clock()

    def given_work(self) -> None:
        """The engine had nothing to do and now has: what it owes counts from here."""
        self._silent_ticks = 0
        if not self.in_step:
            self._changed = self._clock()

    def where(self) -> str:
        """Which step the engine is in, or was last."""
        if self.step is None:
            return "before its first step"
        return f"in {self.step}" if self.in_step else f"after {self.step}"

    def tick(self, has_work: bool) -> str | None:
        """Why the engine counts as stuck, None if it does not. An idle engine never does."""
        if not has_work:
            self._silent_ticks = 0
            return None
        self._silent_ticks += 1
        limits = self._limits
        silent = self._silent_ticks * limits.tick
        if limits.silence is not None and silent >= limits.silence:
            return f"it gave no sign of life for {silent:.1f} s"
        if self.step_age > limits.step:
            what = "the step takes" if self.in_step else "no step began for"
            return f"{what} {self.step_age:.0f} s, more than the {limits.step:.0f} s allowed"
        return None

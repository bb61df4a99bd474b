"""Layouts of steps, made once for runs of the same lengths.

Contract: host integers in, a `StepLayout` of device tensors out (ops/step.py). From one decode step to
the next it is mostly the same.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq

import torch

from fourfold.engine.sequence import Run
from fourfold.ops.step import Key, StepLayout


class Layouts:
    """Makes `StepLayout`s, and keeps the last one."""

    def __init__(self, ratios: Seq[int], ring_rows: int, device: torch.device):
        self._how = (ratios, ring_rows, device)
        self._key: Key | None = None
        self._last: StepLayout | None = None

    def of(self, runs: Seq[Run]) -> StepLayout:
        """The layout of `runs`."""
        key = [(run.count, run.num_drafts, run.samples) for run in runs]
        if self._last is None or key != self._key:
            self._key, self._last = key, StepLayout.of(key, *self._how)
        return self._last

"""Drafts of a test's choice, in place of the MTP layer's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from fourfold.engine.runner import Runner


def plant(monkeypatch: pytest.MonkeyPatch, guesses: Callable[[int, int], Sequence[int]]) -> None:
    """Let every sampling run draft `guesses(tokens known then, drafts)`; the layer runs all the same."""
    original = Runner._draft

    def planted(self: Runner, *args: Any) -> Tensor:
        drafts = original(self, *args)
        placed, _, settled, _ = args
        step, computed = placed.seats.step, placed.batch.num_computed_tokens
        known = (computed + step.known)[step.sampling] + settled.taken
        rows = [(*guesses(n, self.num_drafts), *[0] * self.num_drafts) for n in known.tolist()]
        if not rows:
            return drafts
        return torch.tensor(rows, dtype=torch.int64)[:, : self.num_drafts]

    monkeypatch.setattr(Runner, "_draft", planted)

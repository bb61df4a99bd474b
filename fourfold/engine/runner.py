"""Runs one step on the device: batch in, sampled tokens out.

Contract: the only place that calls the model. Random numbers are a function of a request's seed and
the token's absolute position, never of the batch. Token ids that `allowed` excludes are never picked.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from fourfold.core.batch import ScheduledBatch, lower
from fourfold.core.state import ModelState
from fourfold.model.v4 import DeepseekV4

SAMPLING = 0  # purpose of a random number; others are kept for later uses of the same position


def uniform(seed: int, position: int, purpose: int = SAMPLING) -> float:
    """A number in [0, 1) that depends on nothing but its arguments (Philox, counter-based)."""
    bits = np.random.Philox(key=np.array([seed, purpose], dtype=np.uint64), counter=position)
    return float(np.random.Generator(bits).random())


class Runner:
    """A model, its state, and the device they live on."""

    def __init__(
        self,
        model: DeepseekV4,
        state: ModelState,
        ring_rows: int,
        device: torch.device,
        allowed: Tensor | None,
    ):
        self.model, self.state, self.device = model, state, device
        self.ring_rows = ring_rows
        self.barred = None if allowed is None else ~allowed.to(device)

    @torch.inference_mode()
    def run(
        self,
        scheduled: ScheduledBatch,
        temperature: Sequence[float],
        top_p: Sequence[float],
        uniforms: Sequence[float],
    ) -> tuple[list[int], list[bool]]:
        """Sampled ids, one for each logits row, and whether each sequence met a non-finite number."""
        config = self.model.config
        batch = lower(scheduled, config.compress_ratios, self.ring_rows, self.device)
        out = self.model.forward(batch, self.state)
        flags = out.nonfinite.tolist()
        if not out.logits.shape[0]:
            return [], flags
        logits = out.logits.float()
        if self.barred is not None:
            logits = logits.masked_fill(self.barred, float("-inf"))

        def row(values: Sequence[float]) -> Tensor:
            return torch.tensor(values, dtype=torch.float32, device=self.device)

        ids = self.model.ops.sample(logits, row(temperature), row(top_p), row(uniforms))
        return ids.tolist(), flags

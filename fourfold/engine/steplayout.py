"""A step's runs by their lengths: the batch's layout, and which logits rows belong to whom.

Contract: host integers in, device tensors out, nothing of which depends on where sequences stand. From
one decode step to the next it is mostly the same, and the tensors are used again.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fourfold.core.batch import Layout, to_device
from fourfold.engine.sequence import Run

Key = list[tuple[int, int, bool]]


@dataclass(frozen=True)
class StepLayout:
    """S runs, R of them sampling, with up to W rows of logits each: one for the last known token and
    one for each draft."""

    layout: Layout
    known: Tensor  # [S] tokens of a run that are not drafts
    keep_versions: Tensor  # [V] the version a kept fold becomes
    sampling: Tensor  # [R] the runs that sample
    rows: Tensor  # [R, W] their logits rows; some row beyond their own
    valid: Tensor  # [R, W] bool: their own
    row_counts: Tensor  # [R] how many are their own
    draft_tokens: Tensor  # [R, W - 1] flat tokens of their drafts
    all_sample: bool

    @staticmethod
    def of(key: Key, ratios: Seq[int], ring_rows: int, device: torch.device) -> StepLayout:
        """For runs of (tokens, drafts among them, whether it samples)."""
        counts, drafts, samples = np.array(key, np.int64).reshape(-1, 3).T
        known = counts - drafts
        keeps = 1 + drafts
        versions = np.arange(keeps.sum()) - np.repeat(np.cumsum(keeps) - keeps, keeps)
        layout = Layout.of(
            counts,
            np.where(samples > 0, known - 1, counts),
            (keeps, np.repeat(known - 1, keeps) + versions),
            ratios,
            ring_rows,
            device,
        )
        sampling = np.flatnonzero(samples)
        widths = keeps[sampling]
        first = np.cumsum(widths) - widths
        columns = np.arange(widths.max(initial=1))
        rows = np.minimum(first[:, None] + columns, max(int(widths.sum()) - 1, 0))
        valid = columns < widths[:, None]
        parts = [known, versions, sampling, rows, widths, valid.astype(np.int64)]
        moved = to_device(parts, device)
        return StepLayout(
            layout,
            known=moved[0],
            keep_versions=moved[1],
            sampling=moved[2],
            rows=moved[3],
            row_counts=moved[4],
            valid=moved[5] > 0,
            draft_tokens=layout.logits_tokens[moved[3][:, 1:]],
            all_sample=len(sampling) == len(key),
        )

    def spread(self, values: Tensor, others: Tensor) -> Tensor:
        """`values [R]` of the sampling runs among `others [S]`, of which the rest's are kept."""
        return values if self.all_sample else others.index_copy(0, self.sampling, values)

    def pick(self, values: Tensor) -> Tensor:
        """Of `values [S, …]` those of the sampling runs."""
        return values if self.all_sample else values[self.sampling]


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

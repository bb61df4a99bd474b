"""The online fold: against plain softmax pooling, and bit-equal under any cut and any rollback."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

from fourfold.core.batch import ScheduledBatch, ScheduledSequence, lower
from fourfold.ops.compressor import compress, store_folds

KINDS = ((4, 2), (128, 1))


def inputs(ratio: int, series: int, tokens: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    width = series * 11
    kv, gate = (torch.randn(tokens, width, generator=generator) for _ in range(2))
    gate[3] += 60  # a token that dwarfs the others
    gate[5] -= 200
    return kv, gate, torch.randn(ratio, width, generator=generator)


def pooled(kv: Tensor, gate: Tensor, ape: Tensor, ratio: int, series: int) -> Tensor:
    """The pooling as a softmax over each window, in float64."""
    kv, gate, ape = kv.double(), gate.double(), ape.double()
    width = kv.shape[1] // series
    g = gate + ape[torch.arange(len(kv)) % ratio]
    rows = []
    for j in range(len(kv) // ratio):
        here = slice(ratio * j, ratio * (j + 1))
        values, scores = kv[here, -width:], g[here, -width:]
        if series == 2 and j:
            before = slice(ratio * (j - 1), ratio * j)
            values = torch.cat([kv[before, :width], values])
            scores = torch.cat([g[before, :width], scores])
        rows.append((torch.softmax(scores, 0) * values).sum(0))
    return torch.stack(rows)


class Folder:
    """Runs one sequence through `compress` with kept folds: slot 0 is live, 1 … are draft versions."""

    def __init__(self, ratio: int, series: int, data: tuple[Tensor, Tensor, Tensor]):
        self.ratio, self.series = ratio, series
        self.kv, self.gate, self.ape = data
        self.folds = torch.full((9, series, 3, data[0].shape[1] // series), float("nan"))
        self.at, self.live = 0, -1
        self.rows: dict[int, Tensor] = {}

    def run(self, count: int, keeps: list[tuple[int, int]]) -> None:
        """Fold the next `count` tokens, keeping the fold after token i in slot s for each (i, s)."""
        begin, end = self.at, self.at + count
        pages = range(-(-len(self.kv) // 256))
        run = ScheduledSequence([0] * count, begin, pages, fold_source=self.live, fold_keeps=keeps)
        batch = lower(ScheduledBatch((run,)), (self.ratio,), 1, torch.device("cpu"))
        emission = batch.emissions[self.ratio]
        rows, kept = compress(
            self.kv[begin:end],
            self.gate[begin:end],
            self.ape,
            self.folds,
            batch,
            emission,
            self.ratio,
            torch.float32,
        )
        store_folds(self.folds, kept, batch.fold_targets)
        columns = zip(emission.positions.tolist(), emission.slots.tolist(), rows, strict=True)
        for position, slot, row in columns:
            if slot >= 0:
                self.rows[position // self.ratio] = row
        self.at = end

    def result(self) -> Tensor:
        return torch.stack([self.rows[j] for j in sorted(self.rows)])


@pytest.mark.parametrize(("ratio", "series"), KINDS)
def test_fold_equals_softmax_pooling(ratio: int, series: int) -> None:
    data = inputs(ratio, series, 3 * ratio + 2, 0)
    folder = Folder(ratio, series, data)
    folder.run(len(data[0]), [])
    expected = pooled(*data, ratio, series)
    assert torch.allclose(folder.result().double(), expected, atol=1e-5)


@pytest.mark.parametrize(("ratio", "series"), KINDS)
def test_any_chunking_is_bit_equal(ratio: int, series: int) -> None:
    data = inputs(ratio, series, 2 * ratio + 131, 1)
    whole = Folder(ratio, series, data)
    whole.run(len(data[0]), [(len(data[0]) - 1, 0)])
    rng = random.Random(3)
    for _ in range(30):
        cut = Folder(ratio, series, data)
        while cut.at < len(data[0]):
            count = min(rng.choice([1, 1, 2, 3, 4, 5, 7, 50, 128]), len(data[0]) - cut.at)
            cut.run(count, [(count - 1, 0)])
            cut.live = 0
        assert torch.equal(cut.result(), whole.result())
        assert torch.equal(cut.folds[0], whole.folds[0])


@pytest.mark.parametrize(
    ("ratio", "series"), [KINDS[0], pytest.param(*KINDS[1], marks=pytest.mark.full)]
)
def test_rollback_to_any_draft_position_is_bit_equal(ratio: int, series: int) -> None:
    """Verify k drafts, accept some, go on from the kept version: as if the rest had never run."""
    data = inputs(ratio, series, 2 * ratio + 67, 2)
    whole = Folder(ratio, series, data)
    whole.run(len(data[0]), [])
    rng = random.Random(4)
    for drafts in (1, 2, 3):
        for _ in range(10):
            folder, side = Folder(ratio, series, data), 1
            while folder.at < len(data[0]):
                count = min(1 + drafts, len(data[0]) - folder.at)
                begin = folder.at
                keeps = [(i, side + i) for i in range(count)]
                folder.run(count, keeps)
                accepted = rng.randrange(count)  # the last token that stands
                folder.at, folder.live = begin + accepted + 1, side + accepted
                side = 5 - side  # versions alternate, so a run never reads what it writes
                # Rows of rejected tokens are overwritten when their positions run again.
            assert torch.equal(folder.result(), whole.result())


def test_empty_fold_takes_its_first_token_directly() -> None:
    data = inputs(4, 2, 8, 0)
    folder = Folder(4, 2, data)
    folder.run(1, [(0, 0)])
    top, total, weighted = folder.folds[0, 0]
    gate = data[1][0, 11:] + data[2][0, 11:]
    assert torch.equal(top, gate)
    assert torch.equal(total, torch.ones(11))
    assert torch.equal(weighted, data[0][0, 11:])

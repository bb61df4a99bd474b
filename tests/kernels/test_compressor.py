"""The fold in the interpreter: against the body, and bit-equal under any cut and any rollback."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch

from fourfold.core.batch import ScheduledBatch, ScheduledSequence, lower
from fourfold.ops.registry import Kernel
from tests.kernels import interpreter
from tests.kernels.interpreter import (
    assert_close,
    assert_equals_body,
    driver,
    interpreted,
    poisoned,
)
from tests.ops import test_compressor as definition

pytest.importorskip("triton", reason="Triton is not installed")
pytestmark = pytest.mark.full

KINDS = ((4, 2), (128, 1))


@driver
def test_in_the_interpreter() -> None:
    interpreter.run(__file__)


@driver
@pytest.mark.slow
def test_more_in_the_interpreter() -> None:
    interpreter.run(__file__, "slow")


def kernels() -> dict[str, Kernel]:
    from fourfold.kernels.triton.compressor import KERNELS

    return {k.op: k for k in KERNELS}


@interpreted
@pytest.mark.parametrize("op", ["compress", "store_folds", "compress_rows"])
def test_equals_the_body(op: str) -> None:
    assert_equals_body(kernels()[op])


@pytest.fixture
def folder(monkeypatch: pytest.MonkeyPatch) -> type[definition.Folder]:
    """The definition's test harness, run on the kernels."""
    monkeypatch.setattr(definition, "compress", kernels()["compress"].run)
    monkeypatch.setattr(definition, "store_folds", kernels()["store_folds"].run)
    return definition.Folder


def completed(folder: definition.Folder) -> torch.Tensor:
    """The rows whose last token has run; there may be candidates that nobody completed."""
    return torch.stack([folder.rows[j] for j in range(folder.at // folder.ratio)])


@interpreted
@pytest.mark.parametrize(("ratio", "series"), KINDS)
def test_any_chunking_is_bit_equal(
    ratio: int, series: int, folder: type[definition.Folder]
) -> None:
    data = definition.inputs(ratio, series, ratio + 77, 1)
    whole = folder(ratio, series, data)
    whole.run(len(data[0]), [(len(data[0]) - 1, 0)])
    rng = random.Random(3)
    for _ in range(3):
        cut = folder(ratio, series, data)
        while cut.at < len(data[0]):
            count = min(rng.choice([1, 2, 3, 5, 7, 50, 128]), len(data[0]) - cut.at)
            cut.run(count, [(count - 1, 0)])
            cut.live = 0
        assert torch.equal(completed(cut), completed(whole))
        assert torch.equal(cut.folds[0], whole.folds[0])


@interpreted
@pytest.mark.parametrize(
    ("ratio", "series"), [KINDS[0], pytest.param(*KINDS[1], marks=pytest.mark.slow)]
)
def test_rollback_to_any_draft_position_is_bit_equal(
    ratio: int, series: int, folder: type[definition.Folder]
) -> None:
    data = definition.inputs(ratio, series, ratio + 9, 2)
    whole = folder(ratio, series, data)
    whole.run(len(data[0]), [])
    rng = random.Random(4)
    rolled, side, drafts = folder(ratio, series, data), 1, 2
    while rolled.at < len(data[0]):
        count = min(1 + drafts, len(data[0]) - rolled.at)
        begin = rolled.at
        rolled.run(count, [(i, side + i) for i in range(count)])
        accepted = rng.randrange(count)
        rolled.at, rolled.live = begin + accepted + 1, side + accepted
        side = 5 - side
    assert torch.equal(completed(rolled), completed(whole))


@interpreted
@pytest.mark.parametrize(("ratio", "series"), KINDS)
def test_alone_and_beside_others_with_numbers_that_are_not(ratio: int, series: int) -> None:
    """Sequences of a batch, each as if alone; candidates nobody completes and padding lanes included."""
    run, width = kernels()["compress"].run, 20
    spans = ((0, 1), (ratio - 1, 2), (3, ratio + 2), (2 * ratio, 1), (ratio + 1, 2 * ratio))
    sequences = [
        ScheduledSequence([0] * n, c, (2 * i, 2 * i + 1), fold_source=i if c else -1,
                          fold_keeps=[(n - 1, i)])
        for i, (c, n) in enumerate(spans)
    ]  # fmt: skip
    sequences.append(ScheduledSequence([0], 0, (), -1, -1, [(0, -1)]))

    def step(chosen: list[int]) -> tuple[torch.Tensor, ...]:
        batch = lower(
            ScheduledBatch(tuple(sequences[i] for i in chosen)), (ratio,), 8, torch.device("cpu")
        )
        begins = [sum(len(s) for s in sequences[:i]) for i in chosen]
        tokens = torch.cat(
            [b + torch.arange(len(sequences[i])) for b, i in zip(begins, chosen, strict=True)]
        )
        with poisoned():
            out = run(
                kv[tokens], gate[tokens], ape, folds, batch, batch.emissions[ratio], ratio,
                torch.bfloat16,
            )  # fmt: skip
        body = interpreter.body("compress")
        expected = body(
            kv[tokens], gate[tokens], ape, folds, batch, batch.emissions[ratio], ratio,
            torch.bfloat16,
        )  # fmt: skip
        done = batch.emissions[ratio].slots >= 0
        assert_close((out[0][done], out[1]), (expected[0][done], expected[1]), 1.6e-2)
        return out[0][done], out[1]

    total = sum(len(s) for s in sequences)
    kv, gate = torch.randn(total, series * width), torch.randn(total, series * width) * 5
    kv[4, 2], gate[5, 3] = float("nan"), float("nan")
    ape = torch.randn(ratio, series * width)
    folds = torch.rand(len(sequences), series, 3, width) + 1
    rows, kept = step(list(range(len(sequences))))
    before = 0
    for i in range(len(sequences)):
        own_rows, own_kept = step([i])
        assert torch.equal(own_kept.nan_to_num(7.0), kept[i : i + 1].nan_to_num(7.0))
        part = rows[before : before + len(own_rows)]
        assert torch.equal(own_rows.nan_to_num(7.0), part.nan_to_num(7.0))
        before += len(own_rows)


@interpreted
def test_token_indices_beyond_the_batch_are_not_read() -> None:
    """What a candidate row holds does not matter, but nothing outside the batch is touched."""
    ratio, width = 4, 16
    run = ScheduledSequence([0, 0, 0], 0, (0,), fold_keeps=[(2, -1)])
    batch = lower(ScheduledBatch((run,)), (ratio,), 8, torch.device("cpu"))
    emission = replace(batch.emissions[ratio], tokens=torch.tensor([1 << 40]))
    kv, folds = torch.randn(3, 2 * width), torch.zeros(1, 2, 3, width)
    rows, kept = kernels()["compress"].run(
        kv, kv, torch.zeros(ratio, 2 * width), folds, batch, emission, ratio, torch.float32
    )
    assert torch.isfinite(rows).all()
    kernels()["store_folds"].run(folds, kept, batch.fold_targets)
    assert not folds.any()

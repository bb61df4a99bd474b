"""What is around the model in a step, in the interpreter: the bodies' integers, every one of them."""

from __future__ import annotations

import copy
import random
from typing import Any

import pytest
import torch

from fourfold.ops.registry import CaseMaker, Kernel
from fourfold.ops.step import Columns, StepLayout, place_step, seat_runs, settle_step
from tests.kernels import interpreter
from tests.kernels.interpreter import (
    assert_close,
    assert_equals_body,
    driver,
    interpreted,
    poisoned,
)

pytest.importorskip("triton", reason="Triton is not installed")
pytestmark = pytest.mark.full

OPS = ["seat_runs", "place_step", "settle_step", "next_tokens", "step_after", "keep_drafts"]


@driver
def test_in_the_interpreter() -> None:
    interpreter.run(__file__)


def kernels() -> dict[str, Kernel]:
    from fourfold.kernels.triton.step import KERNELS

    return {k.op: k for k in KERNELS}


@interpreted
@pytest.mark.parametrize("op", OPS)
def test_equals_the_body(op: str) -> None:
    assert_equals_body(kernels()[op])


def columns(rng: random.Random, slots: int, drafts: int, pages: int) -> Columns:
    """Sequences anywhere; one in five is not alive."""
    make = CaseMaker.seeded(torch.float32, seed=rng.randrange(1 << 20))
    lengths = make.randint(pages * 200, slots)
    table = make.randint(90, slots, pages)
    table[torch.arange(pages) > (lengths // 256 + 1).unsqueeze(1)] = -1
    return Columns(
        tokens=make.randint(6, slots, 1 + drafts),
        lengths=lengths * make.randint(2, slots),
        version=make.randint(1 + drafts, slots),
        alive=make.randint(5, slots) > 0,
        block_table=table,
        streams=make.randn(slots, 3, 700, dtype=torch.bfloat16),
        ends=lengths + make.randint(9, slots, low=1),
        stops=make.randint(6, slots, 17, low=-1) * (make.randint(4, slots, 1) > 2) - 1,
        random=make.randint(1 << 62, slots),
        top_k=make.randint(9, slots),
        temperature=make.randn(slots).abs(),
        top_p=make.randn(slots),
        min_p=make.randn(slots),
    )


def bodies() -> Any:
    return interpreter.KernelPlan.bodies(interpreter.OPS)


@interpreted
@pytest.mark.parametrize("seed", range(12))
def test_a_whole_step_of_any_runs(seed: int) -> None:
    """Seats, batch, and what is settled and left in the columns, with slots of nobody among them."""
    rng = random.Random(seed)
    drafts, count, pages = rng.randrange(4), rng.choice([1, 3, 140]), rng.choice([1, 4, 1030])
    table = columns(rng, count + 2, drafts, pages)
    runs = [
        (1 + drafts, drafts, True)
        if rng.random() < 0.6
        else (rng.randrange(1, 150 if count < 9 else 4), 0, rng.random() < 0.5)
        for _ in range(count)
    ]
    step = StepLayout.of(runs, rng.choice([(0, 4, 128), (4,), ()]), 131, torch.device("cpu"))
    slots = torch.tensor(rng.sample(range(count + 2), count))
    run = kernels()
    with poisoned():
        seats = run["seat_runs"].run(table, step, slots, 9)
    expected = seat_runs(table, step, slots, 9)
    assert_close(seats, expected, 0.0)
    known = torch.randint(-1, 6, (step.layout.offsets.shape[0],)) if rng.random() < 0.5 else None
    with poisoned():
        placed = run["place_step"].run(None, table, seats, known)
    assert_close(placed, place_step(bodies(), table, seats, known), 0.0)

    batch = placed[0]
    rows = batch.logits_tokens
    sampled = batch.token_ids.roll(-1)[rows]
    sampled[torch.rand(sampled.shape) < 0.3] = 3
    nonfinite = torch.rand(count) < 0.1
    streams = torch.randn(batch.num_tokens, 3, 700).bfloat16()
    ours, theirs = copy.deepcopy(table), copy.deepcopy(table)
    arguments = (seats, batch, sampled, nonfinite, streams)
    with poisoned():
        settled = run["settle_step"].run(None, ours, *arguments)
    assert_close(settled, settle_step(bodies(), theirs, *arguments), 0.0)
    assert_close(ours, theirs, 0.0)


@interpreted
def test_many_of_nobody_leave_no_trace() -> None:
    """What pads a captured step sits in one slot: it stays dead, and the others are as without it."""
    rng = random.Random(3)
    table = columns(rng, 6, 1, 4)
    table.alive[:] = torch.tensor([True, True, True, True, True, False])
    run, device = kernels(), torch.device("cpu")
    left = []
    for slots in ([2, 0, 3], [2, 0, 3, 5, 5, 5, 5]):
        ours = copy.deepcopy(table)
        step = StepLayout.of([(2, 1, True)] * len(slots), (4, 128), 131, device)
        seats = run["seat_runs"].run(ours, step, torch.tensor(slots), 17)
        batch, numbers = run["place_step"].run(None, ours, seats, None)
        assert batch.state_slots[3:].tolist() == [-1] * (len(slots) - 3)
        assert (batch.ring_slots[6:] == -1).all()
        assert (batch.fold_targets[6:] == -1).all()
        flags = torch.zeros(len(slots), dtype=torch.bool)
        streams = torch.ones(2 * len(slots), 3, 700).bfloat16()
        arguments = (seats, batch, (numbers * 6).long(), flags, streams)
        settled = run["settle_step"].run(None, ours, *arguments)
        left.append((ours, settled.answers[:3], numbers[:6]))
    for a, b in zip(interpreter.tensors(left[0]), interpreter.tensors(left[1]), strict=True):
        assert torch.equal(a[:5], b[:5])
    assert not left[1][0].alive[5]

"""Captured decode steps: one for each of a few batch sizes, replayed for every batch up to it.

    slots ─ copy ─▶ [ forward ] ─▶ logits ─ adjusted where requests ask ─▶ [ finish ] ─▶ answers

Contract: a captured half is a pure function of device memory: slots that stand in one buffer, the slot
table, the state. Nothing depends on a value the host reads, no shape on the batch. What pads a batch
sits in the slot table's slot of nobody and writes nowhere. A replay is bit for bit what the same batch
gives without capture. Steps with prompts in them are not captured: their shapes are too many.
"""

from __future__ import annotations

import bisect
import gc
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Seq
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fourfold.engine.sequence import Run
from fourfold.ops.step import StepLayout

if TYPE_CHECKING:
    from fourfold.engine.runner import Finished, Placed, Runner

Record = Callable[[Callable[[], None]], Callable[[], None]]
"""Makes of some device work a call that does it again."""


@contextmanager
def _nothing_freed_meanwhile() -> Iterator[None]:
    """Keeps the cycle collector out: freeing another engine's graph breaks a capture under way."""
    enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


class CudaRecorder:
    """Captures into CUDA (or HIP) graphs that share their memory: they never run at once."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream()

    def __call__(self, work: Callable[[], None]) -> Callable[[], None]:
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            work()  # compiles, and lets libraries allocate what they keep
        torch.cuda.current_stream().wait_stream(self._stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream):
            work()
        replay: Callable[[], None] = graph.replay
        return replay


class DecodeGraph:
    """A decode step of `size` sequences, in two halves."""

    def __init__(self, runner: Runner, size: int, slots: Tensor, logits: Tensor, record: Record):
        self._runner, self._size, self._slots = runner, size, slots
        rows = size * runner.slots.versions
        self._logits = logits[:rows]
        key = [(runner.slots.versions, runner.num_drafts, True)] * size
        self._step = StepLayout.of(
            key, runner.model.config.compress_ratios, runner.ring_rows, runner.device
        )
        self._placed: Placed | None = None
        self._finished: Finished | None = None
        with torch.inference_mode():
            slots.fill_(runner.slots.nobody)
            self._replay_forward = record(self._forward)
            self._replay_finish = record(self._finish)

    def forward(self, slots: Seq[int]) -> Placed:
        """Run the model for the sequences in `slots`; see `Runner.forward`."""
        padded = torch.tensor([*slots, *[self._runner.slots.nobody] * (self._size - len(slots))])
        if self._slots.device.type != "cpu":
            padded = padded.pin_memory()
        self._slots[: self._size].copy_(padded, non_blocking=True)
        self._replay_forward()
        assert self._placed is not None
        return self._placed

    def finish(self, logits: Tensor) -> Finished:
        """Sample from `logits`, those of `forward` or some made of them; see `Runner.finish`."""
        if logits is not self._logits:
            self._logits.copy_(logits)
        self._replay_finish()
        assert self._finished is not None
        return self._finished

    def _forward(self) -> None:
        runner = self._runner
        seats = runner.slots.seats(self._step, self._slots[: self._size])
        placed = runner.forward(seats, None)
        self._logits.copy_(placed.logits)
        # The step's own logits are let go: every size would keep its own.
        out = replace(placed.out, logits=self._logits)
        self._placed = placed._replace(logits=self._logits, out=out)

    def _finish(self) -> None:
        assert self._placed is not None
        self._finished = self._runner.finish(self._placed, self._logits, None)


class DecodeGraphs:
    """Captured decode steps of a runner for the batch `sizes`."""

    def __init__(self, runner: Runner, sizes: Seq[int], record: Record | None = None):
        self._num_drafts = runner.num_drafts
        record = record or CudaRecorder()
        most = max(sizes)
        slots = torch.zeros(most, dtype=torch.int64, device=runner.device)
        shape = (most * runner.slots.versions, runner.model.config.vocab_size)
        logits = torch.zeros(shape, dtype=torch.float32, device=runner.device)
        self._sizes = sorted(sizes)
        # The largest first: the smaller ones then find all their memory in its.
        with _nothing_freed_meanwhile():
            self._graphs = {
                size: DecodeGraph(runner, size, slots, logits, record)
                for size in reversed(self._sizes)
            }

    def find(self, runs: Seq[Run]) -> DecodeGraph | None:
        """The step to replay for `runs`; None if they are not all decodes with all their drafts."""
        if len(runs) > self._sizes[-1]:
            return None
        if not all(run.decodes and run.num_drafts == self._num_drafts for run in runs):
            return None
        return self._graphs[self._sizes[bisect.bisect_left(self._sizes, len(runs))]]

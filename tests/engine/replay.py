"""Every op of a model, fed the same inputs in another batch: each token's result against a recording.

    record   each sequence alone, in one pass: every op call's results, by call and token
    replay   other batches and chunks: a call's results are compared, token by token, with the recorded
             ones and then replaced by them, so that the next op is again fed what it was fed then

Contract: what differs is then one op's own doing; no rounding flip of an earlier op is in the way.
Results of an op that writes state, and folds, are left as they are: they are compared where they are
read.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fourfold.core.batch import ForwardBatch
from fourfold.core.rows import RowPages
from fourfold.core.tensor import QuantTensor, Weight
from fourfold.dist.comm import SingleComm
from fourfold.model.v4 import DeepseekV4
from fourfold.ops.catalog import OPS
from fourfold.ops.registry import Kernel, KernelPlan, Op
from tests.support import Driver

Key = tuple[int, int]  # sequence, position
STATEFUL = ("store_rows", "store_folds", "nonfinite_sequences")


class Replay:
    """A model whose ops are watched. `worst` is, by op, the largest difference in a replay, relative to
    the largest number of the token's recorded result: 0 where all are equal to the last bit. Linear
    layers with quantised weights go by the name "quantised linear"."""

    def __init__(self, model: DeepseekV4, weights: dict[str, Weight]):
        chosen = {o.name: Kernel(o.name, "watched", self._watch(o)) for o in OPS}
        plan = KernelPlan(OPS, chosen, ())
        self.model = DeepseekV4(model.config, weights, plan, SingleComm())
        self._forward = self.model.forward
        self.model.forward = self._begin  # type: ignore[method-assign]
        self.recording = True
        self.recorded: dict[tuple[int, int, int], Tensor] = {}  # by call, sequence, position
        self.worst: dict[str, float] = {}
        self.numbers: Sequence[int] = ()  # of the sequences in a batch, by state slot
        self._call = 0
        self._batch: ForwardBatch | None = None

    def run(
        self, sequences: Sequence[Sequence[int]], numbers: Sequence[int], formats: Any
    ) -> Driver:
        """A driver of `sequences`, which are those recorded as `numbers`."""
        self.numbers = numbers
        return Driver(self.model, sequences, formats)

    def _begin(self, batch: ForwardBatch, *args: Any) -> Any:
        self._batch, self._call = batch, 0
        return self._forward(batch, *args)

    def _watch(self, op: Op) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            number, self._call = self._call, self._call + 1
            result = op.body(*args, **kwargs)
            if op.name in STATEFUL:
                return result
            quantised = op.name == "linear" and isinstance(args[1], QuantTensor)
            name = "quantised linear" if quantised else op.name
            rows = self._rows(args[1:] if op.composite else args)
            parts = result if isinstance(result, tuple) else (result,)
            if op.name == "compress":
                parts = parts[:1]  # the others are folds
            checked = tuple(
                self._check(name, number * 8 + i, part, rows) for i, part in enumerate(parts)
            )
            if op.name == "compress":
                return checked[0], result[1]
            return checked if isinstance(result, tuple) else checked[0]

        return run

    def _rows(self, args: Sequence[Any]) -> list[Key | None]:
        """Which token each row of the results belongs to; compressed rows go by their first one."""
        batch = self._batch
        assert batch is not None
        owners = batch.state_slots[batch.sequence_ids].tolist()
        for emission in batch.emissions.values():
            if any(a is emission or a is emission.positions for a in args):
                kept = (emission.slots >= 0).tolist()
                tokens, positions = emission.tokens.tolist(), emission.positions.tolist()
                return [
                    (self.numbers[owners[t]], p) if k else None
                    for t, p, k in zip(tokens, positions, kept, strict=True)
                ]
        return [(self.numbers[o], p) for o, p in zip(owners, batch.positions.tolist(), strict=True)]

    def _check(self, name: str, call: int, part: Any, rows: list[Key | None]) -> Any:
        if isinstance(part, RowPages):
            parts = [part.data()[0]]
            if part.format.scale_bytes:
                parts.append(part.scales()[0])
            storage = part.storage.clone()
            copy = replace(part, storage=storage)
            views = [copy.data()[0], *([copy.scales()[0]] if len(parts) > 1 else [])]
            for i, (view, value) in enumerate(zip(views, parts, strict=True)):
                view.copy_(self._compare(name, call + i * 100_000, value, rows))
            return copy
        return self._compare(name, call, part, rows)

    def _compare(self, name: str, call: int, part: Tensor, rows: list[Key | None]) -> Tensor:
        assert part.shape[0] == len(rows), (name, part.shape, len(rows))
        out = part.clone()
        for i, key in enumerate(rows):
            if key is None:
                continue
            if self.recording:
                self.recorded[call, *key] = part[i].clone()
                continue
            expected = self.recorded[call, *key]
            difference = 0.0
            if not torch.equal(part[i], expected):
                scale = float(expected.double().abs().max())
                difference = float((part[i].double() - expected.double()).abs().max()) / scale
            self.worst[name] = max(self.worst.get(name, 0.0), difference)
            out[i] = expected
        return out

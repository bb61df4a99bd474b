"""What a step takes of memory, counted without any: tensors of the meta device, made and dropped.

    Collector.collect ─ every tensor made, every one gone ─▶ Trace ─▶ bytes at once, room it needs

A step's Python code runs as on a GPU, kernels' host code included; only launches do nothing. So what is
alive at once is what is alive at once there, but for scratch that libraries take inside an operation.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

ROUND = 512  # bytes: the caching allocator's unit
SMALL = 1 << 20  # tensors up to this size come from small segments of their own


def _storages(values: Any) -> Iterator[torch.UntypedStorage]:
    for each in tree_iter(values):
        if isinstance(each, Tensor):
            yield each.untyped_storage()


@dataclass
class Trace(TorchDispatchMode):
    """Tensors made (number, bytes) and gone (number, 0) while it is active, in order."""

    events: list[tuple[int, int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()
        self._alive: dict[int, tuple[int, StorageWeakRef]] = {}

    def sweep(self) -> None:
        """Note what is gone."""
        for key, (number, storage) in list(self._alive.items()):
            if storage.expired():
                del self._alive[key]
                self.events.append((number, 0))

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        self.sweep()
        given = {storage._cdata for storage in _storages((args, kwargs))}
        for storage in _storages(out):
            key = storage._cdata
            if key not in given and key not in self._alive:
                number = len(self.events)
                self._alive[key] = number, StorageWeakRef(storage)
                self.events.append((number, storage.nbytes()))
        return out

    @property
    def most(self) -> int:
        """Bytes alive at once, at most."""
        most = now = 0
        sizes: dict[int, int] = {}
        for number, size in self.events:
            now += size - sizes.pop(number, 0)
            sizes[number] = size
            most = max(most, now)
        return most


def room(traces: Iterable[Trace]) -> int:
    """Bytes that one block of memory needs so that all `traces`, one after the other, find room in it:
    each tensor at the start of the smallest gap that holds it, as PyTorch's allocator does."""
    return max((_room(trace.events) for trace in traces), default=0)


def _room(events: list[tuple[int, int]]) -> int:
    taken: list[tuple[int, int]] = []  # (begin, end), in order
    places: dict[int, tuple[int, int]] = {}
    most = 0
    for number, size in events:
        if not size:
            if number in places:
                taken.remove(places.pop(number))
            continue
        if size <= SMALL:
            continue
        size += -size % ROUND
        gaps = zip([0, *(end for _, end in taken)], [*(b for b, _ in taken), 1 << 62], strict=True)
        _, begin = min((end - begin, begin) for begin, end in gaps if end - begin >= size)
        places[number] = begin, begin + size
        bisect.insort(taken, places[number])
        most = max(most, begin + size)
    return most

"""Side streams: independent work of a layer beside its main chain, in captured steps.

    main ──┬── queries, own row ──┬── attention ──┬── router ──┬── experts
           ├── compressor ────────┤               └── shared ──┘
           └── indexer ───────────┘

Contract: a decode step of few tokens is a chain of kernels that each fill a small part of the GPU; a
captured graph knows which of them wait for which. Outside capture everything runs in turn: a prompt's
kernels fill the GPU, and their memory need not be watched across streams. A side stream first waits for
the main one and is joined before the caller reads its result, so memory freed on either is written again
only behind those who read it.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import cycle
from typing import TypeVar

import torch

from fourfold.model.parts import Beside, in_turn

Result = TypeVar("Result")

LANES = 2  # a compressor's and an indexer's


class SideStreams:
    """`Beside` on a GPU."""

    def __init__(self, device: torch.device):
        self._streams = cycle([torch.cuda.Stream(device) for _ in range(LANES)])

    def __call__(self, work: Callable[[], Result]) -> Callable[[], Result]:
        if not torch.cuda.is_current_stream_capturing():
            return in_turn(work)
        side = next(self._streams)
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            result = work()

        def join() -> Result:
            torch.cuda.current_stream().wait_stream(side)
            return result

        return join


def beside(device: torch.device) -> Beside:
    """How a model on `device` runs independent work."""
    return in_turn if device.type == "cpu" else SideStreams(device)

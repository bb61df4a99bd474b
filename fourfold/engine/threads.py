"""How many threads a step runs on where the device is a CPU.

Contract: `step_threads` decides once, from the model's size; `running_on` holds for a step and puts back
what the process had. A thread count changes no definition and no choice of kernels.

A small model's operations take microseconds. Handing one to a second core costs as much, and where that
core has other work (the server, its client, another program) the first one waits for it at the end of
every operation: measured on 2 cores beside other programs, a decode step of the built-in checkpoint took
98 ms on two threads and 20 ms on one, a prompt of 4,000 tokens 44 s and 1.4 s.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

SMALL_MODEL = 256 << 20
"""Bytes of weights in memory up to which a model's steps run on one thread."""


def step_threads(device: torch.device, weight_bytes: int) -> int | None:
    """Threads of a step; None: as many as the process has."""
    return 1 if device.type == "cpu" and weight_bytes <= SMALL_MODEL else None


def note(threads: int | None) -> tuple[str, ...]:
    """What there is to tell of it."""
    if threads is None:
        return ()
    limit = SMALL_MODEL >> 20
    return (f"steps run on one CPU thread: the weights take less than {limit} MiB",)


@contextmanager
def running_on(threads: int | None) -> Iterator[None]:
    """Give torch so many threads (None: as it is)."""
    before = torch.get_num_threads()
    if threads is None or threads == before:
        yield
        return
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)

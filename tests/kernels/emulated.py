"""Runs kernels' AMD machine code in the interpreter of tools/gcn, from the launches ops make."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from torch import Tensor, uint8

from fourfold.core.device import Arch
from fourfold.kernels.targets import Launch, stand_in
from tools.gcn import Kernel


def bytes_of(tensor: Tensor) -> Any:
    """A tensor's memory from its first to its last element: what a kernel may touch of it."""
    if not tensor.numel():
        return np.zeros(0, np.uint8)
    last = sum(
        (size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)
    )
    return tensor.as_strided((last + 1,), (1,)).view(uint8).numpy()


@contextmanager
def emulated(arch: Arch) -> Iterator[dict[str, int]]:
    """Launches inside the block compile for `arch` and run here, on CPU tensors.

    Yields instructions run, by function. Unknown opcodes and faults raise at the launch.
    """
    counts: dict[str, int] = {}

    def run(launch: Launch) -> None:
        kernel = Kernel(
            launch.assembly, arch.name, launch.signature, launch.shared, launch.num_warps
        )
        assert not kernel.unsupported(), (launch.function, kernel.unsupported())
        arguments = [bytes_of(a) if isinstance(a, Tensor) else a for a in launch.arguments]
        counts[launch.function] = counts.get(launch.function, 0) + kernel.launch(
            launch.grid, arguments
        )

    with stand_in(arch, run):
        yield counts

"""Runs kernels' AMD machine code in the interpreter of tools/gcn, from the launches ops make."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
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


@lru_cache(maxsize=64)
def kernel_of(
    assembly: str, arch: str, signature: tuple[tuple[str, str], ...], shared: int, num_warps: int
) -> Kernel:
    """One binary, read once for all its launches."""
    kernel = Kernel(assembly, arch, dict(signature), shared, num_warps)
    assert not kernel.unsupported(), kernel.unsupported()
    return kernel


@contextmanager
def emulated(arch: Arch) -> Iterator[dict[str, int]]:
    """Launches inside the block compile for `arch` and run here, on CPU tensors.

    Yields instructions run, by function. Unknown opcodes and faults raise at the launch.
    """
    counts: dict[str, int] = {}

    def run(launch: Launch) -> None:
        signature = tuple(launch.signature.items())
        kernel = kernel_of(launch.assembly, arch.name, signature, launch.shared, launch.num_warps)
        before = kernel.count
        arguments = [bytes_of(a) if isinstance(a, Tensor) else a for a in launch.arguments]
        ran = kernel.launch(launch.grid, arguments) - before
        counts[launch.function] = counts.get(launch.function, 0) + ran

    with stand_in(arch, run):
        yield counts

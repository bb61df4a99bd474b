"""A GPU that is not here: Triton compiles for it, and a launch is handed to whoever asked.

    with stand_in(ARCHS["gfx942"], on_launch):
        kernel.run(...)            # on CPU or meta tensors; every launch compiles and reaches `on_launch`

Contract: between `stand_in`'s start and end Triton believes that the architecture's GPU is the current
device: arguments are specialised, binaries compiled and cached just as they are there. Nothing runs on
its own; `on_launch` may. One thread at a time, as Triton's driver is one for the process. This file knows
neither ops nor kernels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.backends.driver import Benchmarker, DriverBase
from triton.runtime import driver
from triton.runtime.cache import get_cache_manager

from fourfold.core.device import Arch, Feature
from fourfold.core.errors import KernelError

_ANY_SIZE = 1 << 30  # resources are judged by their own check, not while launching
_THREADS = 1024


def triton_target(arch: Arch) -> GPUTarget:
    """What Triton calls `arch`. Raises `KernelError` for one it does not compile for."""
    if Feature.TRITON not in arch.features:
        raise KernelError(f"{arch.name} is no GPU: there is nothing to compile for it")
    if arch.name.startswith("sm_"):
        return GPUTarget("cuda", int(arch.name.removeprefix("sm_")), arch.wave_size)
    return GPUTarget("hip", arch.name, arch.wave_size)


@dataclass(frozen=True)
class Launch:
    """One launch of a compiled kernel.

    `signature` gives the type of each of `arguments` (tensors, ints, floats), constants left out;
    `assembly` is the binary's text, PTX or AMD's; `shared` is in bytes.
    """

    function: str
    grid: tuple[int, int, int]
    signature: Mapping[str, str]
    arguments: tuple[Any, ...]
    assembly: str
    shared: int
    num_warps: int


OnLaunch = Callable[[Launch], None]


def ignore(launch: Launch) -> None:
    """An `on_launch` that leaves outputs as they are."""


def read_assembly(name: str, digest: str) -> str:
    """The text of a compiled kernel, from Triton's cache."""
    files: Mapping[str, str] = get_cache_manager(digest).get_group(f"{name[:150]}.json") or {}
    for file, path in files.items():
        if file.endswith((".ptx", ".amdgcn")):
            return Path(path).read_text("utf-8")
    raise KernelError(f"the compile cache holds no assembly of {name}")


class StandInDriver(DriverBase):
    """Triton's view of a device: `arch`, with launches going to `on_launch`."""

    def __init__(self, arch: Arch, on_launch: OnLaunch):
        super().__init__()
        self.arch, self.target, self.on_launch = arch, triton_target(arch), on_launch
        self.utils = SimpleNamespace(
            get_device_properties=lambda device: {"max_shared_mem": _ANY_SIZE},
            load_binary=lambda *binary: (object(), object(), 0, 0, _THREADS),
        )

    @classmethod
    def is_active(cls) -> bool:
        """Never found by itself: it is set."""
        return False

    def map_python_to_cpp_type(self, ty: str) -> str:
        """Types keep their names: nothing here is compiled by a C compiler."""
        return ty

    def get_current_device(self) -> StandInDriver:
        """Itself: binaries in memory are kept by device, and must not be mistaken for another's."""
        return self

    def get_current_stream(self, device: StandInDriver) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_benchmarker(self) -> Benchmarker:
        raise KernelError(f"{self.arch.name} is not here: nothing can be timed")

    def launcher_cls(self, source: Any, metadata: Any) -> Callable[..., None]:
        """What a compiled kernel calls to be launched."""
        kept = [n for n, kind in enumerate(source.signature.values()) if kind != "constexpr"]
        signature = {n: kind for n, kind in source.signature.items() if kind != "constexpr"}

        def launch(x: int, y: int, z: int, *rest: Any) -> None:
            # stream, function, metadata twice, two hooks; then every parameter's argument
            arguments: Sequence[Any] = rest[6:]
            self.on_launch(
                Launch(
                    source.name,
                    (x, y, z),
                    signature,
                    tuple(arguments[n] for n in kept),
                    read_assembly(source.name, metadata.hash),
                    metadata.shared,
                    metadata.num_warps,
                )
            )

        return launch


@contextmanager
def stand_in(arch: Arch, on_launch: OnLaunch = ignore) -> Iterator[StandInDriver]:
    """Make `arch` Triton's current device until the end of the block."""
    before = driver._active  # None where there is no GPU, and `driver.active` would look for one
    here = StandInDriver(arch, on_launch)
    driver.set_active(here)
    try:
        yield here
    finally:
        driver.set_active(before)

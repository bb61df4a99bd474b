"""GPUs by name: which architecture they are and how much memory a program gets of them.

Contract: one row a product, for planning where the GPU is not. Memory is what the driver tells a
program, which is a little less than what is printed on the box. Torch-free; what an architecture can do
is core/device.py's, what is there now `detect`'s.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from fourfold.core.errors import ConfigError

GIB = 1 << 30
_MOST = 1024
_COUNTED = re.compile(r"(?:(?P<count>[0-9]{1,4})\s*[xX×*]\s*)?(?P<name>[A-Za-z0-9 ._-]+)")
_SIZE = re.compile(r"(?P<size>[0-9]+(?:\.[0-9]+)?)\s*(?P<unit>gib|gb|g)", re.IGNORECASE)


@dataclass(frozen=True)
class Gpu:
    """`arch` as in `ARCHS`, empty for one known by its memory only; `memory` in bytes."""

    name: str
    arch: str
    memory: int


def _row(name: str, arch: str, gib: float) -> Gpu:
    return Gpu(name, arch, int(gib * GIB))


GPUS: Mapping[str, Gpu] = MappingProxyType(
    {
        gpu.name.lower(): gpu
        for gpu in (
            _row("MI300X", "gfx942", 191.98),
            _row("MI308X", "gfx942", 191.98),
            _row("MI325X", "gfx942", 255.98),
            _row("MI300A", "gfx942", 127.98),
            _row("MI350X", "gfx950", 287.98),
            _row("MI355X", "gfx950", 287.98),
            _row("MI210", "gfx90a", 63.98),
            _row("MI250X", "gfx90a", 63.98),  # each of its two halves is a GPU
            _row("H100", "sm_90", 79.1),
            _row("H200", "sm_90", 139.8),
            _row("H20", "sm_90", 95.0),
            _row("B200", "sm_100", 178.3),
            _row("A100", "sm_80", 79.1),
            _row("A100-40GB", "sm_80", 39.4),
            _row("L40S", "sm_89", 44.4),
            _row("L4", "sm_89", 22.0),
            _row("RTX4090", "sm_89", 23.5),
            _row("RTX6000Ada", "sm_89", 47.4),
            _row("RTX5090", "sm_120", 31.3),
            _row("RTXPRO6000", "sm_120", 94.9),
        )
    }
)
_ALIASES = {"mi308": "mi308x", "a100-80gb": "a100", "h100-80gb": "h100", "mi300": "mi300x"}


def parse_gpus(text: str) -> tuple[int, Gpu]:
    """(how many, of what) from `8xMI300X`, `H200`, or by memory `4x96GiB`. Raises `ConfigError`."""
    match = _COUNTED.fullmatch(text.strip())
    by_size = _SIZE.fullmatch(match["name"].strip()) if match else None
    name = re.sub(r"[ _]", "", match["name"]).lower() if match else ""
    gpu = GPUS.get(_ALIASES.get(name, name))
    if by_size is not None:
        unit = GIB if by_size["unit"].lower() == "gib" else 10**9
        gpu = Gpu(f"{by_size['size']}{by_size['unit']}", "", int(float(by_size["size"]) * unit))
    count = int(match["count"] or 1) if match else 0
    if gpu is None or not 1 <= count <= _MOST:
        known = ", ".join(each.name for each in GPUS.values())
        raise ConfigError(
            f"--gpus {text}: expected a count and a GPU such as 8xMI300X, or its memory such as "
            f"4x96GiB; known are {known}"
        )
    return count, gpu

"""Kernels: other bodies for ops, by device. Only the engine calls `load`; nothing imports kernels.

A kernel module stands in `kernels/<family>/` and defines `KERNELS`, a tuple of `Kernel`; a module there
without it holds what others share. Adding a file is all it takes. Families that are not for this
device's features are not imported, so that Triton is needed only where there is a GPU.
"""

from __future__ import annotations

import importlib
import pkgutil
from types import MappingProxyType

from fourfold.core.device import Device, Feature
from fourfold.ops.registry import Kernel

_FAMILY_NEEDS = MappingProxyType(
    {
        "cpu": Feature.CPU,
        "triton": Feature.TRITON,
        "nvidia": Feature.TRITON,
        "amd": Feature.TRITON,
    }
)


def load(device: Device) -> tuple[Kernel, ...]:
    """All kernels whose family can be imported for `device`."""
    found: list[Kernel] = []
    for family in pkgutil.iter_modules(__path__, __name__ + "."):
        if not family.ispkg:
            continue  # tools beside the families: targets, variants, compile
        needs = _FAMILY_NEEDS.get(family.name.rpartition(".")[2])
        if needs is not None and needs not in device.features:
            continue
        package = importlib.import_module(family.name)
        for module in pkgutil.iter_modules(package.__path__, family.name + "."):
            found.extend(getattr(importlib.import_module(module.name), "KERNELS", ()))
    return tuple(found)

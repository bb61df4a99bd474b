"""Kernels: other bodies for ops, by device. Only the engine calls `load`; nothing imports kernels.

A kernel module stands in `kernels/<family>/` and defines `KERNELS`, a tuple of `Kernel`. Adding a file
is all it takes. Families that are not for this device's features are not imported, so that Triton is
needed only where there is a GPU.
"""

from __future__ import annotations

import importlib
import pkgutil

from fourfold.core.device import Device, Feature
from fourfold.ops.registry import Kernel

_FAMILY_NEEDS = {"triton": Feature.TRITON, "nvidia": Feature.TRITON, "amd": Feature.TRITON}


def load(device: Device) -> tuple[Kernel, ...]:
    """All kernels whose family can be imported for `device`."""
    found: list[Kernel] = []
    for module in pkgutil.walk_packages(__path__, __name__ + "."):
        family = module.name.split(".")[2]
        if _FAMILY_NEEDS.get(family) not in (None, *device.features):
            continue
        found.extend(getattr(importlib.import_module(module.name), "KERNELS", ()))
    return tuple(found)

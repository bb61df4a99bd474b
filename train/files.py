"""Weights between pieces of a run: float16 in a safetensors file, with the step they were left at.

Contract: what `save` wrote `read` gives back as float32 masters, on any device. The optimizer is not
kept: a run that goes on warms up anew.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

LIMIT = 16 * 2**20  # bytes


def save(path: Path, masters: Mapping[str, Tensor], step: int) -> int:
    """Write the file and return its size; `ValueError` above `LIMIT`."""
    kept = {name: _kept(value.detach()).cpu().contiguous() for name, value in masters.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(kept, path, metadata={"step": str(step)})
    size = path.stat().st_size
    if size > LIMIT:
        raise ValueError(f"{path} has {size} bytes, more than {LIMIT}")
    return size


def _kept(value: Tensor) -> Tensor:
    return value.to(torch.float16 if value.is_floating_point() else torch.int16)


def read(path: Path, device: torch.device) -> tuple[dict[str, Tensor], int]:
    """Masters and the step."""
    with safe_open(path, framework="pt") as file:
        step = int((file.metadata() or {})["step"])
        found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    masters = {
        name: value.to(torch.float32 if value.is_floating_point() else torch.int64).to(device)
        for name, value in found.items()
    }
    return masters, step

"""Linear layers on a CPU: weights are numbers since they were loaded, inputs are rounded in fewer steps."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fourfold.core.device import Feature
from fourfold.core.parameters import LINEAR_LAYER_ROLES, Role
from fourfold.core.tensor import Weight, dense
from fourfold.kernels.cpu.rounding import rounded_input, rounds
from fourfold.kernels.cpu.weights import as_numbers, numbers_fit
from fourfold.ops.linear import wo_a
from fourfold.ops.registry import Kernel

TILE = 512  # tokens whose rounding stays in a core's cache


def linear(x: Tensor, weight: Weight, unrounded: bool = False) -> Tensor:
    """The op `linear` (ops/linear.py)."""
    return linears(None, x, (weight,), (unrounded,))[0]


def linears(
    ops: Any, x: Tensor, weights: tuple[Weight, ...], unrounded: tuple[bool, ...]
) -> tuple[Tensor, ...]:
    """The op `linears` (ops/linear.py): the input is rounded once for all weights that want it."""
    matrices = [dense(weight, torch.float32) for weight in weights]
    dtypes = [torch.float32 if wide else x.dtype for wide in unrounded]
    tiles = x.split(TILE)
    if len(tiles) == 1:
        return tuple(_products(x, weights, matrices, dtypes))
    outs = tuple(
        x.new_empty(x.shape[0], matrix.shape[0], dtype=dtype)
        for matrix, dtype in zip(matrices, dtypes, strict=True)
    )
    for number, tile in enumerate(tiles):
        part = slice(number * TILE, number * TILE + tile.shape[0])
        for out, product in zip(outs, _products(tile, weights, matrices, dtypes), strict=True):
            out[part] = product
    return outs


def _products(
    x: Tensor, weights: tuple[Weight, ...], matrices: list[Tensor], dtypes: list[torch.dtype]
) -> list[Tensor]:
    rounded = next((rounded_input(x, weight) for weight in weights if rounds(weight)), None)
    exact = None if all(map(rounds, weights)) else x.float()
    found = []
    for weight, matrix, dtype in zip(weights, matrices, dtypes, strict=True):
        factor = rounded if rounds(weight) else exact
        assert factor is not None
        found.append(torch.nn.functional.linear(factor, matrix).to(dtype))
    return found


_CPU = frozenset({Feature.CPU})
_FITS = numbers_fit(lambda spec: spec.role in LINEAR_LAYER_ROLES)

KERNELS = (
    Kernel(
        "linear", "cpu", linear, _CPU, supports=_FITS, prepare=as_numbers, batch_invariant=False
    ),
    Kernel("linears", "cpu", linears, _CPU, supports=_FITS, batch_invariant=False),
    Kernel(
        "wo_a",
        "cpu",
        wo_a.body,  # what it costs is to make the weight's numbers
        _CPU,
        supports=numbers_fit(lambda spec: spec.role is Role.WO_A),
        prepare=as_numbers,
        batch_invariant=False,
    ),
)

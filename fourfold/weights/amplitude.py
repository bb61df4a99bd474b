"""Are loaded weights of a sane size? A cheap statistic against generous bounds.

Contract: `amplitude_report` reads a band of every matrix, by value, and names what lies outside the
bounds below. It decides nothing: an outlier is a warning, since a model may be unusual. It exists
because quantised weights go wrong by factors, not by noise: FP8 codes read without their scale are
thousands of times too large, E8M0 bytes cast as numbers about 2^20 times, a scale lost to zero
gives zero; each is finite, nonzero almost everywhere and has the right shape. It does not know
files.

Bounds, for trained and for freshly initialised models alike:

    matrix [out, in]   gain = RMS · sqrt(in), how much it amplifies white noise      2^-8 … 2^6
    embedding          RMS of its entries                                            2^-16 … 2^7
    norm weight        RMS of its entries                                            2^-10 … 2^10
    float parameter    largest magnitude (sinks, biases, hyper-connections, ape)     0 … 2^14

A trained matrix has a gain between about 0.1 and 10. FP8 codes alone have an RMS of 50 to 120 where
their blocks are full, a gain above 2^6 from two inputs on; FP4 codes alone one of 2 to 3, above it
from about 1,000 inputs on.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fourfold.core.parameters import Role, Storage
from fourfold.core.tensor import QuantTensor, Weight, dense
from fourfold.weights.names import role_of

_BAND_ROWS = 128  # a multiple of every scheme's block height

GAIN_BOUNDS = (2.0**-8, 2.0**6)
EMBEDDING_BOUNDS = (2.0**-16, 2.0**7)
NORM_BOUNDS = (2.0**-10, 2.0**10)
MAGNITUDE_BOUNDS = (0.0, 2.0**14)


@dataclass(frozen=True)
class Outlier:
    """A statistic outside its bounds. `name` is a parameter's, with `[k]` for expert k."""

    name: str
    role: Role
    statistic: str
    value: float
    bounds: tuple[float, float]

    def __str__(self) -> str:
        low, high = self.bounds
        return (
            f"{self.name} has {self.statistic} {self.value:.4g}, expected {low:.4g} to {high:.4g}"
        )


def amplitude_report(weights: Mapping[str, Weight]) -> list[Outlier]:
    """Outliers among `weights` (parameter name to weight), in their order.

    Each expert of a stack is looked at by itself. NaN and infinity are outliers; integer tensors
    are not looked at.
    """
    outliers = []
    for name, weight in weights.items():
        role = role_of(name)
        if role.storage is Storage.INTEGER:
            continue
        for label, matrix in _matrices(name, weight):
            statistic, value, bounds = _measure(role, _band(matrix))
            if not bounds[0] <= value <= bounds[1]:
                outliers.append(Outlier(label, role, statistic, value, bounds))
    return outliers


def _matrices(name: str, weight: Weight) -> Iterator[tuple[str, Weight]]:
    if len(weight.shape) < 3:
        yield name, weight
        return
    for index in range(weight.shape[0]):
        yield f"{name}[{index}]", weight[index]


def _band(weight: Weight) -> Tensor:
    """Values of at most `_BAND_ROWS` consecutive rows from the middle, float32 or float64."""
    rows = weight.shape[0]
    start = rows // 2 // _BAND_ROWS * _BAND_ROWS
    stop = min(start + _BAND_ROWS, rows)
    if isinstance(weight, QuantTensor):
        height = weight.scheme.block[0]
        band: Weight = QuantTensor(
            weight.codes[start:stop],
            weight.scale[start // height : -(-stop // height)],
            weight.scheme,
            (stop - start, *weight.shape[1:]),
        )
    else:
        band = weight[start:stop]
    return dense(band, torch.float32)


def _measure(role: Role, values: Tensor) -> tuple[str, float, tuple[float, float]]:
    if role.storage is Storage.FLOAT:
        return "magnitude", float(values.abs().max()), MAGNITUDE_BOUNDS
    rms = float(values.double().square().mean().sqrt())
    if values.dim() < 2:
        return "RMS", rms, NORM_BOUNDS
    if role is Role.EMBED:
        return "RMS", rms, EMBEDDING_BOUNDS
    return "gain RMS·sqrt(in)", rms * math.sqrt(values.shape[-1]), GAIN_BOUNDS

"""Are stored weights of a sane size, each by itself and beside its kind?

Contract: `amplitudes` takes a band of rows from the middle of every matrix, decodes it with tables of
its own (apart from the engine's), and names what lies outside the bounds of amplitude.py, or far from
the median of the same parameter over all layers and experts. An outlier is a warning: a model may be
unusual. Tensors that already have an error are left alone.
"""

from __future__ import annotations

import math
import os
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fourfold.core.findings import Finding, Severity
from fourfold.core.parameters import Role, Storage
from fourfold.quant.headers import FP8_BLOCK_SIZE, MXFP4_GROUP
from fourfold.weights.amplitude import (
    EMBEDDING_BOUNDS,
    GAIN_BOUNDS,
    MAGNITUDE_BOUNDS,
    NORM_BOUNDS,
)
from fourfold.weights.coverage import Matching, Source, Stored
from fourfold.weights.header import printable
from fourfold.weights.verify_files import GET_AGAIN

FAR = 16.0
"""A matrix whose amplitude is so many times the median of its kind is an outlier."""
_LEAST_PEERS = 8
_BAND_ROWS = 32
_MOST_THREADS = 8
_PLAIN: Mapping[str, Any] = {"F16": np.float16, "F32": np.float32, "F64": np.float64}

Array = NDArray[Any]
Read = Callable[[Source, int, int], Array]


@dataclass(frozen=True)
class Amplitude:
    """A matrix's statistic: its `value`, the `bounds` for any, of `kind` (role and statistic)."""

    source: Source
    label: str
    kind: tuple[Role, str]
    value: float
    bounds: tuple[float, float]


def amplitudes(
    directory: Path, matching: Matching, faulty: set[str]
) -> tuple[list[Amplitude], list[Finding]]:
    """All matrices of `matching`, but for those of the tensors in `faulty`, and the outliers."""
    stored = [
        each
        for each in matching.stored.values()
        if each.spec.storage is not Storage.INTEGER and _whole(each, faulty)
    ]
    with ThreadPoolExecutor(max_workers=min(_MOST_THREADS, os.cpu_count() or 1)) as pool:
        found = [
            one
            for group in pool.map(lambda s: list(_measure(directory, s)), stored)
            for one in group
        ]
    return found, list(_outliers(found))


def _whole(stored: Stored, faulty: set[str]) -> bool:
    tensors = [*stored.weights.values(), *stored.scales.values()]
    complete = all(expert in stored.weights for expert in stored.experts)
    return complete and not any(printable(header.name) in faulty for header in tensors)


def _measure(directory: Path, stored: Stored) -> Iterator[Amplitude]:
    """The statistic of every matrix of a parameter."""
    maps: dict[str, Array] = {}

    def read(source: Source, begin: int, end: int) -> Array:
        file = source.header.file
        if file not in maps:
            maps[file] = np.memmap(directory / file, dtype=np.uint8, mode="r")
        data: Array = maps[file][source.begin + begin : source.begin + end]
        return data

    weights = stored.sources(stored.weights)
    scales = stored.sources(stored.scales) if stored.scales else (None,) * len(weights)
    shape = stored.spec.checkpoint_shape
    for number, (weight, scale) in enumerate(zip(weights, scales, strict=True)):
        label = weight.header.name
        if stored.fused:
            label = stored.name(number)
        squares, largest = _band(read, weight, scale, shape)
        yield _amplitude(stored.spec.role, weight, label, squares, largest, shape)


def _amplitude(
    role: Role, source: Source, label: str, square: float, largest: float, shape: tuple[int, ...]
) -> Amplitude:
    """The statistic and the bounds that amplitude.py has for this role."""
    rms = math.sqrt(square)
    if role.storage is Storage.FLOAT:
        return Amplitude(source, label, (role, "magnitude"), largest, MAGNITUDE_BOUNDS)
    if len(shape) < 2:
        return Amplitude(source, label, (role, "RMS"), rms, NORM_BOUNDS)
    if role is Role.EMBED:
        return Amplitude(source, label, (role, "RMS"), rms, EMBEDDING_BOUNDS)
    gain = rms * math.sqrt(shape[-1])
    return Amplitude(source, label, (role, "gain RMS·sqrt(in)"), gain, GAIN_BOUNDS)


def _band(
    read: Read, weight: Source, scale: Source | None, shape: tuple[int, ...]
) -> tuple[float, float]:
    """Mean square and largest magnitude of a band of rows (of all, for what is no matrix); the latter
    is asked of plain values only."""
    rows = shape[0] if len(shape) > 1 else 1
    first = rows // 2 // FP8_BLOCK_SIZE * FP8_BLOCK_SIZE
    last = min(first + _BAND_ROWS, rows)
    step = (weight.end - weight.begin) // rows
    stored = read(weight, first * step, last * step)
    if scale is None:
        values = _plain(stored, weight.header.dtype)
        return float(np.mean(np.square(values))), float(np.abs(values).max())
    lines = stored.reshape(last - first, -1)
    if weight.header.dtype == "F8_E4M3":
        line = (scale.end - scale.begin) // -(-rows // FP8_BLOCK_SIZE)
        row = first // FP8_BLOCK_SIZE
        factors = _scales(read(scale, row * line, (row + 1) * line), scale)
        squares = _FP8_SQUARES[lines].sum(0)
        starts = np.arange(0, squares.size, FP8_BLOCK_SIZE)
        total = np.add.reduceat(squares, starts) @ np.square(factors)
        return float(total) / (lines.size), math.inf
    line = (scale.end - scale.begin) // rows
    factors = _scales(read(scale, first * line, last * line), scale).reshape(last - first, -1)
    groups = _FP4_SQUARES[lines].reshape(last - first, -1, MXFP4_GROUP // 2).sum(2)
    return float((groups * np.square(factors)).sum()) / (2 * lines.size), math.inf


def _plain(stored: Array, dtype: str) -> Array:
    """Plain floats as float64."""
    if dtype == "BF16":
        return (stored.view(np.uint16).astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    values: Array = stored.view(_PLAIN[dtype]).astype(np.float64)
    return values


def _scales(stored: Array, source: Source) -> Array:
    if source.header.dtype == "F32":
        floats: Array = stored.view(np.float32).astype(np.float64)
        return floats
    return np.ldexp(1.0, stored.astype(np.int32) - 127)


def _fp8_squares() -> Array:
    """The square of the value of each E4M3 code; 0 for the two that are NaN."""
    codes = np.arange(256)
    exponent, mantissa = codes >> 3 & 0xF, codes & 7
    normal = np.ldexp(1 + mantissa / 8, exponent - 7)
    values = np.where(exponent == 0, np.ldexp(mantissa / 8, -6), normal)
    return np.square(np.where(codes & 0x7F == 0x7F, 0.0, values))


def _fp4_squares() -> Array:
    """The sum of the squares of the two E2M1 values of each byte."""
    squares = np.square(np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6] * 2))
    codes = np.arange(256)
    total: Array = squares[codes & 0xF] + squares[codes >> 4]
    return total


_FP8_SQUARES = _fp8_squares()
_FP4_SQUARES = _fp4_squares()


def _outliers(found: list[Amplitude]) -> Iterator[Finding]:
    """Outside the bounds for any matrix, or far from the median of its kind."""
    kinds: dict[tuple[Role, str], list[float]] = defaultdict(list)
    for one in found:
        kinds[one.kind].append(one.value)
    medians = {
        kind: statistics.median(values) if len(values) >= _LEAST_PEERS else 0.0
        for kind, values in kinds.items()
    }
    for one in found:
        low, high = one.bounds
        usual = medians[one.kind]
        text = ""
        if not low <= one.value <= high:
            text = f"has {one.kind[1]} {one.value:.4g}, expected {low:.4g} to {high:.4g}"
        elif usual and one.kind[1] != "magnitude" and not (usual / FAR <= one.value <= usual * FAR):
            text = f"has {one.kind[1]} {one.value:.4g}, the median of its kind is {usual:.4g}"
        if text:
            yield Finding(
                Severity.WARNING,
                text,
                printable(one.label),
                one.source.header.file,
                one.source.begin,
                GET_AGAIN,
            )

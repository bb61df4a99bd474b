"""Random contents of a synthetic checkpoint's tensors, in the bytes that the file stores.

Contract: `tensor_bytes` depends on the seed, the tensor's name, shape and storage (and, for hash
routes, the number of experts) alone: not on the order of writing, nor on how many layers there are.
It yields pieces of bounded size. Amplitudes keep activations moderate through any number of layers
while every mechanism works: both sides of the SwiGLU limit occur, router and indexer choose
decidedly, streams do not blow up. Quantised matrices are drawn as codes and scales, not rounded
from numbers.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping
from statistics import NormalDist
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fourfold.core.parameters import ParamSpec, Role
from fourfold.ops.quantize import FP4_VALUES, FP8_MAX
from fourfold.quant.mxfp4 import MXFP4
from fourfold.weights.layout import StoredTensor
from fourfold.weights.names import Part

_PIECE = 1 << 22  # items drawn at once

_NORMS = frozenset(
    {Role.NORM, Role.ATTN_NORM, Role.FFN_NORM, Role.Q_NORM, Role.KV_NORM, Role.ENORM, Role.HNORM}
    | {Role.COMPRESSOR_NORM, Role.INDEXER_NORM}
)
# (mean, standard deviation) of what is no matrix.
_FIXED: Mapping[Role, tuple[float, float]] = MappingProxyType(
    dict.fromkeys(_NORMS, (1.0, 0.1))
    | dict.fromkeys((Role.HC_HEAD_BASE, Role.HC_ATTN_BASE, Role.HC_FFN_BASE), (0.0, 0.5))
    | dict.fromkeys((Role.HC_HEAD_SCALE, Role.HC_ATTN_SCALE, Role.HC_FFN_SCALE), (1.0, 0.2))
    | dict.fromkeys((Role.COMPRESSOR_APE, Role.INDEXER_APE), (0.0, 0.5))
    | {Role.ATTN_SINK: (0.0, 1.0), Role.GATE_BIAS: (0.0, 0.1), Role.EMBED: (0.0, 1.0)}
)
# Matrices map unit inputs to outputs of this size, 1 where not listed. SwiGLU inputs of size 3 pass
# the limit of 10 about once in a thousand; their product is brought back to 1 by w2. Attention
# averages over many rows, which wo_b makes up for.
_GAIN: Mapping[Role, float] = MappingProxyType(
    dict.fromkeys((Role.EXPERT_W1, Role.EXPERT_W3, Role.SHARED_W1, Role.SHARED_W3), 3.0)
    | dict.fromkeys((Role.EXPERT_W2, Role.SHARED_W2), 1 / 6)
    | {Role.GATE: 2.0, Role.WO_B: 2.0, Role.HEAD: 1.5}
)


def _spread(counts: Mapping[int, int]) -> NDArray[np.int16]:
    """256 equally likely values, `counts` of each."""
    return np.repeat(np.array(list(counts), np.int16), list(counts.values()))


def _fp8_quantiles() -> NDArray[np.uint8]:
    """256 E4M3 codes spread like a normal distribution whose outermost reach ±448; the innermost
    two are 0 and −0, which real files may hold too."""
    normal = NormalDist()
    points = np.array([normal.inv_cdf((i + 0.5) / 256) for i in range(256)])
    points[127:129] = -0.0, 0.0
    values = torch.from_numpy(points * (FP8_MAX / points[-1])).clamp(-FP8_MAX, FP8_MAX)
    return values.float().to(torch.float8_e4m3fn).view(torch.uint8).numpy()


FP4_EXPONENTS = _spread({-3: 12, -2: 32, -1: 52, 0: 64, 1: 52, 2: 32, 3: 12})
FP8_EXPONENTS = _spread({-2: 8, -1: 60, 0: 120, 1: 60, 2: 8})
# One FP4 group in 256 is this many binades smaller than its neighbours, so that some strips of 128
# inputs are too uneven for one FP8 scale.
FP4_OUTLIER = 12
FP8_CODES = _fp8_quantiles()


def _rms(values: NDArray[Any]) -> float:
    return math.sqrt(float(np.mean(np.square(values.astype(np.float64)))))


_FP8_VALUES = torch.from_numpy(FP8_CODES).view(torch.float8_e4m3fn).float().numpy()
_FP4_RMS = _rms(np.array(FP4_VALUES)) * _rms(np.exp2(FP4_EXPONENTS))
_FP8_RMS = _rms(_FP8_VALUES) * _rms(np.exp2(FP8_EXPONENTS))


def tensor_bytes(tensor: StoredTensor, seed: int, experts: int) -> Iterator[memoryview]:
    """The tensor's data, in pieces. `experts` is the number that hash routes choose from."""
    random = generator(seed, tensor.content)
    if tensor.part is Part.SCALE:
        yield from _scales(tensor, random)
    elif tensor.scheme is not None:
        for count in _pieces(math.prod(tensor.shape)):
            drawn = np.frombuffer(random.bytes(count), np.uint8)
            # Any byte is two FP4 codes, minus zeros included.
            yield (drawn if tensor.scheme is MXFP4 else FP8_CODES[drawn]).data
    elif tensor.spec.role is Role.TID2EID:
        yield from _hash_routes(tensor, random, experts)
    else:
        mean, deviation = distribution(tensor.spec)
        for count in _pieces(math.prod(tensor.shape)):
            values = random.standard_normal(count, np.float32)
            values *= np.float32(deviation)
            values += np.float32(mean)
            yield _float_bytes(values, tensor.dtype)


def generator(seed: int, name: str) -> np.random.Generator:
    """The tensor's own source of numbers, the same on every machine."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return np.random.Generator(np.random.PCG64(int.from_bytes(digest, "little")))


def distribution(spec: ParamSpec) -> tuple[float, float]:
    """(mean, standard deviation) of a parameter's values."""
    if spec.role in _FIXED:
        return _FIXED[spec.role]
    return 0.0, _GAIN.get(spec.role, 1.0) / math.sqrt(spec.shape[-1])


def scale_exponents(spec: ParamSpec, is_fp4: bool) -> tuple[NDArray[np.int16], int]:
    """256 equally likely exponents of a matrix's scales, and the one they lie around."""
    rms, exponents = (_FP4_RMS, FP4_EXPONENTS) if is_fp4 else (_FP8_RMS, FP8_EXPONENTS)
    return exponents, round(math.log2(distribution(spec)[1] / rms))


def _pieces(total: int, size: int = _PIECE) -> Iterator[int]:
    for begin in range(0, total, size):
        yield min(size, total - begin)


def _float_bytes(values: NDArray[np.float32], dtype: str) -> memoryview:
    if dtype == "F32":
        return values.astype("<f4", copy=False).data
    halves: NDArray[np.int16] = (
        torch.from_numpy(values).to(torch.bfloat16).view(torch.int16).numpy()
    )
    return halves.data


def _scales(tensor: StoredTensor, random: np.random.Generator) -> Iterator[memoryview]:
    """Powers of two around the one that gives the matrix its standard deviation."""
    is_fp4 = tensor.scheme is MXFP4
    exponents, centre = scale_exponents(tensor.spec, is_fp4)
    for count in _pieces(math.prod(tensor.shape)):
        exponent = exponents[np.frombuffer(random.bytes(count), np.uint8)] + np.int16(centre)
        if is_fp4:
            exponent -= FP4_OUTLIER * (np.frombuffer(random.bytes(count), np.uint8) == 0)
        if tensor.dtype == "F32":
            yield np.exp2(exponent.astype("<f4")).data
        else:
            yield (exponent + 127).astype(np.uint8).data


def _hash_routes(
    tensor: StoredTensor, random: np.random.Generator, experts: int
) -> Iterator[memoryview]:
    """For each token id, `k` different experts in random order, all choices equally likely."""
    vocabulary, k = tensor.shape
    for count in _pieces(vocabulary, max(1, _PIECE // k)):
        chosen = np.empty((count, k), "<i8")
        for slot in range(k):
            # The r-th of the experts not chosen yet: step over the chosen ones in rising order.
            expert = random.integers(0, experts - slot, count)
            for taken in np.sort(chosen[:, :slot], axis=1).T:
                expert += expert >= taken
            chosen[:, slot] = expert
        yield chosen.data

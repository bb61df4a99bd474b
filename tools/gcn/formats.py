"""Number formats: FP8 in both dialects, FP4, half, bfloat16, and the bits of float32.

Arrays of codes are uint32, one code an element, as a register holds them.
"""

from __future__ import annotations

from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt

Bits = npt.NDArray[np.uint32]
Bytes = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]
Array = npt.NDArray[Any]

U32, I32, U64, I64 = np.uint32, np.int32, np.uint64, np.int64
F32, F64 = np.float32, np.float64


def _fp8_values(exponent: int, mantissa: int, bias: int, fnuz: bool, infinities: bool) -> Array:
    """The value of each of the 256 codes of a format with that many exponent and mantissa bits."""
    values = np.zeros(256)
    top = (1 << exponent) - 1
    for code in range(256):
        e, m = (code >> mantissa) & top, code & ((1 << mantissa) - 1)
        fraction = m / (1 << mantissa)
        value = fraction * 2.0 ** (1 - bias) if e == 0 else (1 + fraction) * 2.0 ** (e - bias)
        if fnuz and code == 0x80:
            value = np.nan
        elif infinities and e == top:
            value = np.nan if m else np.inf
        elif not fnuz and not infinities and code & 0x7F == 0x7F:
            value = np.nan
        values[code] = -value if code >> 7 else value
    return values


# (name, FNUZ) -> value of each code. "fp8" is E4M3, "bf8" is E5M2.
FP8 = MappingProxyType(
    {
        ("fp8", True): _fp8_values(4, 3, 8, True, False),
        ("bf8", True): _fp8_values(5, 2, 16, True, False),
        ("fp8", False): _fp8_values(4, 3, 7, False, False),
        ("bf8", False): _fp8_values(5, 2, 15, False, True),
    }
)
FP4 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])


def encode_fp8(values: Array, name: str, fnuz: bool, saturate: bool) -> Bits:
    """The codes nearest to `values`, ties to even. Too large a value becomes the largest code with
    `saturate`, else NaN (infinity in OCP E5M2)."""
    positive = FP8[name, fnuz][:128]
    positive = positive[np.isfinite(positive)]
    count, most = len(positive), positive[-1]
    x = values.astype(F64)
    size, nan = np.abs(x), np.isnan(x)
    within = np.where(nan, 0, np.minimum(size, most))
    above = np.clip(np.searchsorted(positive, within), 1, count - 1)
    low, high = positive[above - 1], positive[above]
    tie_up = (within - low == high - within) & (above % 2 == 0)
    code = np.where((within - low > high - within) | tie_up, above, above - 1)
    special = 0x80 if fnuz else 0x7F
    overflow = 0x7C if name == "bf8" and not fnuz else special
    half = most + (positive[-1] - positive[-2]) / 2
    too_large = (size >= half) if (count - 1) % 2 else (size > half)
    code = np.where(too_large, count - 1 if saturate else overflow, code)
    code = np.where(nan, special, code)
    unsigned = ((code == 0) | (code == 0x80)) if fnuz else np.zeros(code.shape, bool)
    negative = np.signbit(x) & ~unsigned
    return (code | (negative.astype(I64) << 7)).astype(U32)


def float_of(bits: Bits) -> Floats:
    """The float32 that `bits` are."""
    return bits.view(F32)


def bits_of(values: Array) -> Bits:
    """The bits of `values` as float32."""
    return np.asarray(values, F32).view(U32)


def half_to_float(bits: Bits) -> Floats:
    """The half in the low 16 bits, as float32."""
    return (bits & 0xFFFF).astype(np.uint16).view(np.float16).astype(F32)


def float_to_half(values: Floats) -> Bits:
    """Rounded to half, in the low 16 bits."""
    return values.astype(np.float16).view(np.uint16).astype(U32)


def float_to_bfloat(values: Floats) -> Bits:
    """Rounded to bfloat16 (ties to even, NaN quiet), in the low 16 bits."""
    bits = bits_of(values)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(values), (bits >> 16) | 0x40, rounded).astype(U32)


def low_bfloat(bits: Bits) -> Floats:
    """The bfloat16 in the low 16 bits, as float32."""
    return float_of(bits << U32(16))


def high_bfloat(bits: Bits) -> Floats:
    """The bfloat16 in the high 16 bits, as float32."""
    return float_of(bits & U32(0xFFFF0000))

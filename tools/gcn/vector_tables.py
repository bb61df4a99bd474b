"""Vector arithmetic that is one function of its sources, by opcode.

`BITS_n` take n sources as uint32 and give uint32; `FLOATS_n` take and give float32; `FLOATS_TO_BITS` and
`BITS_TO_FLOATS` convert. Overflow wraps, as numpy's does.
"""

from __future__ import annotations

from collections.abc import Callable
from types import MappingProxyType
from typing import Any

import numpy as np

from tools.gcn.errors import Unsupported
from tools.gcn.formats import (
    F32,
    F64,
    I32,
    I64,
    U32,
    U64,
    Array,
    Bits,
    Floats,
    float_to_half,
    half_to_float,
)

MASK32 = 0xFFFFFFFF
Function = Callable[..., Any]


def signed(bits: Bits) -> Array:
    """The same bits as int32."""
    return bits.view(I32)


def low_signed(bits: Bits) -> Array:
    """The low 16 bits as int16."""
    return bits.astype(np.uint16).view(np.int16)


def product(a: Bits, b: Bits) -> Array:
    """a · b in 64 bits."""
    return a.astype(U64) * b.astype(U64)


def fma(a: Floats, b: Floats, c: Floats) -> Floats:
    """a·b + c: exact product, one rounding to float64 and one to float32."""
    return (a.astype(F64) * b.astype(F64) + c.astype(F64)).astype(F32)


def larger(a: Floats, b: Floats) -> Array:
    """maxNum: a number beats NaN, +0 beats −0."""
    equal = np.where(np.signbit(a), b, a)
    picked = np.where(a == b, equal, np.maximum(a, b))
    return np.where(np.isnan(a), b, np.where(np.isnan(b), a, picked))


def smaller(a: Floats, b: Floats) -> Array:
    """minNum: a number beats NaN, −0 beats +0."""
    equal = np.where(np.signbit(a), a, b)
    picked = np.where(a == b, equal, np.minimum(a, b))
    return np.where(np.isnan(a), b, np.where(np.isnan(b), a, picked))


def largest(a: Floats, b: Floats, c: Floats) -> Array:
    """v_maximum3_f32: NaN if any is."""
    return np.maximum(np.maximum(a, b), c)


def smallest(a: Floats, b: Floats, c: Floats) -> Array:
    """v_minimum3_f32: NaN if any is."""
    return np.minimum(np.minimum(a, b), c)


def middle(a: Floats, b: Floats, c: Floats) -> Array:
    """The median; the smallest if any is NaN."""
    nan = np.isnan(a) | np.isnan(b) | np.isnan(c)
    return np.where(nan, smaller(smaller(a, b), c), np.sort(np.stack([a, b, c]), 0)[1])


def to_integer(x: Floats, low: int, high: int) -> Array:
    """Truncated and clamped to low … high; NaN gives 0."""
    return np.where(np.isnan(x), 0, np.clip(np.trunc(x.astype(F64)), low, high)).astype(I64)


def reverse_bits(a: Bits) -> Bits:
    """v_bfrev_b32."""
    for shift, mask in ((1, 0x55555555), (2, 0x33333333), (4, 0x0F0F0F0F), (8, 0x00FF00FF)):
        a = ((a >> U32(shift)) & U32(mask)) | ((a & U32(mask)) << U32(shift))
    return (a >> U32(16)) | (a << U32(16))


def leading_zeros(a: Bits) -> Bits:
    """v_ffbh_u32: zeros above the highest set bit; all ones for 0."""
    top = np.floor(np.log2(np.maximum(a, 1).astype(F64)))
    return np.where(a == 0, MASK32, 31 - top).astype(U32)


def trailing_zeros(a: Bits) -> Bits:
    """v_ffbl_b32: zeros below the lowest set bit; all ones for 0."""
    lowest = np.maximum(a & (~a + U32(1)), 1).astype(F64)
    return np.where(a == 0, MASK32, np.log2(lowest)).astype(U32)


def permute_bytes(a: Bits, b: Bits, selector: Bits) -> Bits:
    """v_perm_b32: each byte of the result is one of the eight of (a, b), 0 or 255."""
    pick = np.minimum(np.ascontiguousarray(selector).view(np.uint8).reshape(-1, 4), 13)
    if ((pick >= 8) & (pick < 12)).any():
        raise Unsupported("sign selectors of v_perm_b32")
    bytes_ = np.zeros((len(pick), 14), np.uint8)
    bytes_[:, :4] = np.ascontiguousarray(b).view(np.uint8).reshape(-1, 4)
    bytes_[:, 4:8] = np.ascontiguousarray(a).view(np.uint8).reshape(-1, 4)
    bytes_[:, 13] = 255
    return np.take_along_axis(bytes_, pick.astype(np.intp), 1).view(U32).reshape(-1)


def extract_signed(a: Bits, b: Bits, c: Bits) -> Bits:
    """v_bfe_i32: c bits of a from bit b, their sign extended."""
    size = (c & 31).astype(I64)
    value = (a >> (b & 31)).astype(I64) & ((1 << size) - 1)
    sign = 1 << np.maximum(size - 1, 0)
    extended = np.where(size > 0, (value ^ sign) - sign, 0).astype(I32)
    return np.asarray(extended.view(U32), U32)


def extract(a: Bits, b: Bits, c: Bits) -> Bits:
    """v_bfe_u32: c bits of a from bit b."""
    mask = (U64(1) << (c & 31).astype(U64)) - U64(1)
    return np.bitwise_and(a >> (b & 31), mask.astype(U32), dtype=U32)


def align_bits(a: Bits, b: Bits, c: Bits) -> Bits:
    """v_alignbit_b32: the 64 bits (a, b) shifted right by c."""
    both = (a.astype(U64) << U64(32)) | b
    return (both >> (c & 31).astype(U64)).astype(U32)


def high_signed_product(a: Bits, b: Bits) -> Bits:
    """v_mul_hi_i32."""
    wide = signed(a).astype(I64) * signed(b).astype(I64)
    return (wide >> 32).astype(I32).view(U32)


def classify(value: Floats, classes: Bits) -> Array:
    """v_cmp_class_f32: whether each value is in one of the classes that `classes` has bits for.

    From bit 0: signalling NaN, quiet NaN, then −∞, −normal, −denormal, −0, and the positive ones back.
    """
    bits, size = value.view(U32), np.abs(value)
    negative = np.signbit(value)
    quiet = (bits & U32(0x00400000)) != 0
    finite = np.where(size == 0, 5, np.where(size < F32(2.0**-126), 4, 3))
    kind = np.where(np.isinf(value), 2, finite)
    kind = np.where(negative, kind, 11 - kind)
    kind = np.where(np.isnan(value), np.where(quiet, 1, 0), kind)
    return (classes >> kind.astype(U32)) & U32(1) != 0


def _same(a: Any) -> Any:
    return a


BITS_1: MappingProxyType[str, Function] = MappingProxyType(
    {
        "v_mov_b32": _same,
        "v_accvgpr_read_b32": _same,
        "v_accvgpr_write_b32": _same,
        "v_accvgpr_mov_b32": _same,
        "v_not_b32": lambda a: ~a,
        "v_bfrev_b32": reverse_bits,
        "v_ffbh_u32": leading_zeros,
        "v_ffbl_b32": trailing_zeros,
    }
)

BITS_2: MappingProxyType[str, Function] = MappingProxyType(
    {
        "v_add_u32": lambda a, b: a + b,
        "v_sub_u32": lambda a, b: a - b,
        "v_subrev_u32": lambda a, b: b - a,
        "v_and_b32": lambda a, b: a & b,
        "v_or_b32": lambda a, b: a | b,
        "v_xor_b32": lambda a, b: a ^ b,
        "v_xnor_b32": lambda a, b: ~(a ^ b),
        "v_lshlrev_b32": lambda a, b: b << (a & 31),
        "v_lshrrev_b32": lambda a, b: b >> (a & 31),
        "v_ashrrev_i32": lambda a, b: (signed(b) >> signed(a & 31)).view(U32),
        "v_mul_lo_u32": lambda a, b: product(a, b).astype(U32),
        "v_mul_hi_u32": lambda a, b: (product(a, b) >> U64(32)).astype(U32),
        "v_mul_hi_i32": high_signed_product,
        "v_mul_u32_u24": lambda a, b: product(a & 0xFFFFFF, b & 0xFFFFFF).astype(U32),
        "v_mul_i32_i24": lambda a, b: ((signed(a << 8) >> 8) * (signed(b << 8) >> 8)).view(U32),
        "v_max_i32": lambda a, b: np.maximum(signed(a), signed(b)).view(U32),
        "v_min_i32": lambda a, b: np.minimum(signed(a), signed(b)).view(U32),
        "v_max_u32": np.maximum,
        "v_min_u32": np.minimum,
        "v_bfm_b32": lambda a, b: ((U32(1) << (a & 31)) - U32(1)) << (b & 31),
        "v_lshlrev_b16": lambda a, b: (b << (a & 15)) & 0xFFFF,
        "v_lshrrev_b16": lambda a, b: (b & 0xFFFF) >> (a & 15),
        "v_ashrrev_i16": lambda a, b: (
            (low_signed(b) >> (a & 15).astype(np.int16)).astype(np.uint16).astype(U32)
        ),
        "v_add_u16": lambda a, b: (a + b) & 0xFFFF,
        "v_sub_u16": lambda a, b: (a - b) & 0xFFFF,
        "v_mul_lo_u16": lambda a, b: ((a & 0xFFFF) * (b & 0xFFFF)) & 0xFFFF,
        "v_max_u16": lambda a, b: np.maximum(a & 0xFFFF, b & 0xFFFF),
        "v_min_u16": lambda a, b: np.minimum(a & 0xFFFF, b & 0xFFFF),
        "v_max_i16": lambda a, b: (
            np.maximum(low_signed(a), low_signed(b)).view(np.uint16).astype(U32)
        ),
        "v_min_i16": lambda a, b: (
            np.minimum(low_signed(a), low_signed(b)).view(np.uint16).astype(U32)
        ),
        "v_pack_b32_f16": lambda a, b: (a & 0xFFFF) | (b << 16),
        "v_cvt_pk_u16_u32": lambda a, b: np.minimum(a, 65535) | np.minimum(b, 65535) << 16,
    }
)

BITS_3: MappingProxyType[str, Function] = MappingProxyType(
    {
        "v_add3_u32": lambda a, b, c: a + b + c,
        "v_lshl_add_u32": lambda a, b, c: (a << (b & 31)) + c,
        "v_add_lshl_u32": lambda a, b, c: (a + b) << (c & 31),
        "v_lshl_or_b32": lambda a, b, c: (a << (b & 31)) | c,
        "v_and_or_b32": lambda a, b, c: (a & b) | c,
        "v_or3_b32": lambda a, b, c: a | b | c,
        "v_xad_u32": lambda a, b, c: (a ^ b) + c,
        "v_bfe_u32": extract,
        "v_bfe_i32": extract_signed,
        "v_bfi_b32": lambda a, b, c: (a & b) | (~a & c),
        "v_mad_u32_u24": lambda a, b, c: product(a & 0xFFFFFF, b & 0xFFFFFF).astype(U32) + c,
        "v_mad_i32_i24": lambda a, b, c: (
            ((signed(a << 8) >> 8) * (signed(b << 8) >> 8)).view(U32) + c
        ),
        "v_alignbit_b32": align_bits,
        "v_perm_b32": permute_bytes,
        "v_max3_u32": lambda a, b, c: np.maximum(np.maximum(a, b), c),
        "v_min3_u32": lambda a, b, c: np.minimum(np.minimum(a, b), c),
        "v_max3_i32": lambda a, b, c: np.maximum(np.maximum(signed(a), signed(b)), signed(c)).view(
            U32
        ),
        "v_min3_i32": lambda a, b, c: np.minimum(np.minimum(signed(a), signed(b)), signed(c)).view(
            U32
        ),
        "v_med3_i32": lambda a, b, c: np.sort(np.stack([signed(a), signed(b), signed(c)]), 0)[
            1
        ].view(U32),
    }
)

FLOATS_1: MappingProxyType[str, Function] = MappingProxyType(
    {
        "v_exp_f32": lambda a: np.exp2(a.astype(F64)),
        "v_log_f32": lambda a: np.log2(a.astype(F64)),
        "v_rcp_f32": lambda a: F32(1) / a,
        "v_rcp_iflag_f32": lambda a: F32(1) / a,
        "v_rsq_f32": lambda a: 1 / np.sqrt(a.astype(F64)),
        "v_sqrt_f32": np.sqrt,
        "v_floor_f32": np.floor,
        "v_ceil_f32": np.ceil,
        "v_trunc_f32": np.trunc,
        "v_rndne_f32": np.rint,
        "v_fract_f32": lambda a: a - np.floor(a),
        "v_sin_f32": lambda a: np.sin(2 * np.pi * a.astype(F64)),
        "v_cos_f32": lambda a: np.cos(2 * np.pi * a.astype(F64)),
    }
)

FLOATS_2: MappingProxyType[str, Function] = MappingProxyType(
    {
        "v_add_f32": lambda a, b: a + b,
        "v_sub_f32": lambda a, b: a - b,
        "v_subrev_f32": lambda a, b: b - a,
        "v_mul_f32": lambda a, b: a * b,
        "v_mul_legacy_f32": lambda a, b: np.where((a == 0) | (b == 0), F32(0), a * b),
        "v_max_f32": larger,
        "v_min_f32": smaller,
    }
)

FLOATS_3: MappingProxyType[str, Function] = MappingProxyType(
    {
        "v_fma_f32": fma,
        "v_fmaak_f32": fma,
        "v_fmamk_f32": fma,
        "v_mad_f32": lambda a, b, c: a * b + c,
        "v_max3_f32": lambda a, b, c: larger(larger(a, b), c),
        "v_min3_f32": lambda a, b, c: smaller(smaller(a, b), c),
        "v_med3_f32": middle,
        "v_maximum3_f32": largest,
        "v_minimum3_f32": smallest,
        # Only their roles in the IEEE division sequence matter: v_div_fixup divides exactly.
        "v_div_fmas_f32": fma,
        "v_div_fixup_f32": lambda a, b, c: c / b,
    }
)

FLOATS_TO_BITS: MappingProxyType[str, Function] = MappingProxyType(
    {
        "v_cvt_u32_f32": lambda a: to_integer(a, 0, MASK32).astype(U32),
        "v_cvt_i32_f32": lambda a: to_integer(a, -(2**31), 2**31 - 1).astype(I32).view(U32),
        "v_cvt_f16_f32": float_to_half,
    }
)

BITS_TO_FLOATS: MappingProxyType[str, Function] = MappingProxyType(
    {
        "v_cvt_f32_u32": lambda a: a.astype(F32),
        "v_cvt_f32_i32": lambda a: signed(a).astype(F32),
        "v_cvt_f32_f16": half_to_float,
        "v_cvt_f32_ubyte0": lambda a: (a & 255).astype(F32),
        "v_cvt_f32_ubyte1": lambda a: (a >> 8 & 255).astype(F32),
        "v_cvt_f32_ubyte2": lambda a: (a >> 16 & 255).astype(F32),
        "v_cvt_f32_ubyte3": lambda a: (a >> 24).astype(F32),
    }
)

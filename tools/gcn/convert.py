"""Vector conversions between float32, bfloat16, half and FP8, FP4.

gfx942 reads and writes FP8 in the FNUZ dialect, gfx950 in the OCP one; conversions clamp where the wave's
mode says so.
"""

from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np

from tools.gcn.assembly import Instruction
from tools.gcn.formats import (
    F32,
    F64,
    FP4,
    FP8,
    U32,
    Array,
    Bits,
    bits_of,
    encode_fp8,
    float_to_bfloat,
    float_to_half,
    half_to_float,
    high_bfloat,
    low_bfloat,
)
from tools.gcn.lanes import Form, select_part
from tools.gcn.wave import Effect, Reader, Wave, Writer, put, row_of, vector


def conversion(x: Instruction, name: str) -> Effect | None:
    """What a conversion does, or None if it is none of these."""
    return next((effect for build in _FAMILIES if (effect := build(x, name))), None)


def _bfloat_pair(x: Instruction, name: str) -> Effect | None:
    if name != "v_cvt_pk_bf16_f32":
        return None
    form = Form(x)
    a, b, write = form.floats(1), form.floats(2), form.write()
    return lambda w: write(w, float_to_bfloat(a(w)) | float_to_bfloat(b(w)) << U32(16))


def _halves(row: int, high: bool, write: Writer) -> Writer:
    """Writes 16 bits into one half of a register and keeps the other."""

    def put_half(w: Wave, pair: Array) -> None:
        old = w.vgpr[row]
        if high:
            write(w, (old & U32(0xFFFF)) | pair << U32(16))
        else:
            write(w, (old & U32(0xFFFF0000)) | pair)

    return put_half


def _to_fp8(x: Instruction, name: str) -> Effect | None:
    match = re.fullmatch(r"v_cvt_pk_(fp8|bf8)_f32", name)
    if not match:
        return None
    form, kind = Form(x), match[1]
    high = bool(x.modifiers.get("op_sel", [0, 0, 0])[-1])
    a, b, write = form.floats(1), form.floats(2), form.write()
    put_half = _halves(row_of(x.operands[0]), high, write)

    def effect(w: Wave) -> None:
        first = encode_fp8(a(w), kind, w.fnuz, w.saturate)
        second = encode_fp8(b(w), kind, w.fnuz, w.saturate)
        put_half(w, first | second << U32(8))

    return effect


def _pair_reader(form: Form, kind: str) -> Callable[[Wave], tuple[Array, Array]]:
    """Two values: two float32 sources, or the halves of one register."""
    a = form.floats(1)
    if kind == "f32":
        b = form.floats(2)
        return lambda w: (a(w), b(w))
    packed = vector(form.x.operands[1])
    if kind == "bf16":
        return lambda w: (low_bfloat(packed(w)), high_bfloat(packed(w)))
    return lambda w: (half_to_float(packed(w)), half_to_float(packed(w) >> U32(16)))


def _scale(read: Reader, sign: int) -> Callable[[Wave], Array]:
    """2^±e of the exponent of a float32 scale."""
    return lambda w: 2.0 ** (sign * (((read(w) >> 23) & 255).astype(F64) - 127))


def _scaled_to_fp8(x: Instruction, name: str) -> Effect | None:
    match = re.fullmatch(r"v_cvt_scalef32_pk_(fp8|bf8)_(f32|bf16|f16)", name)
    if not match:
        return None
    form, kind = Form(x), match[1]
    high = bool(x.modifiers.get("op_sel", [0])[-1])
    values = _pair_reader(form, match[2])
    inverse = _scale(vector(x.operands[3 if match[2] == "f32" else 2]), -1)
    put_half = _halves(row_of(x.operands[0]), high, form.write())

    def effect(w: Wave) -> None:
        factor = inverse(w)
        first, second = (
            encode_fp8(value.astype(F64) * factor, kind, w.fnuz, w.saturate) for value in values(w)
        )
        put_half(w, first | second << U32(8))

    return effect


def _scaled_from_codes(x: Instruction, name: str) -> Effect | None:
    match = re.fullmatch(r"v_cvt_scalef32_pk_(f32|bf16|f16)_(fp8|bf8|fp4)", name)
    if not match:
        return None
    to, kind, row = match[1], match[2], row_of(x.operands[0])
    select = x.modifiers.get("op_sel", [0, 0, 0])
    packed, scale = vector(x.operands[1]), _scale(vector(x.operands[2]), 1)

    def codes(w: Wave) -> tuple[Array, Array]:
        if kind == "fp4":
            byte = packed(w) >> U32(8 * (select[0] + 2 * select[1]))
            return FP4[byte & 15], FP4[(byte >> 4) & 15]
        pair, table = packed(w) >> U32(16 * select[0]), FP8[kind, w.fnuz]
        return table[pair & 255], table[(pair >> 8) & 255]

    def effect(w: Wave) -> None:
        factor = scale(w)
        first, second = ((value * factor).astype(F32) for value in codes(w))
        if to == "f32":
            put(w, row, bits_of(first))
            put(w, row + 1, bits_of(second))
        else:
            pack = float_to_bfloat if to == "bf16" else float_to_half
            put(w, row, pack(first) | pack(second) << U32(16))

    return effect


def _from_fp8(x: Instruction, name: str) -> Effect | None:
    match = re.fullmatch(r"v_cvt_(pk_)?f32_(fp8|bf8)", name)
    if not match:
        return None
    pair, kind, row = bool(match[1]), match[2], row_of(x.operands[0])
    source, select = vector(x.operands[1]), x.modifiers.get("op_sel")
    part = x.modifiers.get("src0_sel", "WORD_0" if pair else "BYTE_0")

    def chosen(w: Wave) -> Bits:
        if not select:
            return select_part(source(w), part)
        shift = 16 * select[0] if pair else 8 * (select[0] + 2 * select[1])
        return source(w) >> U32(shift)

    def effect(w: Wave) -> None:
        codes, table = chosen(w), FP8[kind, w.fnuz].astype(np.float32)
        second = table[(codes >> 8) & 255]
        put(w, row, bits_of(table[codes & 255]))
        if pair:
            put(w, row + 1, bits_of(second))

    return effect


_FAMILIES = (_bfloat_pair, _to_fp8, _scaled_to_fp8, _scaled_from_codes, _from_fp8)

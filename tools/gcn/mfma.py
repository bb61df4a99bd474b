"""Matrix instructions: D = A · Bᵀ + C over the 64 lanes of a wave.

A wave holds A `[M, K]` as 64/M groups of M lanes, each lane with K·M/64 consecutive values of one row;
B alike. A lane of the result holds one column and M·N/64 of its rows. Products and sums are in float64,
rounded once; hardware rounds differently. EXEC is ignored, as on hardware.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from tools.gcn.assembly import Instruction, Operand
from tools.gcn.errors import Unsupported
from tools.gcn.formats import F32, F64, FP4, FP8, I32, I64, U32, Array
from tools.gcn.wave import LANE, Effect, Wave, row_of, vector

# Values in a 32-bit register.
_PER_REGISTER = {"fp8": 4, "bf8": 4, "i8": 4, "f16": 2, "bf16": 2, "f32": 1, "fp4": 8}
_F8F6F4 = ("fp8", "bf8", "fp6", "bf6", "fp4")
Unpack = Callable[[Wave], Array]  # [64, values a lane] in float64


@dataclass(frozen=True)
class Shape:
    """An instruction's sizes and operand formats."""

    m: int
    n: int
    k: int
    kind: str
    a: str
    b: str
    integer: bool
    scaled: bool

    @property
    def values(self) -> int:
        """Values of A a lane holds."""
        return self.k * self.m // 64

    @property
    def results(self) -> int:
        """Registers of the result."""
        return self.m * self.n // 64


def _shape(x: Instruction) -> Shape:
    match = re.fullmatch(r"v_mfma_(scale_)?(f32|i32)_(\d+)x(\d+)x(\d+)_(\w+?)(?:_e64)?", x.opcode)
    if not match:
        raise Unsupported(x.opcode)
    m, n, k, kind = int(match[3]), int(match[4]), int(match[5]), match[6]
    if m not in (16, 32) or "_4b" in kind or "_2b" in kind:
        raise Unsupported(x.opcode)
    if kind == "f8f6f4":
        a, b = (_F8F6F4[x.modifiers.get(name, 0)] for name in ("cbsz", "blgp"))
    elif kind in ("fp8_fp8", "fp8_bf8", "bf8_fp8", "bf8_bf8"):
        a, b = kind.split("_")
    else:
        a = b = {"bf16_1k": "bf16", "xf32": "f32"}.get(kind, kind)
        if a not in _PER_REGISTER or x.modifiers.get("cbsz") or x.modifiers.get("blgp"):
            raise Unsupported(x.text)
    if a not in _PER_REGISTER or b not in _PER_REGISTER:
        raise Unsupported(x.text)
    return Shape(m, n, k, kind, a, b, match[2] == "i32", bool(match[1]))


def _unpack(operand: Operand, form: str, values: int) -> Unpack:
    """The values that the registers from `operand` on hold."""
    count = max(values // _PER_REGISTER[form], 1)
    row = row_of(operand)

    def read(w: Wave) -> Array:
        words = np.ascontiguousarray(w.vgpr[row : row + count].T)
        if form in ("fp8", "bf8"):
            return FP8[form, w.fnuz][words.view(np.uint8)]
        if form == "i8":
            return words.view(np.int8).astype(F64)
        if form == "f16":
            return words.view(np.float16).astype(F64)
        if form == "bf16":
            wide = words.view(np.uint16).astype(U32) << U32(16)
            return wide.view(F32).astype(F64)
        if form == "f32":
            return words.view(F32).astype(F64)
        codes = words.view(np.uint8)
        return FP4[np.stack([codes & 15, codes >> 4], -1).reshape(64, -1)]

    return read


def _matrix(values: Array, shape: Shape, form: str, exponents: Array | None) -> Array:
    """A lane's values `[64, e]` as the matrix `[M, K]`.

    f8f6f4 with 8-bit data: registers 0–3 hold the low half of K, 4–7 the high half. 32 inputs share a
    scale, which lane group k // 32 holds.
    """
    m, k, each, groups = shape.m, shape.k, shape.values, 64 // shape.m
    grouped = values.reshape(groups, m, each)
    if shape.kind == "f8f6f4" and form in ("fp8", "bf8"):
        split = grouped.reshape(groups, m, 2, each // 2)
        matrix = split.transpose(1, 2, 0, 3).reshape(m, k)
    else:
        matrix = grouped.transpose(1, 0, 2).reshape(m, k)
    if exponents is None:
        return matrix
    return matrix * np.repeat((2.0**exponents).reshape(groups, m).T, k // groups, 1)


def _to_xf32(values: Array) -> Array:
    """Rounded to 10 bits of mantissa, ties to even."""
    bits = values.astype(F32).view(U32)
    rounded = (bits + U32(0xFFF) + ((bits >> U32(13)) & U32(1))) & U32(0xFFFFE000)
    return rounded.view(F32).astype(F64)


def _result_places(shape: Shape) -> tuple[Array, Array]:
    """Row and column of each register and lane of the result, `[registers, 64]`."""
    register = np.arange(shape.results)[:, None]
    if shape.m == 32:
        row = 8 * (register // 4) + 4 * (LANE // 32)[None] + register % 4
    else:
        row = 4 * (LANE // 16)[None] + register
    return row, np.broadcast_to((LANE % shape.n)[None], row.shape)


def _scales(x: Instruction) -> list[Callable[[Wave], Array]]:
    """The exponents of A's and of B's scales, by lane."""
    low, high = x.modifiers.get("op_sel", [0, 0, 0]), x.modifiers.get("op_sel_hi", [0, 0, 0])

    def reader(number: int) -> Callable[[Wave], Array]:
        source, byte = vector(x.operands[4 + number]), low[number] + 2 * high[number]
        return lambda w: ((source(w) >> U32(8 * byte)) & 255).astype(F64) - 127

    return [reader(0), reader(1)]


def matrix_effect(x: Instruction) -> Effect:
    """What a matrix instruction does. Raises `Unsupported` for shapes and formats not known."""
    shape = _shape(x)
    a = _unpack(x.operands[1], shape.a, shape.values)
    b = _unpack(x.operands[2], shape.b, shape.values)
    places, target = _result_places(shape), row_of(x.operands[0])
    addend = x.operands[3]
    in_registers = addend.kind in ("v", "a")
    addend_row = row_of(addend) if in_registers else 0
    constant = None if in_registers else vector(addend)
    scales = _scales(x) if shape.scaled else None

    def effect(w: Wave) -> None:
        left, right = a(w), b(w)
        if shape.kind == "xf32":
            left, right = _to_xf32(left), _to_xf32(right)
        by_a, by_b = (scales[0](w), scales[1](w)) if scales else (None, None)
        product = _matrix(left, shape, shape.a, by_a) @ _matrix(right, shape, shape.b, by_b).T
        product = product[places]
        if constant is None:
            added = w.vgpr[addend_row : addend_row + shape.results]
        else:
            added = np.broadcast_to(constant(w), product.shape)
        if shape.integer:
            total = (product.astype(I64) + added.view(I32)).astype(I32).view(U32)
        else:
            total = (product + added.view(F32)).astype(F32).view(U32)
        w.vgpr[target : target + shape.results] = total

    return effect

"""Vector instructions: table look-ups, and those with a form of their own.

`vector_effect` asks one builder a family; a builder returns None for what is not its own.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np

from tools.gcn.assembly import Instruction
from tools.gcn.convert import conversion
from tools.gcn.double import double_effect, doubles
from tools.gcn.errors import Unsupported
from tools.gcn.formats import F32, F64, I64, U32, U64, Array, Bits, bits_of, half_to_float
from tools.gcn.lanes import Form, plain_name
from tools.gcn.scalar import COMPARE
from tools.gcn.vector_tables import (
    BITS_1,
    BITS_2,
    BITS_3,
    BITS_TO_FLOATS,
    FLOATS_1,
    FLOATS_2,
    FLOATS_3,
    FLOATS_TO_BITS,
    classify,
    fma,
    low_signed,
    product,
    signed,
)
from tools.gcn.wave import (
    LANE,
    LANES,
    MASK32,
    VCC,
    Effect,
    Reader,
    Wave,
    bits_of_mask,
    mask_of,
    put,
    put64,
    row_of,
    scalar,
    scalar64,
    vector,
    vector64,
)


def _table(x: Instruction, name: str) -> Effect | None:
    form = Form(x)
    for table, number in ((BITS_1, 1), (BITS_TO_FLOATS, 1), (BITS_2, 2), (BITS_3, 3)):
        if name in table:
            if number > 1:
                form.no_op_sel()
            compute = _clamped(name) if form.clamp and number == 2 else table[name]
            floats = table is BITS_TO_FLOATS
            return _apply(
                compute,
                [form.bits(n + 1) for n in range(number)],
                form.write_floats() if floats else form.write(),
            )
    for table, number in ((FLOATS_1, 1), (FLOATS_TO_BITS, 1), (FLOATS_2, 2), (FLOATS_3, 3)):
        if name in table:
            bits = table is FLOATS_TO_BITS
            return _apply(
                table[name],
                [form.floats(n + 1) for n in range(number)],
                form.write() if bits else form.write_floats(),
            )
    return None


def _clamped(name: str) -> Callable[[Bits, Bits], Array]:
    """Addition and subtraction that stop at the ends of uint32."""
    if name == "v_sub_u32":
        return lambda a, b: np.where(b > a, U32(0), a - b)
    if name == "v_add_u32":
        return lambda a, b: np.minimum(a.astype(U64) + b, MASK32).astype(U32)
    raise Unsupported(f"clamp on {name}")


def _apply(compute: Callable[..., Any], reads: list[Reader], write: Callable[..., None]) -> Effect:
    if len(reads) == 1:
        (one,) = reads
        return lambda w: write(w, compute(one(w)))
    if len(reads) == 2:
        first, second = reads
        return lambda w: write(w, compute(first(w), second(w)))
    first, second, third = reads
    return lambda w: write(w, compute(first(w), second(w), third(w)))


def _accumulating(x: Instruction, name: str) -> Effect | None:
    """v_fmac_f32, whose third source is the destination, and v_ldexp_f32."""
    form = Form(x)
    if name == "v_fmac_f32":
        row = row_of(x.operands[0])
        a, b, write = form.floats(1), form.floats(2), form.write_floats()
        return lambda w: write(w, fma(a(w), b(w), w.vgpr[row].view(F32)))
    if name == "v_ldexp_f32":
        value, power, write = form.floats(1), form.bits(2), form.write()

        def scale(w: Wave) -> None:
            exponent = np.clip(signed(power(w)), -1000, 1000)
            write(w, bits_of(np.ldexp(value(w).astype(F64), exponent)))

        return scale
    return None


def _three_input_logic(x: Instruction, name: str) -> Effect | None:
    """v_bitop3: any function of three bits, its truth table a modifier."""
    if name not in ("v_bitop3_b32", "v_bitop3_b16"):
        return None
    form, table = Form(x), x.modifiers["bitop3"]
    form.no_op_sel()
    reads, write = [form.bits(n) for n in (1, 2, 3)], form.write()
    mask = U32(0xFFFF if name.endswith("16") else MASK32)

    def effect(w: Wave) -> None:
        a, b, c = (read(w) for read in reads)
        result = np.zeros(LANES, U32)
        for number in range(8):
            if table >> number & 1:
                left = (a if number & 4 else ~a) & (b if number & 2 else ~b)
                result |= left & (c if number & 1 else ~c)
        write(w, result & mask)

    return effect


def _select(x: Instruction, name: str) -> Effect | None:
    if name != "v_cndmask_b32":
        return None
    form = Form(x)
    write = form.write()
    mask: Callable[[Wave], int] = lambda w: w.sgpr[VCC] | w.sgpr[VCC + 1] << 32  # noqa: E731
    if len(x.operands) > 3:
        mask = scalar64(x.operands[3])
    signs = any(p.negate or p.absolute for p in x.operands[1:3])
    a, b = (form.floats(1), form.floats(2)) if signs else (form.bits(1), form.bits(2))
    return lambda w: write(w, np.where(mask_of(mask(w)), b(w).view(U32), a(w).view(U32)))


_NEGATED = {"nlt": "lt", "nle": "le", "ngt": "gt", "nge": "ge"}


def _comparison(condition: str) -> Callable[[Array, Array], Array]:
    """Element-wise; NaN makes every comparison false and every negated one true."""
    if condition == "o":
        return lambda a, b: ~(np.isnan(a) | np.isnan(b))
    if condition == "u":
        return lambda a, b: np.isnan(a) | np.isnan(b)
    if condition == "lg":
        return lambda a, b: (a < b) | (a > b)
    if condition == "nlg":
        return lambda a, b: ~((a < b) | (a > b))
    if condition == "neq":
        return lambda a, b: ~(a == b)
    if condition in _NEGATED:
        positive = COMPARE[_NEGATED[condition]]
        return lambda a, b: ~positive(a, b)
    if condition in COMPARE:
        return COMPARE[condition]
    raise Unsupported(f"comparison {condition!r}")


def _compared(form: Form, number: int, kind: str) -> Reader:
    operand = form.x.operands[number]
    if kind == "f32":
        return form.floats(number)
    if kind == "f64":
        return doubles(operand)
    if kind in ("u64", "i64"):
        wide = vector64(operand)
        return wide if kind == "u64" else lambda w: wide(w).view(I64)
    read = form.bits(number)
    views: dict[str, Callable[[Bits], Array]] = {
        "u32": lambda v: v,
        "i32": signed,
        "u16": lambda v: v & 0xFFFF,
        "i16": low_signed,
        "f16": half_to_float,
    }
    view = views[kind]
    return lambda w: view(read(w))


def _compare(x: Instruction, name: str) -> Effect | None:
    match = re.fullmatch(r"v_cmp(x?)_(\w+?)_(f64|f32|f16|u32|i32|u16|i16|u64|i64)", name)
    if not match or match[2] == "class":
        return None
    form, compare, index = Form(x), _comparison(match[2]), x.operands[0].index
    a, b = _compared(form, 1, match[3]), _compared(form, 2, match[3])
    if match[1]:
        return lambda w: w.set_exec(bits_of_mask(compare(a(w), b(w)) & w.active()))
    return lambda w: w.set_scalar(index, bits_of_mask(compare(a(w), b(w)) & w.active()), 2)


def _classify(x: Instruction, name: str) -> Effect | None:
    match = re.fullmatch(r"v_cmp(x?)_class_f32", name)
    if not match:
        return None
    form, index = Form(x), x.operands[0].index
    value, classes = form.floats(1), form.bits(2)

    def found(w: Wave) -> int:
        return bits_of_mask(classify(value(w), classes(w)) & w.active())

    if match[1]:
        return lambda w: w.set_exec(found(w))
    return lambda w: w.set_scalar(index, found(w), 2)


def _carry(x: Instruction, name: str) -> Effect | None:
    """Addition and subtraction with a carry for each lane in a scalar pair."""
    match = re.fullmatch(r"v_(add|sub|subrev|addc|subb|subbrev)_co_u32", name)
    if not match:
        return None
    form, row, out = Form(x), row_of(x.operands[0]), x.operands[1].index
    kind, a, b = match[1], form.bits(2), form.bits(3)
    carry = scalar64(x.operands[4]) if kind in ("addc", "subb", "subbrev") else None

    def effect(w: Wave) -> None:
        left, right = a(w).astype(I64), b(w).astype(I64)
        if kind.endswith("rev"):
            left, right = right, left
        more = mask_of(carry(w)).astype(I64) if carry else 0
        result = left + right + more if kind.startswith("add") else left - right - more
        out_of_range = ((result < 0) | (result > MASK32)) & w.active()
        put(w, row, (result & MASK32).astype(U32))
        w.set_scalar(out, bits_of_mask(out_of_range), 2)

    return effect


def _division(x: Instruction, name: str) -> Effect | None:
    """v_div_scale_f32 passes its source on: v_div_fixup_f32 divides exactly by itself."""
    if name != "v_div_scale_f32":
        return None
    row, out, source = row_of(x.operands[0]), x.operands[1].index, vector(x.operands[2])

    def effect(w: Wave) -> None:
        put(w, row, source(w))
        w.set_scalar(out, 0, 2)

    return effect


def _wide(x: Instruction, name: str) -> Effect | None:
    """64 bits a lane."""
    o = x.operands
    if name == "v_mov_b64":
        row, source = row_of(o[0]), vector64(o[1])
        return lambda w: put64(w, row, source(w))
    if name == "v_lshl_add_u64":
        row, a, shift, b = row_of(o[0]), vector64(o[1]), vector(o[2]), vector64(o[3])
        return lambda w: put64(w, row, (a(w) << (shift(w) & 7).astype(U64)) + b(w))
    shifts: dict[str, Callable[[Array, Array], Array]] = {
        "v_lshlrev_b64": lambda value, by: value << by,
        "v_lshrrev_b64": lambda value, by: value >> by,
        "v_ashrrev_i64": lambda value, by: (value.view(I64) >> by.view(I64)).view(U64),
    }
    if name in shifts:
        move, row, by, value = shifts[name], row_of(o[0]), vector(o[1]), vector64(o[2])
        return lambda w: put64(w, row, move(value(w), (by(w) & 63).astype(U64)))
    if name in ("v_mad_u64_u32", "v_mad_i64_i32"):
        row, left, right, add = row_of(o[0]), vector(o[2]), vector(o[3]), vector64(o[4])

        def multiply(w: Wave) -> None:
            a_, b_ = left(w), right(w)
            if name == "v_mad_u64_u32":
                wide = product(a_, b_)
            else:
                wide = (signed(a_).astype(I64) * signed(b_).astype(I64)).view(U64)
            put64(w, row, wide + add(w))

        return multiply
    return None


def _packed(x: Instruction, name: str) -> Effect | None:
    """Two float32 in a register pair; op_sel picks which half each source gives to each result."""
    if name not in ("v_pk_mul_f32", "v_pk_add_f32", "v_pk_fma_f32", "v_pk_mov_b32"):
        return None
    form, row, sources = Form(x), row_of(x.operands[0]), x.operands[1:]
    if form.clamp:
        raise Unsupported(f"clamp: {x.text}")
    count, m = len(sources), x.modifiers
    low, high = m.get("op_sel", [0] * count), m.get("op_sel_hi", [1] * count)
    negate = m.get("neg_lo", [0] * count), m.get("neg_hi", [0] * count)

    def half(number: int, word: int, negative: int) -> Reader:
        operand = sources[number]
        read = vector(operand, word if operand.count > 1 else 0)
        if negative:
            return lambda w: (read(w) ^ U32(0x80000000)).view(F32)
        return lambda w: read(w).view(F32)

    if name == "v_pk_mov_b32":
        first, second = half(0, low[0], 0), half(1, low[1], 0)

        def move(w: Wave) -> None:
            a, b = first(w).view(U32).copy(), second(w).view(U32).copy()
            put(w, row, a)
            put(w, row + 1, b)

        return move
    lows = [half(n, low[n], negate[0][n]) for n in range(count)]
    highs = [half(n, high[n], negate[1][n]) for n in range(count)]
    packed: dict[str, Callable[..., Array]] = {
        "v_pk_mul_f32": np.multiply,
        "v_pk_add_f32": np.add,
        "v_pk_fma_f32": fma,
    }
    compute = packed[name]

    def effect(w: Wave) -> None:
        a, b = compute(*(read(w) for read in lows)), compute(*(read(w) for read in highs))
        put(w, row, bits_of(a))
        put(w, row + 1, bits_of(b))

    return effect


def _lane_access(x: Instruction, name: str) -> Effect | None:
    """Between vector and scalar registers."""
    o = x.operands
    if name == "v_readfirstlane_b32":
        index, source = o[0].index, vector(o[1])
        return lambda w: w.set_scalar(index, int(source(w)[int(np.argmax(w.active()))]))
    if name == "v_readlane_b32":
        index, source, lane = o[0].index, vector(o[1]), scalar(o[2])
        return lambda w: w.set_scalar(index, int(source(w)[lane(w) & 63]))
    if name == "v_writelane_b32":
        row, value, lane = row_of(o[0]), scalar(o[1]), scalar(o[2])

        def write(w: Wave) -> None:
            w.vgpr[row, lane(w) & 63] = value(w)

        return write
    if name not in ("v_mbcnt_lo_u32_b32", "v_mbcnt_hi_u32_b32", "v_bcnt_u32_b32"):
        return None
    row, bits, add = row_of(o[0]), vector(o[1]), vector(o[2])
    below = np.clip(LANE if "lo" in name else LANE - 32, 0, 32).astype(U64)
    mask = ((U64(1) << below) - U64(1)).astype(U32)  # of the lanes before this one
    if name == "v_bcnt_u32_b32":
        mask = np.full(LANES, MASK32, U32)

    def count(w: Wave) -> None:
        counted = np.unpackbits((bits(w) & mask).view(np.uint8).reshape(LANES, 4), axis=1).sum(1)
        put(w, row, counted.astype(U32) + add(w))

    return count


def _exchange(x: Instruction, name: str) -> Effect | None:
    """Swaps of registers and of halves of registers between lanes."""
    if name == "v_swap_b32":
        first, second = row_of(x.operands[0]), row_of(x.operands[1])

        def swap(w: Wave) -> None:
            a, b = w.vgpr[first].copy(), w.vgpr[second].copy()
            put(w, first, b)
            put(w, second, a)

        return swap
    if name not in ("v_permlane32_swap_b32", "v_permlane16_swap_b32"):
        return None
    size, d, s = (32 if "32_" in name else 16), row_of(x.operands[0]), row_of(x.operands[1])

    def exchange(w: Wave) -> None:
        for begin in range(0, LANES, 2 * size):
            low, high = slice(begin, begin + size), slice(begin + size, begin + 2 * size)
            kept = w.vgpr[s, low].copy()
            w.vgpr[s, low] = w.vgpr[d, high]
            w.vgpr[d, high] = kept

    return exchange


_FAMILIES = (
    _table,
    _accumulating,
    _three_input_logic,
    _select,
    _compare,
    _classify,
    double_effect,
    _carry,
    _division,
    _wide,
    _packed,
    _lane_access,
    _exchange,
    conversion,
)


def vector_effect(x: Instruction) -> Effect | None:
    """What a vector instruction does, or None if it is unknown."""
    name = plain_name(x.opcode)
    return next((effect for build in _FAMILIES if (effect := build(x, name))), None)

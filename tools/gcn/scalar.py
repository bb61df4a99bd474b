"""Scalar instructions: arithmetic on one wave's Python ints, scalar loads, mode changes.

`scalar_effect` asks one builder a family; a builder returns None for what is not its own.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from types import MappingProxyType

import numpy as np

from tools.gcn.assembly import Instruction
from tools.gcn.errors import Fault, Unsupported
from tools.gcn.formats import U32, U64
from tools.gcn.wave import MASK32, MASK64, Effect, Wave, scalar, scalar64

Compute = Callable[[int, int], int]
Carry = Callable[[int, int, int], bool]  # SCC from both operands and the unmasked result


def signed32(value: int) -> int:
    """The two's complement of 32 bits."""
    return value - (1 << 32) if value & 0x80000000 else value


def signed16(value: int) -> int:
    """The two's complement of the low 16 bits: how constants of s_…k_i32 are written."""
    return (value & 0xFFFF ^ 0x8000) - 0x8000


def signed64(value: int) -> int:
    """The two's complement of 64 bits."""
    return value - (1 << 64) if value >> 63 else value


def _fits(value: int) -> bool:
    return -(2**31) <= value < 2**31


def _nonzero(a: int, b: int, result: int) -> bool:
    return bool(result & MASK32)


def _sign_bits(a: int) -> int:
    """How many leading bits equal the sign; all ones if all 32 do."""
    return 32 - (a ^ MASK32 if a >> 31 else a).bit_length() if a not in (0, MASK32) else MASK32


def _field(a: int, b: int) -> int:
    return (a >> (b & 31)) & ((1 << ((b >> 16) & 127)) - 1)


def _signed_field(a: int, b: int) -> int:
    size, value = (b >> 16) & 127, _field(a, b)
    return value - (1 << size) if size and value >> (size - 1) else value


def _signed_field64(a: int, b: int) -> int:
    size = (b >> 16) & 127
    value = (a >> (b & 63)) & ((1 << size) - 1)
    return value - (1 << size) if size and value >> (size - 1) else value


COMPARE = MappingProxyType(
    {
        "lt": lambda a, b: a < b,
        "le": lambda a, b: a <= b,
        "gt": lambda a, b: a > b,
        "ge": lambda a, b: a >= b,
        "eq": lambda a, b: a == b,
        "lg": lambda a, b: a != b,
        "ne": lambda a, b: a != b,
    }
)
LOGIC: MappingProxyType[str, Compute] = MappingProxyType(
    {
        "and": lambda a, b: a & b,
        "or": lambda a, b: a | b,
        "xor": lambda a, b: a ^ b,
        "andn2": lambda a, b: a & ~b,
        "orn2": lambda a, b: a | ~b,
        "nand": lambda a, b: ~(a & b),
        "nor": lambda a, b: ~(a | b),
        "xnor": lambda a, b: ~(a ^ b),
        "andn1": lambda a, b: ~a & b,
        "orn1": lambda a, b: ~a | b,
    }
)
# name -> result of two 32-bit operands, and SCC where the instruction sets it.
BINARY: MappingProxyType[str, tuple[Compute, Carry | None]] = MappingProxyType(
    {
        "s_add_u32": (lambda a, b: a + b, lambda a, b, r: r > MASK32),
        "s_sub_u32": (lambda a, b: a - b, lambda a, b, r: b > a),
        "s_add_i32": (
            lambda a, b: a + b,
            lambda a, b, r: not _fits(signed32(a) + signed32(b)),
        ),
        "s_sub_i32": (
            lambda a, b: a - b,
            lambda a, b, r: not _fits(signed32(a) - signed32(b)),
        ),
        "s_mul_i32": (lambda a, b: a * b, None),
        "s_mul_hi_u32": (lambda a, b: a * b >> 32, None),
        "s_mul_hi_i32": (lambda a, b: signed32(a) * signed32(b) >> 32, None),
        "s_lshl_b32": (lambda a, b: a << (b & 31), _nonzero),
        "s_lshr_b32": (lambda a, b: a >> (b & 31), _nonzero),
        "s_ashr_i32": (lambda a, b: signed32(a) >> (b & 31), _nonzero),
        "s_max_i32": (
            lambda a, b: max(signed32(a), signed32(b)),
            lambda a, b, r: signed32(a) > signed32(b),
        ),
        "s_min_i32": (
            lambda a, b: min(signed32(a), signed32(b)),
            lambda a, b, r: signed32(a) < signed32(b),
        ),
        "s_max_u32": (max, lambda a, b, r: a > b),
        "s_min_u32": (min, lambda a, b, r: a < b),
        "s_absdiff_i32": (lambda a, b: abs(signed32(a) - signed32(b)), _nonzero),
        "s_bfm_b32": (lambda a, b: ((1 << (a & 31)) - 1) << (b & 31), None),
        "s_pack_ll_b32_b16": (lambda a, b: a & 0xFFFF | (b & 0xFFFF) << 16, None),
        "s_pack_lh_b32_b16": (lambda a, b: a & 0xFFFF | b & 0xFFFF0000, None),
        "s_pack_hh_b32_b16": (lambda a, b: a >> 16 | b & 0xFFFF0000, None),
        "s_bfe_u32": (_field, _nonzero),
        "s_bfe_i32": (_signed_field, _nonzero),
        "s_lshl1_add_u32": (lambda a, b: (a << 1) + b, lambda a, b, r: r > MASK32),
        "s_lshl2_add_u32": (lambda a, b: (a << 2) + b, lambda a, b, r: r > MASK32),
        "s_lshl3_add_u32": (lambda a, b: (a << 3) + b, lambda a, b, r: r > MASK32),
        "s_lshl4_add_u32": (lambda a, b: (a << 4) + b, lambda a, b, r: r > MASK32),
    }
)
# name -> (result of one operand, operand is 64 bits wide, sets SCC to result ≠ 0)
UNARY: MappingProxyType[str, tuple[Callable[[int], int], bool, bool]] = MappingProxyType(
    {
        "s_mov_b32": (lambda a: a, False, False),
        "s_movk_i32": (signed16, False, False),
        "s_abs_i32": (lambda a: abs(signed32(a)), False, True),
        "s_not_b32": (lambda a: ~a, False, True),
        "s_bcnt1_i32_b32": (lambda a: a.bit_count(), False, True),
        "s_bcnt1_i32_b64": (lambda a: a.bit_count(), True, True),
        "s_ff1_i32_b32": (lambda a: (a & -a).bit_length() - 1, False, False),
        "s_ff1_i32_b64": (lambda a: (a & -a).bit_length() - 1, True, False),
        "s_flbit_i32_b32": (lambda a: 32 - a.bit_length() if a else MASK32, False, False),
        "s_flbit_i32": (_sign_bits, False, False),
        "s_brev_b32": (lambda a: int(f"{a:032b}"[::-1], 2), False, False),
        "s_sext_i32_i16": (signed16, False, False),
        "s_sext_i32_i8": (lambda a: (a & 0xFF ^ 0x80) - 0x80, False, False),
    }
)


def _binary(x: Instruction) -> Effect | None:
    if x.opcode not in BINARY:
        return None
    compute, carry = BINARY[x.opcode]
    index, a, b = x.operands[0].index, scalar(x.operands[1]), scalar(x.operands[2])

    def effect(w: Wave) -> None:
        left, right = a(w), b(w)
        result = compute(left, right)
        w.sgpr[index] = result & MASK32
        if carry:
            w.scc = int(carry(left, right, result))

    return effect


def _unary(x: Instruction) -> Effect | None:
    if x.opcode not in UNARY:
        return None
    compute, wide, sets = UNARY[x.opcode]
    index, a = x.operands[0].index, (scalar64 if wide else scalar)(x.operands[1])

    def effect(w: Wave) -> None:
        result = compute(a(w)) & MASK32
        w.sgpr[index] = result
        if sets:
            w.scc = int(result != 0)

    return effect


def _wide(x: Instruction) -> Effect | None:
    """Moves, shifts and inversion of 64 bits."""
    moves: dict[str, Callable[[int, int], int]] = {
        "s_lshl_b64": lambda a, b: a << (b & 63),
        "s_lshr_b64": lambda a, b: a >> (b & 63),
        "s_ashr_i64": lambda a, b: signed64(a) >> (b & 63),
        "s_bfe_i64": _signed_field64,
        "s_bfe_u64": lambda a, b: (a >> (b & 63)) & ((1 << ((b >> 16) & 127)) - 1),
        "s_not_b64": lambda a, b: ~a,
        "s_mov_b64": lambda a, b: a,
    }
    if x.opcode not in moves:
        return None
    compute, index, a = moves[x.opcode], x.operands[0].index, scalar64(x.operands[1])
    b: Callable[[Wave], int] = scalar(x.operands[2]) if len(x.operands) > 2 else lambda w: 0
    sets = x.opcode != "s_mov_b64"

    def effect(w: Wave) -> None:
        result = compute(a(w), b(w)) & MASK64
        w.set_scalar(index, result, 2)
        if sets:
            w.scc = int(result != 0)

    return effect


def _logic(x: Instruction) -> Effect | None:
    if match := re.fullmatch(r"s_(\w+)_saveexec_b64", x.opcode):
        return _save_exec(x, match[1]) if match[1] in LOGIC else None
    match = re.fullmatch(r"s_(and|or|xor|andn2|orn2|nand|nor|xnor)_b(32|64)", x.opcode)
    if not match:
        return None
    compute, words = LOGIC[match[1]], int(match[2]) // 32
    read, mask = (scalar64, MASK64) if words == 2 else (scalar, MASK32)
    index, a, b = x.operands[0].index, read(x.operands[1]), read(x.operands[2])

    def effect(w: Wave) -> None:
        result = compute(a(w), b(w)) & mask
        w.set_scalar(index, result, words)
        w.scc = int(result != 0)

    return effect


def _save_exec(x: Instruction, name: str) -> Effect:
    compute, index, a = LOGIC[name], x.operands[0].index, scalar64(x.operands[1])

    def effect(w: Wave) -> None:
        source, old = a(w), w.exec
        result = compute(source, old) & MASK64
        w.set_scalar(index, old, 2)
        w.set_exec(result)
        w.scc = int(result != 0)

    return effect


def _compare(x: Instruction) -> Effect | None:
    if match := re.fullmatch(r"s_bitcmp([01])_b32", x.opcode):
        wanted, a, b = int(match[1]), scalar(x.operands[0]), scalar(x.operands[1])

        def test(w: Wave) -> None:
            w.scc = int((a(w) >> (b(w) & 31) & 1) == wanted)

        return test
    match = re.fullmatch(r"s_cmpk?_(lt|le|gt|ge|eq|lg)_([iu])(32|64)", x.opcode)
    if not match:
        return None
    compare, wide, signed = COMPARE[match[1]], match[3] == "64", match[2] == "i"
    read = scalar64 if wide else scalar
    first, second = read(x.operands[0]), read(x.operands[1])
    if x.opcode.startswith("s_cmpk") and signed:
        constant = signed16(x.operands[1].index) & MASK32
        second = lambda w: constant  # noqa: E731

    def effect(w: Wave) -> None:
        left, right = first(w), second(w)
        if signed and not wide:
            left, right = signed32(left), signed32(right)
        w.scc = int(compare(left, right))

    return effect


def _conditional(x: Instruction) -> Effect | None:
    if x.opcode in ("s_cmov_b32", "s_cmovk_i32"):
        index, source = x.operands[0].index, scalar(x.operands[1])
        if x.opcode == "s_cmovk_i32":
            constant = signed16(x.operands[1].index)
            source = lambda w: constant  # noqa: E731
        return lambda w: w.set_scalar(index, source(w)) if w.scc else None
    if x.opcode not in ("s_cselect_b32", "s_cselect_b64"):
        return None
    words = 2 if x.opcode.endswith("64") else 1
    read = scalar64 if words == 2 else scalar
    index, a, b = x.operands[0].index, read(x.operands[1]), read(x.operands[2])
    return lambda w: w.set_scalar(index, a(w) if w.scc else b(w), words)


def _with_carry(x: Instruction) -> Effect | None:
    """Additions that take SCC, and those of a 16-bit constant to the destination."""
    if x.opcode in ("s_addc_u32", "s_subb_u32"):
        adds, index = x.opcode == "s_addc_u32", x.operands[0].index
        a, b = scalar(x.operands[1]), scalar(x.operands[2])

        def carry(w: Wave) -> None:
            result = a(w) + b(w) + w.scc if adds else a(w) - b(w) - w.scc
            w.sgpr[index] = result & MASK32
            w.scc = int(result > MASK32 or result < 0)

        return carry
    if x.opcode not in ("s_addk_i32", "s_mulk_i32"):
        return None
    adds, index = x.opcode == "s_addk_i32", x.operands[0].index
    constant = signed16(x.operands[1].index)

    def effect(w: Wave) -> None:
        value = signed32(w.sgpr[index])
        result = value + constant if adds else value * constant
        w.sgpr[index] = result & MASK32
        if adds:
            w.scc = int(not _fits(result))

    return effect


def _load(x: Instruction) -> Effect | None:
    match = re.fullmatch(r"s_load_dword(?:x(\d+))?", x.opcode)
    if not match:
        return None
    words, index, base = int(match[1] or 1), x.operands[0].index, scalar64(x.operands[1])
    constant = x.modifiers.get("offset", 0)
    at: Callable[[Wave], int] = lambda w: constant  # noqa: E731
    if x.operands[2].kind == "s":
        register = scalar(x.operands[2])
        at = lambda w: register(w) + constant  # noqa: E731
    else:
        constant += x.operands[2].index

    def effect(w: Wave) -> None:
        address = np.array([(base(w) + at(w)) & MASK64], U64)
        loaded = w.memory.gather(address, 4 * words, x.text)[0].view(U32)
        w.sgpr[index : index + words] = loaded.tolist()

    return effect


def _mode(x: Instruction) -> Effect | None:
    """The one mode bit that is known, FP8 overflow; rounding and denormal modes are refused."""
    if not x.opcode.startswith("s_setreg"):
        return None
    register, first, size = x.modifiers["hwreg"]
    low, high = int(first or 0), int(first or 0) + int(size or 32)
    if register not in ("HW_REG_MODE", "1"):
        return lambda w: None
    if low < 8:
        raise Unsupported(f"change of rounding or denormal mode: {x.text}")
    value = scalar(x.operands[0])

    def effect(w: Wave) -> None:
        if low <= 23 < high:
            w.saturate = bool((value(w) >> (23 - low)) & 1)

    return effect


def _trap(x: Instruction) -> Effect | None:
    if x.opcode != "s_trap":
        return None

    def effect(w: Wave) -> None:
        raise Fault("the kernel reached s_trap")

    return effect


_FAMILIES = (
    _binary,
    _unary,
    _wide,
    _logic,
    _compare,
    _conditional,
    _with_carry,
    _load,
    _mode,
    _trap,
)


def scalar_effect(x: Instruction) -> Effect | None:
    """What a scalar instruction does, or None if it is unknown."""
    return next((effect for build in _FAMILIES if (effect := build(x))), None)

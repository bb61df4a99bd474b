"""How a vector instruction reads its sources and writes its destination.

Sources may carry a sign or an absolute value, come from another lane (DPP), or be a part of a register
(SDWA); the destination may be a part of one, and a float result may be clamped to [0, 1].
"""

from __future__ import annotations

import re
from typing import Any

import numpy as np

from tools.gcn.assembly import Instruction, Operand
from tools.gcn.errors import Unsupported
from tools.gcn.formats import F32, U32, Array, Bits, bits_of
from tools.gcn.wave import LANE, LANES, Mask, Reader, Wave, Writer, put, row_of, vector

SIGN, MAGNITUDE = U32(0x80000000), U32(0x7FFFFFFF)


def dpp_source(modifiers: dict[str, Any]) -> tuple[Array, Mask]:
    """For each lane the lane it reads, and whether that lane exists in its row."""
    row, place, all_lanes = LANE & ~15, LANE & 15, np.ones(LANES, bool)
    for name, value in modifiers.items():
        match name:
            case "quad_perm":
                return (LANE & ~3) + np.array(value)[LANE & 3], all_lanes
            case "row_shl":
                return LANE + value, place + value <= 15
            case "row_shr":
                return LANE - value, place >= value
            case "row_ror":
                return row + ((place - value) & 15), all_lanes
            case "row_mirror":
                return row + 15 - place, all_lanes
            case "row_half_mirror":
                return (LANE & ~7) + 7 - (LANE & 7), all_lanes
            case "row_newbcast":
                return row + value, all_lanes
            case "row_bcast":
                if value == 15:
                    return row - 1, LANE >= 16
                return np.full(LANES, 31), LANE >= 32
            case "wave_shl":
                return LANE + 1, LANE < 63
            case "wave_shr":
                return LANE - 1, LANE >= 1
            case "wave_rol":
                return (LANE + 1) % 64, all_lanes
            case "wave_ror":
                return (LANE - 1) % 64, all_lanes
    raise Unsupported(f"DPP {modifiers}")


def select_part(value: Bits, part: str | None, signed: bool = False) -> Bits:
    """SDWA: a byte or a word of each lane, its sign extended if `signed`."""
    if part is None or part == "DWORD":
        return value
    size = 8 if part.startswith("BYTE") else 16
    up = U32(32 - size - size * int(part[-1]))  # shifts the part to the top
    top = value << up
    if signed:
        return (top.view(np.int32) >> np.int32(32 - size)).view(U32)
    return top >> U32(32 - size)


class Form:
    """The sources (1 is the first after the destination) and the destination of one instruction."""

    def __init__(self, x: Instruction):
        self.x, self.m = x, x.modifiers
        self.dpp, self.sdwa = x.opcode.endswith("_dpp"), x.opcode.endswith("_sdwa")
        self.clamp = bool(self.m.get("clamp"))
        if self.m.get("mul") or self.m.get("div"):
            raise Unsupported(f"output modifier: {x.text}")
        if self.dpp:
            lane, self.exists = dpp_source(self.m)
            self.lane = np.clip(lane, 0, LANES - 1)

    def no_op_sel(self) -> None:
        """Refuse an operand selection that the caller would ignore."""
        if any(self.m.get("op_sel", ())):
            raise Unsupported(f"op_sel: {self.x.text}")

    def _source(self, number: int) -> tuple[Operand, Reader]:
        operand = self.x.operands[number]
        signed = self.sdwa and operand.text.startswith("sext(")
        if signed:
            operand = Operand(operand.text[5:-1])
        read = vector(operand)
        if self.dpp and number == 1:
            lane, exists, plain = self.lane, self.exists, read

            def moved(w: Wave) -> Array:
                from_lanes = exists & w.active()[lane]
                return np.where(from_lanes, plain(w)[lane], U32(0))

            read = moved
        if self.sdwa and number in (1, 2):
            part, whole = self.m.get(f"src{number - 1}_sel"), read
            read = lambda w: select_part(whole(w), part, signed)  # noqa: E731
        return operand, read

    def bits(self, number: int) -> Reader:
        """Source `number` as uint32; modifiers of sign are refused."""
        operand, read = self._source(number)
        if operand.negate or operand.absolute:
            raise Unsupported(f"sign modifier of an integer source: {self.x.text}")
        return read

    def floats(self, number: int) -> Reader:
        """Source `number` as float32, its sign modified."""
        operand, read = self._source(number)
        negate, absolute = operand.negate, operand.absolute
        if not (negate or absolute):
            return lambda w: read(w).view(F32)

        def modified(w: Wave) -> Array:
            value = read(w)
            value = value & MAGNITUDE if absolute else value
            return (value ^ SIGN if negate else value).view(F32)

        return modified

    def write(self) -> Writer:
        """Writes the destination's bits."""
        row = row_of(self.x.operands[0])
        part = self.m.get("dst_sel", "DWORD") if self.sdwa else "DWORD"
        if self.dpp:
            return self._write_dpp(row)
        if part == "DWORD":
            return lambda w, value: put(w, row, value)
        size = 0xFF if part.startswith("BYTE") else 0xFFFF
        shift = U32((8 if size == 0xFF else 16) * int(part[-1]))
        mask, kept = U32(size << int(shift)), U32(~(size << int(shift)) & 0xFFFFFFFF)
        unused = self.m.get("dst_unused", "UNUSED_PAD")
        if unused not in ("UNUSED_PAD", "UNUSED_PRESERVE"):
            raise Unsupported(f"{unused}: {self.x.text}")

        def write_part(w: Wave, value: Array) -> None:
            value = (value.astype(U32) << shift) & mask
            if unused == "UNUSED_PRESERVE":
                value = (w.vgpr[row] & kept) | value
            put(w, row, value)

        return write_part

    def _write_dpp(self, row: int) -> Writer:
        rows, banks = self.m.get("row_mask", 15), self.m.get("bank_mask", 15)
        enabled = np.array([rows >> (n // 16) & banks >> ((n & 15) // 4) & 1 for n in range(64)])
        enabled = enabled.astype(bool)
        lane, exists, bound = self.lane, self.exists, bool(self.m.get("bound_ctrl"))

        def write(w: Wave, value: Array) -> None:
            active = w.active()
            mask = active & enabled if bound else active & enabled & exists & active[lane]
            np.copyto(w.vgpr[row], value, where=mask, casting="unsafe")

        return write

    def write_floats(self) -> Writer:
        """Writes a float32 result, clamped if the instruction says so."""
        write = self.write()
        if not self.clamp:
            return lambda w, value: write(w, bits_of(value))

        def clamped(w: Wave, value: Array) -> None:
            write(w, bits_of(np.where(np.isnan(value), F32(0), np.clip(value, 0, 1))))

        return clamped


def plain_name(opcode: str) -> str:
    """An opcode without its encoding."""
    return re.sub(r"_(e32|e64|dpp|sdwa|e64_dpp)$", "", opcode)

"""The registers of one wave of 64 lanes, and the closures that read and write them.

A vector register is a row of 64 uint32; accumulation registers are the rows 256 … 511. Scalar registers
are Python ints; EXEC is s126 and s127, VCC s106 and s107. Readers and writers are made once for an
instruction: they are what the interpreter spends its time in.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from tools.gcn.assembly import Operand
from tools.gcn.errors import Unsupported
from tools.gcn.formats import U32, U64, Array, Bits
from tools.gcn.memory import GlobalMemory, LocalMemory

MASK32, MASK64 = 0xFFFFFFFF, 0xFFFFFFFFFFFFFFFF
VCC, M0, EXEC = 106, 124, 126
LANES = 64
LANE = np.arange(LANES)

Mask = npt.NDArray[np.bool_]
ScalarReader = Callable[["Wave"], int]
Reader = Callable[["Wave"], Any]  # an array of 64 lanes
Writer = Callable[["Wave", Array], None]
Effect = Callable[["Wave"], Any]  # carries out one instruction


class Wave:
    """Registers, status bits and program counter; every vector register starts poisoned."""

    def __init__(self, memory: GlobalMemory, local: LocalMemory, scratch: int, fnuz: bool):
        self.vgpr: Bits = np.full((512, LANES), 0xDEADBEEF, U32)
        self.sgpr = [0] * 128
        self.sgpr[EXEC] = self.sgpr[EXEC + 1] = MASK32
        self.scc = self.pc = 0
        self.saturate = False  # FP8 conversions clamp
        self.memory, self.local, self.fnuz = memory, local, fnuz
        self.scratch = np.zeros((LANES, scratch + 16), np.uint8)

    @property
    def exec(self) -> int:
        return self.sgpr[EXEC] | self.sgpr[EXEC + 1] << 32

    @property
    def all_active(self) -> bool:
        return self.sgpr[EXEC] == MASK32 and self.sgpr[EXEC + 1] == MASK32

    def active(self) -> Mask:
        """Which lanes are on."""
        return mask_of(self.exec)

    def active_lanes(self) -> Array:
        """The numbers of the lanes that are on."""
        return LANE if self.all_active else np.nonzero(self.active())[0]

    def set_exec(self, value: int) -> None:
        self.sgpr[EXEC], self.sgpr[EXEC + 1] = value & MASK32, value >> 32

    def set_scalar(self, index: int, value: int, words: int = 1) -> None:
        for word in range(words):
            self.sgpr[index + word] = (value >> 32 * word) & MASK32


@lru_cache(maxsize=4096)
def mask_of(bits: int) -> Mask:
    """64 booleans from the bits of an int, lane 0 first; not to be written to."""
    packed = np.frombuffer(bits.to_bytes(8, "little"), np.uint8)
    mask = np.unpackbits(packed, bitorder="little").astype(bool)
    mask.flags.writeable = False
    return mask


def bits_of_mask(mask: Mask) -> int:
    """The int whose bits are 64 booleans."""
    return int.from_bytes(np.packbits(mask, bitorder="little").tobytes(), "little")


def row_of(operand: Operand) -> int:
    """The row of `Wave.vgpr` that a vector register is."""
    if operand.kind not in ("v", "a"):
        raise Unsupported(f"{operand.text} is no vector register")
    return operand.index + (256 if operand.kind == "a" else 0)


@lru_cache(maxsize=4096)
def broadcast(value: int) -> Bits:
    """32 bits in every lane; not to be written to."""
    lanes = np.full(LANES, value, U32)
    lanes.flags.writeable = False
    return lanes


def scalar(operand: Operand) -> ScalarReader:
    """Reads 32 bits."""
    index = operand.index
    if operand.kind == "s":
        return lambda w: w.sgpr[index]
    if operand.kind in ("c", "f"):
        value = index & MASK32
        return lambda w: value
    raise Unsupported(f"scalar operand {operand.text}")


def scalar64(operand: Operand) -> ScalarReader:
    """Reads 64 bits; constants are extended by their sign."""
    index = operand.index
    if operand.kind == "s":
        return lambda w: w.sgpr[index] | w.sgpr[index + 1] << 32
    if operand.kind == "c":
        value = index & MASK64
        return lambda w: value
    raise Unsupported(f"64-bit scalar operand {operand.text}")


def vector(operand: Operand, word: int = 0) -> Reader:
    """Reads 32 bits a lane, without modifiers: a view of the register or a broadcast."""
    if operand.kind in ("v", "a"):
        row = row_of(operand) + word
        return lambda w: w.vgpr[row]
    if operand.kind == "s":
        index = operand.index + word
        return lambda w: broadcast(w.sgpr[index])
    if operand.kind in ("c", "f"):
        value = broadcast((operand.index & MASK64) >> 32 * word & MASK32)
        return lambda w: value
    raise Unsupported(f"vector operand {operand.text}")


def vector64(operand: Operand) -> Reader:
    """Reads 64 bits a lane as uint64."""
    low = vector(operand)
    if operand.count == 1 and operand.kind != "c":
        return lambda w: low(w).astype(U64)
    high = vector(operand, 1)
    return lambda w: low(w).astype(U64) | (high(w).astype(U64) << U64(32))


def put(wave: Wave, row: int, value: Array) -> None:
    """Write a vector register in the active lanes."""
    if wave.all_active:
        wave.vgpr[row] = value
    else:
        np.copyto(wave.vgpr[row], value, where=wave.active(), casting="unsafe")


def put64(wave: Wave, row: int, value: Array) -> None:
    """Write two vector registers with the halves of uint64s in the active lanes."""
    put(wave, row, (value & U64(MASK32)).astype(U32))
    put(wave, row + 1, (value >> U64(32)).astype(U32))

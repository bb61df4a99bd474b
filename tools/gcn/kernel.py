"""Launching: arguments, workgroups, waves, barriers, branches.

The waves of a workgroup run one after another, each to its next barrier, until all have ended; workgroups
run one after another.
"""

from __future__ import annotations

import itertools
import struct
from collections.abc import Callable, Mapping, Sequence
from enum import Enum
from types import MappingProxyType
from typing import Any

import numpy as np

from tools.gcn.access import memory_effect
from tools.gcn.assembly import Instruction, parse
from tools.gcn.errors import Fault, Unsupported
from tools.gcn.formats import U32, Array, Bytes
from tools.gcn.memory import GlobalMemory, LocalMemory
from tools.gcn.mfma import matrix_effect
from tools.gcn.scalar import scalar_effect
from tools.gcn.vector import vector_effect
from tools.gcn.wave import EXEC, LANE, LANES, MASK32, VCC, Effect, Wave

LOCAL_MEMORY = MappingProxyType({"gfx942": 65_536, "gfx950": 163_840})
FNUZ_TARGETS = frozenset(("gfx942",))

# How an argument of each type is packed; pointers are "<Q".
_PACKING = MappingProxyType(
    {
        "i1": "<B",
        "u1": "<B",
        "i8": "<b",
        "u8": "<B",
        "i16": "<h",
        "u16": "<H",
        "i32": "<i",
        "u32": "<I",
        "i64": "<q",
        "u64": "<Q",
        "fp32": "<f",
        "fp64": "<d",
    }
)


class Stop(Enum):
    """Why a wave no longer runs."""

    BARRIER = "barrier"
    END = "end"


_CONDITIONS: MappingProxyType[str, Callable[[Wave], bool]] = MappingProxyType(
    {
        "s_cbranch_scc0": lambda w: not w.scc,
        "s_cbranch_scc1": lambda w: bool(w.scc),
        "s_cbranch_vccz": lambda w: not (w.sgpr[VCC] | w.sgpr[VCC + 1]),
        "s_cbranch_vccnz": lambda w: bool(w.sgpr[VCC] | w.sgpr[VCC + 1]),
        "s_cbranch_execz": lambda w: not (w.sgpr[EXEC] | w.sgpr[EXEC + 1]),
        "s_cbranch_execnz": lambda w: bool(w.sgpr[EXEC] | w.sgpr[EXEC + 1]),
    }
)


def _control(x: Instruction, labels: Mapping[str, int]) -> Effect | None:
    """Branches, barriers and the end."""
    if x.opcode == "s_endpgm":
        return lambda w: Stop.END
    if x.opcode == "s_barrier":
        return lambda w: Stop.BARRIER
    if x.opcode != "s_branch" and x.opcode not in _CONDITIONS:
        return None
    condition = _CONDITIONS.get(x.opcode, lambda w: True)
    target = labels[x.operands[0].text]

    def branch(w: Wave) -> None:
        if condition(w):
            w.pc = target

    return branch


class Kernel:
    """One kernel of a binary for `target` (gfx942 or gfx950).

    `signature` gives every argument's type in order, constants as "constexpr"; `shared` is the local
    memory in bytes, `num_warps` the waves of a workgroup. Raises `Fault` if the target has less local
    memory. `count` is the number of instructions run so far.
    """

    def __init__(
        self, asm: str, target: str, signature: Mapping[str, str], shared: int, num_warps: int
    ):
        self.program = parse(asm)
        self.target, self.num_warps = target, num_warps
        self.count = self._most = 0
        self.types = [kind for kind in signature.values() if kind != "constexpr"]
        self.local_size = max(shared, self.program.setting("group_segment_fixed_size"))
        if self.local_size > LOCAL_MEMORY[target]:
            raise Fault(
                f"the kernel needs {self.local_size} bytes of local memory and {target} has "
                f"{LOCAL_MEMORY[target]}"
            )
        self._effects: list[Effect | None] = [None] * len(self.program.instructions)

    def unsupported(self) -> dict[str, str]:
        """Opcodes of the program that the interpreter does not know, with what it said."""
        found = {}
        for number, instruction in enumerate(self.program.instructions):
            try:
                self._translate(number)
            except Unsupported as error:
                found[instruction.opcode] = str(error)
        return found

    def _translate(self, number: int) -> Effect:
        """What instruction `number` does. Raises `Unsupported` naming it."""
        x = self.program.instructions[number]
        effect = _control(x, self.program.labels)
        if effect is None and x.opcode.startswith("v_mfma"):
            effect = matrix_effect(x)
        elif effect is None:
            family = {"s": scalar_effect, "v": vector_effect}.get(
                x.opcode.partition("_")[0], memory_effect
            )
            effect = family(x)
        if effect is None:
            raise Unsupported(x.text)
        self._effects[number] = effect
        return effect

    def launch(self, grid: Sequence[int], arguments: Sequence[Any], limit: int = 50_000_000) -> int:
        """Run every workgroup of `grid` (x, y, z) and return `count`.

        `arguments` follow the signature without constants: an array for a pointer (any dtype of the right
        size; what is stored is seen in it), else an int or float. Raises `Fault` after `limit`
        instructions.
        """
        x, y, z = (*grid, 1, 1)[:3]
        packed, arrays = self._pack(arguments, (x, y, z))
        memory = GlobalMemory([*arrays, packed])
        self._most = self.count + limit
        with np.errstate(all="ignore"):
            for place in itertools.product(range(z), range(y), range(x)):
                self._workgroup(memory, packed.ctypes.data, place[::-1])
        return self.count

    def _pack(self, arguments: Sequence[Any], grid: Sequence[int]) -> tuple[Bytes, list[Array]]:
        """The kernel's argument bytes, hidden ones included, and the arrays they point to."""
        if len(arguments) != len(self.types):
            raise Fault(f"{len(arguments)} arguments for {len(self.types)} parameters")
        packed = bytearray(max(self.program.setting("kernarg_size"), 8) + 64)
        arrays, at = [], 0
        for kind, value in zip(self.types, arguments, strict=True):
            pointer = kind.startswith("*")
            if pointer:
                arrays.append(value)
                value = value.ctypes.data
            elif kind not in _PACKING:
                raise Unsupported(f"an argument of type {kind}")
            code = "<Q" if pointer else _PACKING[kind]
            size = struct.calcsize(code)
            at = -(-at // size) * size
            struct.pack_into(code, packed, at, value)
            at += size
        for axis, count in zip("xyz", grid, strict=True):
            if (at := self.program.hidden.get(f"hidden_block_count_{axis}", -1)) >= 0:
                struct.pack_into("<I", packed, at, count)
            if (at := self.program.hidden.get(f"hidden_group_size_{axis}", -1)) >= 0:
                struct.pack_into("<H", packed, at, LANES * self.num_warps if axis == "x" else 1)
        return np.frombuffer(bytes(packed), np.uint8).copy(), arrays

    def _workgroup(self, memory: GlobalMemory, arguments: int, place: Sequence[int]) -> None:
        local = LocalMemory(self.local_size)
        waves = [self._wave(memory, local, arguments, place, n) for n in range(self.num_warps)]
        running = waves
        while running:
            running = [wave for wave in running if self._run(wave) is not Stop.END]

    def _wave(
        self,
        memory: GlobalMemory,
        local: LocalMemory,
        arguments: int,
        place: Sequence[int],
        number: int,
    ) -> Wave:
        """A wave at its start: argument address, workgroup place and lane numbers in registers."""
        setting = self.program.setting
        scratch = setting("private_segment_fixed_size")
        wave, register = Wave(memory, local, scratch, self.target in FNUZ_TARGETS), 0
        for name in ("dispatch_ptr", "queue_ptr", "kernarg_segment_ptr", "dispatch_id"):
            if setting(f"user_sgpr_{name}"):
                if name == "kernarg_segment_ptr":
                    wave.set_scalar(register, arguments, 2)
                register += 2
        register = setting("user_sgpr_count")
        for axis, value in zip("xyz", place, strict=True):
            if setting(f"system_sgpr_workgroup_id_{axis}"):
                wave.sgpr[register] = value
                register += 1
        wave.vgpr[0] = (LANE + LANES * number).astype(U32) & U32(MASK32)
        return wave

    def _run(self, wave: Wave) -> Stop:
        """Run one wave to its next barrier or its end."""
        effects, count = self._effects, 0
        stop: Stop | None = None
        left = self._most - self.count
        while stop is None and count <= left:
            number = wave.pc
            wave.pc = number + 1
            count += 1
            effect = effects[number] or self._translate(number)
            stop = effect(wave)
        self.count += count
        if stop is None or self.count > self._most:
            raise Fault("the kernel does not end: more instructions than the launch allows")
        return stop

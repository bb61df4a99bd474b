"""From assembly text to instructions. It does not know what an instruction does.

The text holds one kernel. Waits and other instructions without an effect on values are dropped here.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

FLOAT_CONSTANTS = MappingProxyType(
    {
        "0.5": 0x3F000000,
        "-0.5": 0xBF000000,
        "1.0": 0x3F800000,
        "-1.0": 0xBF800000,
        "2.0": 0x40000000,
        "-2.0": 0xC0000000,
        "4.0": 0x40800000,
        "-4.0": 0xC0800000,
        "0.15915494": 0x3E22F983,
        "0.15915494309189532": 0x3E22F983,
    }
)
# Scalar registers with a name: (index, 32-bit words).
NAMED_REGISTERS = MappingProxyType(
    {
        "flat_scratch": (102, 2),
        "flat_scratch_lo": (102, 1),
        "flat_scratch_hi": (103, 1),
        "xnack_mask": (104, 2),
        "vcc": (106, 2),
        "vcc_lo": (106, 1),
        "vcc_hi": (107, 1),
        "m0": (124, 1),
        "exec": (126, 2),
        "exec_lo": (126, 1),
        "exec_hi": (127, 1),
    }
)
IGNORED = frozenset(
    (
        "s_waitcnt",
        "s_nop",
        "s_setprio",
        "s_sleep",
        "s_sethalt",
        "buffer_inv",
        "buffer_wbl2",
        "s_icache_inv",
        "s_dcache_wb",
        "s_inst_prefetch",
        "s_clause",
        "s_delay_alu",
        "v_nop",
        "s_sendmsg",
        "s_endpgm_saved",
    )
)
_FLAGS = frozenset(("offen", "idxen", "lds", "sc0", "sc1", "nt", "clamp"))
_INTEGER = re.compile(r"-?(0x[0-9a-fA-F]+|\d+)")


class Operand:
    """One operand. `kind` is v, a or s (a register, `index`, `count` words), c (an integer) or f (the bits
    of a float constant) with the value in `index`, "off", or "?" for anything else."""

    __slots__ = ("absolute", "count", "index", "kind", "negate", "text")

    def __init__(self, text: str):
        self.text, self.count = text, 1
        self.negate = text.startswith("-") and not re.match(r"-[\d.]", text)
        text = text[1:] if self.negate else text
        self.absolute = text.startswith("|")
        text = text.strip("|")
        if one := re.fullmatch(r"([vsa])(\d+)", text):
            self.kind, self.index = one[1], int(one[2])
        elif several := re.fullmatch(r"([vsa])\[(\d+):(\d+)\]", text):
            self.kind, self.index = several[1], int(several[2])
            self.count = int(several[3]) - int(several[2]) + 1
        elif text in NAMED_REGISTERS:
            self.kind = "s"
            self.index, self.count = NAMED_REGISTERS[text]
        elif text in FLOAT_CONSTANTS:
            self.kind, self.index = "f", FLOAT_CONSTANTS[text]
        elif _INTEGER.fullmatch(text):
            self.kind, self.index = "c", int(text, 0)
        else:
            self.kind, self.index = ("off" if text == "off" else "?"), 0


@dataclass
class Instruction:
    """An opcode, its operands in order (destination first), and its modifiers by name."""

    opcode: str
    text: str
    operands: list[Operand] = field(default_factory=list)
    modifiers: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Program:
    """Instructions, the number of the one after each label, the kernel descriptor, and the byte offset of
    each argument that the launch adds by itself ("hidden_block_count_x")."""

    instructions: tuple[Instruction, ...]
    labels: dict[str, int]
    descriptor: dict[str, str]
    hidden: dict[str, int]

    def setting(self, name: str) -> int:
        """The descriptor's `.amdhsa_<name>`, 0 if absent."""
        return int(self.descriptor.get(name, "0"), 0)


def parse(assembly: str) -> Program:
    """Read the assembly text of one kernel."""
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    descriptor: dict[str, str] = {}
    in_text = True
    for line in assembly.split("\n"):
        line = line.split(";")[0].strip()
        if not line:
            continue
        if setting := re.match(r"\.amdhsa_(\w+)\s+(\S+)", line):
            descriptor[setting[1]] = setting[2]
            continue
        if line.startswith(".section"):
            in_text = False
        if line == ".text" or line.startswith(".text "):
            in_text = True
        if label := re.fullmatch(r"([.\w$]+):", line):
            labels[label[1]] = len(instructions)
        elif in_text and not line.startswith(".") and line.split()[0] not in IGNORED:
            instructions.append(_instruction(line))
    return Program(tuple(instructions), labels, descriptor, _hidden(assembly))


def _hidden(assembly: str) -> dict[str, int]:
    """Offsets of hidden arguments, from the metadata's list of arguments."""
    entry = re.compile(r"\.offset:\s+(\d+)\s+\.size:\s+\d+\s+\.value_kind:\s+(hidden_\w+)")
    return {kind: int(offset) for offset, kind in entry.findall(assembly)}


def _instruction(line: str) -> Instruction:
    opcode, rest = (*line.split(None, 1), "")[:2]
    found = Instruction(opcode, line)
    if opcode.startswith(("s_setreg", "s_getreg")):
        register = re.search(r"hwreg\((\w+)(?:, (\d+), (\d+))?\)", rest)
        found.modifiers["hwreg"] = register.groups() if register else ("?", None, None)
        rest = re.sub(r"hwreg\([^)]*\)", "", rest)
        found.operands = [Operand(t.strip()) for t in rest.split(",") if t.strip()]
        return found
    for part in _split(rest):
        words = re.findall(r"[\w]+:\[[^\]]*\]|[\w]+:[\w]+\([^)]*\)|\S+", part)
        for number, word in enumerate(words):
            if number == 0 and not re.match(r"[a-z_0-9]+:", word) and word not in _FLAGS:
                found.operands.append(Operand(word))
            else:
                name, colon, value = word.partition(":")
                found.modifiers[name] = _modifier(value) if colon else True
    return found


def _split(text: str) -> list[str]:
    """Split at commas outside brackets."""
    parts, depth, current = [], 0, ""
    for character in text + ",":
        depth += (character in "[(") - (character in "])")
        if character == "," and not depth:
            parts.append(current.strip())
            current = ""
        else:
            current += character
    return parts


def _modifier(value: str) -> Any:
    if value.startswith("["):
        return [int(each, 0) for each in value[1:-1].split(",")]
    return int(value, 0) if _INTEGER.fullmatch(value) else value

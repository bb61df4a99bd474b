"""Kernels that start before the one ahead has ended read nothing of its before they wait.

A race shows on a GPU now and then, in the machine code always: every load that some way through a binary
reaches before `griddepcontrol.wait` is traced back to the kernel's arguments.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest

from fourfold.core.config import EngineConfig
from fourfold.core.device import ARCHS
from fourfold.engine.compile import Collector, steps, subject_of_geometry

pytest.importorskip("triton", reason="Triton is not installed")
pytestmark = pytest.mark.full

# What may be read early: weights, whose names these are, and by function what is older than the kernel
# ahead, which lets this one start behind its own wait (nvidia/overlap.py).
WEIGHTS = {
    "w", "w1", "w2", "w3", "w_scale", "w1_scale", "w2_scale", "w3_scale", "codes", "scales", "plains",
    "weight", "norm", "fn", "base", "scale",
}  # fmt: skip
OLDER = {"_fp4_down": {"tiles", "order"}}
REGISTER = re.compile(r"%[a-z]+\d+")
PARAM = re.compile(r"\[\w+_param_(\d+)")


@dataclass
class Block:
    """Instructions between a label and a branch, and where they may lead."""

    code: list[str] = field(default_factory=list)
    leads: list[str] = field(default_factory=list)


def blocks(ptx: str) -> dict[str, Block]:
    """The basic blocks of a PTX function, by label; the first is "entry"."""
    body = ptx[ptx.index("\n{", ptx.index(".entry")) :]
    found, name = {"entry": Block()}, "entry"
    for raw in body.splitlines():
        line = raw.split("//")[0].strip()
        label = re.match(r"(\$L__BB\w+):", line)
        if label:
            found[name].leads.append(label[1])
            name = label[1]
            found[name] = Block()
            continue
        branch = re.match(r"(@!?%p\d+\s+)?bra(\.uni)?\s+(\$L__BB\w+);", line)
        if branch:
            found[name].leads.append(branch[3])
            after = f"{name} behind {len(found)}"
            if branch[1]:
                found[name].leads.append(after)
            name = after
            found[name] = Block()
        elif line.startswith("ret"):
            name = f"{name} behind {len(found)}"
            found[name] = Block()
        elif line and not line.startswith((".", "{", "}")):
            found[name].code.append(line)
    return found


def traced(code: list[str]) -> dict[str, set[int]]:
    """Register → numbers of the parameters its value may come from."""
    origin: dict[str, set[int]] = {}
    changed = True
    while changed:
        changed = False
        for line in code:
            own = {int(number) for number in PARAM.findall(line)} if "ld.param" in line else set()
            registers = REGISTER.findall(re.sub(r"^@!?%p\d+\s+", "", line))
            if not registers or (line.startswith(("st.", "red.", "@")) and "ld." not in line):
                continue
            parts = line.split("{", 1)
            vector = len(parts) > 1 and "}" in parts[1] and not REGISTER.search(parts[0])
            wide = REGISTER.findall(parts[1].split("}")[0]) if vector else registers[:1]
            for source in registers[len(wide) :]:
                own |= origin.get(source, set())
            for register in wide:
                if not own <= origin.setdefault(register, set()):
                    origin[register] |= own
                    changed = True
    return origin


def early_reads(ptx: str) -> Iterator[set[int]]:
    """The parameters behind the address of every global load that may come before the wait."""
    graph = blocks(ptx)
    origin = traced([line for block in graph.values() for line in block.code])
    reached, waiting = {"entry"}, ["entry"]
    while waiting:
        block = graph[waiting.pop()]
        for line in block.code:
            if "griddepcontrol.wait" in line:
                break
            if re.search(r"\bld\.global|cp\.async\S*\.global", line):
                address = re.findall(r"\[\s*(%[a-z]+\d+)", line)[-1]
                yield origin.get(address, set())
        else:
            for label in block.leads:
                if label not in reached:
                    reached.add(label)
                    waiting.append(label)


def flattened(signature: tuple[tuple[str, Any], ...]) -> Iterator[tuple[str, str]]:
    """(name, type) of the arguments a binary takes, in order."""
    for name, kind in signature:
        for each in (kind,) if isinstance(kind, str) else kind:
            if each != "constexpr":
                yield name, each


@pytest.mark.slow
def test_nothing_but_weights_is_read_before_the_wait() -> None:
    from fourfold.kernels.compile import compiled_binary

    subject = subject_of_geometry("flash")
    engine = EngineConfig(
        "flash", max_model_len=4096, max_num_batched_tokens=256, num_speculative_tokens=1
    )
    collector = Collector(subject, ARCHS["sm_90"], engine)
    checked, faults = set(), set()
    for wanted in collector.collect(steps(engine, (1, 16, 64, 256))):
        variant = wanted.variant
        if not dict(variant.options).get("launch_pdl"):
            continue
        arguments = list(flattened(variant.signature))
        ptx = compiled_binary(variant, ARCHS["sm_90"]).asm["ptx"]
        assert "griddepcontrol.wait" in ptx, f"{variant.name} is launched early and never waits"
        checked.add(variant.name)
        allowed = WEIGHTS | OLDER.get(variant.name, set())
        for numbers in early_reads(ptx):
            read = {arguments[n][0] for n in numbers if arguments[n][1].startswith("*")}
            if not read or not read <= allowed:
                faults.add(f"{variant.name} reads {sorted(read)}")
    assert len(checked) > 15
    assert not faults, "\n".join(sorted(faults))

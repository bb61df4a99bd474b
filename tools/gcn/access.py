"""Loads, stores and atomics: global, buffer, local (LDS) and scratch memory, and lane permutations.

`memory_effect` asks one builder a family; a builder returns None for what is not its own.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from types import MappingProxyType
from typing import Any

import numpy as np

from tools.gcn.assembly import Instruction, Operand
from tools.gcn.errors import Fault, Unsupported
from tools.gcn.formats import (
    I64,
    U32,
    U64,
    Array,
    Bytes,
    bits_of,
    float_of,
    float_to_bfloat,
    high_bfloat,
    low_bfloat,
)
from tools.gcn.scalar import signed32
from tools.gcn.wave import (
    LANE,
    LANES,
    M0,
    MASK32,
    MASK64,
    Effect,
    Wave,
    put,
    row_of,
    scalar,
    scalar64,
    vector,
    vector64,
)

SIZES = MappingProxyType(
    {
        "ubyte": 1,
        "sbyte": 1,
        "byte": 1,
        "u8": 1,
        "i8": 1,
        "b8": 1,
        "ushort": 2,
        "sshort": 2,
        "short": 2,
        "u16": 2,
        "i16": 2,
        "b16": 2,
        "dword": 4,
        "b32": 4,
        "dwordx2": 8,
        "b64": 8,
        "dwordx3": 12,
        "b96": 12,
        "dwordx4": 16,
        "b128": 16,
    }
)
_SIGNED = frozenset(("sbyte", "sshort", "i8", "i16"))
_LOCAL_ADDRESS = 0x3FFFF  # the bits of M0 that are an address in local memory

Addresses = Callable[[Wave, Array], Array]  # of the lanes with these numbers


class Part:
    """What of a register a load or store touches: `size` bytes, and for less than four which half."""

    def __init__(self, name: str, d16: bool, high: bool):
        self.size, self.signed, self.d16, self.high = SIZES[name], name in _SIGNED, d16, high

    def store(self, w: Wave, row: int, lanes: Array, data: Bytes, word: int = 0) -> None:
        """Put `data [n, size]` into the registers from `row` (+ `word`) on, in `lanes [n]`."""
        if self.size >= 4:
            first = row + word
            words = np.ascontiguousarray(data).view(U32).T
            if len(lanes) == LANES:
                w.vgpr[first : first + self.size // 4] = words
            else:
                w.vgpr[first : first + self.size // 4, lanes] = words
            return
        kinds = {1: (np.uint8, np.int8), 2: (np.uint16, np.int16)}[self.size]
        value = np.ascontiguousarray(data).view(kinds[self.signed])[:, 0].astype(I64) & MASK32
        if self.d16:
            old = w.vgpr[row, lanes].astype(I64)
            half = value & 0xFFFF
            value = (old & 0xFFFF) | half << 16 if self.high else (old & 0xFFFF0000) | half
        w.vgpr[row, lanes] = value.astype(U32)

    def fetch(self, w: Wave, row: int, lanes: Array, word: int = 0) -> Bytes:
        """The bytes `[n, size]` that the registers hold in `lanes`."""
        first = row + word
        words = w.vgpr[first : first + max(self.size // 4, 1), lanes]
        data = np.ascontiguousarray(words.T).view(np.uint8)
        return data[:, 2 : 2 + self.size] if self.high else data[:, : self.size]


def _address(vector_part: Operand, scalar_part: Operand, offset: int) -> Addresses:
    """Global addresses: 64 bits a lane, or a scalar base and 32 bits a lane."""
    if scalar_part.kind == "off":
        wide, add = vector64(vector_part), U64(offset & MASK64)
        return lambda w, lanes: wide(w)[lanes] + add
    narrow, base = vector(vector_part), scalar64(scalar_part)

    def based(w: Wave, lanes: Array) -> Array:
        start = U64((base(w) + offset) & MASK64)
        return start + narrow(w)[lanes].astype(U64)

    return based


def _global(x: Instruction) -> Effect | None:
    match = re.fullmatch(r"global_(load|store)_(lds_)?(\w+?)(_d16)?(_hi)?", x.opcode)
    if not match or match[3] not in SIZES:
        return None
    part, o = Part(match[3], bool(match[4]), bool(match[5])), x.operands
    offset = x.modifiers.get("offset", 0)
    if match[2]:
        return _to_local(x, _address(o[0], o[1], offset), part.size, offset)
    if match[1] == "store":
        address, row = _address(o[0], o[2], offset), row_of(o[1])

        def store(w: Wave) -> None:
            lanes = w.active_lanes()
            if len(lanes):
                w.memory.scatter(address(w, lanes), part.fetch(w, row, lanes), x.text)

        return store
    address, row = _address(o[1], o[2], offset), row_of(o[0])

    def load(w: Wave) -> None:
        lanes = w.active_lanes()
        if len(lanes):
            part.store(w, row, lanes, w.memory.gather(address(w, lanes), part.size, x.text))

    return load


def _to_local(x: Instruction, address: Addresses, size: int, offset: int) -> Effect:
    """Loads that go to local memory at M0, lane after lane."""

    def effect(w: Wave) -> None:
        lanes = w.active_lanes()
        if not len(lanes):
            return
        data = w.memory.gather(address(w, lanes), size, x.text)
        at = (w.sgpr[M0] & _LOCAL_ADDRESS) + offset + lanes * max(size, 4)
        w.local.write(at, data, x.text)

    return effect


_ATOMICS: MappingProxyType[str, Callable[[int, int], int]] = MappingProxyType(
    {
        "add": lambda old, value: old + value,
        "sub": lambda old, value: old - value,
        "umax": max,
        "umin": min,
        "smax": lambda old, value: max(signed32(old), signed32(value)),
        "smin": lambda old, value: min(signed32(old), signed32(value)),
        "and": lambda old, value: old & value,
        "or": lambda old, value: old | value,
        "xor": lambda old, value: old ^ value,
        "swap": lambda old, value: value,
    }
)


def _atomic_result(kind: str, old: int, value: int, compared: int) -> int:
    if kind == "cmpswap":
        return value if old == compared else old
    if kind in _ATOMICS:
        return _ATOMICS[kind](old, value) & MASK32
    both = np.array([old, value], U32)
    if kind == "add_f32":
        return int(bits_of(float_of(both[:1]) + float_of(both[1:]))[0])
    low, high = low_bfloat(both), high_bfloat(both)
    first, second = float_to_bfloat(low[:1] + low[1:]), float_to_bfloat(high[:1] + high[1:])
    return int(first[0]) | int(second[0]) << 16


def _atomic(x: Instruction) -> Effect | None:
    match = re.fullmatch(r"global_atomic_(\w+?)(_x2)?", x.opcode)
    if not match:
        return None
    kind, o = match[1], x.operands
    known = kind in _ATOMICS or kind in ("cmpswap", "add_f32", "pk_add_bf16")
    if not known or match[2]:
        raise Unsupported(x.opcode)
    returns = len(o) == 4
    place, value, base = o[1:] if returns else o
    address = _address(place, base, x.modifiers.get("offset", 0))
    source = vector(value)
    compared = vector(value, 1) if kind == "cmpswap" else source
    row = row_of(o[0]) if returns else 0

    def effect(w: Wave) -> None:
        lanes = w.active_lanes()
        values, wanted = source(w).copy(), compared(w).copy()
        for lane, at in zip(lanes.tolist(), address(w, lanes).tolist(), strict=True):
            cell = w.memory.word(at, 4, x.text).view(U32)
            old = int(cell[0])
            cell[0] = _atomic_result(kind, old, int(values[lane]), int(wanted[lane]))
            if returns:
                w.vgpr[row, lane] = old

    return effect


# Names of the same operations on local memory, with and without the old value returned.
_LOCAL_ATOMIC = re.compile(
    r"ds_(add|sub|max|min|and|or|xor|wrxchg|cmpst|cmpswap)(_rtn)?_(u32|i32|b32|f32)"
)


def _local_atomic(x: Instruction) -> Effect | None:
    match = _LOCAL_ATOMIC.fullmatch(x.opcode)
    if not match:
        return None
    named, kind = match[1], match[3]
    signs = {"u32": "u", "i32": "s"}
    operation = {
        "max": f"{signs.get(kind)}max",
        "min": f"{signs.get(kind)}min",
        "wrxchg": "swap",
    }.get(named, named)
    if named == "add" and kind == "f32":
        operation = "add_f32"
    if operation not in (*_ATOMICS, "add_f32"):
        raise Unsupported(x.opcode)
    returns, o = bool(match[2]), x.operands
    place, value = (vector(o[1]), vector(o[2])) if returns else (vector(o[0]), vector(o[1]))
    row, offset = row_of(o[0]) if returns else 0, x.modifiers.get("offset", 0)

    def effect(w: Wave) -> None:
        lanes = w.active_lanes()
        at, values = place(w).astype(I64) + offset, value(w).copy()
        for lane in lanes.tolist():
            cell = w.local.read(at[lane : lane + 1], 4, x.text)
            old = int(cell.view(U32)[0, 0])
            new = np.array([[_atomic_result(operation, old, int(values[lane]), 0)]], U32)
            w.local.write(at[lane : lane + 1], new.view(np.uint8), x.text)
            if returns:
                w.vgpr[row, lane] = old

    return effect


def _buffer(x: Instruction) -> Effect | None:
    """Accesses through a descriptor: loads beyond its size give 0 and stores there do nothing."""
    match = re.fullmatch(r"buffer_(load|store)_(\w+?)(_d16)?(_hi)?", x.opcode)
    if not match or match[2] not in SIZES:
        return None
    m = x.modifiers
    if m.get("idxen"):
        raise Unsupported(f"idxen: {x.text}")
    part, local = Part(match[2], bool(match[3]), bool(match[4])), bool(m.get("lds"))
    offset, size = m.get("offset", 0), part.size
    place, descriptor, scalar_offset = x.operands[0 if local else 1 :]
    resource, shift = descriptor.index, scalar(scalar_offset)
    lane_offset = vector(place) if m.get("offen") else None
    row = 0 if local else row_of(x.operands[0])

    def within(w: Wave) -> tuple[Array, Array]:
        """The lanes inside the buffer and their addresses."""
        at = np.full(LANES, offset, I64)
        if lane_offset:
            at += lane_offset(w)
        lanes = np.nonzero(w.active() & (at + size <= w.sgpr[resource + 2]))[0]
        base = w.sgpr[resource] | (w.sgpr[resource + 1] & 0xFFFF) << 32
        return lanes, U64(base + shift(w)) + at[lanes].astype(U64)

    def store(w: Wave) -> None:
        lanes, addresses = within(w)
        if len(lanes):
            w.memory.scatter(addresses, part.fetch(w, row, lanes), x.text)

    def load(w: Wave) -> None:
        lanes, addresses = within(w)
        active = w.active_lanes()
        data = np.zeros((LANES, size), np.uint8)
        if len(lanes):
            data[lanes] = w.memory.gather(addresses, size, x.text)
        if local and len(active):
            at = (w.sgpr[M0] & _LOCAL_ADDRESS) + offset + active * max(size, 4)
            w.local.write(at, data[active], x.text)
        elif len(active):
            part.store(w, row, active, data[active])

    return store if match[1] == "store" else load


def _local(x: Instruction) -> Effect | None:
    match = re.fullmatch(r"ds_(read|write)(2)?(st64)?_(\w+?)(_d16)?(_hi|_d16_hi)?", x.opcode)
    if not match or match[4] not in SIZES:
        return None
    m, o = x.modifiers, x.operands
    part = Part(match[4], "d16" in x.opcode, x.opcode.endswith("_hi"))
    unit = part.size * (64 if match[3] else 1)
    two = bool(match[2])
    offsets = [m.get("offset0", 0) * unit, m.get("offset1", 0) * unit]
    offsets = offsets if two else [m.get("offset", 0)]
    writes = match[1] == "write"
    place = vector(o[0] if writes else o[1])
    rows = [row_of(each) for each in o[1 : 1 + len(offsets)]] if writes else [row_of(o[0])]

    def write(w: Wave) -> None:
        lanes = w.active_lanes()
        if len(lanes):
            at = place(w)[lanes].astype(I64)
            for row, offset in zip(rows, offsets, strict=True):
                w.local.write(at + offset, part.fetch(w, row, lanes), x.text)

    def read(w: Wave) -> None:
        lanes = w.active_lanes()
        if len(lanes):
            at = place(w)[lanes].astype(I64)
            for number, offset in enumerate(offsets):
                data = w.local.read(at + offset, part.size, x.text)
                part.store(w, rows[0], lanes, data, number * part.size // 4)

    return write if writes else read


def _swizzle_source(pattern: Any, text: str) -> Array:
    """The lane each lane reads under ds_swizzle_b32."""
    if not isinstance(pattern, int):
        kind, _, rest = str(pattern).removeprefix("swizzle(").rstrip(")").partition(",")
        numbers = [int(each) for each in re.findall(r"\d+", rest)]
        if kind == "SWAP":
            pattern = 0x1F | numbers[0] << 10
        elif kind == "REVERSE":
            pattern = 0x1F | (numbers[0] - 1) << 10
        elif kind == "BROADCAST":
            pattern = (0x1F & ~(numbers[0] - 1)) | numbers[1] << 5
        elif kind == "QUAD_PERM":
            pattern = 0x8000 | sum(each << 2 * n for n, each in enumerate(numbers))
        else:
            raise Unsupported(text)
    if pattern & 0x8000:
        return (LANE & ~3) + ((pattern >> (2 * (LANE & 3))) & 3)
    within = (((LANE & 31) & (pattern & 31)) | (pattern >> 5 & 31)) ^ (pattern >> 10 & 31)
    return (LANE & 32) | within


def _permute(x: Instruction) -> Effect | None:
    """Values between lanes; a lane that is off gives 0."""
    o, offset = x.operands, x.modifiers.get("offset", 0)
    if x.opcode == "ds_swizzle_b32":
        row, source, lane = row_of(o[0]), vector(o[1]), _swizzle_source(offset, x.text)
        return lambda w: put(w, row, np.where(w.active(), source(w), U32(0))[lane])
    if x.opcode not in ("ds_bpermute_b32", "ds_permute_b32"):
        return None
    row, place, source = row_of(o[0]), vector(o[1]), vector(o[2])

    def effect(w: Wave) -> None:
        active = w.active()
        at = ((place(w).astype(I64) + offset) // 4) % LANES
        value = np.where(active, source(w), U32(0))
        if x.opcode == "ds_bpermute_b32":
            put(w, row, value[at])
        else:
            sent = np.zeros(LANES, U32)
            sent[at[active]] = value[active]
            put(w, row, sent)

    return effect


def _transposed(x: Instruction) -> Effect | None:
    """gfx950: 16 lanes read 8 bytes each and get the transpose of what they read."""
    match = re.fullmatch(r"ds_read_b64_tr_b(16|8)", x.opcode)
    if not match:
        return None
    element = np.uint16 if match[1] == "16" else np.uint8
    per_lane = 64 // int(match[1])
    row, place, offset = row_of(x.operands[0]), vector(x.operands[1]), x.modifiers.get("offset", 0)

    def effect(w: Wave) -> None:
        at = place(w).astype(I64) + offset
        data = np.ascontiguousarray(w.local.read(at, 8, x.text)).view(element)
        blocks = data.reshape(4, 16 * per_lane).reshape(4, per_lane, 16).transpose(0, 2, 1)
        words = np.ascontiguousarray(blocks).reshape(LANES, per_lane).view(U32)
        w.vgpr[row], w.vgpr[row + 1] = words[:, 0], words[:, 1]

    return effect


def _scratch(x: Instruction) -> Effect | None:
    match = re.fullmatch(r"scratch_(load|store)_(\w+?)(_d16)?(_hi)?", x.opcode)
    if not match or match[2] not in SIZES:
        return None
    part, stores = Part(match[2], bool(match[3]), bool(match[4])), match[1] == "store"
    o, offset = x.operands, x.modifiers.get("offset", 0)
    place, data, base = (o[0], o[1], o[2]) if stores else (o[1], o[0], o[2])
    lane_part = vector(place) if place.kind == "v" else None
    scalar_part = scalar(base) if base.kind == "s" else None
    row = row_of(data)

    def effect(w: Wave) -> None:
        lanes = w.active_lanes()
        if not len(lanes):
            return
        at = np.full(len(lanes), offset + (scalar_part(w) if scalar_part else 0), I64)
        if lane_part:
            at += lane_part(w)[lanes]
        if at.min() < 0 or at.max() + part.size > w.scratch.shape[1]:
            raise Fault(f"access outside scratch memory: {x.text}")
        places = (lanes[:, None], at[:, None] + np.arange(part.size))
        if stores:
            w.scratch[places] = part.fetch(w, row, lanes)
        else:
            part.store(w, row, lanes, w.scratch[places])

    return effect


_FAMILIES = (_global, _atomic, _buffer, _local_atomic, _local, _permute, _transposed, _scratch)


def memory_effect(x: Instruction) -> Effect | None:
    """What a memory instruction does, or None if it is unknown."""
    return next((effect for build in _FAMILIES if (effect := build(x))), None)

"""Read and check the header of one safetensors file, before any of its data.

Contract: `read_header(path)` returns every tensor of the file with absolute byte offsets, or raises
`FileFault`, a `CheckpointError` that names the file, the byte and what is wrong there. What it
returns is safe to read: each tensor lies inside the file, has as many bytes as its shape and dtype
need, and shares none with another. Whoever wants to hear of every fault gives a `report` that does
not raise; then only what is no fault's subject is safe to read. It does not know what the tensors
are for. Nothing in a file is ever executed.

    0        8                8 + n                                       end of file
    | n: u64 | JSON, n bytes  | tensors, back to back, no gaps             |
"""

from __future__ import annotations

import json
import math
import stat
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from fourfold.core.checkpoint import TensorHeader
from fourfold.core.errors import CheckpointError

MAX_HEADER_BYTES = 100_000_000  # as in the safetensors format's own rules

# Bits of one item, for every dtype that the format knows.
DTYPE_BITS: Mapping[str, int] = MappingProxyType(
    {"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6}
    | dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 8)
    | dict.fromkeys(("F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8)
    | dict.fromkeys(("U16", "I16", "F16", "BF16"), 16)
    | dict.fromkeys(("U32", "I32", "F32"), 32)
    | dict.fromkeys(("U64", "I64", "F64", "C64"), 64)
)


class FileFault(CheckpointError):
    """Something wrong at one place of a file: `tensor` (None: the file itself) at `byte` (None: no
    place in particular); `what` completes "TENSOR …"."""

    def __init__(self, file: str, byte: int | None, what: str, tensor: str | None = None) -> None:
        where = printable(file) + ("" if byte is None else f", byte {byte}")
        subject = "" if tensor is None else printable(tensor) + " "
        super().__init__(f"{where}: {subject}{what}")
        self.file, self.byte, self.what, self.tensor = file, byte, what, tensor


Report = Callable[[FileFault], None]


def refuse(fault: FileFault) -> None:
    """The report of those who stop at the first fault."""
    raise fault


def printable(name: str) -> str:
    """`name` as a message may show it: unprintable or very long names are escaped and cut."""
    if name and name.isprintable() and len(name) <= 200:
        return name
    return ascii(name[:200]) + ("…" if len(name) > 200 else "")


def key_offset(data: bytes, key: str) -> int:
    """The byte at which `key` is first spelt as a JSON string in `data`, 0 if it is not found."""
    for ensure_ascii in (False, True):
        found = data.find(json.dumps(key, ensure_ascii=ensure_ascii).encode("utf-8", "replace"))
        if found >= 0:
            return found
    return 0


def parse_json_object(
    data: bytes, where: str, base: int = 0, report: Report = refuse
) -> dict[str, Any]:
    """The JSON object in `data`, without duplicate keys at any depth; empty if it is none.

    `where` names the file in messages, `base` is the offset of `data` in it. Of a key that occurs
    twice the last value counts, where `report` returns.
    """
    twice: list[str] = []

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            counts = Counter(key for key, _ in pairs)
            twice.extend(key for key, count in counts.items() if count > 1)
        return result

    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=unique)
    except json.JSONDecodeError as error:
        byte = base + len(error.doc[: error.pos].encode("utf-8"))
        report(FileFault(where, byte, f"not valid JSON ({error.msg})"))
        return {}
    except UnicodeDecodeError as error:
        report(FileFault(where, base + error.start, "not valid UTF-8"))
        return {}
    except (RecursionError, ValueError) as error:
        report(FileFault(where, base, f"unusable JSON ({error})"))
        return {}
    for key in twice:
        byte = base + key_offset(data, key)
        report(FileFault(where, byte, f"the JSON names {printable(key)} twice"))
    if not isinstance(value, dict):
        kind = type(value).__name__
        report(FileFault(where, base, f"expected a JSON object, found {kind}"))
        return {}
    return value


def read_header(path: Path, report: Report = refuse) -> dict[str, TensorHeader]:
    """All tensors of the file at `path`, in the order of their data. Raises `CheckpointError`."""
    try:
        found = path.stat()
        if not stat.S_ISREG(found.st_mode):
            report(FileFault(path.name, None, "is not a regular file"))
            return {}
        with path.open("rb") as file:
            length = _header_length(path.name, file.read(8), found.st_size, report)
            raw = file.read(length or 0)
    except OSError as error:
        report(FileFault(path.name, None, f"cannot read {path}: {error.strerror}"))
        return {}
    return {} if length is None else _Header(path.name, raw, report).tensors(found.st_size)


def _header_length(name: str, prefix: bytes, size: int, report: Report) -> int | None:
    """The length field of a file of `size` bytes, if a header of that length can stand in it."""
    length = int.from_bytes(prefix, "little")
    if len(prefix) < 8:
        what = f"truncated; a safetensors file starts with 8 bytes of length, found {size}"
        report(FileFault(name, size, what))
    elif length > MAX_HEADER_BYTES:
        what = (
            f"header length is {length} bytes, at most {MAX_HEADER_BYTES} are allowed; this is no "
            "safetensors file or its start is corrupt"
        )
        report(FileFault(name, 0, what))
    elif 8 + length > size:
        what = f"truncated inside the header, which ends at byte {8 + length}"
        report(FileFault(name, size, what))
    else:
        return length
    return None


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63


class _Header:
    """The JSON of one file, `raw`, which stands at byte 8."""

    def __init__(self, file: str, raw: bytes, report: Report) -> None:
        self.file = file
        self.raw = raw
        self.report = report
        self.start = 8 + len(raw)
        self.faulty = False

    def tensors(self, size: int) -> dict[str, TensorHeader]:
        """All entries of a file of `size` bytes, checked, in the order of their data."""
        entries = parse_json_object(self.raw, self.file, 8, self._note)
        metadata = entries.pop("__metadata__", {})
        if not isinstance(metadata, dict) or any(type(v) is not str for v in metadata.values()):
            self._fault("__metadata__", "must map strings to strings")
        found = (self._tensor(key, value) for key, value in entries.items())
        headers = [header for header in found if header is not None]
        headers.sort(key=lambda header: (header.offset_begin, header.offset_end))
        if entries or not self.faulty:
            self._check_layout(headers, size, complete=len(headers) == len(entries))
        return {header.name: header for header in headers}

    def _note(self, fault: FileFault) -> None:
        self.faulty = True
        self.report(fault)

    def _fault(self, key: str, what: str) -> None:
        self.report(FileFault(self.file, 8 + key_offset(self.raw, key), what, key))

    def _tensor(self, key: str, value: object) -> TensorHeader | None:
        if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
            self._fault(key, "must have exactly dtype, shape and data_offsets")
            return None
        dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
        if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
            known = ", ".join(DTYPE_BITS)
            self._fault(key, f"has unknown dtype {printable(str(dtype))}; known are {known}")
            return None
        if not isinstance(shape, list) or not all(map(_is_count, shape)):
            self._fault(key, f"has shape {str(shape)[:80]}, expected a list of sizes")
            return None
        is_pair = isinstance(offsets, list) and len(offsets) == 2 and all(map(_is_count, offsets))
        if not is_pair or offsets[0] > offsets[1]:
            what = f"has data_offsets {str(offsets)[:80]}, expected [begin, end]"
            self._fault(key, what)
            return None
        begin, end = self.start + offsets[0], self.start + offsets[1]
        bits = math.prod(shape) * DTYPE_BITS[dtype]
        if bits != 8 * (end - begin):
            what = (
                f"is {dtype} {shape}, which takes {bits / 8:g} bytes, but its data_offsets span "
                f"{end - begin} (bytes {begin} to {end} of the file)"
            )
            self._fault(key, what)
            return None
        return TensorHeader(key, dtype, tuple(shape), self.file, begin, end)

    def _check_layout(self, headers: list[TensorHeader], size: int, complete: bool) -> None:
        """Tensors in order of their offsets must lie back to back and end with the file. Gaps are
        none where entries were refused (not `complete`)."""
        position, before = self.start, "the header"
        for header in headers:
            what, begin = printable(header.name), header.offset_begin
            if begin < position:
                text = f"overlaps {before}, which ends at byte {position}"
                self.report(FileFault(self.file, begin, text, header.name))
            if begin > position and complete:
                text = f"{begin - position} bytes between {before} and {what} belong to no tensor"
                self.report(FileFault(self.file, position, text))
            position, before = max(position, header.offset_end), what
        if position > size:
            text = (
                f"truncated; its tensors end at byte {position}, the file has {size} bytes "
                f"({position - size} missing)"
            )
            self.report(FileFault(self.file, size, text))
        if position < size and complete:
            text = f"{size - position} bytes after the last tensor belong to none"
            self.report(FileFault(self.file, position, text))

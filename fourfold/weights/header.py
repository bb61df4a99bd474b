"""Read and check the header of one safetensors file, before any of its data.

Contract: `read_header(path)` returns every tensor of the file with absolute byte offsets, or raises
`CheckpointError` naming the file, the byte and what is wrong there. What it returns is safe to
read: each tensor lies inside the file, has as many bytes as its shape and dtype need, and shares
none with another. It does not know what the tensors are for. Nothing in a file is ever executed.

    0        8                8 + n                                       end of file
    | n: u64 | JSON, n bytes  | tensors, back to back, no gaps             |
"""

from __future__ import annotations

import json
import math
import stat
from collections.abc import Mapping
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


class _DuplicateKeyError(ValueError):
    """A JSON object names one key twice."""

    def __init__(self, key: str) -> None:
        super().__init__(key)
        self.key = key


def printable(name: str) -> str:
    """`name` as a message may show it: unprintable or very long names are escaped and cut."""
    if name and name.isprintable() and len(name) <= 200:
        return name
    return ascii(name[:200]) + ("…" if len(name) > 200 else "")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in pairs:
        if key in result:
            raise _DuplicateKeyError(key)
        result[key] = value
    return result


def key_offset(data: bytes, key: str) -> int:
    """The byte at which `key` is first spelt as a JSON string in `data`, 0 if it is not found."""
    for ensure_ascii in (False, True):
        found = data.find(json.dumps(key, ensure_ascii=ensure_ascii).encode("utf-8", "replace"))
        if found >= 0:
            return found
    return 0


def parse_json_object(data: bytes, where: str, base: int = 0) -> dict[str, Any]:
    """The JSON object in `data`, without duplicate keys at any depth.

    `where` names the file in messages, `base` is the offset of `data` in it.
    """
    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=_unique)
    except _DuplicateKeyError as error:
        key = printable(error.key)
        raise CheckpointError(
            f"{where}, byte {base + key_offset(data, error.key)}: the JSON names {key} twice"
        ) from None
    except json.JSONDecodeError as error:
        byte = base + len(error.doc[: error.pos].encode("utf-8"))
        raise CheckpointError(f"{where}, byte {byte}: not valid JSON ({error.msg})") from None
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{where}, byte {base + error.start}: not valid UTF-8") from None
    except (RecursionError, ValueError) as error:
        raise CheckpointError(f"{where}, byte {base}: unusable JSON ({error})") from None
    if not isinstance(value, dict):
        raise CheckpointError(
            f"{where}, byte {base}: expected a JSON object, found {type(value).__name__}"
        )
    return value


def read_header(path: Path) -> dict[str, TensorHeader]:
    """All tensors of the file at `path`, in the order of their data. Raises `CheckpointError`."""
    try:
        found = path.stat()
        if not stat.S_ISREG(found.st_mode):
            raise CheckpointError(f"{printable(path.name)} is not a regular file")
        with path.open("rb") as file:
            length = _header_length(printable(path.name), file.read(8), found.st_size)
            raw = file.read(length)
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from None
    return _Header(path.name, raw).tensors(found.st_size)


def _header_length(name: str, prefix: bytes, size: int) -> int:
    """The length field of a file of `size` bytes, if a header of that length can stand in it."""
    if len(prefix) < 8:
        raise CheckpointError(
            f"{name}, byte {size}: truncated; a safetensors file starts with 8 bytes of length, "
            f"found {size}"
        )
    length = int.from_bytes(prefix, "little")
    if length > MAX_HEADER_BYTES:
        raise CheckpointError(
            f"{name}, byte 0: header length is {length} bytes, at most {MAX_HEADER_BYTES} are "
            "allowed; this is no safetensors file or its start is corrupt"
        )
    if 8 + length > size:
        raise CheckpointError(
            f"{name}, byte {size}: truncated inside the header, which ends at byte {8 + length}"
        )
    return length


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63


class _Header:
    """The JSON of one file, `raw`, which stands at byte 8."""

    def __init__(self, file: str, raw: bytes) -> None:
        self.file = file
        self.raw = raw
        self.name = printable(file)
        self.start = 8 + len(raw)

    def tensors(self, size: int) -> dict[str, TensorHeader]:
        """All entries of a file of `size` bytes, checked, in the order of their data."""
        entries = parse_json_object(self.raw, self.name, 8)
        metadata = entries.pop("__metadata__", {})
        if not isinstance(metadata, dict) or any(type(v) is not str for v in metadata.values()):
            raise CheckpointError(f"{self._at('__metadata__')} must map strings to strings")
        headers = [self._tensor(key, value) for key, value in entries.items()]
        headers.sort(key=lambda header: (header.offset_begin, header.offset_end))
        self._check_layout(headers, size)
        return {header.name: header for header in headers}

    def _at(self, key: str) -> str:
        return f"{self.name}, byte {8 + key_offset(self.raw, key)}: {printable(key)}"

    def _tensor(self, key: str, value: object) -> TensorHeader:
        if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
            raise CheckpointError(
                f"{self._at(key)} must have exactly dtype, shape and data_offsets"
            )
        dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
        if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
            raise CheckpointError(
                f"{self._at(key)} has unknown dtype {printable(str(dtype))}; "
                f"known are {', '.join(DTYPE_BITS)}"
            )
        if not isinstance(shape, list) or not all(map(_is_count, shape)):
            raise CheckpointError(
                f"{self._at(key)} has shape {str(shape)[:80]}, expected a list of sizes"
            )
        is_pair = isinstance(offsets, list) and len(offsets) == 2 and all(map(_is_count, offsets))
        if not is_pair or offsets[0] > offsets[1]:
            raise CheckpointError(
                f"{self._at(key)} has data_offsets {str(offsets)[:80]}, expected [begin, end]"
            )
        begin, end = self.start + offsets[0], self.start + offsets[1]
        bits = math.prod(shape) * DTYPE_BITS[dtype]
        if bits != 8 * (end - begin):
            raise CheckpointError(
                f"{self._at(key)} is {dtype} {shape}, which takes {bits / 8:g} bytes, but its "
                f"data_offsets span {end - begin} (bytes {begin} to {end} of the file)"
            )
        return TensorHeader(key, dtype, tuple(shape), self.file, begin, end)

    def _check_layout(self, headers: list[TensorHeader], size: int) -> None:
        """Tensors in order of their offsets must lie back to back and end with the file."""
        position, before = self.start, "the header"
        for header in headers:
            what, begin = printable(header.name), header.offset_begin
            if begin < position:
                raise CheckpointError(
                    f"{self.name}, byte {begin}: {what} overlaps {before}, which ends at byte "
                    f"{position}"
                )
            if begin > position:
                raise CheckpointError(
                    f"{self.name}, byte {position}: {begin - position} bytes between {before} and "
                    f"{what} belong to no tensor"
                )
            position, before = header.offset_end, what
        if position > size:
            raise CheckpointError(
                f"{self.name}, byte {size}: truncated; its tensors end at byte {position}, the "
                f"file has {size} bytes ({position - size} missing)"
            )
        if position < size:
            raise CheckpointError(
                f"{self.name}, byte {position}: {size - position} bytes after the last tensor "
                "belong to none"
            )

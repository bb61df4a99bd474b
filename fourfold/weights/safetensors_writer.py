"""Write one safetensors file: header, then data produced piece by piece.

Contract: `arrange` fixes the order and offsets of a file's tensors as DeepSeek's own files have
them (by dtype, then by name; compact JSON padded with blanks to a multiple of 8 bytes; no
`__metadata__`); `write_file` writes it with no more than one piece of data in memory, or leaves the
data as a file hole. It does not know what the tensors are for.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

from fourfold.core.errors import CheckpointError
from fourfold.weights.header import DTYPE_BITS

DTYPE_ORDER = ("I64", "F32", "BF16", "F8_E8M0", "F8_E4M3", "I8")
_ALIGNMENT = 8


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor as the header names it: `shape` is the stored one (bytes for packed FP4)."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of its data."""
        return math.prod(self.shape) * DTYPE_BITS[self.dtype] // 8


E = TypeVar("E", bound=Entry)


@dataclass(frozen=True)
class FileLayout(Generic[E]):
    """A whole file: `entries` in data order, `offsets` of their data counted from its start, and
    `header`, all bytes in front of the data."""

    entries: tuple[E, ...]
    offsets: tuple[int, ...]
    header: bytes

    @property
    def payload_bytes(self) -> int:
        """Bytes of data."""
        return self.offsets[-1] + self.entries[-1].nbytes

    @property
    def file_bytes(self) -> int:
        """Bytes of the file."""
        return len(self.header) + self.payload_bytes


def arrange(entries: Iterable[E]) -> FileLayout[E]:
    """The layout of a file that holds `entries` (at least one), back to back."""
    ordered = sorted(entries, key=lambda e: (DTYPE_ORDER.index(e.dtype), e.name))
    offsets: list[int] = []
    described = {}
    end = 0
    for entry in ordered:
        begin, end = end, end + entry.nbytes
        offsets.append(begin)
        described[entry.name] = {
            "dtype": entry.dtype,
            "shape": entry.shape,
            "data_offsets": [begin, end],
        }
    text = json.dumps(described, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    return FileLayout(tuple(ordered), tuple(offsets), len(text).to_bytes(8, "little") + text)


def write_file(
    path: Path,
    layout: FileLayout[E],
    data: Callable[[E], Iterable[memoryview]] | None,
    advance: Callable[[int], None],
) -> None:
    """Write `layout` to `path`. `data(entry)` gives its bytes in pieces; None leaves a hole.

    `advance(n)` is called after each `n` bytes of data. Raises `CheckpointError` where the disk
    refuses.
    """
    try:
        with path.open("wb") as file:
            file.write(layout.header)
            if data is None:
                file.truncate(layout.file_bytes)
                advance(layout.payload_bytes)
                return
            for entry in layout.entries:
                written = 0
                for piece in data(entry):
                    file.write(piece)
                    written += piece.nbytes
                    advance(piece.nbytes)
                if written != entry.nbytes:
                    raise ValueError(f"{entry.name} needs {entry.nbytes} bytes, got {written}")
    except OSError as error:
        raise CheckpointError(f"{path} cannot be written: {error.strerror}") from error

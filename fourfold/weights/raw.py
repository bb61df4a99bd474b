"""Bytes of a file into tensors, without ever taking a byte for a number.

Contract: data is copied byte for byte from memory-mapped files into aligned tensors of the stored
dtype; files align nothing to more than 4 bytes, so no tensor ever views a file. The two ways from
one dtype to another are `reinterpret`, which changes no byte, and `to_float`, which changes no
value (but for rounding) and takes plain floats only: a raw byte can therefore not become a number
by accident. This file does not know what the tensors are for.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType, TracebackType

import numpy as np
import torch
from torch import Tensor

from fourfold.core.checkpoint import TensorHeader
from fourfold.core.errors import CheckpointError

STORED_DTYPES: Mapping[str, torch.dtype] = MappingProxyType(
    {
        "BF16": torch.bfloat16,
        "F16": torch.float16,
        "F32": torch.float32,
        "F64": torch.float64,
        "I64": torch.int64,
        "I32": torch.int32,
    }
    # FP8 and FP4 codes and E8M0 exponents are held as the bytes they are.
    | dict.fromkeys(("U8", "I8", "F4", "F8_E4M3", "F8_E8M0"), torch.uint8)
)
PLAIN_FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def reinterpret(data: Tensor, dtype: torch.dtype) -> Tensor:
    """The same bytes as `dtype`, flat `[n]`; shares memory with contiguous `data`."""
    return data.view(-1).view(dtype)


def to_float(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Plain floats as plain floats of another width, by value."""
    if values.dtype not in PLAIN_FLOATS or dtype not in PLAIN_FLOATS:
        raise TypeError(f"a conversion from {values.dtype} to {dtype} is not one between floats")
    return values.to(dtype)


class MappedFiles:
    """Shards of `directory`, memory-mapped on first use and closed together."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._maps: dict[str, np.ndarray[tuple[int], np.dtype[np.uint8]]] = {}

    def __enter__(self) -> MappedFiles:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Forget all mappings; their pages return to the system."""
        self._maps.clear()

    def read_into(self, out: Tensor, header: TensorHeader, begin: int, end: int) -> None:
        """Copy bytes `begin` to `end` of the tensor's file over all of `out` (CPU, contiguous)."""
        file = self._map(header.file)
        if end > file.size:
            raise CheckpointError(
                f"{header.file}, byte {file.size}: the file became shorter while it was read; "
                f"{header.name} ends at byte {end}"
            )
        target = reinterpret(out, torch.uint8).numpy()
        if target.size != end - begin:
            raise ValueError(f"{header} has {end - begin} bytes for a tensor of {target.size}")
        np.copyto(target, file[begin:end], casting="no")

    def read(self, header: TensorHeader, begin: int, end: int, shape: tuple[int, ...]) -> Tensor:
        """The same bytes as a new tensor of the stored dtype."""
        out = torch.empty(shape, dtype=STORED_DTYPES[header.dtype])
        self.read_into(out, header, begin, end)
        return out

    def _map(self, file: str) -> np.ndarray[tuple[int], np.dtype[np.uint8]]:
        if file not in self._maps:
            try:
                self._maps[file] = np.memmap(self._directory / file, dtype=np.uint8, mode="r")
            except (OSError, ValueError) as error:
                raise CheckpointError(f"cannot map {self._directory / file}: {error}") from None
        return self._maps[file]

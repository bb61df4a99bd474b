"""Global and local memory: arrays of bytes that raise when touched outside.

Global memory is the buffers handed to the kernel and nothing else. Words are read four bytes at a time
where the addresses allow it, which is four times as fast.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from tools.gcn.errors import Fault
from tools.gcn.formats import I64, U32, U64, Array, Bits, Bytes


class Region:
    """Bytes at the addresses `base` …; `at` are offsets from there."""

    def __init__(self, data: Bytes, base: int):
        self.base, self.end, self.bytes = base, base + len(data), data
        self.words: Bits = data[: len(data) // 4 * 4].view(U32)
        # An array that does not start on a word has no words at aligned addresses.
        self.aligned = data.ctypes.data % 4 == 0 and base % 4 == 0

    def read(self, at: Array, size: int) -> Bytes:
        """`size` bytes at each offset of `at [n]`: `[n, size]`."""
        if size % 4 == 0 and self.aligned and not (at & 3).any():
            words = self.words[(at >> 2)[:, None] + np.arange(size // 4)]
            return words.view(np.uint8)
        return self.bytes[at[:, None] + np.arange(size)]

    def write(self, at: Array, data: Bytes) -> None:
        """Write `data [n, size]` at each offset; of two to one place, the later lane's stays."""
        size = data.shape[1]
        if size % 4 == 0 and self.aligned and not (at & 3).any():
            self.words[(at >> 2)[:, None] + np.arange(size // 4)] = data.view(U32)
        else:
            self.bytes[at[:, None] + np.arange(size)] = data


class GlobalMemory:
    """The buffers a kernel may touch, by address."""

    def __init__(self, arrays: Sequence[Array]):
        self.regions = [
            Region(array.reshape(-1).view(np.uint8), array.ctypes.data)
            for array in arrays
            if array.nbytes
        ]

    def region(self, first: int, end: int, what: str) -> Region:
        """The buffer that holds the addresses first … end − 1. Raises `Fault` if none does."""
        for region in self.regions:
            if region.base <= first and end <= region.end:
                return region
        raise Fault(f"global access [{first:#x}, {end:#x}) is outside every buffer: {what}")

    def _whole(self, addresses: Array, size: int) -> Region | None:
        """The one buffer that holds all of the accesses, if there is one."""
        first, end = int(addresses.min()), int(addresses.max()) + size
        for region in self.regions:
            if region.base <= first and end <= region.end:
                return region
        return None

    def gather(self, addresses: Array, size: int, what: str) -> Bytes:
        """`size` bytes at each of `addresses [n]` (uint64): `[n, size]`."""
        if region := self._whole(addresses, size):
            return region.read((addresses - U64(region.base)).astype(I64), size)
        found = np.empty((len(addresses), size), np.uint8)
        for number, address in enumerate(addresses.tolist()):
            region = self.region(address, address + size, what)
            at = address - region.base
            found[number] = region.bytes[at : at + size]
        return found

    def scatter(self, addresses: Array, data: Bytes, what: str) -> None:
        """Write `data [n, size]` to `addresses [n]` (uint64)."""
        size = data.shape[1]
        if region := self._whole(addresses, size):
            region.write((addresses - U64(region.base)).astype(I64), data)
            return
        for number, address in enumerate(addresses.tolist()):
            region = self.region(address, address + size, what)
            at = address - region.base
            region.bytes[at : at + size] = data[number]

    def word(self, address: int, size: int, what: str) -> Bytes:
        """A view of `size` bytes at one address, to read and change."""
        region = self.region(address, address + size, what)
        at = address - region.base
        return region.bytes[at : at + size]


class LocalMemory:
    """A workgroup's local memory (LDS), poisoned."""

    POISON = 0xA5

    def __init__(self, size: int):
        self.size = size
        self.region = Region(np.full(-(-size // 4) * 4, self.POISON, np.uint8), 0)

    def check(self, at: Array, size: int, what: str) -> None:
        """Raise `Fault` unless `size` bytes at every offset are inside."""
        if at.min() < 0 or at.max() + size > self.size:
            raise Fault(f"access outside the {self.size} bytes of local memory: {what}")

    def read(self, at: Array, size: int, what: str) -> Bytes:
        self.check(at, size, what)
        return self.region.read(at, size)

    def write(self, at: Array, data: Bytes, what: str) -> None:
        self.check(at, data.shape[1], what)
        self.region.write(at, data)

"""Cached rows: what one key/value row looks like in memory and how rows are grouped into pages.

Contract: window rings, pages of compressed rows and the rows of the chunk in flight are all
`RowPages` of one `RowFormat`; a row's address is its *slot*, `page * rows_per_page + offset`, and
slot −1 is nowhere (reads give zeros, writes do nothing). This file knows the geometry only: encoding
and decoding are ops (ops/rows.py), allocation is cache/.

    FP8 page   | row 0 data | row 1 data | … | row 0 scales | row 1 scales | … | padding |
    data       | E4M3 codes of the n unrotated dims | bfloat16 of the r rotated dims |
    plain page | row 0 | row 1 | …   (one torch dtype, [rows, d])
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor


class RowKind(Enum):
    """How the numbers of a row are stored."""

    PLAIN = "plain"
    FP8_GROUPS = "fp8"  # n dims in groups of 64 with E8M0 scales, r dims bfloat16
    FP8_WHOLE = "fp8 whole"  # all dims under one float32 power-of-two scale (indexer rows)


FP8_GROUP = 64  # dims under one scale in a main row


@dataclass(frozen=True)
class RowFormat:
    """One row of `dim` numbers, of which the last `rope_dim` are rotary.

    `dtype` is the storage dtype of a plain row and ignored by FP8 rows. Sizes are bytes. At
    dim 512 / rope_dim 64 an FP8 row is 576 + 8 = 584 bytes; an FP8 indexer row of 128 is 132.
    """

    kind: RowKind
    dim: int
    rope_dim: int
    dtype: torch.dtype = torch.bfloat16

    @property
    def nope_dim(self) -> int:
        return self.dim - self.rope_dim

    @property
    def num_groups(self) -> int:
        """Scale groups of an `FP8_GROUPS` row; the last may be shorter."""
        return -(-self.nope_dim // FP8_GROUP)

    @property
    def data_bytes(self) -> int:
        if self.kind is RowKind.FP8_GROUPS:
            return self.nope_dim + 2 * self.rope_dim
        if self.kind is RowKind.FP8_WHOLE:
            return self.dim
        return self.dim * self.dtype.itemsize

    @property
    def scale_bytes(self) -> int:
        """Group scales are padded to whole 8-byte words; a whole-row scale is one float32."""
        if self.kind is RowKind.FP8_GROUPS:
            return 8 * -(-self.num_groups // 8)
        return 4 if self.kind is RowKind.FP8_WHOLE else 0

    @property
    def row_bytes(self) -> int:
        return self.data_bytes + self.scale_bytes

    def page_bytes(self, rows_per_page: int) -> int:
        """Bytes of one page; FP8 pages are padded to a multiple of a row's data bytes."""
        size = rows_per_page * self.row_bytes
        return size if self.kind is RowKind.PLAIN else -(-size // self.data_bytes) * self.data_bytes


@dataclass(frozen=True)
class RowPages:
    """Rows in pages. `storage` is uint8 `[pages, page_bytes]` for FP8, `[pages, rows, dim]` plain."""

    storage: Tensor
    format: RowFormat
    rows_per_page: int

    @staticmethod
    def zeros(
        format: RowFormat, num_pages: int, rows_per_page: int, device: torch.device
    ) -> RowPages:
        if format.kind is RowKind.PLAIN:
            shape: tuple[int, ...] = (num_pages, rows_per_page, format.dim)
            return RowPages(
                torch.zeros(shape, dtype=format.dtype, device=device), format, rows_per_page
            )
        shape = (num_pages, format.page_bytes(rows_per_page))
        return RowPages(torch.zeros(shape, dtype=torch.uint8, device=device), format, rows_per_page)

    @property
    def num_pages(self) -> int:
        return self.storage.shape[0]

    @property
    def num_slots(self) -> int:
        return self.num_pages * self.rows_per_page

    @property
    def device(self) -> torch.device:
        return self.storage.device

    @property
    def nbytes(self) -> int:
        return self.storage.nbytes

    def data(self) -> Tensor:
        """Writable view of the rows' data: plain `[pages, rows, dim]`, FP8 `[pages, rows, bytes]`."""
        if self.format.kind is RowKind.PLAIN:
            return self.storage
        size = self.rows_per_page * self.format.data_bytes
        return self.storage[:, :size].unflatten(1, (self.rows_per_page, self.format.data_bytes))

    def scales(self) -> Tensor:
        """Writable view of the rows' scale bytes, uint8 `[pages, rows, scale_bytes]`."""
        begin = self.rows_per_page * self.format.data_bytes
        size = self.rows_per_page * self.format.scale_bytes
        region = self.storage[:, begin : begin + size]
        return region.unflatten(1, (self.rows_per_page, self.format.scale_bytes))

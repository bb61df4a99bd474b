"""Cached rows in memory: pages of rows of one format.

Contract: window rings, pages of compressed rows and the rows of the chunk in flight are all
`RowPages` of one `RowFormat`; a row's address is its *slot*, `page * rows_per_page + offset`, and
slot −1 is nowhere (reads give zeros, writes do nothing). Formats, their bytes and the layout of a
page: core/row_format.py. This file knows tensors and views of them only: encoding and decoding are
ops (ops/rows.py), allocation is cache/.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fourfold.core.row_format import RowFormat, RowKind
from fourfold.core.tensor import named_dtype


def storage_dtype(format: RowFormat) -> torch.dtype:
    """The torch dtype of a page's tensor: the rows' own for plain ones, bytes for FP8."""
    return named_dtype(format.dtype) if format.kind is RowKind.PLAIN else torch.uint8


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
        plain = format.kind is RowKind.PLAIN
        each = (rows_per_page, format.dim) if plain else (format.page_bytes(rows_per_page),)
        storage = torch.zeros((num_pages, *each), dtype=storage_dtype(format), device=device)
        return RowPages(storage, format, rows_per_page)

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

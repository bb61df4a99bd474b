"""Row formats and pages, in numbers: what a cached row costs and how rows are grouped.

Contract: bytes are exact, and everything is host integers, so that memory can be planned without a
device and without torch. Rows in memory: core/rows.py. Which formats a model has: cache/rows.py.

    FP8 page   | row 0 data | row 1 data | … | row 0 scales | row 1 scales | … | padding |
    data       | E4M3 codes of the n unrotated dims | bfloat16 of the r rotated dims |
    plain page | row 0 | row 1 | …   (one dtype, [rows, d])
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum

from fourfold.core.config import expect_choice
from fourfold.core.frozen import FrozenDict

PAGE_TOKENS = 256  # source tokens a page stands for, in every layer
FP8_GROUP = 64  # dims under one scale in a main row
DTYPE_BYTES: Mapping[str, int] = FrozenDict({"bfloat16": 2, "float32": 4, "float64": 8})


def pages_for(tokens: int) -> int:
    """Pages that hold `tokens` source tokens."""
    return -(-tokens // PAGE_TOKENS)


def table_width(tokens: int) -> int:
    """Columns of the block table of sequences of up to `tokens`: a multiple of 16, so that kernels are
    compiled for one kind of width, however long requests may be."""
    return -(-pages_for(tokens) // 16) * 16


def rows_per_page(ratio: int) -> int:
    """Compressed rows a page of `PAGE_TOKENS` source tokens holds: 64 for CSA, 2 for HCA."""
    return PAGE_TOKENS // ratio


class RowKind(Enum):
    """How the numbers of a row are stored."""

    PLAIN = "plain"
    FP8_GROUPS = "fp8"  # n dims in groups of 64 with E8M0 scales, r dims bfloat16
    FP8_WHOLE = "fp8 whole"  # all dims under one float32 power-of-two scale (indexer rows)


@dataclass(frozen=True)
class RowFormat:
    """One row of `dim` numbers, of which the last `rope_dim` are rotary.

    `dtype` names the storage dtype of a plain row and is ignored by FP8 rows. Sizes are bytes. At
    dim 512 / rope_dim 64 an FP8 row is 576 + 8 = 584 bytes; an FP8 indexer row of 128 is 132.
    Raises `ConfigError` for a dtype that rows do not come in.
    """

    kind: RowKind
    dim: int
    rope_dim: int
    dtype: str = "bfloat16"

    def __post_init__(self) -> None:
        expect_choice("the dtype of plain rows", self.dtype, tuple(DTYPE_BYTES))

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
        return self.dim * DTYPE_BYTES[self.dtype]

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

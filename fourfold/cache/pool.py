"""Allocation of a model's state: rings and folds by slot, compressed rows by page.

Contract: `allocate` makes all tensors at once, zeroed, and nothing grows afterwards. It does not know
which sequence owns what (blocks.py).
"""

from __future__ import annotations

import torch

from fourfold.cache.rows import RowFormats, ring_rows
from fourfold.core.config import ModelConfig
from fourfold.core.row_format import RowFormat, rows_per_page
from fourfold.core.rows import RowPages
from fourfold.core.state import CompressedState, LayerState, ModelState
from fourfold.core.tensor import accumulate_dtype


def allocate(
    config: ModelConfig,
    formats: RowFormats,
    num_pages: int,
    num_slots: int,
    dtype: torch.dtype,
    device: torch.device,
    drafts: int = 0,
) -> ModelState:
    """State for `num_slots` sequences and `num_pages` pages; `dtype` is the model's."""
    versions = 1 + drafts

    def compressed(format: RowFormat, ratio: int) -> CompressedState:
        series = config.compressor_series(ratio)
        shape = (num_slots * versions, series, 3, format.dim)
        return CompressedState(
            RowPages.zeros(format, num_pages, rows_per_page(ratio), device),
            torch.zeros(shape, dtype=accumulate_dtype(dtype), device=device),
        )

    def ring() -> RowPages:
        return RowPages.zeros(formats.main, num_slots, ring_rows(config, drafts), device)

    layers = tuple(
        LayerState(
            ring(),
            compressed(formats.main, ratio) if ratio else None,
            compressed(formats.indexer, ratio) if config.has_indexer(ratio) else None,
        )
        for ratio in config.compress_ratios
    )
    mtp = tuple(LayerState(ring()) for _ in range(config.num_nextn_predict_layers))
    return ModelState(layers, mtp)

"""Batches for training: rows of equal length, filled with documents that start at multiples of 128.

    row   | document 0 ............ pad | document 1 ... pad | padding |
          0                            384                  512       L

Contract: a document's positions count from its start, so that every layer computes for it what it
would compute for the document alone (tested). Because documents start at multiples of every compress
ratio, compressed row c of a batch row pools tokens m·c … m·c+m−1, and windows never straddle two
documents. Tensors only; it does not know what the tokens say.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fourfold.cache.rows import RowFormats
from fourfold.core.batch import Emission, ForwardBatch
from fourfold.core.config import ModelConfig
from fourfold.core.row_format import RowFormat, RowKind
from fourfold.core.rows import RowPages
from fourfold.core.state import CompressedState, LayerState, ModelState

BLOCK = 128  # documents start at its multiples; queries are attended to in blocks of it


@dataclass(frozen=True)
class TrainBatch(ForwardBatch):
    """A batch of R rows of L tokens, N = R·L/128 blocks.

    `near [N, 128, 256]`: which tokens of the block before and of its own a query sees through the
    window. `visible[m] [R, L, L/m]`: which compressed rows it may see.
    """

    length: int
    near: Tensor
    visible: Mapping[int, Tensor]

    @staticmethod
    def of(token_ids: Tensor, starts: Tensor, config: ModelConfig) -> TrainBatch:
        """`token_ids [R, L]`; `starts [R, L]` is the index in its row of each token's document's start."""
        rows, length = token_ids.shape
        device = token_ids.device
        index = torch.arange(length, device=device)
        positions = (index - starts).flatten()
        row = torch.arange(rows, device=device).unsqueeze(-1)
        documents = (starts + row * length).flatten()
        nothing = torch.zeros(0, dtype=torch.int64, device=device)
        emissions, visible = {}, {}
        for ratio in sorted(set(config.compress_ratios) - {0}):
            own = positions[::ratio]
            emissions[ratio] = Emission(nothing, own, own)
            complete = index[::ratio] + ratio - 1 <= index.unsqueeze(-1)
            same = starts.unsqueeze(-1) == starts[:, None, ::ratio]
            visible[ratio] = same & complete
        return TrainBatch(
            token_ids=token_ids.flatten(),
            positions=positions,
            sequence_ids=documents,
            cu_seqlens_q=nothing,
            num_computed_tokens=nothing,
            block_table=nothing.view(0, 0),
            state_slots=nothing,
            ring_slots=nothing,
            fold_sources=nothing,
            fold_tokens=nothing,
            fold_targets=nothing,
            emissions=emissions,
            # Every token's logits: a slice, so that taking them is a view and not a gather.
            logits_tokens=slice(None),  # type: ignore[arg-type]
            length=length,
            near=_near(documents, positions, config.sliding_window),
            visible=visible,
        )


def _near(documents: Tensor, positions: Tensor, window: int) -> Tensor:
    """Window mask of each block against the block before it and itself."""
    if window > BLOCK:
        raise ValueError(f"windows above {BLOCK} do not fit in two blocks, found {window}")
    owner, place = documents.view(-1, BLOCK), positions.view(-1, BLOCK)
    before = torch.cat([owner.new_full((1, BLOCK), -1), owner[:-1]])
    owners = torch.cat([before, owner], dim=1)
    places = torch.cat([place.roll(1, 0), place], dim=1)
    distance = place.unsqueeze(-1) - places.unsqueeze(1)
    same = owner.unsqueeze(-1) == owners.unsqueeze(1)
    return same & (distance >= 0) & (distance < window)


def fresh_state(
    config: ModelConfig, formats: RowFormats, batch: TrainBatch, dtype: torch.dtype
) -> ModelState:
    """State for one step: compressed rows are written to it and read from it, with gradients.

    Pages hold numbers in `dtype` whatever their format; the format says how rows are rounded. A page
    is one batch row's compressed rows.
    """
    device, length = batch.token_ids.device, batch.length
    rows = batch.num_tokens // length
    nothing = torch.zeros(0, device=device)

    def pages(format: RowFormat, count: int, each: int) -> RowPages:
        storage = torch.zeros(count, each, format.dim, dtype=dtype, device=device)
        return RowPages(storage, format, each)

    def compressed(format: RowFormat, ratio: int) -> CompressedState:
        return CompressedState(pages(format, rows, length // ratio), nothing)

    ring = pages(formats.main, 0, 1)
    layers = tuple(
        LayerState(
            ring,
            compressed(formats.main, ratio) if ratio else None,
            compressed(formats.indexer, ratio) if config.has_indexer(ratio) else None,
        )
        for ratio in config.compress_ratios
    )
    return ModelState(layers, (LayerState(ring),) * config.num_nextn_predict_layers)


def as_rows(values: Tensor, format: RowFormat) -> RowPages:
    """`values [N, d]` as one page of plain rows, whatever they were rounded to."""
    name = str(values.dtype).removeprefix("torch.")
    plain = RowFormat(RowKind.PLAIN, format.dim, format.rope_dim, name)
    return RowPages(values.unsqueeze(0), plain, values.shape[0])

"""Containers of a model's sequence state: what a layer may read from and write to.

Contract: one `LayerState` a layer, one `ModelState` a model. For a sequence in state slot `s`, a
layer's state is the ring page `ring[s]`, the folds `folds[s * versions + v]`, and the pages its block
table names. The containers hold tensors and nothing else; cache/ allocates them, ops write them.

Folds are `[slots, F, 3, width]` float32 or float64: F = 1 (HCA) or 2 (CSA: the row being finished,
the next row), 3 = running maximum, sum and weighted sum of the online softmax. All zeros is empty.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from fourfold.core.rows import RowPages


@dataclass(frozen=True)
class CompressedState:
    """Compressed rows and the compressor's folds of one series (main rows, or indexer keys)."""

    pages: RowPages
    folds: Tensor


@dataclass(frozen=True)
class LayerState:
    """State of one layer; `main` is None in SWA layers, `indexer` in all but CSA layers."""

    ring: RowPages
    main: CompressedState | None = None
    indexer: CompressedState | None = None


@dataclass(frozen=True)
class ModelState:
    """State of all main layers, and of each MTP layer."""

    layers: tuple[LayerState, ...]
    mtp: tuple[LayerState, ...] = ()

    @property
    def nbytes(self) -> int:
        total = 0
        for layer in (*self.layers, *self.mtp):
            total += layer.ring.nbytes
            for part in (layer.main, layer.indexer):
                total += part.pages.nbytes + part.folds.nbytes if part else 0
        return total

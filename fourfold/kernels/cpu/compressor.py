"""Compressors on a CPU: the few tokens of a decode step are folded sequence by sequence, side by side.

Contract: bit for bit the definition, whose steps are taken in its order. Longer runs are its own.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fourfold.core.batch import Emission, ForwardBatch
from fourfold.core.device import Feature
from fourfold.ops.compressor import compress as definition
from fourfold.ops.compressor import fold_step
from fourfold.ops.registry import Kernel

FEW = 8  # tokens of a run, at most


def compress(
    kv: Tensor,
    gate: Tensor,
    ape: Tensor,
    folds: Tensor,
    batch: ForwardBatch,
    emission: Emission,
    ratio: int,
    out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """The op `compress` (ops/compressor.py)."""
    first, counts = batch.cu_seqlens_q[:-1], batch.cu_seqlens_q.diff()
    longest = int(counts.max()) if counts.numel() else 0
    if not 0 < longest <= FEW or bool((counts == 0).any()):
        return definition.body(kv, gate, ape, folds, batch, emission, ratio, out_dtype)
    phase, series, width = batch.positions % ratio, folds.shape[1], folds.shape[-1]
    # Second halves of a token's numbers go to the row being finished, first halves to the next one.
    gate = (gate + ape.to(gate.dtype)[phase]).to(folds.dtype).view(-1, series, width).flip(1)
    value = kv.to(folds.dtype).view(-1, series, width).flip(1)
    source = batch.fold_sources
    fold = folds[source.clamp(min=0)]
    fold.masked_fill_((source < 0).view(-1, 1, 1, 1), 0.0)
    after = torch.empty(kv.shape[0], *folds.shape[1:], dtype=folds.dtype)
    for step in range(longest):
        tokens = first[counts > step] + step if step else first
        if step:
            fold = after[tokens - 1]
            opens = (phase[tokens] == 0).view(-1, 1, 1, 1)
            fold = torch.where(opens, _rolled(fold), fold)
        taken = fold_step(
            fold.flatten(0, 1), gate[tokens].flatten(0, 1), value[tokens].flatten(0, 1)
        )
        after[tokens] = taken.view_as(fold)
    done, kept = after[emission.tokens, 0], after[batch.fold_tokens]
    completes = (phase[batch.fold_tokens] == ratio - 1).view(-1, 1, 1, 1)
    return (done[:, 2] / done[:, 1]).to(out_dtype), torch.where(completes, _rolled(kept), kept)


def _rolled(folds: Tensor) -> Tensor:
    """Folds `[N, F, 3, w]` behind a completed row: the next row is the one being finished."""
    return torch.cat([folds[:, 1:], torch.zeros_like(folds[:, :1])], dim=1)


KERNELS = (Kernel("compress", "cpu", compress, frozenset({Feature.CPU})),)

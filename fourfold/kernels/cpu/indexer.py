"""The indexer on a CPU: rows are scored only where there are more than are listed, and none are sorted."""

from __future__ import annotations

import torch
from torch import Tensor

from fourfold.core.batch import ForwardBatch
from fourfold.core.device import Feature
from fourfold.core.row_format import RowKind
from fourfold.core.rows import RowPages
from fourfold.kernels.cpu.rounding import round_groups
from fourfold.kernels.cpu.rows import read_rows
from fourfold.ops.indexer import page_slots
from fourfold.ops.registry import Kernel

_TILE = 1 << 20  # score products held at once


def largest(scores: Tensor, count: int) -> Tensor:
    """`ops.indexer.largest` of `scores [n, rows]`, which are lost and of which there are more."""
    scores.masked_fill_(scores.isnan(), float("-inf"))
    least = scores.topk(count, dim=-1, sorted=False).values.amin(-1, keepdim=True)
    above, equal = scores > least, scores == least
    room = count - above.sum(-1, keepdim=True)
    taken = above | (equal & (equal.cumsum(-1) <= room))
    return taken.nonzero()[:, 1].view(-1, count)


def index_topk(
    q: Tensor, weights: Tensor, keys: RowPages, batch: ForwardBatch, ratio: int, topk: int
) -> Tensor:
    """The op `index_topk` (ops/indexer.py)."""
    visible = ((batch.positions + 1) // ratio).unsqueeze(-1)
    listed = torch.arange(topk).expand(q.shape[0], topk)
    chosen = torch.where(listed < visible, listed, -1)
    if not bool((visible > topk).any()):
        return chosen
    whole = keys.format.kind is RowKind.FP8_WHOLE
    for sequence, (begin, end, computed) in enumerate(batch.runs()):
        # Tokens up to the one that completes row topk see no more rows than are listed.
        scored = max(begin, begin + ratio * (topk + 1) - 1 - computed)
        if scored >= end:
            continue
        total = (computed + end - begin) // ratio
        rows = read_rows(keys, page_slots(batch, sequence, total, keys.rows_per_page))
        index = torch.arange(total)
        tile = max(1, _TILE // (total * q.shape[1]))
        for low in range(scored, end, tile):
            part = slice(low, min(low + tile, end))
            seen = int(visible[part].max())
            heads = q[part].to(torch.bfloat16) if whole else q[part]
            heads = round_groups(heads, q.shape[-1]).to(q.dtype) if whole else heads
            dots = torch.matmul(heads.float(), rows[:seen].t()).relu_()
            scores = torch.bmm(weights[part].float().unsqueeze(1), dots).squeeze(1)
            scores.masked_fill_(index[:seen] >= visible[part], float("-inf"))
            chosen[part] = largest(scores, topk)
    return chosen


# Scores are matrix products, whose order of sums torch chooses by their shape.
KERNELS = (
    Kernel("index_topk", "cpu", index_topk, frozenset({Feature.CPU}), batch_invariant=False),
)

"""Attention on a CPU: no query is multiplied with rows far outside its window or its list.

    few tokens      every token gathers the rows it sees, all tokens of the step in one product
    a prompt's run  tiles of queries: the rows of their windows, then the compressed rows any of them sees

Contract: the definition's sums, over fewer rows that would have weighed nothing. The sink is a row of
zeros whose score is not a product.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from fourfold.core.batch import ForwardBatch
from fourfold.core.device import Feature
from fourfold.core.rows import RowPages
from fourfold.kernels.cpu.rows import read_rows
from fourfold.ops.indexer import page_slots
from fourfold.ops.registry import Kernel

FEW = 32  # tokens that gather their rows, at most: a token has rows of its own then
_ROWS = 4096  # compressed rows a token may gather where none are listed
_QUERIES = 128  # of a tile


def sparse_attention(
    q: Tensor,
    sink: Tensor,
    own: RowPages,
    ring: RowPages,
    pages: RowPages | None,
    listed: Tensor | None,
    batch: ForwardBatch,
    window: int,
    ratio: int,
) -> Tensor:
    """The op `sparse_attention` (ops/attention.py)."""
    if not q.shape[0]:
        return torch.empty_like(q)
    compressed = 0
    if pages is not None:
        compressed = int((batch.positions.max() + 1) // ratio)
        if listed is not None:
            compressed = min(compressed, listed.shape[1])
    if q.shape[0] <= FEW and compressed <= _ROWS:
        slots = _seen_slots(batch, listed, compressed, ratio, pages)
        return _gathered(q, sink, own, ring, pages, slots, batch, window)
    out = torch.empty_like(q)
    for part, rows, seen in _tiles(own, ring, pages, listed, batch, window, ratio):
        out[part] = _attend(q[part], sink, rows, seen)
    return out


def _attend(q: Tensor, sink: Tensor, rows: Tensor, seen: Tensor) -> Tensor:
    """q `[n, H, d]`; rows `[L, d]` or `[n, L, d]` float32, the last one zeros; seen `[n, L]`, of which the
    last is True: `[n, H, d]`."""
    wide, size = q.float(), q.shape[-1]
    if rows.dim() == 2:
        scores = torch.mm(wide.flatten(0, 1), rows.t()).view(*q.shape[:2], -1)
    else:
        scores = torch.bmm(wide, rows.transpose(1, 2))
    scores.mul_(size**-0.5).masked_fill_(~seen.unsqueeze(1), float("-inf"))
    scores[..., -1] = sink.float()
    weights = torch.softmax(scores, dim=-1)
    if rows.dim() == 2:
        finite = torch.isfinite(rows)
        if bool(finite.all()):
            return torch.mm(weights.flatten(0, 1), rows).view(q.shape).to(q.dtype)
        # A weight of zero must not carry what is not finite to queries that do not see its row.
        out = torch.mm(weights.flatten(0, 1), rows.masked_fill(~finite, 0.0)).view(q.shape)
        spoilt = torch.mm(seen.float(), (~finite).float()) > 0
        return out.masked_fill_(spoilt.unsqueeze(1), float("nan")).to(q.dtype)
    return torch.bmm(weights, rows).to(q.dtype)


def _seen_slots(
    batch: ForwardBatch, listed: Tensor | None, count: int, ratio: int, pages: RowPages | None
) -> Tensor:
    """Slots of the compressed rows each token sees, `[T, count]`, −1 for none."""
    if not count or pages is None:
        return batch.positions.new_empty(batch.num_tokens, 0)
    if listed is None:
        rows = torch.arange(count).expand(batch.num_tokens, count)
        visible = ((batch.positions + 1) // ratio).unsqueeze(-1)
        rows = torch.where(rows < visible, rows, -1)
    else:
        rows = listed[:, :count]
    page = rows.clamp(min=0) // pages.rows_per_page
    block = batch.block_table[batch.sequence_ids.unsqueeze(-1), page]
    return torch.where(rows >= 0, (block - page) * pages.rows_per_page + rows, -1)


def _gathered(
    q: Tensor,
    sink: Tensor,
    own: RowPages,
    ring: RowPages,
    pages: RowPages | None,
    slots: Tensor,
    batch: ForwardBatch,
    window: int,
) -> Tensor:
    """Attention of few tokens, each over rows of its own: its window, `slots [T, count]`, the sink."""
    tokens, dim = q.shape[0], q.shape[-1]
    ages = torch.arange(window - 1, -1, -1)
    positions = batch.positions.unsqueeze(-1) - ages
    # Of a window the positions from the run's first on are this step's own rows.
    computed = batch.num_computed_tokens[batch.sequence_ids].unsqueeze(-1)
    state = batch.state_slots[batch.sequence_ids].unsqueeze(-1) * ring.rows_per_page
    mine = positions >= computed
    kept = torch.where(
        (positions < 0) | mine, -1, state + positions.clamp(min=0) % ring.rows_per_page
    )
    rows = torch.empty(tokens, window + slots.shape[1] + 1, dim)
    rows[:, :window] = read_rows(ring, kept.flatten()).view(tokens, window, dim)
    token, place = mine.nonzero(as_tuple=True)
    rows[token, place] = read_rows(own, token - ages[place])
    if pages is not None and slots.shape[1]:
        rows[:, window:-1] = read_rows(pages, slots.flatten()).view(tokens, -1, dim)
    rows[:, -1] = 0.0
    seen = torch.cat([positions >= 0, slots >= 0, torch.ones(tokens, 1, dtype=torch.bool)], dim=1)
    return _attend(q, sink, rows, seen)


def _tiles(
    own: RowPages,
    ring: RowPages,
    pages: RowPages | None,
    listed: Tensor | None,
    batch: ForwardBatch,
    window: int,
    ratio: int,
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Tiles of every run: its flat tokens, the rows they may see and which of them each sees."""
    for sequence, (begin, end, computed) in enumerate(batch.runs()):
        if begin == end:
            continue
        earlier = torch.arange(max(0, computed - window + 1), computed)
        state = batch.state_slots[sequence] * ring.rows_per_page
        before = read_rows(ring, state + earlier % ring.rows_per_page)
        near = torch.cat([before, read_rows(own, torch.arange(begin, end))])
        oldest = computed - before.shape[0]
        total = (computed + end - begin) // ratio if pages is not None else 0
        far = near[:0]
        if pages is not None and total:
            far = read_rows(pages, page_slots(batch, sequence, total, pages.rows_per_page))
        for low in range(begin, end, _QUERIES):
            part = slice(low, min(low + _QUERIES, end))
            first, last = computed + low - begin, computed + part.stop - begin  # positions
            window_from = max(first - window + 1, oldest)
            reach = last // ratio if total else 0
            rows = torch.cat(
                [
                    near[window_from - oldest : last - oldest],
                    far[:reach],
                    near.new_zeros(1, near.shape[1]),
                ]
            )
            position = torch.arange(window_from, last)
            p = batch.positions[part].unsqueeze(-1)
            seen = [(position <= p) & (position > p - window)]
            if reach:
                seen.append(_listed_mask(p, reach, ratio, None if listed is None else listed[part]))
            seen.append(torch.ones_like(p, dtype=torch.bool))
            yield part, rows, torch.cat(seen, dim=1)


def _listed_mask(p: Tensor, count: int, ratio: int, listed: Tensor | None) -> Tensor:
    """Which of the first `count` compressed rows the queries at `p [n, 1]` see, bool `[n, count]`."""
    if listed is None:
        return torch.arange(count) < (p + 1) // ratio
    mask = torch.zeros(p.shape[0], count + 1, dtype=torch.bool)
    mask.scatter_(1, torch.where(listed >= 0, listed, count), True)
    return mask[:, :count]


KERNELS = (
    Kernel(
        "sparse_attention",
        "cpu",
        sparse_attention,
        frozenset({Feature.CPU}),
        batch_invariant=False,
    ),
)

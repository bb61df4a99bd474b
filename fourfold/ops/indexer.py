"""The indexer: which compressed rows a CSA query attends to.

    score_j = Σ_h w_h · relu(q_h · K_j),   the index_topk largest visible rows, ties to the lower row

Contract: rows j < floor((p+1)/m) are visible to position p. Results are row numbers in ascending
order, −1 beyond their count. Scores accumulate in the accumulation dtype; NaN counts as −∞ and −0 as
+0, so that equal scores always fall to the lower row, on any device and in any batch.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fourfold.core.batch import ForwardBatch, ScheduledBatch, ScheduledSequence, lower
from fourfold.core.row_format import RowFormat, RowKind, pages_for, rows_per_page
from fourfold.core.rows import RowPages
from fourfold.core.tensor import accumulate_dtype, dtype_name
from fourfold.ops.registry import Case, CaseMaker, op
from fourfold.ops.rows import encode_rows, index_round, read_rows, store_rows

_TILE = 1 << 24  # score products held at once


def page_slots(batch: ForwardBatch, sequence: int, rows: int, per_page: int) -> Tensor:
    """Slots of compressed rows 0 … rows−1 of a sequence `[rows]`."""
    index = torch.arange(rows, device=batch.block_table.device)
    return batch.block_table[sequence, index // per_page] * per_page + index % per_page


def index_scores(q: Tensor, weights: Tensor, keys: Tensor) -> Tensor:
    """`Σ_h w_h · relu(q_h · K_j)`: q `[n, h, c]`, weights `[n, h]`, keys `[rows, c]` → `[n, rows]`."""
    dots = torch.einsum("nhc,rc->nhr", q, keys).relu()
    return torch.einsum("nhr,nh->nr", dots, weights)


def largest(scores: Tensor, count: int) -> Tensor:
    """Indices of the `count` largest of `scores [n, rows]`, ascending, ties to the lower index."""
    comparable = torch.where(scores.isnan(), float("-inf"), scores) + 0.0
    order = torch.sort(comparable, dim=-1, descending=True, stable=True).indices
    return order[:, :count].sort(dim=-1).values


Runs = tuple[tuple[int, int], ...]
MIXED: Runs = ((0, 18), (41, 3), (300, 1))  # a prompt's start, a run of drafts and one token


def paged_case(
    make: CaseMaker, format: RowFormat, ratio: int, size: float = 1.0, runs: Runs = MIXED
) -> tuple[ForwardBatch, RowPages]:
    """A batch of `runs` (position of the first token, tokens) and the pages their rows lie in.

    Pages are scattered; rows are `size` times normal.
    """
    free = iter([4, 2, 5, 1])
    pages = [[next(free, 0) for _ in range(pages_for(c + n))] for c, n in runs]
    batch = lower(
        ScheduledBatch(
            tuple(
                ScheduledSequence([0] * n, c, block_ids=p, state_slot=i % 3)
                for i, ((c, n), p) in enumerate(zip(runs, pages, strict=True))
            )
        ),
        (ratio,),
        24,
        make.device,
    )
    per_page = rows_per_page(ratio)
    stored = RowPages.zeros(format, 6, per_page, make.device)
    rows = encode_rows(make.randn(6 * per_page, format.dim, scale=size), format)
    store_rows(stored, rows, torch.arange(6 * per_page, device=make.device))
    return batch, stored


def _cases(make: CaseMaker) -> Iterator[Case]:
    formats = {
        "plain": RowFormat(RowKind.PLAIN, 32, 8, dtype_name(make.dtype)),
        "fp8": RowFormat(RowKind.FP8_WHOLE, 32, 8),
        "ragged fp8": RowFormat(RowKind.FP8_WHOLE, 44, 8),
    }
    for name, format in formats.items():
        for heads, topk in ((8, 6), (3, 1), (17, 40)):
            batch, keys = paged_case(make, format, 4)
            inputs: dict[str, Any] = {
                "q": make.randn(batch.num_tokens, heads, format.dim),
                "weights": make.randn(batch.num_tokens, heads, dtype=accumulate_dtype(make.dtype)),
                "keys": keys,
                "batch": batch,
                "ratio": 4,
                "topk": topk,
            }
            yield Case(f"{name}, {heads} heads, {topk} rows", inputs)
        # Scores that are all zero, all NaN, or infinite: the lower rows are taken.
        weights = inputs["weights"].clone()
        weights[::3], weights[1::3, 0], weights[2::6] = 0.0, float("nan"), float("-inf")
        yield Case(f"{name}, scores alike", {**inputs, "weights": weights, "topk": 20})
        yield Case(f"{name}, huge queries", {**inputs, "q": inputs["q"] * 1e30})


@op(_cases, differentiable=False, reads_host=True)
def index_topk(
    q: Tensor, weights: Tensor, keys: RowPages, batch: ForwardBatch, ratio: int, topk: int
) -> Tensor:
    """Rows to attend to, int64 `[T, topk]`, ascending, padded with −1.

    `q [T, h, c]` rotated, `weights [T, h]` float32 with all factors applied, `keys` the paged indexer
    rows. FP8 keys round the queries by the same rule.
    """
    wide = accumulate_dtype(q.dtype)
    rounded = index_round(q) if keys.format.kind is RowKind.FP8_WHOLE else q
    chosen = torch.full((q.shape[0], topk), -1, dtype=torch.int64, device=q.device)
    for sequence, (begin, end, computed) in enumerate(batch.runs()):
        total = (computed + end - begin) // ratio
        if not total:
            continue
        slots = page_slots(batch, sequence, total, keys.rows_per_page)
        rows = read_rows(keys, slots, wide)
        index = torch.arange(total, device=q.device)
        tile = max(1, _TILE // (total * q.shape[1]))
        for low in range(begin, end, tile):
            part = slice(low, min(low + tile, end))
            scores = index_scores(rounded[part].to(wide), weights[part].to(wide), rows)
            hidden = index >= (batch.positions[part].unsqueeze(-1) + 1) // ratio
            best = largest(scores.masked_fill(hidden, float("-inf")), topk)
            visible = best < (batch.positions[part].unsqueeze(-1) + 1) // ratio
            # Hidden rows may fill up a short list; sorting them last keeps the order ascending.
            best = torch.where(visible, best, total).sort(dim=-1).values
            chosen[part, : best.shape[1]] = torch.where(best < total, best, -1)
    return chosen

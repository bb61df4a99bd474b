"""Attention of each query over its window and over compressed rows, with a sink.

The one key/value head's row is key and value at once. A query at position p sees

    window rows      positions max(0, p−W+1) … p: the ring's rows before this run, then the run's own
    compressed rows  HCA: all j < floor((p+1)/m);  CSA: those of the indexer's list
    the sink         one learned logit a head, in the denominator only

    out = Σ softmax([q·row / √d, sink])_row · row

Contract: rows come already rounded to their cache format, the run's own included. Softmax in the
accumulation dtype. The output still carries the rows' rotation. It does not know how rows were made.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from fourfold.core.batch import ForwardBatch
from fourfold.core.row_format import RowFormat, RowKind
from fourfold.core.rows import RowPages
from fourfold.core.tensor import accumulate_dtype, dtype_name
from fourfold.ops.indexer import MIXED, Runs, page_slots, paged_case
from fourfold.ops.registry import Case, CaseMaker, Tolerance, op
from fourfold.ops.rows import encode_rows, read_rows, store_rows

_TILE = 1 << 25  # scores held at once


def _case(
    make: CaseMaker,
    name: str,
    format: RowFormat,
    ratio: int,
    *,
    heads: int = 4,
    window: int = 20,
    topk: int = 5,
    size: float = 1.0,
    runs: Runs = MIXED,
) -> Case:
    """A batch as `paged_case` makes it; rows are `size` times, queries 1 / `size` times normal."""
    batch, pages = paged_case(make, format, ratio or 4, size, runs)
    ring, dim = RowPages.zeros(format, 3, 24, make.device), format.dim
    rows = encode_rows(make.randn(72, dim, scale=size), format)
    store_rows(ring, rows, torch.arange(72, device=make.device))
    visible = (batch.positions + 1) // 4
    listed = torch.arange(topk, device=make.device).expand(batch.num_tokens, topk)
    listed = torch.where(listed < visible.unsqueeze(-1), listed, -1)
    return Case(
        name,
        {
            "q": make.randn(batch.num_tokens, heads, dim, scale=1 / size),
            "sink": make.randn(heads),
            "own": encode_rows(make.randn(batch.num_tokens, dim, scale=size), format),
            "ring": ring,
            "pages": pages if ratio else None,
            "listed": listed if ratio == 4 else None,
            "batch": batch,
            "window": window,
            "ratio": ratio,
        },
    )


def _cases(make: CaseMaker) -> Iterator[Case]:
    stored = dtype_name(make.dtype)
    for name, kind in (("plain", RowKind.PLAIN), ("fp8", RowKind.FP8_GROUPS)):
        format = RowFormat(kind, 80, 16, stored)
        for ratio in (0, 4, 128):
            yield _case(make, f"{name} rows, ratio {ratio}", format, ratio)
        yield _case(make, f"{name} rows, a longer list", format, 4, heads=3, topk=70)
        yield _case(make, f"{name} rows, a prompt", format, 4, runs=((0, 40),))
    lanes = tuple((9 * i, 1) for i in range(33))
    format = RowFormat(RowKind.FP8_GROUPS, 80, 16)
    yield _case(make, "fp8 rows, one token each", format, 4, heads=1, window=1, runs=lanes)
    ragged = RowFormat(RowKind.FP8_GROUPS, 150, 22)
    yield _case(make, "fp8 rows, ragged", ragged, 4, heads=17, window=24, topk=33)
    yield _case(make, "fp8 rows, huge", format, 4, size=1e30)


@op(_cases, tolerance=Tolerance(float32=2e-5), reads_host=True, consumes=("q",))
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
    """Attention output `[T, H, d]` in q's dtype.

    `q [T, H, d]` normalised and rotated, `sink [H]`, `own` one page with the T rows of this step,
    `ring` a page a state slot, `pages` the paged compressed rows (None: SWA), `listed [T, K]` the
    indexer's rows, −1 padded (None: all visible rows).
    """
    out = torch.empty_like(q)
    for sequence, (begin, end, computed) in enumerate(batch.runs()):
        if begin == end:
            continue
        rows, position = _window_rows(own, ring, batch, sequence, (begin, end, computed), window, q)
        total = (computed + end - begin) // ratio if ratio else 0
        if pages is not None and total:
            slots = page_slots(batch, sequence, total, pages.rows_per_page)
            rows = torch.cat([rows, read_rows(pages, slots, rows.dtype)])
        tile = max(1, _TILE // (rows.shape[0] * q.shape[1]))
        for low in range(begin, end, tile):
            part = slice(low, min(low + tile, end))
            p = batch.positions[part].unsqueeze(-1)
            seen = (position <= p) & (position > p - window)
            if total:
                mask = _compressed_mask(p, total, ratio, None if listed is None else listed[part])
                seen = torch.cat([seen, mask], dim=-1)
            out[part] = _attend(q[part], sink, rows, seen)
    return out


def _window_rows(
    own: RowPages,
    ring: RowPages,
    batch: ForwardBatch,
    sequence: int,
    run: tuple[int, int, int],
    window: int,
    q: Tensor,
) -> tuple[Tensor, Tensor]:
    """Rows a run's queries may see through the window, and their positions."""
    begin, end, computed = run
    wide = accumulate_dtype(q.dtype)
    earlier = torch.arange(max(0, computed - window + 1), computed, device=q.device)
    state = batch.state_slots[sequence] * ring.rows_per_page
    before = read_rows(ring, state + earlier % ring.rows_per_page, wide)
    now = read_rows(own, torch.arange(begin, end, device=q.device), wide)
    positions = torch.arange(computed, computed + end - begin, device=q.device)
    return torch.cat([before, now]), torch.cat([earlier, positions])


def _compressed_mask(p: Tensor, total: int, ratio: int, listed: Tensor | None) -> Tensor:
    """Which of `total` compressed rows the queries at positions `p [n, 1]` see, bool `[n, total]`."""
    if listed is None:
        return torch.arange(total, device=p.device) < (p + 1) // ratio
    mask = torch.zeros(p.shape[0], total + 1, dtype=torch.bool, device=p.device)
    mask.scatter_(1, torch.where(listed >= 0, listed, total), True)
    return mask[:, :total]


def _attend(q: Tensor, sink: Tensor, rows: Tensor, seen: Tensor) -> Tensor:
    """q `[n, H, d]`, rows `[L, d]`, seen `[n, L]` → `[n, H, d]`.

    Rows that are not finite spoil what the queries that see them get, and nothing else.
    """
    wide = rows.dtype
    scores = torch.einsum("nhd,ld->nhl", q.to(wide), rows) * q.shape[-1] ** -0.5
    scores = scores.masked_fill(~seen.unsqueeze(1), float("-inf"))
    sinks = sink.to(wide).view(1, -1, 1).expand(q.shape[0], -1, 1)
    weights = torch.softmax(torch.cat([scores, sinks], dim=-1), dim=-1)
    finite = torch.isfinite(rows)
    out = torch.einsum("nhl,ld->nhd", weights[..., :-1], torch.where(finite, rows, 0.0))
    if not bool(finite.all()):
        spoilt = seen.to(wide) @ (~finite).to(wide) > 0
        out = out.masked_fill(spoilt.unsqueeze(1), float("nan"))
    return out.to(q.dtype)

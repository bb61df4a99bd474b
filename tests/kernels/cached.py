"""One long sequence in a cache, and any of its tokens as a step: alone, in a batch, cut anywhere.

Rows of all kinds are made once, from a seed; a step takes the runs (first position, tokens) it is
asked for, each with a ring filled as if everything before it had run. What no token of a step may see
is filled with codes that decode to huge numbers or NaN.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fourfold.core.batch import ForwardBatch, ScheduledBatch, ScheduledSequence, lower
from fourfold.core.row_format import RowFormat, RowKind, pages_for, rows_per_page
from fourfold.core.rows import RowPages
from fourfold.ops.rows import encode_rows, store_rows

Run = tuple[int, int]
PADDING: Run = (-1, 1)  # a lane that fills up a captured batch


@dataclass(frozen=True)
class Cached:
    """Tokens base … base + count − 1 of a sequence, what came before them, and its compressed rows."""

    q: Tensor  # [count, H, d]
    values: Tensor  # [before + count, d], the window rows before encoding
    sink: Tensor
    format: RowFormat
    pages: RowPages
    block_ids: tuple[int, ...]
    listed: Tensor | None  # [count, K]
    base: int
    window: int
    ratio: int

    @staticmethod
    def make(
        count: int,
        *,
        base: int = 0,
        heads: int = 4,
        dim: int = 80,
        rope: int = 16,
        window: int = 20,
        ratio: int = 4,
        topk: int | None = 6,
        kind: RowKind = RowKind.FP8_GROUPS,
        dtype: torch.dtype = torch.float32,
        device: str = "cpu",
        seed: int = 0,
    ) -> Cached:
        """`topk` None: every visible compressed row is attended."""
        generator = torch.Generator(device).manual_seed(seed)

        def randn(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, device=device).to(torch.bfloat16)

        format = RowFormat(kind, dim, rope, str(dtype).removeprefix("torch."))
        blocks = pages_for(base + count)
        block_ids = tuple((7 * i + 3) % (blocks + 2) for i in range(blocks)) if ratio else ()
        if len(set(block_ids)) < len(block_ids):
            block_ids = tuple(reversed(range(1, blocks + 1)))
        per_page = rows_per_page(ratio or 4)
        pages = spoilt(format, blocks + 2, per_page, torch.device(device))
        rows = (base + count) // (ratio or 4)
        if ratio:
            index = torch.arange(rows, device=device)
            table = torch.tensor(block_ids, device=device)
            slots = table[index // per_page] * per_page + index % per_page
            store_rows(pages, encode_rows(randn(rows, dim).to(dtype), format), slots)
        listed = None
        if ratio and topk is not None:
            visible = (base + torch.arange(count, device=device) + 1) // ratio
            order = torch.rand(count, max(rows, 1), generator=generator, device=device)
            hidden = torch.arange(max(rows, 1), device=device) >= visible.unsqueeze(-1)
            best = order.masked_fill(hidden, 2).argsort(-1)[:, :topk]
            best = torch.where(best < visible.unsqueeze(-1), best, 1 << 40).sort(-1).values
            listed = torch.where(best < 1 << 40, best, -1)
            missing = topk - listed.shape[1]
            listed = torch.nn.functional.pad(listed, (0, missing), value=-1)
        before = min(base, window)
        return Cached(
            randn(count, heads, dim).to(dtype),
            randn(before + count, dim).to(dtype),
            randn(heads).float(),
            format,
            pages,
            block_ids,
            listed,
            base,
            window,
            ratio,
        )

    def step(self, runs: Sequence[Run]) -> dict[str, Any]:
        """Arguments of `sparse_attention` for these runs."""
        device, ring_rows = self.q.device, self.window + 3
        batch = self.batch(runs)
        first = self.base - (self.values.shape[0] - self.q.shape[0])  # position of values[0]
        earlier = [
            torch.arange(0)
            if run == PADDING
            else torch.arange(max(first, run[0] - self.window), run[0])
            for run in runs
        ]
        slots = [i * ring_rows + p % ring_rows for i, p in enumerate(earlier)]
        ring = spoilt(self.format, len(runs), ring_rows, device)
        before = self.values[torch.cat(earlier).to(device) - first]
        store_rows(ring, encode_rows(before, self.format), torch.cat(slots).to(device))
        own = self.values[self.tokens(runs) + self.base - first]
        at = self.tokens(runs)
        q, listed = self.q[at], None if self.listed is None else self.listed[at]
        if listed is not None:
            listed = torch.where((batch.state_slots >= 0)[batch.sequence_ids][:, None], listed, -1)
        return {
            "q": q,
            "sink": self.sink,
            "own": encode_rows(own, self.format),
            "ring": ring,
            "pages": self.pages if self.ratio else None,
            "listed": listed,
            "batch": batch,
            "window": self.window,
            "ratio": self.ratio,
        }

    def tokens(self, runs: Sequence[Run]) -> Tensor:
        """Index in `q` of each flat token of a step; 0 for padding."""
        parts = [
            torch.arange(1) if run == PADDING else torch.arange(run[1]) + run[0] - self.base
            for run in runs
        ]
        return torch.cat(parts).to(self.q.device)

    def batch(self, runs: Sequence[Run]) -> ForwardBatch:
        return lower_runs(runs, self.block_ids, (self.ratio,), self.window + 3, self.q.device)


def lower_runs(
    runs: Sequence[Run],
    block_ids: tuple[int, ...],
    ratios: Sequence[int],
    ring_rows: int,
    device: torch.device,
) -> ForwardBatch:
    """Every run as a sequence with a state slot of its own and the same pages."""
    sequences = tuple(
        ScheduledSequence([0])
        if run == PADDING
        else ScheduledSequence([0] * run[1], run[0], block_ids=block_ids, state_slot=slot)
        for slot, run in enumerate(runs)
    )
    return lower(ScheduledBatch(sequences), ratios, ring_rows, device)


def spoilt(format: RowFormat, pages: int, rows: int, device: torch.device) -> RowPages:
    """Pages nobody has written to: NaN, or FP8 codes and scales that are NaN."""
    made = RowPages.zeros(format, pages, rows, device)
    if format.kind is RowKind.PLAIN:
        made.storage.fill_(float("nan"))
    else:
        made.storage.fill_(0xFF)
    return made


@dataclass(frozen=True)
class CachedKeys:
    """Indexer queries of tokens base … of a sequence, and its paged keys."""

    q: Tensor  # [count, h, c]
    weights: Tensor  # [count, h]
    keys: RowPages
    block_ids: tuple[int, ...]
    base: int
    ratio: int
    topk: int

    @staticmethod
    def make(
        count: int,
        *,
        base: int = 0,
        heads: int = 4,
        dim: int = 32,
        ratio: int = 4,
        topk: int = 6,
        kind: RowKind = RowKind.FP8_WHOLE,
        dtype: torch.dtype = torch.float32,
        device: str = "cpu",
        seed: int = 0,
    ) -> CachedKeys:
        generator = torch.Generator(device).manual_seed(seed)

        def randn(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, device=device).to(torch.bfloat16)

        format = RowFormat(kind, dim, 8, str(dtype).removeprefix("torch."))
        blocks, per_page = pages_for(base + count), rows_per_page(ratio)
        block_ids = tuple(reversed(range(1, blocks + 1)))
        keys = spoilt(format, blocks + 2, per_page, torch.device(device))
        rows = torch.arange((base + count) // ratio, device=device)
        slots = torch.tensor(block_ids, device=device)[rows // per_page] * per_page
        values = randn(rows.shape[0], dim).to(dtype)
        store_rows(keys, encode_rows(values, format), slots + rows % per_page)
        return CachedKeys(
            randn(count, heads, dim).to(dtype),
            randn(count, heads).float(),
            keys,
            block_ids,
            base,
            ratio,
            topk,
        )

    def step(self, runs: Sequence[Run]) -> dict[str, Any]:
        """Arguments of `index_topk` for these runs."""
        parts = [
            torch.arange(1) if run == PADDING else torch.arange(run[1]) + run[0] - self.base
            for run in runs
        ]
        at = torch.cat(parts).to(self.q.device)
        return {
            "q": self.q[at],
            "weights": self.weights[at],
            "keys": self.keys,
            "batch": lower_runs(runs, self.block_ids, (self.ratio,), 24, self.q.device),
            "ratio": self.ratio,
            "topk": self.topk,
        }

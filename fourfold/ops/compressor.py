"""Gated pooling of m tokens into one compressed row, as an online softmax fold in token order.

Per channel, a row pools its tokens with softmax(g): Σ exp(g_i)·v_i / Σ exp(g_i), g including ape.

    HCA, one series      row j pools tokens of window j
    CSA, two series      row j pools the first halves of window j−1, then the second halves of window j

A fold is (max, sum, weighted sum). HCA keeps one; CSA two: `current`, which will finish the row of
the running window and already holds the previous window's first halves, and `next`, which collects
this window's first halves. All zeros is an empty fold, which takes its first token directly.

Contract: every token is folded strictly in order by `fold_step`, whatever the chunking, so that any
chunking and any rollback to a kept fold is bit-equal. Pure; `store_folds` is the op that writes.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fourfold.core.batch import (
    Emission,
    ForwardBatch,
    ScheduledBatch,
    ScheduledSequence,
    lower,
)
from fourfold.core.row_format import RowFormat, RowKind, rows_per_page
from fourfold.core.rows import RowPages
from fourfold.core.tensor import accumulate_dtype, dtype_name
from fourfold.ops.registry import Case, CaseMaker, Tolerance, op
from fourfold.ops.rope import inverse_frequencies


def fold_step(fold: Tensor, gate: Tensor, value: Tensor) -> Tensor:
    """Take one token `gate, value [N, w]` into `fold [N, 3, w]`.

    top' = max(top, g); sum' = sum·e^(top−top') + e^(g−top'); likewise the weighted sum. An empty fold
    starts at top = g, which makes both factors 1 without a −∞ anywhere.
    """
    top, total, weighted = fold.unbind(1)
    top = torch.where(total == 0, gate, top)
    new_top = torch.maximum(top, gate)
    decay, lift = torch.exp(top - new_top), torch.exp(gate - new_top)
    return torch.stack([new_top, total * decay + lift, weighted * decay + lift * value], dim=1)


def fold_runs(start: Tensor, gate: Tensor, value: Tensor, first: Tensor, count: Tensor) -> Tensor:
    """Fold runs of consecutive tokens: the fold after every token, `[T, 3, w]`.

    Run n folds tokens `first[n] … first[n]+count[n]−1` of `gate, value [T, w]` in order, from
    `start[n]`. Runs are contiguous and together cover all tokens.
    """
    folds, tokens = [], []
    fold, longest = start, int(count.max()) if count.numel() else 0
    alive = torch.arange(start.shape[0], device=start.device)
    for step in range(longest):
        going = count[alive] > step
        alive, fold = alive[going], fold[going]
        token = first[alive] + step
        fold = fold_step(fold, gate[token], value[token])
        folds.append(fold)
        tokens.append(token)
    if not folds:
        return start.new_zeros(0, *start.shape[1:])
    return torch.cat(folds)[torch.argsort(torch.cat(tokens))]


def _case(make: CaseMaker, ratio: int, series: int, width: int) -> dict[str, Any]:
    lengths = (1, 2 * ratio + 3, ratio, 2)
    computed = (0, ratio + 1, 2 * ratio - 1, 2 * ratio)  # the last begins where a window does
    batch = lower(
        ScheduledBatch(
            tuple(
                ScheduledSequence(
                    token_ids=[0] * n,
                    num_computed_tokens=c,
                    block_ids=[2 * i, 2 * i + 1],
                    fold_source=i if c else -1,
                    fold_keeps=[(n - 1, i)] + [(0, 4 + i)] * (n > 1),
                )
                for i, (n, c) in enumerate(zip(lengths, computed, strict=True))
            )
        ),
        (ratio,),
        8,
        make.device,
    )
    wide = accumulate_dtype(make.dtype)
    folds = make.randn(8, series, 3, width, dtype=wide)
    folds[:, :, 1] = folds[:, :, 1].abs() + 1
    return {
        "kv": make.randn(sum(lengths), series * width, dtype=wide),
        "gate": make.randn(sum(lengths), series * width, dtype=wide),
        "ape": make.randn(ratio, series * width, dtype=wide),
        "folds": folds,
        "batch": batch,
        "emission": batch.emissions[ratio],
        "ratio": ratio,
        "out_dtype": make.dtype,
    }


def _pool_cases(make: CaseMaker) -> Iterator[Case]:
    yield Case("two series of 4", _case(make, 4, 2, 24))
    yield Case("one series of 128", _case(make, 128, 1, 20))


@op(_pool_cases, tolerance=Tolerance(float32=2e-5), reads_host=True)
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
    """Pool this step's tokens: completed rows `[E, w]` in `out_dtype`, kept folds `[V, F, 3, w]`.

    `kv, gate [T, F·w]` float32 (float64), `ape [m, F·w]`, `folds [slots, F, 3, w]` (read only). Rows
    are those of `emission.tokens`, before norm and rotary; folds those after `batch.fold_tokens`.
    """
    series, width = folds.shape[1], folds.shape[-1]
    gate = gate + ape.to(gate.dtype)[batch.positions % ratio]
    kv, gate = kv.to(folds.dtype), gate.to(folds.dtype)
    starts_run = batch.positions % ratio == 0
    starts_run[batch.cu_seqlens_q[:-1]] = True
    first = starts_run.nonzero().squeeze(-1)
    count = torch.diff(first, append=first.new_tensor([kv.shape[0]]))
    opens = torch.searchsorted(first, batch.cu_seqlens_q[:-1])  # each sequence's first run
    source = batch.fold_sources
    saved = torch.where(
        (source >= 0).view(-1, 1, 1, 1), folds[source.clamp(min=0)], torch.zeros_like(folds[:1])
    )
    empty = folds.new_zeros(first.shape[0], 3, width)
    if series == 1:
        current = fold_runs(empty.index_put((opens,), saved[:, 0]), gate, kv, first, count)
        after = current.unsqueeze(1)
        rolled = torch.zeros_like(after)
    else:
        upcoming = fold_runs(
            empty.index_put((opens,), saved[:, 1]), gate[:, :width], kv[:, :width], first, count
        )
        # A run starts from what the run before it left for it, the first from the saved fold.
        last = (first + count - 1).roll(1)
        start = upcoming[last].index_put((opens,), saved[:, 0])
        current = fold_runs(start, gate[:, width:], kv[:, width:], first, count)
        after = torch.stack([current, upcoming], dim=1)
        rolled = torch.stack([upcoming, torch.zeros_like(upcoming)], dim=1)
    done = current[emission.tokens]
    completes = (batch.positions[batch.fold_tokens] + 1) % ratio == 0
    kept = torch.where(
        completes.view(-1, 1, 1, 1), rolled[batch.fold_tokens], after[batch.fold_tokens]
    )
    return (done[:, 2] / done[:, 1]).to(out_dtype), kept


def _store_cases(make: CaseMaker) -> Iterator[Case]:
    yield Case(
        "with a hole",
        {
            "folds": make.randn(4, 2, 3, 8),
            "kept": make.randn(3, 2, 3, 8),
            "targets": torch.tensor([2, -1, 0], device=make.device),
        },
    )


@op(_store_cases, writes=("folds",), differentiable=False, reads_host=True)
def store_folds(folds: Tensor, kept: Tensor, targets: Tensor) -> None:
    """Write `kept[i]` to `folds[targets[i]]`; −1 writes nowhere."""
    kept_rows = (targets >= 0).nonzero().squeeze(-1)
    folds[targets[kept_rows]] = kept[kept_rows].detach()


def _rows_cases(make: CaseMaker) -> Iterator[Case]:
    for name, kind, ratio, series in (
        ("plain, two series of 4", RowKind.PLAIN, 4, 2),
        ("fp8, two series of 4", RowKind.FP8_GROUPS, 4, 2),
        ("fp8 whole, two series of 4", RowKind.FP8_WHOLE, 4, 2),
        ("fp8, one series of 128", RowKind.FP8_GROUPS, 128, 1),
    ):
        format = RowFormat(kind, 80, 16, dtype_name(make.dtype))
        yield Case(
            name,
            {
                **_case(make, ratio, series, 80),
                "norm": 1 + make.randn(80, scale=0.1),
                "inv_freq": inverse_frequencies(16, 10000.0, None).to(make.device),
                "eps": 1e-6,
                "pages": RowPages.zeros(format, 8, rows_per_page(ratio), make.device),
            },
        )


@op(
    _rows_cases,
    parts=("compress", "norm_rope_rows", "store_rows", "store_folds"),
    writes=("pages", "folds"),
    tolerance=Tolerance(float32=5e-5),
)
def compress_rows(
    ops: Any,
    kv: Tensor,
    gate: Tensor,
    ape: Tensor,
    norm: Tensor,
    inv_freq: Tensor,
    eps: float,
    pages: RowPages,
    folds: Tensor,
    batch: ForwardBatch,
    emission: Emission,
    ratio: int,
    out_dtype: torch.dtype,
) -> RowPages:
    """Pool this step's tokens, write the rows they complete to `pages` and the kept folds to `folds`.

    `compress`, `norm_rope_rows` at `emission.positions`, `store_rows` and `store_folds` in one; the
    encoded rows of all candidates are returned.
    """
    pooled, kept = ops.compress(kv, gate, ape, folds, batch, emission, ratio, out_dtype)
    rows: RowPages = ops.norm_rope_rows(
        pooled, norm, emission.positions, inv_freq, eps, pages.format
    )
    ops.store_rows(pages, rows, emission.slots)
    ops.store_folds(folds, kept, batch.fold_targets)
    return rows

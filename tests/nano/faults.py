"""Parts of the engine broken on purpose, as kernels that a plan is forced to.

    fault = FAULTS["short window"]
    with installed(fault):
        LLM(model, kernels=fault.kernels)

Contract: a `Fault` gives ops results of the right shape and dtype that are wrong in one way; nothing else
differs. They run the ops' own definitions, on a CPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.nn.functional import softplus

from fourfold import kernels
from fourfold.core.batch import ForwardBatch
from fourfold.core.rows import RowPages
from fourfold.ops.attention import sparse_attention
from fourfold.ops.compressor import compress
from fourfold.ops.indexer import index_topk
from fourfold.ops.moe import route_topk
from fourfold.ops.registry import Kernel


@dataclass(frozen=True)
class Fault:
    """Wrong results `runs`, by op."""

    name: str
    runs: Mapping[str, Callable[..., Any]]

    @property
    def kernels(self) -> dict[str, str]:
        """As `LLM` takes them."""
        return dict.fromkeys(self.runs, self.name)


def _raw(logits: Tensor, bias: Tensor, topk: int, scaling: float) -> tuple[Tensor, Tensor]:
    """Learned routing whose weights sum to whatever they do, and not to `scaling`."""
    ids, _ = route_topk(logits, bias, topk, scaling)
    return ids, softplus(logits).sqrt().gather(-1, ids) * scaling


def _short(share: float) -> Callable[..., Tensor]:
    """Attention that sees `share` of its window."""

    def run(
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
        seen = int(window * share)
        return sparse_attention(q, sink, own, ring, pages, listed, batch, seen, ratio)

    return run


def _worst(
    q: Tensor, weights: Tensor, keys: RowPages, batch: ForwardBatch, ratio: int, topk: int
) -> Tensor:
    """The rows of the lowest scores."""
    return index_topk(q, -weights, keys, batch, ratio, topk)


def _latest(
    q: Tensor, weights: Tensor, keys: RowPages, batch: ForwardBatch, ratio: int, topk: int
) -> Tensor:
    """The last rows, whatever their scores."""
    visible = (batch.positions.unsqueeze(-1) + 1) // ratio
    rows = (visible - topk).clamp(min=0) + torch.arange(topk, device=q.device)
    return torch.where(rows < visible, rows, -1)


def _blank(*args: Any, **more: Any) -> tuple[Tensor, Tensor]:
    """Compressed rows that hold nothing."""
    rows, folds = compress(*args, **more)
    return torch.zeros_like(rows), folds


FAULTS = {
    fault.name: fault
    for fault in (
        Fault("worst rows", {"index_topk": _worst}),
        Fault("latest rows", {"index_topk": _latest}),
        Fault("blank rows", {"compress": _blank}),
        Fault("raw weights", {"route_topk": _raw}),
        Fault("short window", {"sparse_attention": _short(0.25)}),
    )
}


@contextmanager
def installed(fault: Fault) -> Iterator[None]:
    """The fault's kernels are there to be asked for, beside the real ones."""
    real = kernels.load
    broken = tuple(Kernel(op, fault.name, run) for op, run in fault.runs.items())
    with mock.patch.object(kernels, "load", lambda device: (*real(device), *broken)):
        yield

"""The kernel plan of training: the model's ops, batched and differentiable, for one compute dtype.

Contract: `train_plan` gives a `KernelPlan` for the one model definition. Its kernels take `TrainBatch`es
and `TrainWeight`s and compute what the op bodies compute for each document alone. What a step leaves
beside its logits (experts' loads, how well indexers foresaw attention) collects in a `Trace`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from fourfold.core.batch import Emission
from fourfold.core.row_format import RowFormat, RowKind
from fourfold.core.rows import RowPages
from fourfold.core.tensor import accumulate_dtype
from fourfold.ops.catalog import OPS
from fourfold.ops.mhc import Site
from fourfold.ops.moe import route_topk
from fourfold.ops.norm import rms_norm
from fourfold.ops.registry import Choice, Kernel, KernelPlan
from fourfold.ops.rope import rotate
from train.batch import TrainBatch, as_rows
from train.ops import attention, compressor, indexer, mixing, moe
from train.ops.rounding import round_activations, round_rows
from train.ops.weights import TrainWeight, value_of

NAME = "train"


@dataclass
class Trace:
    """What one step's ops leave: `loads` of each learned router `[E]` (in layer order, then MTP),
    `foresight` of each indexer. `real [T]` is 1 for the tokens whose routing counts."""

    real: Tensor
    loads: list[Tensor] = field(default_factory=list)
    foresight: list[Tensor] = field(default_factory=list)

    def clear(self) -> None:
        """Forget a step."""
        self.loads.clear()
        self.foresight.clear()


class _Ops:
    """The kernels. `sparse` tells whether compressed rows are chosen by the indexer or all seen."""

    def __init__(self, dtype: torch.dtype, trace: Trace, sparse: bool):
        self.dtype, self.trace, self.sparse = dtype, trace, sparse
        self._rounded: tuple[Tensor, Tensor] | None = None
        self._widened: tuple[Tensor, Tensor] | None = None

    def rounded(self, x: Tensor) -> Tensor:
        """`x` as quantised layers read it; several read the same one."""
        if self._rounded is None or self._rounded[0] is not x:
            self._rounded = (x, round_activations(x))
        return self._rounded[1]

    def widened(self, x: Tensor) -> Tensor:
        """`x` in the accumulation dtype, likewise."""
        if self._widened is None or self._widened[0] is not x:
            self._widened = (x, x.to(accumulate_dtype(x.dtype)))
        return self._widened[1]

    def embed(self, token_ids: Tensor, weight: Tensor, first_token: int = 0) -> Tensor:
        return torch.nn.functional.embedding(token_ids, value_of(weight)).to(self.dtype)

    def linear(self, x: Tensor, weight: TrainWeight | Tensor, unrounded: bool = False) -> Tensor:
        matrix = value_of(weight)
        rounds = isinstance(weight, TrainWeight) and weight.rounds_input
        x = self.rounded(x) if rounds else x
        x = self.widened(x) if unrounded else x
        x = x.detach() if isinstance(weight, TrainWeight) and weight.detached else x
        return torch.nn.functional.linear(x, matrix.to(x.dtype))

    def norm_rope_rows(
        self,
        x: Tensor,
        weight: Tensor,
        positions: Tensor,
        inv_freq: Tensor,
        eps: float,
        format: RowFormat,
    ) -> RowPages:
        rows = rotate(rms_norm(x, weight, eps), positions, inv_freq)
        return as_rows(round_rows(rows, format), format)

    def compress_rows(
        self,
        kv: Tensor,
        gate: Tensor,
        ape: Tensor,
        norm: Tensor,
        inv_freq: Tensor,
        eps: float,
        pages: RowPages,
        folds: Tensor,
        batch: TrainBatch,
        emission: Emission,
        ratio: int,
        out_dtype: torch.dtype,
    ) -> RowPages:
        width = norm.shape[0]
        pooled = compressor.pool(kv, gate, ape, batch.positions, ratio, width).to(out_dtype)
        rows = self.norm_rope_rows(pooled, norm, emission.positions, inv_freq, eps, pages.format)
        pages.storage.copy_(rows.storage.view(pages.storage.shape))
        return rows

    def index_topk(
        self,
        q: Tensor,
        weights: Tensor,
        keys: RowPages,
        batch: TrainBatch,
        ratio: int,
        topk: int,
    ) -> Any:
        if keys.format.kind is RowKind.FP8_WHOLE:
            q = round_rows(q.flatten(0, 1), keys.format).view(q.shape)
        scores = indexer.score_rows(q, weights, keys.storage, batch.visible[ratio])
        return indexer.IndexScores(scores, topk)

    def sparse_attention(
        self,
        q: Tensor,
        sink: Tensor,
        own: RowPages,
        ring: RowPages,
        pages: RowPages | None,
        listed: indexer.IndexScores | None,
        batch: TrainBatch,
        window: int,
        ratio: int,
    ) -> Tensor:
        seen = batch.visible[ratio] if ratio else None
        if listed is not None and self.sparse:
            seen = indexer.choose(listed.scores.detach(), listed.topk)
        rows = pages.storage if pages is not None else None
        out, used = attention.attend(q, sink, own.storage[0], batch.near, rows, seen)
        if listed is not None and seen is not None:
            self.trace.foresight.append(indexer.foresight(listed.scores, used, seen))
        return out

    def wo_a(
        self, attended: Tensor, weight: TrainWeight, positions: Tensor, inv_freq: Tensor
    ) -> Tensor:
        matrix = value_of(weight)
        tokens, heads, dim = attended.shape
        still = rotate(attended, positions, inv_freq, inverse=True)
        groups = heads * dim // matrix.shape[-1]
        inputs = still.view(tokens, groups, -1).transpose(0, 1)
        blocks = matrix.view(groups, -1, matrix.shape[-1]).transpose(1, 2)
        return torch.bmm(inputs, blocks).transpose(0, 1).flatten(1)

    def route_topk(
        self, logits: Tensor, bias: Tensor, topk: int, scaling: float
    ) -> tuple[Tensor, Tensor]:
        ids, weights = route_topk(logits, bias, topk, scaling)
        real = self.trace.real.unsqueeze(-1).expand(ids.shape)
        counts = real.new_zeros(bias.shape[0])
        self.trace.loads.append(counts.scatter_add(0, ids.flatten(), real.flatten()))
        return ids, weights

    def moe(
        self,
        plan: KernelPlan,
        y: Tensor,
        ids: Tensor,
        weights: Tensor,
        experts: moe.Triple,
        shared: Tensor,
        limit: float,
        first_expert: int = 0,
    ) -> Tensor:
        rounds = isinstance(experts[0], TrainWeight) and experts[0].rounds_input
        x = self.rounded(y) if rounds else y
        return (moe.routed_experts(x, ids, weights, experts, limit) + shared).to(y.dtype)

    def nothing(self, *args: Any) -> Tensor:
        """Rings are not kept, and sequences are not flagged: the loss shows what is not finite."""
        return torch.zeros(0)


class Hyper(Protocol):
    """The two halves of a hyper-connection site: train/ops/mixing.py, or mixing_gpu.py."""

    def hc_pre(self, streams: Tensor, site: Site) -> tuple[Tensor, Tensor, Tensor]: ...

    def hc_post(self, z: Tensor, streams: Tensor, post: Tensor, comb: Tensor) -> Tensor: ...


def train_plan(dtype: torch.dtype, trace: Trace, sparse: bool, hyper: Hyper = mixing) -> KernelPlan:
    """The plan. With `sparse` CSA queries see only the rows their indexer chooses."""
    ops = _Ops(dtype, trace, sparse)
    runs: dict[str, Callable[..., Any]] = {
        "embed": ops.embed,
        "linear": ops.linear,
        "hc_pre": hyper.hc_pre,
        "hc_post": hyper.hc_post,
        "norm_rope_rows": ops.norm_rope_rows,
        "compress_rows": ops.compress_rows,
        "index_topk": ops.index_topk,
        "sparse_attention": ops.sparse_attention,
        "wo_a": ops.wo_a,
        "route_topk": ops.route_topk,
        "shared_expert": moe.shared_expert,
        "moe": ops.moe,
        "store_rows": ops.nothing,
        "nonfinite_sequences": ops.nothing,
    }
    # Composite ops are handed the plan first: those whose kernel does not want it drop it.
    composite = {op.name for op in OPS if op.composite} - {"moe"}
    chosen = {
        name: Kernel(name, NAME, _without_plan(run) if name in composite else run)
        for name, run in runs.items()
    }
    choices = [Choice(op.name, NAME if op.name in runs else "body", "training") for op in OPS]
    return KernelPlan(OPS, chosen, choices)


def _without_plan(run: Callable[..., Any]) -> Callable[..., Any]:
    return lambda plan, *args, **kwargs: run(*args, **kwargs)

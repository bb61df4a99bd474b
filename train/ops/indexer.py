"""The indexer in training: scores of all rows, the rows they choose, and how well they foresee attention.

Contract: `choose` picks the rows that `index_topk`'s body lists. `foresight` is the divergence of the
indexer's softmax from what attention gave the rows, weighted by how much a query used rows at all; its
gradient reaches the indexer alone (its weights' inputs are detached).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fourfold.core.tensor import accumulate_dtype


@dataclass(frozen=True)
class IndexScores:
    """What the indexer hands to attention in place of a list: scores `[R, L, C]`, −∞ where hidden."""

    scores: Tensor
    topk: int


def score_rows(q: Tensor, weights: Tensor, keys: Tensor, visible: Tensor) -> Tensor:
    """`Σ_h w_h · relu(q_h · K_j)`: q `[T, h, c]`, weights `[T, h]`, keys `[R, C, c]` → `[R, L, C]`."""
    rows, count, dim = keys.shape
    heads = q.shape[1]
    dots = torch.bmm(q.reshape(rows, -1, dim), keys.transpose(1, 2)).relu()
    dots = dots.view(-1, heads, count)
    scores = torch.bmm(weights.to(dots.dtype).unsqueeze(1), dots).view(rows, -1, count)
    return scores.to(accumulate_dtype(q.dtype)).masked_fill(~visible, float("-inf"))


def choose(scores: Tensor, topk: int) -> Tensor:
    """Mask of the `topk` largest of `scores [..., C]`, ties to the lower row; hidden rows stay out."""
    visible = scores > float("-inf")
    if scores.shape[-1] <= topk:
        return visible
    limit = scores.topk(topk, dim=-1).values[..., -1:]
    above, level = scores > limit, scores == limit
    room = topk - above.sum(-1, keepdim=True)
    return visible & (above | (level & (level.cumsum(-1, dtype=torch.int32) <= room)))


def foresight(scores: Tensor, used: Tensor, among: Tensor) -> Tensor:
    """Mean of KL(attention ‖ indexer) over queries, weighted by the attention that rows got; scalar.

    `used [R, L, C]` is attention's share of each row, `among` the rows compared.
    """
    used = used.detach().to(scores.dtype)
    mass = used.sum(-1)
    target = used / mass.clamp(min=1e-9).unsqueeze(-1)
    masked = scores.masked_fill(~among, torch.finfo(scores.dtype).min / 2)
    guess = torch.log_softmax(masked, dim=-1)
    gap = torch.xlogy(target, target) - target * guess
    divergence = torch.where(among, gap, torch.zeros_like(gap)).sum(-1)
    return (mass * divergence).sum() / mass.sum().clamp(min=1e-6)

"""Attention in blocks: the window from two neighbouring blocks, all compressed rows under a mask.

Contract: gives what `sparse_attention`'s body gives for each document alone. Scores are formed again
in the backward pass instead of being kept, so that memory does not grow with heads × rows twice.

    Z = logaddexp(lse(window), lse(compressed), sink);  P = e^(S − Z);  out = P·rows
    dS = P·(dout·rows − Σ dout·out);  rows are keys and values: drows = dSᵀ q + Pᵀ dout
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from fourfold.core.tensor import accumulate_dtype
from train.batch import BLOCK

_LOWEST = -1e30


def _near_rows(own: Tensor) -> Tensor:
    """`own [T, d]` as `[N, 256, d]`: each block after the one before it."""
    blocks = own.view(-1, BLOCK, own.shape[-1])
    before = torch.cat([torch.zeros_like(blocks[:1]), blocks[:-1]])
    return torch.cat([before, blocks], dim=1)


@cache
def _widens(device: torch.device) -> bool:
    """Whether products of bfloat16 matrices come in float32 here."""
    if device.type != "cuda":
        return False
    one = torch.ones(1, 16, 16, dtype=torch.bfloat16, device=device)
    try:
        torch.bmm(one, one, out_dtype=torch.float32)
    except (RuntimeError, TypeError):
        return False
    return True


def _product(left: Tensor, right: Tensor) -> Tensor:
    """`left @ right`, batched, in the accumulation dtype."""
    if left.dtype == torch.bfloat16 and _widens(left.device):
        return torch.bmm(left, right, out_dtype=torch.float32)
    return torch.bmm(left, right).to(accumulate_dtype(left.dtype))


def _scores(q: Tensor, rows: Tensor, seen: Tensor) -> Tensor:
    """q `[G, n, H, d]`, rows `[G, r, d]`, seen `[G, n, r]` → masked scores `[G, n, H, r]`, wide."""
    groups, count, heads, dim = q.shape
    dots = _product(q.reshape(groups, count * heads, dim), rows.transpose(1, 2))
    dots = dots.view(groups, count, heads, -1).mul_(dim**-0.5)
    return dots.masked_fill_(~seen.unsqueeze(2), float("-inf"))


def _exponentials(scores: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """e^(S − top), made in place, top and log Σ e^S, both `[T, H]`; top is finite where no row is seen."""
    top = scores.amax(-1, keepdim=True).clamp_(min=_LOWEST)
    raised = scores.sub_(top).exp_()
    total = raised.sum(-1).log_() + top.squeeze(-1)
    return raised, top.flatten(0, 1).squeeze(-1), total.flatten(0, 1)


def _weigh(weights: Tensor, rows: Tensor) -> Tensor:
    """weights `[G, n, H, r]` of rows `[G, r, d]` → `[G·n, H, d]`."""
    groups, count, heads, _ = weights.shape
    out = torch.bmm(weights.reshape(groups, count * heads, -1).to(rows.dtype), rows)
    return out.view(groups * count, heads, -1)


def _pull(weights: Tensor, values: Tensor) -> Tensor:
    """The transpose: weights `[G, n, H, r]`, values `[G, n, H, d]` → `[G, r, d]`."""
    return torch.bmm(weights.flatten(1, 2).transpose(1, 2).to(values.dtype), values.flatten(1, 2))


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        sink: Tensor,
        own: Tensor,
        near: Tensor,
        rows: Tensor | None,
        seen: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        window = _near_rows(own)
        blocks = q.view(-1, BLOCK, *q.shape[1:])
        weights, top, part = _exponentials(_scores(blocks, window, near))
        total = torch.logaddexp(part, sink.to(part.dtype))
        out, used = _weigh(weights, window).to(part.dtype), q.new_zeros(0)
        if rows is None or seen is None:
            out = out * torch.exp(top - total).unsqueeze(-1)
        else:
            far, far_top, part = _exponentials(
                _scores(q.view(rows.shape[0], -1, *q.shape[1:]), rows, seen)
            )
            total = torch.logaddexp(total, part)
            share = torch.exp(far_top - total)
            out = out * torch.exp(top - total).unsqueeze(-1)
            out = out + _weigh(far, rows) * share.unsqueeze(-1)
            used = torch.einsum("rnhc,rnh->rnc", far, share.view(far.shape[:3]) / far.shape[2])
        out = out.to(q.dtype)
        ctx.save_for_backward(q, sink, own, near, rows, seen, total, out)
        ctx.mark_non_differentiable(used, total)
        return out, used, total

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        q, sink, own, near, rows, seen, total, out = ctx.saved_tensors
        grad = grads[0].contiguous()
        delta = (grad.to(total.dtype) * out.to(total.dtype)).sum(-1)
        window = _near_rows(own)
        q_grad, pulled = _backward(q, grad, window, near, total, delta)
        before, now = pulled.split(BLOCK, dim=1)
        own_grad = now + torch.cat([before[1:], torch.zeros_like(before[:1])])
        rows_grad = None
        if rows is not None:
            more, rows_grad = _backward(q, grad, rows, seen, total, delta)
            q_grad = q_grad + more
        sink_grad = -(torch.exp(sink.to(total.dtype) - total) * delta).sum(0).to(sink.dtype)
        return q_grad, sink_grad, own_grad.reshape(own.shape), None, rows_grad, None


def _backward(
    q: Tensor, grad: Tensor, rows: Tensor, seen: Tensor, total: Tensor, delta: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of q and rows through one part of the softmax."""
    groups = rows.shape[0]
    queries = q.view(groups, -1, *q.shape[1:])
    above = grad.view(queries.shape)
    weights = _scores(queries, rows, seen)
    shape = (*weights.shape[:3], 1)
    weights.sub_(total.view(shape)).exp_()
    pulled = _pull(weights, above)
    inner = _product(above.flatten(1, 2), rows.transpose(1, 2)).view(weights.shape)
    inner.sub_(delta.view(shape)).mul_(weights).mul_(q.shape[-1] ** -0.5)
    return _weigh(inner, rows), pulled + _pull(inner, queries)


def attend(
    q: Tensor,
    sink: Tensor,
    own: Tensor,
    near: Tensor,
    rows: Tensor | None,
    seen: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """`q [T, H, d]`, window rows `own [T, d]` under `near [N, 128, 256]`, compressed `rows [R, C, d]`
    under `seen [R, L, C]` → output `[T, H, d]`, and `[R, L, C]` how much of the softmax each
    compressed row got, the mean over heads (without gradient; empty without rows)."""
    out, used, _ = _Attention.apply(q, sink, own, near, rows, seen)
    return out, used

"""Hyper-connections in training: the bodies' arithmetic in fewer passes over the streams.

Contract: gives what `hc_pre` and `hc_post` give. Sinkhorn's matrices are laid out streams first, so
that every step is arithmetic on long vectors.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fourfold.core.tensor import accumulate_dtype
from fourfold.ops.mhc import Site
from fourfold.ops.norm import normalized


def sinkhorn(logits: Tensor, iterations: int, eps: float) -> Tensor:
    """As the op's, of logits `[S, S, T]`."""
    matrix = torch.softmax(logits, dim=1) + eps
    matrix = matrix / (matrix.sum(0, keepdim=True) + eps)
    for _ in range(iterations - 1):
        matrix = matrix / (matrix.sum(1, keepdim=True) + eps)
        matrix = matrix / (matrix.sum(0, keepdim=True) + eps)
    return matrix


def hc_pre(streams: Tensor, site: Site) -> tuple[Tensor, Tensor, Tensor]:
    """As the op's: y `[T, D]`, post `[T, S]`, comb `[T, S, S]`."""
    count = streams.shape[1]
    wide = accumulate_dtype(streams.dtype)
    flat = streams.flatten(1).to(wide)
    size = torch.linalg.vector_norm(flat, dim=-1, keepdim=True)
    inverse = torch.rsqrt(size.square() / flat.shape[1] + site.norm_eps)
    mix = torch.nn.functional.linear(flat, site.fn.to(wide)) * inverse
    pre_mix, post_mix, comb_mix = mix.split([count, count, count * count], dim=-1)
    base = site.base.to(wide).split([count, count, count * count])
    scale = site.scale.to(wide)
    pre = torch.sigmoid(pre_mix * scale[0] + base[0]) + site.hc_eps
    post = 2 * torch.sigmoid(post_mix * scale[1] + base[1])
    logits = (comb_mix * scale[2] + base[2]).t().contiguous().view(count, count, -1)
    comb = sinkhorn(logits, site.iterations, site.hc_eps).permute(2, 0, 1)
    mixed = torch.bmm(pre.unsqueeze(1), flat.view(streams.shape)).squeeze(1)
    y = normalized(mixed, site.norm_eps) * site.norm.to(wide)
    return y.to(streams.dtype), post, comb


def hc_post(z: Tensor, streams: Tensor, post: Tensor, comb: Tensor) -> Tensor:
    """As the op's: new streams `[T, S, D]`."""
    wide = accumulate_dtype(streams.dtype)
    # One product: the coefficients [T, S, S + 1] of the streams and of z.
    parts = torch.cat([streams, z.unsqueeze(1)], dim=1).to(wide)
    factors = torch.cat([comb, post.unsqueeze(1)], dim=1).transpose(1, 2)
    return torch.bmm(factors, parts).to(streams.dtype)

"""Hyper-connections on a CPU: in tiles of tokens; tokens lie last while S × S matrices are balanced."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from fourfold.core.device import Feature
from fourfold.ops.mhc import Site
from fourfold.ops.registry import Kernel

TILE = 256  # tokens whose streams stay in a core's cache


def sinkhorn(logits: Tensor, iterations: int, eps: float) -> Tensor:
    """`ops.mhc.sinkhorn` of `logits [T, S, S]`, with the same sums.

    A token's matrix has few elements: reductions over them are fast only if tokens lie last.
    """
    matrix = torch.softmax(logits, dim=-1).add_(eps).permute(1, 2, 0).contiguous()
    numbers = matrix.numpy()  # the same memory; numpy spends less on so small an operation
    small, total = np.float32(eps), np.add.reduce
    numbers /= total(numbers, 0) + small
    for _ in range(iterations - 1):
        numbers /= total(numbers, 1, keepdims=True) + small
        numbers /= total(numbers, 0) + small
    return matrix.permute(2, 0, 1)


def hc_pre(streams: Tensor, site: Site) -> tuple[Tensor, Tensor, Tensor]:
    """The op `hc_pre` (ops/mhc.py)."""
    tiles = [_pre(tile, site) for tile in streams.split(TILE)]
    if len(tiles) == 1:
        return tiles[0]
    y, post, comb = (torch.cat(each) for each in zip(*tiles, strict=True))
    return y, post, comb


def _pre(streams: Tensor, site: Site) -> tuple[Tensor, Tensor, Tensor]:
    tokens, count, _ = streams.shape
    wide = streams.float()
    flat = wide.reshape(tokens, -1)
    inverse = flat.square().mean(-1, keepdim=True).add_(site.norm_eps).rsqrt_()
    mix = torch.nn.functional.linear(flat, site.fn.float()).mul_(inverse)
    base, scale = site.base.float(), site.scale.float()
    # Of one token's mix the three parts are scaled at once.
    mix.mul_(scale.repeat_interleave(_parts(count))).add_(base)
    pre = mix[:, :count].contiguous().sigmoid_().add_(site.hc_eps)
    post = mix[:, count : 2 * count].contiguous().sigmoid_().mul_(2)
    logits = mix[:, 2 * count :].view(tokens, count, count)
    comb = sinkhorn(logits, site.iterations, site.hc_eps)
    mixed = (pre.unsqueeze(-1) * wide).sum(1)
    inverse = mixed.square().mean(-1, keepdim=True).add_(site.norm_eps).rsqrt_()
    y = mixed.mul_(inverse).mul_(site.norm.float())
    return y.to(streams.dtype), post, comb


def _parts(count: int) -> Tensor:
    """Sizes of the parts pre, post and comb of a mix."""
    return torch.tensor([count, count, count * count])


def hc_post(z: Tensor, streams: Tensor, post: Tensor, comb: Tensor) -> Tensor:
    """The op `hc_post` (ops/mhc.py)."""
    out = torch.empty_like(streams)
    for low in range(0, z.shape[0], TILE):
        part = slice(low, low + TILE)
        written = post[part].unsqueeze(-1) * z[part].float().unsqueeze(1)
        out[part] = torch.baddbmm(written, comb[part].transpose(1, 2), streams[part].float())
    return out


KERNELS = tuple(
    Kernel(name, "cpu", run, frozenset({Feature.CPU}), batch_invariant=False)
    for name, run in (("hc_pre", hc_pre), ("hc_post", hc_post))
)

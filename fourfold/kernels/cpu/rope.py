"""Rotary positions on a CPU: the definition's arithmetic, written where the result will be."""

from __future__ import annotations

from torch import Tensor

from fourfold.core.device import Feature
from fourfold.ops.norm import normalized
from fourfold.ops.registry import Kernel


def rotate(x: Tensor, positions: Tensor, inv_freq: Tensor, inverse: bool = False) -> Tensor:
    """The op `rotate` (ops/rope.py)."""
    angle = positions.float().unsqueeze(-1) * inv_freq.float()
    angle = angle.view(angle.shape[0], *[1] * (x.dim() - 2), angle.shape[1])
    cos, sin = angle.cos(), angle.sin_()
    if inverse:
        sin.neg_()
    size = 2 * inv_freq.shape[0]
    turning = x[..., -size:].float()
    even, odd = turning[..., 0::2], turning[..., 1::2]
    out = x.clone()
    out[..., -size::2] = even * cos - odd * sin
    out[..., 1 - size :: 2] = even * sin + odd * cos
    return out


def query_norm_rope(q: Tensor, positions: Tensor, inv_freq: Tensor, eps: float) -> Tensor:
    """The op `query_norm_rope` (ops/norm.py)."""
    return rotate(normalized(q, eps).to(q.dtype), positions, inv_freq)


KERNELS = tuple(
    Kernel(name, "cpu", run, frozenset({Feature.CPU}), batch_invariant=False)
    for name, run in (("rotate", rotate), ("query_norm_rope", query_norm_rope))
)

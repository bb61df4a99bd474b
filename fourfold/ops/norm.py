"""RMS normalisation, alone and with rotary.

    rms_norm(x) = x / sqrt(mean(x²) + eps) · weight

Contract: computed in the accumulation dtype, weight included, and rounded once.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from fourfold.core.tensor import accumulate_dtype
from fourfold.ops.registry import Case, CaseMaker, Tolerance, op
from fourfold.ops.rope import rope_case, rotate


def normalized(x: Tensor, eps: float) -> Tensor:
    """`x / sqrt(mean(x²) + eps)` over the last dimension, in the accumulation dtype."""
    wide = x.to(accumulate_dtype(x.dtype))
    return wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)


def _norm_cases(make: CaseMaker) -> Iterator[Case]:
    for tokens, size in ((1, 64), (6, 200)):
        x, weight = make.randn(tokens, size, scale=2.0), 1 + make.randn(size, scale=0.1)
        yield Case(f"{tokens}x{size}", {"x": x, "weight": weight, "eps": 1e-6})
    x = make.randn(2, 64) * 0
    yield Case("zeros", {"x": x, "weight": make.randn(64), "eps": 1e-6})


@op(_norm_cases)
def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm of `x [T, K]` with `weight [K]`, in x's dtype."""
    wide = normalized(x, eps)
    return (wide * weight.to(wide.dtype)).to(x.dtype)


def _query_cases(make: CaseMaker) -> Iterator[Case]:
    positions, inv_freq = rope_case(make, 5, 8)
    yield Case(
        "3 heads",
        {
            "q": make.randn(5, 3, 24, scale=4.0),
            "positions": positions,
            "inv_freq": inv_freq,
            "eps": 1e-6,
        },
    )


@op(_query_cases, tolerance=Tolerance(float32=3e-5), consumes=("q",))
def query_norm_rope(q: Tensor, positions: Tensor, inv_freq: Tensor, eps: float) -> Tensor:
    """Each head of `q [T, H, d]` divided by its own RMS (no weight), then rotated; q's dtype."""
    return rotate(normalized(q, eps).to(q.dtype), positions, inv_freq)

"""Manifold-constrained hyper-connections: S residual streams, read before and written after a sublayer.

    X [T, S, D] ──► mix = (f @ fnᵀ)·rsqrt(mean f² + ε),  f = flatten(X)
                    pre  = sigmoid(mix_pre·scale₀ + base_pre) + hc_eps             [S]
                    post = 2·sigmoid(mix_post·scale₁ + base_post)                  [S]
                    C    = Sinkhorn(mix_comb·scale₂ + base_comb)                   [S, S]
                    y    = RMSNorm(Σ_i pre_i·X_i)
    z = sublayer(y) ──► X'_j = post_j·z + Σ_i C[i, j]·X_i

Contract: coefficients are float32 (float64 for float64 streams); streams and y are rounded to the
model dtype once. S is read from the shapes. It does not know which sublayer it surrounds.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fourfold.core.tensor import accumulate_dtype
from fourfold.ops.norm import normalized
from fourfold.ops.registry import Case, CaseMaker, Tolerance, op


@dataclass(frozen=True)
class Site:
    """Parameters of one hyper-connection site and of the norm behind it.

    `fn [S(S+2), S·D]`, `base [S(S+2)]`, `scale [3]`; rows and scales in the order pre, post, comb.
    """

    fn: Tensor
    base: Tensor
    scale: Tensor
    norm: Tensor  # [D]
    norm_eps: float
    hc_eps: float
    iterations: int


def sinkhorn(logits: Tensor, iterations: int, eps: float) -> Tensor:
    """Nearly doubly stochastic `[T, S, S]` from logits.

    Softmax over the last index plus eps, columns normalised, then `iterations` − 1 rounds of rows and
    columns, each sum with eps added.
    """
    matrix = torch.softmax(logits, dim=-1) + eps
    matrix = matrix / (matrix.sum(-2, keepdim=True) + eps)
    for _ in range(iterations - 1):
        matrix = matrix / (matrix.sum(-1, keepdim=True) + eps)
        matrix = matrix / (matrix.sum(-2, keepdim=True) + eps)
    return matrix


def _mix(streams: Tensor, fn: Tensor, eps: float) -> Tensor:
    """`(f @ fnᵀ) · rsqrt(mean f² + eps)` of flattened streams, in the accumulation dtype."""
    flat = streams.flatten(1).to(accumulate_dtype(streams.dtype))
    scale = torch.rsqrt(flat.square().mean(-1, keepdim=True) + eps)
    return torch.nn.functional.linear(flat, fn.to(flat.dtype)) * scale


def _site(make: CaseMaker, streams: int, dim: int) -> Site:
    rows = streams * (streams + 2)
    return Site(
        fn=make.randn(rows, streams * dim, scale=(streams * dim) ** -0.5),
        base=make.randn(rows, scale=0.5),
        scale=1 + make.randn(3, scale=0.1),
        norm=1 + make.randn(dim, scale=0.1),
        norm_eps=1e-6,
        hc_eps=1e-6,
        iterations=20,
    )


def _pre_cases(make: CaseMaker) -> Iterator[Case]:
    for streams, dim in ((4, 48), (2, 33)):
        site = _site(make, streams, dim)
        yield Case(f"{streams}x{dim}", {"streams": make.randn(5, streams, dim), "site": site})


@op(_pre_cases, tolerance=Tolerance(float32=3e-5))
def hc_pre(streams: Tensor, site: Site) -> tuple[Tensor, Tensor, Tensor]:
    """Read the streams: sublayer input y `[T, D]`, post `[T, S]`, comb `[T, S, S]`."""
    count = streams.shape[1]
    mix = _mix(streams, site.fn, site.norm_eps)
    pre_mix, post_mix, comb_mix = mix.split([count, count, count * count], dim=-1)
    base = site.base.to(mix.dtype).split([count, count, count * count])
    scale = site.scale.to(mix.dtype)
    pre = torch.sigmoid(pre_mix * scale[0] + base[0]) + site.hc_eps
    post = 2 * torch.sigmoid(post_mix * scale[1] + base[1])
    logits = (comb_mix * scale[2] + base[2]).unflatten(-1, (count, count))
    comb = sinkhorn(logits, site.iterations, site.hc_eps)
    mixed = (pre.unsqueeze(-1) * streams.to(mix.dtype)).sum(1)
    y = normalized(mixed, site.norm_eps) * site.norm.to(mix.dtype)
    return y.to(streams.dtype), post, comb


def _post_arguments(make: CaseMaker, streams: int, dim: int) -> dict[str, Any]:
    wide = accumulate_dtype(make.dtype)
    logits = make.randn(5, streams, streams, dtype=wide)
    return {
        "z": make.randn(5, dim),
        "streams": make.randn(5, streams, dim),
        "post": make.randn(5, streams, dtype=wide),
        "comb": sinkhorn(logits, 20, 1e-6),
    }


def _post_cases(make: CaseMaker) -> Iterator[Case]:
    yield Case("4x48", _post_arguments(make, 4, 48))


@op(_post_cases, consumes=("streams",))
def hc_post(z: Tensor, streams: Tensor, post: Tensor, comb: Tensor) -> Tensor:
    """Write the sublayer output z `[T, D]` back: new streams `[T, S, D]`.

    The comb sum runs over its first index: X'_j takes Σ_i C[i, j]·X_i.
    """
    wide = accumulate_dtype(streams.dtype)
    mixed = torch.einsum("tij,tid->tjd", comb, streams.to(wide))
    return (post.unsqueeze(-1) * z.to(wide).unsqueeze(1) + mixed).to(streams.dtype)


def _post_pre_cases(make: CaseMaker) -> Iterator[Case]:
    yield Case("4x48", {**_post_arguments(make, 4, 48), "site": _site(make, 4, 48)})


@op(
    _post_pre_cases,
    parts=("hc_post", "hc_pre"),
    tolerance=Tolerance(float32=3e-5),
    consumes=("streams",),
)
def hc_post_pre(
    ops: Any, z: Tensor, streams: Tensor, post: Tensor, comb: Tensor, site: Site
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Post step of one site and pre step of the next: streams, y, post, comb."""
    new = ops.hc_post(z, streams, post, comb)
    return (new, *ops.hc_pre(new, site))


def _head_cases(make: CaseMaker) -> Iterator[Case]:
    yield Case(
        "4x48",
        {
            "streams": make.randn(5, 4, 48),
            "fn": make.randn(4, 4 * 48, scale=0.07),
            "base": make.randn(4),
            "scale": make.randn(1),
            "norm": 1 + make.randn(48, scale=0.1),
            "norm_eps": 1e-6,
            "hc_eps": 1e-6,
        },
    )


@op(_head_cases)
def hc_head(
    streams: Tensor,
    fn: Tensor,
    base: Tensor,
    scale: Tensor,
    norm: Tensor,
    norm_eps: float,
    hc_eps: float,
) -> Tensor:
    """Collapse the streams before the output head: RMSNorm(Σ w_i·X_i) `[T, D]`.

    w = sigmoid(mix·scale + base) + hc_eps, with `fn [S, S·D]`, `base [S]`, `scale [1]`.
    """
    mix = _mix(streams, fn, norm_eps)
    weight = torch.sigmoid(mix * scale.to(mix.dtype) + base.to(mix.dtype)) + hc_eps
    mixed = (weight.unsqueeze(-1) * streams.to(mix.dtype)).sum(1)
    return (normalized(mixed, norm_eps) * norm.to(mix.dtype)).to(streams.dtype)

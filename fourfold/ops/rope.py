"""Rotary position embedding on the last dims of a vector, in interleaved pairs.

    (x[2i], x[2i+1]) → (x[2i]·cos − x[2i+1]·sin, x[2i]·sin + x[2i+1]·cos),  angle = position · f_i

Contract: frequencies are a tensor of the model's, float64 `[r/2]`; angles are formed in the
accumulation dtype, as the reference does. `inverse` turns back. It does not know layers.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from fourfold.core.config import RopeScaling
from fourfold.core.tensor import accumulate_dtype
from fourfold.ops.registry import Case, CaseMaker, Tolerance, op


def inverse_frequencies(rope_dim: int, theta: float, scaling: RopeScaling | None) -> Tensor:
    """Rotary frequencies `[rope_dim/2]`, float64: θ^(−2i/r), with YaRN if `scaling` is given.

    YaRN: frequency i is divided by `factor` where its pair turns less than `beta_slow` times within
    the original length, kept where it turns more than `beta_fast` times, and blended linearly over
    the pairs between (bounds rounded outwards, clamped to [0, r − 1]). The amplitude is untouched.
    """
    index = torch.arange(0, rope_dim, 2, dtype=torch.float64)
    frequency = theta ** (-index / rope_dim)
    if scaling is None:
        return frequency

    def pair_turning(turns: float) -> float:
        length = scaling.original_max_position_embeddings
        return rope_dim * math.log(length / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low = max(math.floor(pair_turning(scaling.beta_fast)), 0)
    high = min(math.ceil(pair_turning(scaling.beta_slow)), rope_dim - 1)
    span = high - low if high != low else 0.001
    ramp = ((torch.arange(rope_dim // 2, dtype=torch.float64) - low) / span).clamp(0, 1)
    return frequency / scaling.factor * ramp + frequency * (1 - ramp)


def rope_case(make: CaseMaker, tokens: int, rope_dim: int) -> tuple[Tensor, Tensor]:
    """Positions and frequencies for op cases."""
    frequencies = inverse_frequencies(rope_dim, 10000.0, None).to(make.device)
    return make.randint(1000, tokens), frequencies


def _rotate_cases(make: CaseMaker) -> Iterator[Case]:
    for name, shape, inverse in (("rows", (5, 24), False), ("heads", (5, 3, 24), True)):
        positions, inv_freq = rope_case(make, 5, 8)
        yield Case(
            name,
            {
                "x": make.randn(*shape),
                "positions": positions,
                "inv_freq": inv_freq,
                "inverse": inverse,
            },
        )


@op(_rotate_cases, tolerance=Tolerance(float32=3e-5), consumes=("x",))
def rotate(x: Tensor, positions: Tensor, inv_freq: Tensor, inverse: bool = False) -> Tensor:
    """Rotate the last 2·len(inv_freq) dims of `x [T, …, d]` by `positions [T]`; x's dtype."""
    wide = accumulate_dtype(x.dtype)
    angle = positions.to(wide).unsqueeze(-1) * inv_freq.to(wide)
    angle = angle.view(angle.shape[0], *[1] * (x.dim() - 2), angle.shape[1])
    cos, sin = angle.cos(), -angle.sin() if inverse else angle.sin()
    size = 2 * inv_freq.shape[0]
    still, turning = x[..., :-size], x[..., -size:].to(wide)
    even, odd = turning[..., 0::2], turning[..., 1::2]
    turned = torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2)
    return torch.cat([still, turned.to(x.dtype)], dim=-1)

"""Rounding to FP8 and back, as ops/quantize.py defines it, in few operations on float32 numbers.

    2^e     the smallest power of two with max(amax, 1e-4) ≤ 448 · 2^e
    code    x / 2^e to three bits behind its leading one, or to a multiple of 2^-9 below 2^-6

Contract: equal to the definition in every number; what is not finite becomes 0 or the largest code, as
there. Both are bits: adding what 448's mantissa lacks to the next power carries
into amax's exponent exactly where amax lies above 448 · 2^e, and adding a number 2^20 times as large as
x's power of two rounds x to what is left of float32's 24 bits, ties to even.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fourfold.core.tensor import QuantTensor, Weight
from fourfold.ops.quantize import ACTIVATION_GROUP, AMAX_FLOOR, FP8_MAX, decode_fp8, without_nan

_LARGEST = torch.finfo(torch.float32).max
_EXPONENT = 0x7F800000
_TO_SCALE = 0x1FFFFF - (8 << 23)  # 448 = 1.75 · 2^8
_SMALLEST = 2.0**-6  # normal E4M3
_ROUND = 1.5 * 2.0**20


def group_scales(x: Tensor) -> Tensor:
    """2^e of each group of `x [..., G, group]` float32: `[..., G, 1]`."""
    amax = x.abs().amax(-1, keepdim=True).nan_to_num_(nan=0.0, posinf=_LARGEST)
    bits = amax.clamp_(min=AMAX_FLOOR).view(torch.int32)
    return bits.add_(_TO_SCALE).bitwise_and_(_EXPONENT).view(torch.float32)


def to_e4m3(y: Tensor) -> Tensor:
    """The E4M3 numbers nearest to `y` float32, saturating at ±448; zeros are positive; `y` is lost."""
    y.clamp_(-FP8_MAX, FP8_MAX).nan_to_num_(nan=0.0)
    power = y.view(torch.int32).bitwise_and(_EXPONENT).view(torch.float32)
    power = power.clamp_(min=_SMALLEST).mul_(_ROUND)
    return y.add_(power).sub_(power)


def round_groups(x: Tensor, group: int) -> Tensor:
    """`x [..., K]` rounded to FP8 in groups along the last dimension: float32."""
    size = x.shape[-1]
    if size <= group:
        wide = x.float()
        scale = group_scales(wide)
        return to_e4m3(wide / scale).mul_(scale)
    wide = torch.nn.functional.pad(x.float(), (0, -size % group)) if size % group else x.float()
    groups = wide.view(*x.shape[:-1], -1, group)
    scale = group_scales(groups)
    rounded = to_e4m3(groups / scale).mul_(scale).view(wide.shape)
    return rounded[..., :size] if size % group else rounded


def rounds(weight: Weight) -> bool:
    """Whether `weight` asks for an input rounded to FP8 groups."""
    return isinstance(weight, QuantTensor) and weight.quantize_activations


def rounded_input(x: Tensor, weight: Weight) -> Tensor:
    """`x [T, K]` in float32, rounded if `weight` asks for it."""
    return round_groups(without_nan(x), ACTIVATION_GROUP) if rounds(weight) else x.float()


def fp8_numbers(codes: Tensor) -> Tensor:
    """The float32 numbers of E4M3 `codes` uint8: looked up, which is faster than the cast."""
    table = decode_fp8(torch.arange(256, dtype=torch.uint8), torch.float32)
    return table.index_select(0, codes.int().view(-1)).view(codes.shape)

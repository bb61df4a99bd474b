"""Rounding as the released formats round, with gradients passed straight through.

Contract: values come out exactly as an encoder and decoder of the format would give them; the gradient
is that of the identity. Nothing is read back from the device.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fourfold.core.row_format import FP8_GROUP, RowFormat, RowKind
from fourfold.ops.quantize import (
    ACTIVATION_GROUP,
    FP4_GROUP,
    FP4_MAX,
    dequantize_fp8_groups,
    power_of_two,
    quantize_fp8_groups,
    scale_exponent,
)
from fourfold.quant.fp8_block import FP8_BLOCK


class _Straight(torch.autograd.Function):
    """The second argument, with the gradient of the first."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rounded: Tensor) -> Tensor:
        return rounded.view_as(rounded)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, None]:
        return grads[0], None


def straight(x: Tensor, rounded: Tensor) -> Tensor:
    """`rounded`, whose gradient goes to `x` unchanged."""
    result: Tensor = _Straight.apply(x, rounded.to(x.dtype))
    return result


def _fp8_values(x: Tensor, group: int) -> Tensor:
    codes, exponent = quantize_fp8_groups(x, group)
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    return dequantize_fp8_groups(codes, exponent, group, wide)


def round_activations(x: Tensor) -> Tensor:
    """`x [..., K]` rounded to FP8 in groups of 128 along K, as quantised linears round their input."""
    return straight(x, _fp8_values(x.detach(), ACTIVATION_GROUP))


def round_linear(weight: Tensor) -> Tensor:
    """`weight [..., N, K]` rounded to FP8 in blocks of 128×128."""
    codes, scale = FP8_BLOCK.quantize(weight.detach(), "f32")
    return straight(weight, FP8_BLOCK.dequantize(codes, scale, torch.float32))


def round_expert(weight: Tensor) -> Tensor:
    """`weight [..., N, K]` rounded to FP4 in groups of 32 along K.

    Steps are 0.5 below 2, 1 below 4 and 2 above; rounding half to even in steps is rounding to the
    even code.
    """
    groups = weight.detach().float().unflatten(-1, (-1, FP4_GROUP))
    scale = power_of_two(scale_exponent(groups.abs().amax(-1), FP4_MAX), torch.float32)
    scaled = groups / scale.unsqueeze(-1)
    size = scaled.abs()
    step = torch.where(size < 2, 0.5, torch.where(size < 4, 1.0, 2.0))
    values = torch.round(scaled / step) * step * scale.unsqueeze(-1)
    return straight(weight, values.flatten(-2))


def round_rows(rows: Tensor, format: RowFormat) -> Tensor:
    """`rows [N, d]` as a cache of `format` would give them back."""
    if format.kind is RowKind.PLAIN:
        return rows
    values = rows.detach().to(torch.bfloat16)
    if format.kind is RowKind.FP8_WHOLE:
        return straight(rows, _fp8_values(values, format.dim))
    still = _fp8_values(values[:, : format.nope_dim], FP8_GROUP)
    return straight(rows, torch.cat([still, values[:, format.nope_dim :].to(still.dtype)], dim=-1))

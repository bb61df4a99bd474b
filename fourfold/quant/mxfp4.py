"""MXFP4: E2M1 codes two a byte (low nibble first), one E8M0 scale for 32 inputs of a row."""

from __future__ import annotations

import torch
from torch import Tensor

from fourfold.core.errors import QuantizationError
from fourfold.core.tensor import QuantScheme
from fourfold.ops.quantize import (
    FP4_GROUP,
    FP4_MAX,
    decode_fp4,
    encode_e8m0,
    encode_fp4,
    power_of_two,
    scale_exponent,
)
from fourfold.quant.fp8_block import refuse_bad_scales, scale_values


class Mxfp4(QuantScheme):
    """`codes` uint8 `[..., o, i/2]`; `scale` uint8 E8M0 `[..., o, i/32]`. i is a multiple of 32."""

    name = "mxfp4"
    block = (1, FP4_GROUP)

    def codes_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        if shape[-1] % FP4_GROUP:
            raise QuantizationError(
                f"mxfp4 needs a multiple of {FP4_GROUP} inputs, found a {list(shape)} matrix"
            )
        return (*shape[:-1], shape[-1] // 2)

    def dequantize(self, codes: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        factor = scale_values(scale, wide).repeat_interleave(FP4_GROUP, dim=-1)
        return (decode_fp4(codes, wide) * factor).to(dtype)

    def quantize(self, values: Tensor, scale_format: str) -> tuple[Tensor, Tensor]:
        if scale_format != "e8m0":
            raise QuantizationError(f"mxfp4 scales are E8M0, not {scale_format}")
        groups = values.float().unflatten(-1, (-1, FP4_GROUP))
        exponent = scale_exponent(groups.abs().amax(-1), FP4_MAX)
        scaled = groups * power_of_two(-exponent, torch.float32).unsqueeze(-1)
        return encode_fp4(scaled.flatten(-2)), encode_e8m0(exponent)

    def validate(self, codes: Tensor, scale: Tensor, name: str) -> None:
        refuse_bad_scales(scale, name)

    def canonicalize(self, codes: Tensor) -> None:
        # Magnitude + 7 carries into the sign's place exactly where the magnitude is not 0: the sign
        # stays there and nowhere else.
        keep = codes & 0x77
        keep += 0x77
        keep |= 0x77
        codes &= keep


MXFP4 = Mxfp4()

"""FP8 in blocks of 128×128: E4M3 codes, one scale a block, stored as E8M0 bytes or as float32."""

from __future__ import annotations

import torch
from torch import Tensor

from fourfold.core.errors import QuantizationError
from fourfold.core.tensor import QuantScheme
from fourfold.ops.quantize import (
    FP8_NAN_CODES,
    canonical_fp8,
    decode_e8m0,
    decode_fp8,
    encode_e8m0,
    encode_fp8,
    expand_blocks,
    power_of_two,
    scale_exponent,
)


def scale_values(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Scales by value: E8M0 bytes (uint8) as 2^(b − 127), float32 as they are."""
    return decode_e8m0(scale, dtype) if scale.dtype == torch.uint8 else scale.to(dtype)


def refuse_bad_scales(scale: Tensor, name: str) -> None:
    """Raise `QuantizationError` if a scale is NaN, infinite, negative or zero."""
    # A byte other than 255 is a positive power of two; there can be billions of them.
    bad = scale == 255 if scale.dtype == torch.uint8 else ~(torch.isfinite(scale) & (scale > 0))
    if bool(bad.any()):
        values = scale_values(scale, torch.float32)
        first = [int(i) for i in bad.nonzero()[0]]
        raise QuantizationError(
            f"{name}: scale at {first} is {float(values[tuple(first)])}; "
            "scales must be positive and finite"
        )


class Fp8Block(QuantScheme):
    """`codes` uint8 `[..., o, i]`; `scale` `[..., ceil(o/128), ceil(i/128)]`, uint8 or float32."""

    name = "fp8_block"
    block = (128, 128)

    def codes_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return shape

    def dequantize(self, codes: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        blocks = expand_blocks(scale_values(scale, wide), self.block, tuple(codes.shape))
        return (decode_fp8(codes, wide) * blocks).to(dtype)

    def quantize(self, values: Tensor, scale_format: str) -> tuple[Tensor, Tensor]:
        rows, columns = values.shape[-2:]
        padding = (0, -columns % 128, 0, -rows % 128)
        padded = torch.nn.functional.pad(values.float(), padding)
        blocks = padded.unflatten(-1, (-1, 128)).unflatten(-3, (-1, 128))
        exponent = scale_exponent(blocks.abs().amax((-3, -1)))
        factor = power_of_two(-exponent, torch.float32)
        codes = encode_fp8(values.float() * expand_blocks(factor, self.block, tuple(values.shape)))
        if scale_format == "f32":
            return codes, power_of_two(exponent, torch.float32)
        return codes, encode_e8m0(exponent)

    def validate(self, codes: Tensor, scale: Tensor, name: str) -> None:
        nan = (codes == FP8_NAN_CODES[0]) | (codes == FP8_NAN_CODES[1])
        if bool(nan.any()):
            first = [int(i) for i in nan.nonzero()[0]]
            raise QuantizationError(
                f"{name}: FP8 code at {first} is 0x{int(codes[tuple(first)]):02X}, which is NaN"
            )
        refuse_bad_scales(scale, name)

    def canonicalize(self, codes: Tensor) -> None:
        codes[...] = canonical_fp8(codes)


FP8_BLOCK = Fp8Block()

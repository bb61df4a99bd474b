"""FP8, FP4 and E8M0 by enumeration, against tables written out here and torch's own casts."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fourfold.core.device import Fp8Dialect
from fourfold.core.errors import QuantizationError
from fourfold.core.tensor import QuantTensor
from fourfold.ops.linear import linear
from fourfold.ops.quantize import (
    FP4_VALUES,
    canonical_fp8,
    decode_e8m0,
    decode_fp4,
    decode_fp8,
    dequantize_fp8_groups,
    encode_e8m0,
    encode_fp4,
    encode_fp8,
    fp4_as_fp8,
    power_of_two,
    quantize_fp8_groups,
    scale_exponent,
)
from fourfold.quant.fp8_block import FP8_BLOCK
from fourfold.quant.mxfp4 import MXFP4

ALL = torch.arange(256, dtype=torch.uint8)


def e4m3(code: int) -> float:
    """An OCP E4M3 code by its definition: sign, 4 exponent bits of bias 7, 3 mantissa bits."""
    sign = -1.0 if code & 0x80 else 1.0
    exponent, mantissa = code >> 3 & 0xF, code & 7
    if exponent == 15 and mantissa == 7:
        return math.nan
    if exponent == 0:
        return sign * mantissa * 2.0**-9
    return sign * (1 + mantissa / 8) * 2.0 ** (exponent - 7)


def test_all_256_fp8_codes_decode_by_definition() -> None:
    got = decode_fp8(ALL, torch.float64).tolist()
    for code, value in enumerate(got):
        expected = e4m3(code)
        assert value == expected or (math.isnan(value) and math.isnan(expected)), hex(code)


def test_all_finite_fp8_codes_encode_back_and_negative_zero_never_occurs() -> None:
    finite = canonical_fp8(ALL[~torch.isnan(decode_fp8(ALL, torch.float32))])
    assert torch.equal(encode_fp8(decode_fp8(finite, torch.float32)), finite)
    assert not (encode_fp8(torch.tensor([-0.0, -1e-9, -(2.0**-11)])) == 0x80).any()
    assert canonical_fp8(ALL).tolist() == [0 if c == 0x80 else c for c in range(256)]


def test_nan_codes_are_never_written() -> None:
    odd = torch.tensor([math.nan, math.inf, -math.inf, 1e30, -1e30, 448.1, 463.9, 464.0, 465.0])
    for dialect in Fp8Dialect:
        codes = encode_fp8(odd, dialect).tolist()
        assert codes == [0, 0x7E, 0xFE, 0x7E, 0xFE, 0x7E, 0x7E, 0x7E, 0x7E]


def test_fp8_ties_go_to_even_and_saturation_is_448() -> None:
    values = [e4m3(c) for c in range(0x7F)]
    for low, high, code in zip(values[:-1], values[1:], range(0x7E), strict=True):
        tie = encode_fp8(torch.tensor([(low + high) / 2, -(low + high) / 2])).tolist()
        even = code if code % 2 == 0 else code + 1
        assert tie == [even, even | 0x80 if even else 0]


def test_fnuz_reads_every_byte_as_half_and_encodes_the_same_codes() -> None:
    """The other dialect: same bytes, half the value; 0x80, its NaN, never occurs."""
    usable = canonical_fp8(ALL[(ALL != 0x7F) & (ALL != 0xFF)])
    half = decode_fp8(usable, torch.float32, Fp8Dialect.FNUZ)
    assert torch.equal(half * Fp8Dialect.FNUZ.product_factor, decode_fp8(usable, torch.float32))
    assert torch.isnan(
        decode_fp8(torch.tensor([0x80], dtype=torch.uint8), torch.float32, Fp8Dialect.FNUZ)
    )


def test_fp8_codes_are_equal_in_both_dialects_for_many_values() -> None:
    generator = torch.Generator().manual_seed(0)
    spread = torch.randn(400_000, generator=generator) * torch.exp2(
        torch.randint(-14, 9, (400_000,), generator=generator).float()
    )
    dense = torch.arange(-470, 470, 0.25)
    for values in (spread, dense):
        assert torch.equal(encode_fp8(values), encode_fp8(values, Fp8Dialect.FNUZ))


def test_matmul_through_a_simulated_fnuz_device_is_identical() -> None:
    """Codes quantised and multiplied as a FNUZ device would, results doubled once an operand."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(9, 256, generator=generator) * 5
    codes, scale = FP8_BLOCK.quantize(torch.randn(64, 256, generator=generator), "e8m0")
    expected = linear(x, QuantTensor(codes, scale, FP8_BLOCK, (64, 256)))
    x_codes, exponent = quantize_fp8_groups(x, 128)
    groups = (
        x.unflatten(1, (2, 128)) / power_of_two(exponent, torch.float32).unsqueeze(-1)
    ).flatten(1)
    fnuz_codes = encode_fp8(groups, Fp8Dialect.FNUZ)
    assert torch.equal(fnuz_codes, x_codes)
    factor = Fp8Dialect.FNUZ.product_factor
    scales = power_of_two(exponent, torch.float32).repeat_interleave(128, 1)
    a = decode_fp8(fnuz_codes, torch.float32, Fp8Dialect.FNUZ) * scales
    blocks = (
        decode_e8m0(scale, torch.float32).repeat_interleave(128, 0)[:64].repeat_interleave(128, 1)
    )
    b = decode_fp8(codes, torch.float32, Fp8Dialect.FNUZ) * blocks
    assert torch.equal((a @ b.T) * factor * factor, expected)


def test_e8m0_is_a_power_of_two_for_every_byte() -> None:
    """E8M0 bytes cast as numbers (exponent 120 read as 120.0) would fail here."""
    values = decode_e8m0(ALL, torch.float64).tolist()
    assert values[:255] == [2.0 ** (b - 127) for b in range(255)]
    assert math.isnan(values[255])
    assert torch.equal(encode_e8m0(torch.arange(-127, 128)), ALL[:255])
    with pytest.raises(ValueError, match="E8M0"):
        encode_e8m0(torch.tensor([128]))


@given(st.floats(min_value=0, max_value=2.0**127, width=32))
def test_scale_exponent_is_the_smallest_that_fits(amax: float) -> None:
    e = int(scale_exponent(torch.tensor(amax)))
    floor = max(amax, float(torch.tensor(1e-4)))
    assert floor <= 448 * 2.0**e
    assert floor > 448 * 2.0 ** (e - 1)


def test_scale_exponent_just_above_a_power_of_two() -> None:
    """Where a float log2 rounds down and the group would saturate."""
    for k in range(-5, 20):
        exact = torch.tensor(448.0 * 2.0**k)
        above = torch.nextafter(exact, torch.tensor(math.inf))
        assert int(scale_exponent(exact)) == k
        assert int(scale_exponent(above)) == k + 1


def test_groups_are_independent_and_the_last_may_be_short() -> None:
    x = torch.cat([torch.full((1, 128), 1e-3), torch.full((1, 72), 300.0)], dim=1)
    codes, exponent = quantize_fp8_groups(x, 128)
    assert codes.shape == (1, 200)
    assert exponent.shape == (1, 2)
    back = dequantize_fp8_groups(codes, exponent, 128, torch.float32)
    assert float(((back - x) / x).abs().max()) <= 2**-4


def test_fp4_every_code_times_every_exponent_low_nibble_first() -> None:
    codes = torch.arange(256, dtype=torch.uint8).repeat(255, 1)[:, :16]  # 32 inputs a row
    scale = torch.arange(255, dtype=torch.uint8).view(255, 1)
    for packed in (codes, codes + 16 * 13):
        got = MXFP4.dequantize(packed, scale, torch.float64)
        for row in range(255):
            for byte in range(16):
                for half, nibble in enumerate(
                    (int(packed[row, byte]) & 15, int(packed[row, byte]) >> 4)
                ):
                    magnitude = FP4_VALUES[nibble & 7] * (-1 if nibble & 8 else 1)
                    assert float(got[row, 2 * byte + half]) == magnitude * 2.0 ** (row - 127)


def test_fp4_encodes_to_the_nearest_code_ties_to_even() -> None:
    values = torch.tensor(
        [0, 0.25, 0.26, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 5.01, 9.0, -0.25, -0.74, -5.0]
    )
    expected = [0, 0, 0.5, 1.0, 1.0, 2.0, 2.0, 4.0, 4.0, 6.0, 6.0, 0, -0.5, -4.0]
    assert decode_fp4(encode_fp4(values), torch.float64).tolist() == expected
    every = decode_fp4(torch.arange(256, dtype=torch.uint8), torch.float32)
    assert torch.equal(decode_fp4(encode_fp4(every), torch.float32), every)


@pytest.mark.parametrize("spread", range(15))
def test_fp4_strip_re_expresses_exactly_as_fp8_up_to_a_spread_of_14(spread: int) -> None:
    generator = torch.Generator().manual_seed(spread)
    packed = torch.randint(0, 256, (6, 64), dtype=torch.uint8, generator=generator)
    scale = torch.tensor([[0, spread, spread // 2, 0]], dtype=torch.uint8).repeat(6, 1) + 100
    codes, exponent, exact = fp4_as_fp8(packed, scale)
    assert bool(exact.all())
    assert not (codes == 0x80).any()
    strips = power_of_two(exponent, torch.float64).repeat_interleave(128, -1)
    values = decode_fp8(codes, torch.float64) * strips
    assert torch.equal(values, MXFP4.dequantize(packed, scale, torch.float64))


def test_fp4_strip_that_does_not_fit_says_so_and_its_neighbour_still_does() -> None:
    packed = torch.randint(0, 256, (2, 96), dtype=torch.uint8)
    scale = torch.tensor([[90, 105, 90, 90, 80, 80], [90, 104, 90, 90, 80, 66]], dtype=torch.uint8)
    codes, exponent, exact = fp4_as_fp8(packed, scale)
    assert exact.tolist() == [[False, True], [True, True]]
    assert not codes[0, :128].any()
    assert codes.shape == (2, 192)
    assert exponent.shape == (2, 2)


def test_fp4_strip_exponent_may_lie_below_e8m0() -> None:
    packed = torch.full((1, 64), 0x11, dtype=torch.uint8)
    _, exponent, exact = fp4_as_fp8(packed, torch.zeros(1, 4, dtype=torch.uint8))
    assert bool(exact.all())
    assert int(exponent) == -133


@pytest.mark.parametrize("shape", [(128, 128), (130, 200), (1, 1), (257, 384)])
@pytest.mark.parametrize("scale_format", ["e8m0", "f32"])
def test_fp8_blocks_round_trip_with_partial_edges(
    shape: tuple[int, int], scale_format: str
) -> None:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(2)) * 3
    codes, scale = FP8_BLOCK.quantize(values, scale_format)
    assert tuple(scale.shape) == FP8_BLOCK.scale_shape(shape)
    back = QuantTensor(codes, scale, FP8_BLOCK, shape).dequantize(torch.float32)
    assert float((back - values).abs().max()) <= float(values.abs().max()) * 2**-4
    again, same = FP8_BLOCK.quantize(back, scale_format)
    assert torch.equal(again, codes)
    assert torch.equal(same, scale)


def test_both_scale_formats_mean_the_same_numbers() -> None:
    values = torch.randn(256, 256, generator=torch.Generator().manual_seed(3))
    a = FP8_BLOCK.dequantize(*FP8_BLOCK.quantize(values, "e8m0"), torch.float32)
    b = FP8_BLOCK.dequantize(*FP8_BLOCK.quantize(values, "f32"), torch.float32)
    assert torch.equal(a, b)


def test_a_quantised_tensor_needs_its_scale_in_the_right_shape_and_type() -> None:
    codes = torch.zeros(128, 256, dtype=torch.uint8)
    with pytest.raises(QuantizationError, match=r"scale .* \[1, 2\], found \[1, 1\]"):
        QuantTensor(codes, torch.zeros(1, 1, dtype=torch.uint8), FP8_BLOCK, (128, 256))
    with pytest.raises(QuantizationError, match="uint8"):
        QuantTensor(codes, torch.zeros(1, 2, dtype=torch.bfloat16), FP8_BLOCK, (128, 256))
    with pytest.raises(QuantizationError, match="multiple of 32"):
        QuantTensor(codes, codes, MXFP4, (128, 40))


def test_no_conversion_of_a_quantised_tensor_changes_its_dtype() -> None:
    """FP8 copied without its scale: the only way from codes to numbers applies the scale."""
    values = torch.randn(128, 128, generator=torch.Generator().manual_seed(4)) * 1e-3
    weight = QuantTensor(*FP8_BLOCK.quantize(values, "e8m0"), FP8_BLOCK, (128, 128))
    assert not hasattr(weight, "copy_")
    assert weight.to("cpu").codes.dtype == torch.uint8
    error = (weight.dequantize(torch.float32) - values).abs()
    assert float(error.max()) <= float(values.abs().max()) * 2**-4

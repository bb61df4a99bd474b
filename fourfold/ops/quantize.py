"""FP8, FP4 and E8M0: codes to numbers and numbers to codes.

Contract: pure functions on tensors. One FP8 alphabet: OCP E4M3 codes in uint8 with negative zero
rewritten to zero; NaN codes 0x7F and 0xFF are never written. Scales multiply: value = code · scale.
E8M0 byte b stands for 2^(b − 127), 255 is NaN, there is no zero. FP4 is E2M1, two codes a byte, the
low nibble first. Encoders take finite numbers: what is not finite has raised its sequence's flag
elsewhere, and becomes 0 (NaN) or the largest code (infinity) here.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from fourfold.core.device import Fp8Dialect
from fourfold.ops.registry import Case, CaseMaker, op

FP8_MAX = 448.0
FP4_MAX = 6.0
AMAX_FLOOR = 1e-4  # amplitude below which a group's scale stops shrinking
ACTIVATION_GROUP = 128  # inputs of a linear layer that share one scale
FP4_GROUP = 32  # inputs of an FP4 row that share one scale
FP8_NAN_CODES = (0x7F, 0xFF)

FP4_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def canonical_fp8(codes: Tensor) -> Tensor:
    """`codes` (uint8) with negative zero, 0x80, rewritten to zero."""
    return torch.where(codes == 0x80, torch.zeros_like(codes), codes)


def encode_fp8(values: Tensor, dialect: Fp8Dialect = Fp8Dialect.OCP) -> Tensor:
    """E4M3 codes (uint8) nearest to `values`, ties to even, saturating at ±448.

    A FNUZ device halves before its cast; the codes come out the same.
    """
    finite = torch.nan_to_num(values.float(), nan=0.0, posinf=FP8_MAX, neginf=-FP8_MAX)
    clamped = finite.clamp(-FP8_MAX, FP8_MAX)
    if dialect is Fp8Dialect.FNUZ:
        codes = (clamped * 0.5).to(torch.float8_e4m3fnuz).view(torch.uint8)
    else:
        codes = clamped.to(torch.float8_e4m3fn).view(torch.uint8)
    return canonical_fp8(codes)


def decode_fp8(codes: Tensor, dtype: torch.dtype, dialect: Fp8Dialect = Fp8Dialect.OCP) -> Tensor:
    """The numbers a device of `dialect` reads from `codes`; FNUZ reads half the OCP value."""
    kind = torch.float8_e4m3fnuz if dialect is Fp8Dialect.FNUZ else torch.float8_e4m3fn
    return codes.view(kind).to(dtype)


def decode_e8m0(codes: Tensor, dtype: torch.dtype) -> Tensor:
    """2^(b − 127) for each byte b, exactly; NaN for 255. `dtype` is float32 or float64."""
    wide = codes.to(torch.int32)
    bits = torch.where(wide == 0, torch.full_like(wide, 0x00400000), wide << 23)
    values = bits.view(torch.float32)
    return torch.where(wide == 255, torch.full_like(values, float("nan")), values).to(dtype)


def encode_e8m0(exponents: Tensor) -> Tensor:
    """Bytes for the powers of two 2^exponents (integers), which must lie in −127 … 127."""
    if exponents.numel() and (int(exponents.min()) < -127 or int(exponents.max()) > 127):
        raise ValueError("exponent outside the range of E8M0")
    return (exponents + 127).to(torch.uint8)


def power_of_two(exponents: Tensor, dtype: torch.dtype) -> Tensor:
    """2^exponents exactly, for integer exponents within float32's normal range."""
    return ((exponents.to(torch.int32) + 127) << 23).view(torch.float32).to(dtype)


def scale_exponent(amax: Tensor, limit: float = FP8_MAX) -> Tensor:
    """The smallest integer e with max(amax, 1e-4) ≤ limit · 2^e, as int32.

    `limit` is 1.75·2^8 (FP8) or 1.5·2^2 (FP4): with amax = f·2^k, 0.5 ≤ f < 1, e follows from
    comparing mantissas. A float log2 would miss values just above a power of two.
    """
    finite = torch.nan_to_num(amax, nan=0.0, posinf=torch.finfo(torch.float32).max)
    mantissa, exponent = torch.frexp(finite.clamp(min=AMAX_FLOOR))
    limit_mantissa, limit_exponent = torch.frexp(torch.tensor(limit, dtype=torch.float64))
    above = (mantissa > float(limit_mantissa)).to(torch.int32)
    return exponent.to(torch.int32) - int(limit_exponent) + above


def without_nan(x: Tensor) -> Tensor:
    """`x` with 0 for NaN; infinities stay."""
    return torch.nan_to_num(x, nan=0.0, posinf=float("inf"), neginf=float("-inf"))


def quantize_fp8_groups(x: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """Codes (uint8, shape of x) and scale exponents (int32 `[..., ceil(K/group)]`) of x `[..., K]`.

    Groups of `group` along the last dimension, the last may be shorter; scale 2^e as in
    `scale_exponent`.
    """
    size = x.shape[-1]
    wide = x.float()
    padded = torch.nn.functional.pad(wide, (0, -size % group)).unflatten(-1, (-1, group))
    exponent = scale_exponent(padded.abs().amax(-1))
    codes = encode_fp8(padded / power_of_two(exponent, torch.float32).unsqueeze(-1))
    return codes.flatten(-2)[..., :size].contiguous(), exponent


def dequantize_fp8_groups(
    codes: Tensor, exponent: Tensor, group: int, dtype: torch.dtype
) -> Tensor:
    """Inverse of `quantize_fp8_groups`: numbers `[..., K]` in `dtype`."""
    scale = power_of_two(exponent, dtype).repeat_interleave(group, dim=-1)
    return decode_fp8(codes, dtype) * scale[..., : codes.shape[-1]]


def expand_blocks(scale: Tensor, block: tuple[int, int], shape: tuple[int, ...]) -> Tensor:
    """Block scales `[..., ceil(o/b0), ceil(i/b1)]` repeated to `[..., o, i]`."""
    rows = scale.repeat_interleave(block[0], dim=-2)[..., : shape[-2], :]
    return rows.repeat_interleave(block[1], dim=-1)[..., : shape[-1]]


def decode_fp4(packed: Tensor, dtype: torch.dtype) -> Tensor:
    """E2M1 values `[..., 2n]` of packed bytes `[..., n]`; the low nibble is the even index."""
    magnitudes = torch.tensor(FP4_VALUES, dtype=dtype, device=packed.device)
    table = torch.cat([magnitudes, -magnitudes])
    nibbles = torch.stack([packed & 0xF, packed >> 4], dim=-1).flatten(-2)
    return table[nibbles.to(torch.int64)]


def encode_fp4(values: Tensor) -> Tensor:
    """Packed E2M1 codes `[..., n]` of `values [..., 2n]`: nearest, ties to even code, saturating."""
    magnitude = values.float().abs()
    bounds = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0], device=values.device)
    below = torch.bucketize(magnitude, bounds, right=False)
    above = torch.bucketize(magnitude, bounds, right=True)
    code = torch.where(below % 2 == 0, below, above)
    code = torch.where((values < 0) & (code > 0), code + 8, code).to(torch.uint8)
    return code[..., 0::2] | (code[..., 1::2] << 4)


def fp4_as_fp8(packed: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Re-express FP4 rows as FP8 strips of 128 inputs, exactly where the exponents allow.

    `packed` uint8 `[..., o, i/2]`, `scale` E8M0 bytes `[..., o, i/32]` → FP8 codes uint8 `[..., o, i]`,
    strip exponents int32 `[..., o, ceil(i/128)]`, and a bool mask of the strips that are exact: every
    E2M1 value · 2^k is an E4M3 value for −8 ≤ k ≤ 6, so a strip is exact when its group exponents
    differ by at most 14. Strip exponents reach below E8M0's range. Codes of inexact strips are 0.
    """
    groups_a_strip = ACTIVATION_GROUP // FP4_GROUP
    values = decode_fp4(packed, torch.float32)
    size = values.shape[-1]
    exponent = scale.to(torch.int32) - 127
    count = exponent.shape[-1]
    short = -count % groups_a_strip
    if short:
        last = exponent[..., -1:].expand(*exponent.shape[:-1], short)
        exponent = torch.cat([exponent, last], dim=-1)
    strips = exponent.unflatten(-1, (-1, groups_a_strip))
    top, bottom = strips.amax(-1), strips.amin(-1)
    exact = top - bottom <= 14
    strip_exponent = top - 6
    shift = torch.where(exact.unsqueeze(-1), strips - strip_exponent.unsqueeze(-1), 0)
    factor = power_of_two(shift.flatten(-2), torch.float32)[..., :count]
    codes = encode_fp8(values * factor.repeat_interleave(FP4_GROUP, dim=-1)[..., :size])
    keep = exact.repeat_interleave(ACTIVATION_GROUP, dim=-1)[..., :size]
    return torch.where(keep, codes, torch.zeros_like(codes)), strip_exponent, exact


def _activation_cases(make: CaseMaker) -> Iterator[Case]:
    for tokens, size in ((1, 128), (5, 384), (3, 200)):
        yield Case(f"{tokens}x{size}", {"x": make.randn(tokens, size, scale=3.0)})
    yield Case("zeros", {"x": make.randn(2, 256) * 0})
    yield Case("huge", {"x": make.randn(2, 256, scale=1e30)})


@op(_activation_cases, differentiable=False, batch_invariant=True)
def quantize_activations(x: Tensor) -> tuple[Tensor, Tensor]:
    """FP8 codes uint8 `[T, K]` and scale exponents int32 `[T, ceil(K/128)]` of x `[T, K]`.

    Groups of 128 along K; e is the smallest integer with max(amax, 1e-4) ≤ 448·2^e. NaN counts as 0:
    the rest of its group keeps the scale that it has without.
    """
    return quantize_fp8_groups(without_nan(x), ACTIVATION_GROUP)

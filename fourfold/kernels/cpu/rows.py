"""Cached rows on a CPU: encoded into their page at once, decoded by table, with as few steps as that takes.

Contract: codes, scales and numbers are those of ops/rows.py. Scales that rows are written with are powers
of two within float32's normal range, so an E8M0 byte is a float's exponent as it is.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fourfold.core.device import Feature
from fourfold.core.row_format import FP8_GROUP, RowFormat, RowKind
from fourfold.core.rows import RowPages, storage_dtype
from fourfold.kernels.cpu.rope import rotate
from fourfold.kernels.cpu.rounding import fp8_numbers, group_scales, to_e4m3
from fourfold.ops.norm import rms_norm
from fourfold.ops.registry import Kernel

_MANTISSA = 23


def _codes(x: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """FP8 codes `[N, K]` of `x [N, K]` float32 in groups, and their scales `[N, ceil(K/group)]`."""
    size = x.shape[-1]
    padded = torch.nn.functional.pad(x, (0, -size % group))
    groups = padded.view(x.shape[0], -1, group)
    scale = group_scales(groups)
    numbers = to_e4m3(groups / scale).view(padded.shape)[:, :size]
    return numbers.to(torch.float8_e4m3fn).view(torch.uint8), scale.squeeze(-1)


def encode_rows(rows: Tensor, format: RowFormat) -> RowPages:
    """The op `encode_rows` (ops/rows.py)."""
    count, whole = rows.shape[0], format.kind is RowKind.FP8_WHOLE
    if format.kind is RowKind.PLAIN:
        return RowPages(rows.to(storage_dtype(format)).unsqueeze(0), format, count)
    page = RowPages(torch.zeros(1, format.page_bytes(count), dtype=torch.uint8), format, count)
    data, scales = page.data()[0], page.scales()[0]
    rounded = rows.to(torch.bfloat16)
    nope = rounded if whole else rounded[:, : format.nope_dim]
    codes, scale = _codes(nope.float(), format.dim if whole else FP8_GROUP)
    data[:, : codes.shape[1]] = codes
    if whole:
        scales.copy_(scale.contiguous().view(torch.uint8).view(count, -1))
    else:
        data[:, codes.shape[1] :] = rounded[:, format.nope_dim :].contiguous().view(torch.uint8)
        scales[:, : format.num_groups] = scale.view(torch.int32) >> _MANTISSA
    return page


def norm_rope_rows(
    x: Tensor, weight: Tensor, positions: Tensor, inv_freq: Tensor, eps: float, format: RowFormat
) -> RowPages:
    """The op `norm_rope_rows` (ops/rows.py)."""
    return encode_rows(rotate(rms_norm.body(x, weight, eps), positions, inv_freq), format)


def store_rows(pages: RowPages, rows: RowPages, slots: Tensor) -> None:
    """The op `store_rows` (ops/rows.py)."""
    data, scales = rows.data()[0], rows.scales()[0] if pages.format.scale_bytes else None
    if bool((slots < 0).any()):
        kept = (slots >= 0).nonzero().squeeze(-1)
        slots, data = slots[kept], data[kept]
        scales = None if scales is None else scales[kept]
    page = slots // pages.rows_per_page
    offset = slots - page * pages.rows_per_page
    pages.data()[page, offset] = data
    if scales is not None:
        pages.scales()[page, offset] = scales


def read_rows(pages: RowPages, slots: Tensor) -> Tensor:
    """`ops.rows.read_rows` in float32: the rows at `slots [N]`, zeros for −1."""
    format, at = pages.format, slots.clamp(min=0)
    page = at // pages.rows_per_page
    offset = at - page * pages.rows_per_page
    data = pages.data()[page, offset]
    if format.kind is RowKind.PLAIN:
        values = data.float()
    elif format.kind is RowKind.FP8_WHOLE:
        values = fp8_numbers(data).mul_(pages.scales()[page, offset].view(torch.float32))
    else:
        values = _grouped(data, pages.scales()[page, offset, : format.num_groups], format)
    return values.masked_fill_((slots < 0).unsqueeze(-1), 0.0)


def _grouped(data: Tensor, scales: Tensor, format: RowFormat) -> Tensor:
    """Main FP8 rows `[N, d]` of their bytes and scales."""
    values = torch.empty(data.shape[0], format.dim)
    factors = (scales.int() << _MANTISSA).view(torch.float32)
    factors = factors.repeat_interleave(FP8_GROUP, dim=-1)[:, : format.nope_dim]
    torch.mul(fp8_numbers(data[:, : format.nope_dim]), factors, out=values[:, : format.nope_dim])
    values[:, format.nope_dim :] = data[:, format.nope_dim :].contiguous().view(torch.bfloat16)
    return values


KERNELS = (
    Kernel("encode_rows", "cpu", encode_rows, frozenset({Feature.CPU})),
    # Sums of squares: torch's order depends on the shape.
    Kernel(
        "norm_rope_rows", "cpu", norm_rope_rows, frozenset({Feature.CPU}), batch_invariant=False
    ),
    Kernel("store_rows", "cpu", store_rows, frozenset({Feature.CPU})),
)

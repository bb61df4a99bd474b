"""Cached rows: normalise, rotate, encode, store, read.

Contract: `norm_rope_rows` and `encode_rows` are pure and make a one-page `RowPages` whose row i is
token (or compressed row) i; `store_rows` is the one op that writes rows. Slot −1 is nowhere. What a
row is encoded to, every reader sees: attention reads a chunk's own rows already rounded.
Formats and page geometry: core/row_format.py.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from fourfold.core.row_format import FP8_GROUP, RowFormat, RowKind
from fourfold.core.rows import RowPages, storage_dtype
from fourfold.core.tensor import dtype_name
from fourfold.ops.norm import rms_norm
from fourfold.ops.quantize import (
    decode_e8m0,
    decode_fp8,
    dequantize_fp8_groups,
    encode_e8m0,
    power_of_two,
    quantize_fp8_groups,
)
from fourfold.ops.registry import Case, CaseMaker, Tolerance, op
from fourfold.ops.rope import rope_case, rotate


def _formats(make: CaseMaker) -> dict[str, RowFormat]:
    return {
        "plain": RowFormat(RowKind.PLAIN, 80, 16, dtype_name(make.dtype)),
        "fp8": RowFormat(RowKind.FP8_GROUPS, 80 + 16, 16),
        "ragged fp8": RowFormat(RowKind.FP8_GROUPS, 100, 16),
        "indexer fp8": RowFormat(RowKind.FP8_WHOLE, 64, 16),
    }


def _encode_cases(make: CaseMaker) -> Iterator[Case]:
    for name, format in _formats(make).items():
        yield Case(name, {"rows": make.randn(5, format.dim, scale=2.0), "format": format})


def _pack(data: Tensor, scales: Tensor, format: RowFormat) -> RowPages:
    """One FP8 page from `data [N, data_bytes]` and `scales [N, scale_bytes]`, zero padded."""
    count = data.shape[0]
    body = torch.cat([data.flatten(), scales.flatten()])
    padding = format.page_bytes(count) - body.shape[0]
    storage = torch.nn.functional.pad(body, (0, padding)).unsqueeze(0)
    return RowPages(storage, format, count)


@op(_encode_cases, reads_host=True, batch_invariant=True)
def encode_rows(rows: Tensor, format: RowFormat) -> RowPages:
    """`rows [N, d]` in `format`, as one page of N rows.

    Main FP8 rows round to bfloat16, then code the first n dims in groups of 64 under 2^e and keep the
    last r in bfloat16; indexer FP8 rows code all dims under one 2^e.
    """
    if format.kind is RowKind.PLAIN:
        return RowPages(rows.to(storage_dtype(format)).unsqueeze(0), format, rows.shape[0])
    rounded = rows.to(torch.bfloat16)
    if format.kind is RowKind.FP8_WHOLE:
        codes, exponent = quantize_fp8_groups(rounded, format.dim)
        return _pack(codes, power_of_two(exponent, torch.float32).view(torch.uint8), format)
    nope = rounded[:, : format.nope_dim]
    codes, exponent = quantize_fp8_groups(nope, FP8_GROUP)
    rotary = rounded[:, format.nope_dim :].contiguous().view(torch.uint8)
    unused = format.scale_bytes - format.num_groups
    scales = torch.nn.functional.pad(encode_e8m0(exponent), (0, unused))
    return _pack(torch.cat([codes, rotary], dim=-1), scales, format)


def _norm_rope_cases(make: CaseMaker) -> Iterator[Case]:
    for name, format in _formats(make).items():
        positions, inv_freq = rope_case(make, 4, 16)
        yield Case(
            name,
            {
                "x": make.randn(4, format.dim, scale=3.0),
                "weight": 1 + make.randn(format.dim, scale=0.1),
                "positions": positions,
                "inv_freq": inv_freq,
                "eps": 1e-6,
                "format": format,
            },
        )


@op(_norm_rope_cases, tolerance=Tolerance(float32=3e-5), reads_host=True)
def norm_rope_rows(
    x: Tensor, weight: Tensor, positions: Tensor, inv_freq: Tensor, eps: float, format: RowFormat
) -> RowPages:
    """RMSNorm of `x [N, d]`, rotary at `positions [N]` on the last dims, encoded in `format`."""
    return encode_rows(rotate(rms_norm(x, weight, eps), positions, inv_freq), format)


def _store_cases(make: CaseMaker) -> Iterator[Case]:
    slots = torch.tensor([7, -1, 0, 12], device=make.device)
    for name, format in _formats(make).items():
        pages = RowPages.zeros(format, 3, 5, make.device)
        rows = encode_rows(make.randn(4, format.dim), format)
        yield Case(name, {"pages": pages, "rows": rows, "slots": slots})


@op(_store_cases, writes=("pages",), reads_host=True, batch_invariant=True)
def store_rows(pages: RowPages, rows: RowPages, slots: Tensor) -> None:
    """Write row i of `rows` to slot `slots[i]` of `pages`; −1 writes nowhere."""
    kept = (slots >= 0).nonzero().squeeze(-1)
    page, offset = slots[kept] // pages.rows_per_page, slots[kept] % pages.rows_per_page
    pages.data()[page, offset] = rows.data()[0, kept]
    if pages.format.scale_bytes:
        pages.scales()[page, offset] = rows.scales()[0, kept]


def read_rows(pages: RowPages, slots: Tensor, dtype: torch.dtype) -> Tensor:
    """The numbers of the rows at `slots [N]` → `[N, d]` in `dtype`; slot −1 gives zeros."""
    page, offset = (
        slots.clamp(min=0) // pages.rows_per_page,
        slots.clamp(min=0) % pages.rows_per_page,
    )
    data = pages.data()[page, offset]
    format = pages.format
    if format.kind is RowKind.PLAIN:
        values = data.to(dtype)
    elif format.kind is RowKind.FP8_WHOLE:
        scale = pages.scales()[page, offset].contiguous().view(torch.float32)
        values = decode_fp8(data, dtype) * scale.to(dtype)
    else:
        scale = decode_e8m0(pages.scales()[page, offset, : format.num_groups], torch.float32)
        wide = scale.to(dtype).repeat_interleave(FP8_GROUP, dim=-1)[:, : format.nope_dim]
        nope = decode_fp8(data[:, : format.nope_dim].contiguous(), dtype) * wide
        rotary = data[:, format.nope_dim :].contiguous().view(torch.bfloat16).to(dtype)
        values = torch.cat([nope, rotary], dim=-1)
    return torch.where((slots >= 0).unsqueeze(-1), values, torch.zeros_like(values))


def index_round(x: Tensor) -> Tensor:
    """What FP8 indexer rows do to a vector, for indexer queries: one 2^e for the last dimension.

    Keys (`encode_rows`) and queries round through the same function, so that neither is transformed
    without the other; no Hadamard rotation is applied to either.
    """
    codes, exponent = quantize_fp8_groups(x.to(torch.bfloat16), x.shape[-1])
    return dequantize_fp8_groups(codes, exponent, x.shape[-1], x.dtype)

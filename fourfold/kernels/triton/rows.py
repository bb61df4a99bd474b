"""Cached rows for GPUs: normalise, rotate, quantise and store, one program a row.

E4M3 codes are made by integer arithmetic: every device gets the same ones, those without FP8 casts and
those that read the codes as half their value included.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fourfold.core.device import Feature
from fourfold.core.row_format import FP8_GROUP, RowFormat, RowKind
from fourfold.core.rows import RowPages, storage_dtype
from fourfold.kernels.triton.early import after_previous, also_early, launch
from fourfold.kernels.triton.rope import EXACT, turn
from fourfold.ops.registry import Kernel

PLAIN, GROUPS, WHOLE = (tl.constexpr(n) for n in range(3))
_KINDS = {RowKind.PLAIN: 0, RowKind.FP8_GROUPS: 1, RowKind.FP8_WHOLE: 2}


@triton.jit
def fp8_exponent(amax):
    """The smallest integer e with max(amax, 1e-4) ≤ 448·2^e; NaN counts as 0, infinity as the largest
    float."""
    finite = tl.where(amax == amax, amax, 0.0)
    bits = tl.minimum(tl.maximum(finite, 1e-4), 3.4028234663852886e38).to(tl.int32, bitcast=True)
    return ((bits >> 23) & 0xFF) - 135 + ((bits & 0x7FFFFF) > 0x600000).to(tl.int32)


@triton.jit
def power_of_two(exponent):
    """2^exponent as float32, for normal numbers."""
    return ((exponent + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def fp8_code(value):
    """The E4M3 code (uint8) nearest to a float32, ties to even, saturating at ±448; NaN and −0 give 0.

    Normal codes: round the low 20 mantissa bits away and rebias. Below 2^−6 codes count multiples of
    2^−9, which is the last bit of float32 numbers from 2^14 on.
    """
    size = tl.minimum(tl.abs(tl.where(value == value, value, 0.0)), 448.0)
    bits = size.to(tl.int32, bitcast=True)
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - (120 << 3)
    small = (size + 16384.0).to(tl.int32, bitcast=True) - 0x46800000
    code = tl.where(size < 0.015625, small, normal)
    return tl.where((value < 0) & (code > 0), code | 0x80, code).to(tl.uint8)


@triton.jit
def _row_amax(value):
    """Largest magnitude over the last axis; NaN if there is one."""
    last: tl.constexpr = len(value.shape) - 1
    nan = tl.max((value != value).to(tl.int32), axis=last)
    amax = tl.max(tl.where(value == value, tl.abs(value), 0.0), axis=last)
    return tl.where(nan > 0, float("nan"), amax)


@triton.jit
def store_row(
    storage,
    data,
    scales,
    still,
    turned,
    d,
    r,
    n,
    SCALE_BYTES,
    KIND: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Encode and write one row: `still [groups, GROUP]` holds dims d, of which those below n count,
    `turned [1, 2·HALF]` the rotary ones, from n + r on; both in the model's dtype.

    `data` and `scales` are offsets into `storage`: elements of a plain row, bytes of an FP8 row.
    """
    if KIND == PLAIN:
        kept = still.to(storage.dtype.element_ty)
        tl.store(storage + data + d, kept, mask=d < n)
        tl.store(storage + data + n + r, turned.to(storage.dtype.element_ty), mask=r >= 0)
    else:
        kept = tl.where(d < n, still, 0.0).to(tl.bfloat16).to(tl.float32)
        rotary = turned.to(tl.bfloat16)
        amax = _row_amax(kept)
        if KIND == WHOLE:
            wide = tl.where(r >= 0, rotary.to(tl.float32), 0.0)
            top = tl.max(tl.where(amax == amax, amax, 0.0), axis=0)
            nan = tl.max((amax != amax).to(tl.int32), axis=0)
            own = tl.max(_row_amax(wide), axis=0)
            top = tl.maximum(top, tl.where(own == own, own, 0.0))
            exponent = fp8_exponent(tl.where((nan > 0) | (own != own), 0.0, top))
            inverse = power_of_two(-exponent)
            tl.store(storage + data + d, fp8_code(kept * inverse), mask=d < n)
            tl.store(storage + data + n + r, fp8_code(wide * inverse), mask=r >= 0)
            byte = tl.arange(0, 4)
            bits = power_of_two(exponent).to(tl.int32, bitcast=True)
            tl.store(storage + scales + byte, ((bits >> (8 * byte)) & 0xFF).to(tl.uint8))
        else:
            exponent = fp8_exponent(amax)
            codes = fp8_code(kept * power_of_two(-exponent)[:, None])
            tl.store(storage + data + d, codes, mask=d < n)
            pairs = (storage + data + n).to(tl.pointer_type(tl.bfloat16), bitcast=True)
            tl.store(pairs + r, rotary, mask=r >= 0)
            group = tl.arange(0, still.shape[0])
            used = (n + GROUP - 1) // GROUP
            tl.store(storage + scales + group, (exponent + 127).to(tl.uint8), mask=group < used)
            spare = used + tl.arange(0, 8)
            tl.store(
                storage + scales + spare, tl.zeros_like(spare).to(tl.uint8), spare < SCALE_BYTES
            )


@triton.jit
def normed_row(
    x,
    weight,
    position,
    inv_freq,
    d,
    r,
    n,
    DIM,
    half,
    eps,
    HALF: tl.constexpr,
):
    """One row at `x`, RMSNorm and rotary, rounded to x's dtype after each: dims d, rotary dims n + r."""
    value = tl.load(x + d, mask=d < DIM, other=0.0).to(tl.float32)
    part = tl.load(x + n + r, mask=r >= 0, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(tl.sum(value * value, axis=1), axis=0) / DIM + eps)
    gain = tl.load(weight + d, mask=d < DIM, other=0.0).to(tl.float32)
    still = (value * scale * gain).to(x.dtype.element_ty)
    gain = tl.load(weight + n + r, mask=r >= 0, other=0.0).to(tl.float32)
    part = (part * scale * gain).to(x.dtype.element_ty).to(tl.float32)
    turned = turn(part, position, inv_freq, half, HALF, False)
    return still.to(tl.float32), turned.to(x.dtype.element_ty).to(tl.float32)


@triton.jit(do_not_specialize=["N", "PAGE"])
def _rows(
    x,
    weight,
    positions,
    inv_freq,
    storage,
    N,
    DIM,
    half,
    eps,
    DATA,
    SCALE_BYTES,
    PAGE,
    NORM: tl.constexpr,
    KIND: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
    HALF: tl.constexpr,
    PADDING: tl.constexpr,
    EARLY: tl.constexpr,
):
    """Row i of a page of N rows; the last program clears what lies between the rows and the page's end."""
    after_previous(EARLY)
    row = tl.program_id(0).to(tl.int64)
    n = DIM - 2 * half
    d = tl.arange(0, BLOCK // GROUP)[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    r = tl.arange(0, 2 * HALF)[None, :]
    r = tl.where(r < 2 * half, r, -1)
    if NORM:
        position = tl.load(positions + row)
        still, turned = normed_row(
            x + row * DIM, weight, position, inv_freq, d, r, n, DIM, half, eps, HALF
        )
    else:
        still = tl.load(x + row * DIM + d, mask=d < n, other=0.0).to(tl.float32)
        turned = tl.load(x + row * DIM + n + r, mask=r >= 0, other=0.0).to(tl.float32)
    scales = DATA * tl.cast(N, tl.int64) + row * SCALE_BYTES
    store_row(storage, row * DATA, scales, still, turned, d, r, n, SCALE_BYTES, KIND, GROUP)
    if KIND != PLAIN:  # noqa: SIM102 - one is decided when compiling
        if row == N - 1:
            spare = (DATA + SCALE_BYTES) * tl.cast(N, tl.int64) + tl.arange(0, PADDING)
            tl.store(storage + spare, tl.zeros((PADDING,), dtype=tl.uint8), mask=spare < PAGE)


@triton.jit(do_not_specialize=["N"])
def _copy_rows(
    storage,
    page_stride,
    rows,
    slots,
    N,
    PER_PAGE,
    DATA,
    SCALE_BYTES,
    BLOCK: tl.constexpr,
    SCALES: tl.constexpr,
    EARLY: tl.constexpr,
):
    """Row i of the page `rows` to its slot; slot −1 is nowhere."""
    after_previous(EARLY)
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + row).to(tl.int64)
    if slot < 0:
        return
    page = storage + slot // PER_PAGE * page_stride
    offset = slot % PER_PAGE
    i = tl.arange(0, BLOCK)
    value = tl.load(rows + row * DATA + i, mask=i < DATA)
    tl.store(page + offset * DATA + i, value, mask=i < DATA)
    if SCALES:
        i = tl.arange(0, SCALES)
        source = rows + tl.cast(N, tl.int64) * DATA + row * SCALE_BYTES + i
        target = page + tl.cast(PER_PAGE, tl.int64) * DATA + offset * SCALE_BYTES + i
        tl.store(target, tl.load(source, mask=i < SCALE_BYTES), mask=i < SCALE_BYTES)


def row_shape(format: RowFormat) -> dict[str, int]:
    """Compile-time shape of a row for `store_row` and `normed_row`."""
    return {
        "KIND": _KINDS[format.kind],
        "GROUP": FP8_GROUP,
        "BLOCK": max(FP8_GROUP, triton.next_power_of_2(format.dim)),
        "HALF": max(triton.next_power_of_2(format.rope_dim // 2), 1),
    }


def row_size(format: RowFormat) -> int:
    """What `store_row` counts a row's data in: numbers of a plain row, bytes of an FP8 row."""
    return format.dim if format.kind is RowKind.PLAIN else format.data_bytes


def _run(x: Tensor, norm: tuple[Any, ...] | None, format: RowFormat, early: bool) -> RowPages:
    count = x.shape[0]
    plain = format.kind is RowKind.PLAIN
    shape = (1, count, format.dim) if plain else (1, format.page_bytes(count))
    storage = torch.empty(shape, dtype=storage_dtype(format), device=x.device)
    if count:
        x = x.contiguous()
        weight, positions, inv_freq, eps = norm or (x, x, x, 0.0)
        _rows[(count,)](
            x, weight, positions, inv_freq, storage, count, format.dim, format.rope_dim // 2, eps,
            row_size(format), format.scale_bytes, storage.shape[1],
            NORM=norm is not None, PADDING=triton.next_power_of_2(format.data_bytes),
            EARLY=early, **row_shape(format), num_warps=1, **EXACT, **launch(early),
        )  # fmt: skip
    return RowPages(storage, format, count)


def encode_rows(rows: Tensor, format: RowFormat, early: bool = False) -> RowPages:
    """The op `encode_rows` (ops/rows.py)."""
    return _run(rows, None, format, early)


def norm_rope_rows(
    x: Tensor,
    weight: Tensor,
    positions: Tensor,
    inv_freq: Tensor,
    eps: float,
    format: RowFormat,
    early: bool = False,
) -> RowPages:
    """The op `norm_rope_rows` (ops/rows.py)."""
    return _run(x, (weight, positions, inv_freq, eps), format, early)


def store_rows(pages: RowPages, rows: RowPages, slots: Tensor, early: bool = False) -> None:
    """The op `store_rows` (ops/rows.py)."""
    count, format = slots.shape[0], pages.format
    if count:
        size = row_size(format)
        _copy_rows[(count,)](
            pages.storage, pages.storage.stride(0), rows.storage, slots, rows.rows_per_page,
            pages.rows_per_page, size, format.scale_bytes, BLOCK=triton.next_power_of_2(size),
            SCALES=triton.next_power_of_2(format.scale_bytes) if format.scale_bytes else 0,
            EARLY=early, num_warps=1, **launch(early),
        )  # fmt: skip


_NEEDS = frozenset({Feature.TRITON})
KERNELS = also_early(
    Kernel("encode_rows", "triton", encode_rows, _NEEDS),
    Kernel("norm_rope_rows", "triton", norm_rope_rows, _NEEDS),
    Kernel("store_rows", "triton", store_rows, _NEEDS),
)

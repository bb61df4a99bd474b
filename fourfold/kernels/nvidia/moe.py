"""Routed experts in FP4 on sm_90: weights go from memory to the matrix unit's registers directly.

    one warp group, 64 rows × 128 inputs of a weight a step (4 KiB: 16 bytes a thread and half tile):
    16-byte loads, `AHEAD` steps early → nibbles to E4M3 codes, in registers → left operand
    → one product for each 32 inputs, times that group's scale, then the token's, added in float32

Contract: as triton/moe.py, whose sorting and quantising it uses, for weights that `prepare` has laid out;
others go there. A token's result does not depend on the batch: the order of the sum is the weight's
alone, whatever the tile of tokens. Scales for each 32 inputs are exact.

`prepare` permutes codes and scales in place; nothing grows. In half tiles of 32 rows (w, g) and strips
of 128 inputs (group, half, q, b), a byte holds the codes of half 0 (low) and half 1 (high):

    codes [rows/32, K/128, w 4, g 8, q 4, group 4, b 4]       thread (w, g, q): 16 bytes in a row
    scale [rows/32, K/512, row 32, strip 4, group 4]          exponent byte + 6, for codes · 2^−6

Rows g and g + 8 of a thread's accumulators come from two half tiles, so that gate and up of a feature
meet in one thread. Measured on one H200 for 256 experts of [4096 → 2 × 2048] and [2048 → 4096], bytes of
codes and scales: 4.2 and 4.1 TB/s at 1 token an expert, 4.0 and 3.7 at 8, 3.5 and 3.2 at 16 (portable:
0.9); a copy moves 4.2. At 8,192 tokens 350 TFLOP/s (portable: 117).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TypeGuard

import torch
import triton.experimental.gluon.language as gl
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from fourfold.core.device import Feature
from fourfold.core.errors import QuantizationError
from fourfold.core.tensor import QuantScheme, QuantTensor, Weight
from fourfold.kernels.nvidia.overlap import after_previous
from fourfold.kernels.triton.moe import Plan, grouped
from fourfold.kernels.triton.moe import routed_experts as portable
from fourfold.ops.quantize import FP4_GROUP, decode_e8m0, decode_fp4
from fourfold.ops.registry import Kernel

EXPONENT = 6  # codes are expanded to value · 2^−6
AT_ONCE = 16  # matrices permuted together


@gluon.jit
def _expand(words):
    """Four int32 words of nibbles → eight registers of four E4M3 codes of value · 2^−6.

    Results 2 i and 2 i + 1 hold the low and the high nibbles of word i. What was the word's place in
    the input is the byte's place in a result.
    """
    return gl.inline_asm_elementwise(
        """
        {
        .reg .b32 a, b;
        shl.b32 a, $8, 2;
        shl.b32 b, $8, 4;
        and.b32 a, a, 0x1C1C1C1C;
        and.b32 b, b, 0x80808080;
        or.b32 $0, a, b;
        shr.u32 a, $8, 2;
        and.b32 a, a, 0x1C1C1C1C;
        and.b32 b, $8, 0x80808080;
        or.b32 $1, a, b;
        shl.b32 a, $9, 2;
        shl.b32 b, $9, 4;
        and.b32 a, a, 0x1C1C1C1C;
        and.b32 b, b, 0x80808080;
        or.b32 $2, a, b;
        shr.u32 a, $9, 2;
        and.b32 a, a, 0x1C1C1C1C;
        and.b32 b, $9, 0x80808080;
        or.b32 $3, a, b;
        shl.b32 a, $10, 2;
        shl.b32 b, $10, 4;
        and.b32 a, a, 0x1C1C1C1C;
        and.b32 b, b, 0x80808080;
        or.b32 $4, a, b;
        shr.u32 a, $10, 2;
        and.b32 a, a, 0x1C1C1C1C;
        and.b32 b, $10, 0x80808080;
        or.b32 $5, a, b;
        shl.b32 a, $11, 2;
        shl.b32 b, $11, 4;
        and.b32 a, a, 0x1C1C1C1C;
        and.b32 b, b, 0x80808080;
        or.b32 $6, a, b;
        shr.u32 a, $11, 2;
        and.b32 a, a, 0x1C1C1C1C;
        and.b32 b, $11, 0x80808080;
        or.b32 $7, a, b;
        }
        """,
        "=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,r,r,r,r",
        [words],
        dtype=(gl.uint8,) * 8,
        is_pure=True,
        pack=4,
    )


@gluon.jit
def _fragment(low_0, high_0, low_1, high_1, operand: gl.constexpr):
    """The left operand [64, 32] of one product, from the bytes [512] of both half tiles."""
    both = gl.join(gl.join(low_0, high_0), gl.join(low_1, high_1))  # [512, half, h]
    both = both.reshape(4, 8, 4, 4, 2, 2).permute(0, 5, 1, 4, 2, 3)  # w h g | half q b
    codes = both.reshape(64, 32).to(gl.float8e4nv, bitcast=True)
    return gl.convert_layout(codes, operand, assert_trivial=True)


@gluon.jit
def _copy_tokens(buf_x, buf_sx, x, s_x, live_x, live_sx, turn):
    """Start the copy of 512 inputs of each token, and of their scales, into one half of the ring."""
    for j in gl.static_range(4):
        slot = (turn % 2) * 4 + j
        async_copy.async_copy_global_to_shared(
            buf_x.index(slot), x + (turn * 512 + j * 128), mask=live_x
        )
        async_copy.async_copy_global_to_shared(
            buf_sx.index(slot), s_x + (turn * 4 + j), mask=live_sx
        )
    async_copy.commit_group()


@gluon.jit
def _group(a, x, g: gl.constexpr, zero):
    b = x.slice(g * 32, 32, dim=1).permute((1, 0))
    return warpgroup_mma(a, b, zero, use_acc=False, is_async=True)


@gluon.jit
def _scale(packed, g: gl.constexpr):
    value = (((packed >> (8 * g)) & 0xFF) << 23).to(gl.float32, bitcast=True)
    return gl.expand_dims(value, 1)


@gluon.jit
def _row_scales(s_0, s_1, rows: gl.constexpr):
    """Four int32 [64], one for each strip of 128, each with the exponents of its four groups."""
    both = gl.join(s_0, s_1).reshape(4, 8, 4, 2).permute(0, 3, 1, 2)
    even, odd = gl.split(both.reshape(64, 2, 2))
    first, third = gl.split(even)
    second, fourth = gl.split(odd)
    return (
        gl.convert_layout(first, rows, assert_trivial=True),
        gl.convert_layout(second, rows, assert_trivial=True),
        gl.convert_layout(third, rows, assert_trivial=True),
        gl.convert_layout(fourth, rows, assert_trivial=True),
    )


@gluon.jit
def _strip(acc, raw_0, raw_1, packed, x, sx, zero, operand: gl.constexpr, PAIRS: gl.constexpr):
    """acc + 128 inputs: a product for each 32, times the row's scale, summed, times the token's."""
    f = _expand(raw_0)
    h = _expand(raw_1)
    p_0 = _group(_fragment(f[0], f[1], h[0], h[1], operand), x, 0, zero)
    p_1 = _group(_fragment(f[2], f[3], h[2], h[3], operand), x, 1, zero)
    c_2 = _fragment(f[4], f[5], h[4], h[5], operand)
    c_3 = _fragment(f[6], f[7], h[6], h[7], operand)
    if PAIRS:
        p_0, p_1 = warpgroup_mma_wait(0, deps=(p_0, p_1))
        p_2 = _group(c_2, x, 2, zero)
        p_3 = _group(c_3, x, 3, zero)
        part = p_0 * _scale(packed, 0)
        part = gl.fma(p_1, _scale(packed, 1), part)
        p_2, p_3 = warpgroup_mma_wait(0, deps=(p_2, p_3))
    else:
        p_2 = _group(c_2, x, 2, zero)
        p_3 = _group(c_3, x, 3, zero)
        p_0, p_1, p_2, p_3 = warpgroup_mma_wait(0, deps=(p_0, p_1, p_2, p_3))
        part = p_0 * _scale(packed, 0)
        part = gl.fma(p_1, _scale(packed, 1), part)
    part = gl.fma(p_2, _scale(packed, 2), part)
    part = gl.fma(p_3, _scale(packed, 3), part)
    return gl.fma(part, gl.expand_dims(sx, 0), acc)


@gluon.jit
def _product(
    w_0,
    w_1,
    s_0,
    s_1,
    turns,
    x,
    s_x,
    row,
    row_sx,
    live,
    live_sx,
    TT: gl.constexpr,
    AHEAD: gl.constexpr,
):
    """[64, TT]: row (w, h, g) is row 8 w + g of a half tile, of w_0's for h = 0, of w_1's for h = 1."""
    PAIRS: gl.constexpr = TT > 32
    mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, TT, 32])
    operand: gl.constexpr = gl.DotOperandLayout(0, mma, 4)
    flat: gl.constexpr = gl.BlockedLayout([4], [32], [4], [0])
    x_layout: gl.constexpr = gl.BlockedLayout([1, 16], [4, 8], [4, 1], [1, 0])
    rows: gl.constexpr = gl.SliceLayout(1, mma)
    columns: gl.constexpr = gl.SliceLayout(0, mma)
    # A thread holds the scales of its own rows of the product.
    scales: gl.constexpr = gl.DistributedLinearLayout(
        [[0, 1], [0, 2]], [[0, 0], [0, 0], [1, 0], [2, 0], [4, 0]], [[8, 0], [16, 0]], [], [32, 4]
    )
    buf_x = gl.allocate_shared_memory(gl.float8e4nv, [8, TT, 128], gl.NVMMASharedLayout(128, 8, 2))
    buf_sx = gl.allocate_shared_memory(gl.float32, [8, TT], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    offset = gl.arange(0, 512, layout=flat)
    r = gl.arange(0, 32, layout=gl.SliceLayout(1, scales))
    j = gl.arange(0, 4, layout=gl.SliceLayout(0, scales))
    s_offset = r[:, None] * 4 + j[None, :]
    p_0 = gl.multiple_of(w_0 + offset, [16])
    p_1 = gl.multiple_of(w_1 + offset, [16])
    ring = (gl.load(p_0), gl.load(p_1))
    for strip in gl.static_range(1, AHEAD):
        following = (gl.load(p_0 + strip * 512), gl.load(p_1 + strip * 512))
        ring = ring + following  # type: ignore[assignment]
    sp_0 = gl.multiple_of(s_0 + s_offset, [1, 16])
    sp_1 = gl.multiple_of(s_1 + s_offset, [1, 16])
    e_0, e_1 = gl.load(sp_0), gl.load(sp_1)
    start = after_previous(gl.to_tensor(0))
    k = gl.arange(0, 128, layout=gl.SliceLayout(0, x_layout))
    x_ptr = gl.multiple_of(x + ((start + row)[:, None] + k[None, :]), [1, 16])
    live_x = live[:, None] & (k >= 0)[None, :]
    sx_ptr = s_x + (start + row_sx)
    _copy_tokens(buf_x, buf_sx, x_ptr, sx_ptr, live_x, live_sx, 0)
    acc = gl.zeros([64, TT], gl.float32, layout=mma)
    zero = gl.zeros([64, TT], gl.float32, layout=mma)
    last = turns * 4 - 1
    for turn in range(turns):
        async_copy.wait_group(0)
        fence_async_shared()
        gl.thread_barrier()
        more = turn + 1 < turns
        _copy_tokens(buf_x, buf_sx, x_ptr, sx_ptr, live_x & more, live_sx & more, turn + 1)
        e = _row_scales(e_0, e_1, rows)
        ahead = gl.minimum(turn + 1, turns - 1) * 128
        e_0, e_1 = gl.load(sp_0 + ahead), gl.load(sp_1 + ahead)
        for strip in gl.static_range(4):
            slot = (turn % 2) * 4 + strip
            sx = buf_sx.index(slot).load(columns)
            acc = _strip(
                acc, ring[0], ring[1], e[strip], buf_x.index(slot), sx, zero, operand, PAIRS
            )
            place = gl.minimum(turn * 4 + strip + AHEAD, last) * 512
            ring = ring[2:] + (gl.load(p_0 + place), gl.load(p_1 + place))  # noqa: RUF005
    async_copy.wait_group(0)
    return acc


@gluon.jit
def _tile_of(tiles, TT: gl.constexpr):
    """This program's expert, first place and end, and the places of its columns in two layouts."""
    expert = gl.load(tiles + gl.program_id(1) * 3)
    first = gl.load(tiles + gl.program_id(1) * 3 + 1)
    end = gl.load(tiles + gl.program_id(1) * 3 + 2)
    wide: gl.constexpr = gl.SliceLayout(1, gl.BlockedLayout([1, 16], [4, 8], [4, 1], [1, 0]))
    flat: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    place = first + gl.arange(0, TT, layout=wide)
    place_flat = first + gl.arange(0, TT, layout=flat)
    return expert, first, end, place, place_flat


@gluon.jit(do_not_specialize=["TURNS", "INNER_TILES"])
def _fp4_gate_up(
    w1, w1_scale, w3, w3_scale, x, x_scale, order, weights, tiles, hidden, TURNS, INNER_TILES, LIMIT,
    TOPK: gl.constexpr, TT: gl.constexpr, AHEAD: gl.constexpr,
):  # fmt: skip
    """hidden[place, n] of one tile of an expert's tokens and 32 of its inner features.

    For few tokens the kernel ahead is the one that sorts: which weights to read is not known before.
    """
    sorted_ = after_previous(gl.to_tensor(0))
    expert, first, end, place, place_flat = _tile_of(tiles + sorted_, TT)
    if expert >= 0:
        row = gl.load(order + place, mask=place < end, other=0) // TOPK
        row_flat = gl.load(order + place_flat, mask=place_flat < end, other=0) // TOPK
        tile = expert.to(gl.int64) * INNER_TILES + gl.program_id(0)
        base, base_s = tile * TURNS * 2048, tile * TURNS * 128
        acc = _product(
            w1 + base, w3 + base, w1_scale + base_s, w3_scale + base_s, TURNS, x, x_scale,
            row * (TURNS * 512), row_flat * (TURNS * 4), place < end, place_flat < end,
            TT, AHEAD,
        )  # fmt: skip
        gate, up = gl.split(acc.reshape(4, 2, 8, TT).permute(0, 2, 3, 1))
        gate = gl.minimum(gate, LIMIT)
        up = gl.minimum(gl.maximum(up, -LIMIT), LIMIT)
        value = (gate / (1.0 + gl.exp(-gate)) * up).reshape(32, TT)
        layout: gl.constexpr = gl.BlockedLayout([2, 1], [16, 2], [1, 4], [0, 1])
        value = gl.convert_layout(value, layout)
        t = first + gl.arange(0, TT, layout=gl.SliceLayout(0, layout))
        n = gl.program_id(0) * 32 + gl.arange(0, 32, layout=gl.SliceLayout(1, layout))
        slot = gl.load(order + t, mask=t < end, other=0)
        value *= gl.expand_dims(gl.load(weights + slot, mask=t < end, other=0.0), 0)
        gl.store(
            hidden + t.to(gl.int64)[None, :] * (INNER_TILES * 32) + n[:, None],
            value.to(hidden.dtype.element_ty),
            mask=(t < end)[None, :] & (n < INNER_TILES * 32)[:, None],
        )  # fmt: skip


@gluon.jit(do_not_specialize=["TURNS", "D_TILES"])
def _fp4_down(
    w2, w2_scale, x, x_scale, order, tiles, result, TURNS, D_TILES,
    TT: gl.constexpr, AHEAD: gl.constexpr,
):  # fmt: skip
    """result[slot, n] of one tile of an expert's tokens and 64 output features.

    Tiles and order are older than the kernel ahead, which rounds: they need no waiting.
    """
    expert, first, end, place, place_flat = _tile_of(tiles, TT)
    if expert >= 0:
        # A tile's two halves are the first and the second 32 of its features.
        tile = expert.to(gl.int64) * D_TILES + gl.program_id(0) * 2
        base, base_s = tile * TURNS * 2048, tile * TURNS * 128
        acc = _product(
            w2 + base, w2 + base + TURNS * 2048,
            w2_scale + base_s, w2_scale + base_s + TURNS * 128, TURNS, x, x_scale,
            place * (TURNS * 512), place_flat * (TURNS * 4), place < end, place_flat < end,
            TT, AHEAD,
        )  # fmt: skip
        layout: gl.constexpr = gl.BlockedLayout([4, 1], [16, 2], [1, 4], [0, 1])
        value = acc.reshape(4, 2, 8, TT).permute(1, 0, 2, 3).reshape(64, TT)
        value = gl.convert_layout(value, layout)
        t = first + gl.arange(0, TT, layout=gl.SliceLayout(0, layout))
        n = gl.program_id(0) * 64 + gl.arange(0, 64, layout=gl.SliceLayout(1, layout))
        slot = gl.load(order + t, mask=t < end, other=0)
        gl.store(
            result + slot.to(gl.int64)[None, :] * (D_TILES * 32) + n[:, None],
            value,
            mask=(t < end)[None, :] & (n < D_TILES * 32)[:, None],
        )  # fmt: skip
    else:
        after_previous(expert)


class PreparedMxfp4(QuantScheme):
    """MXFP4 in the order of this file's products. Shapes and bytes are MXFP4's."""

    name = "mxfp4_sm90"
    block = (1, FP4_GROUP)

    def codes_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return (*shape[:-1], shape[-1] // 2)

    def dequantize(self, codes: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        *lead, rows, packed = codes.shape
        nibbles = torch.stack([codes & 15, codes >> 4], -1)
        split = nibbles.view(-1, rows // 32, packed // 64, 4, 8, 4, 4, 4, 2)
        pairs = split.permute(0, 1, 3, 4, 2, 6, 8, 5, 7).reshape(*lead, rows, packed, 2)
        natural = pairs[..., 0] | (pairs[..., 1] << 4)
        turned = scale.view(-1, rows // 32, packed // 256, 32, 16).transpose(2, 3)
        exponents = turned.reshape(scale.shape) - EXPONENT
        factor = decode_e8m0(exponents, wide).repeat_interleave(FP4_GROUP, dim=-1)
        return (decode_fp4(natural, wide) * factor).to(dtype)

    def quantize(self, values: Tensor, scale_format: str) -> tuple[Tensor, Tensor]:
        raise QuantizationError(f"{self.name} is made by preparing mxfp4, not from values")

    def validate(self, codes: Tensor, scale: Tensor, name: str) -> None:
        if bool((scale < EXPONENT).any()):
            raise QuantizationError(f"{name}: scales were not prepared")

    def canonicalize(self, codes: Tensor) -> None:
        """Nothing: negative zeros were rewritten before the codes were prepared."""


PREPARED = PreparedMxfp4()


def _ordered(codes: Tensor) -> Tensor:
    """Codes `[E, N, K/2]` as the products read them."""
    count, rows, packed = codes.shape
    nibbles = torch.stack([codes & 15, codes >> 4], -1)
    split = nibbles.view(count, rows // 32, 4, 8, packed // 64, 4, 2, 4, 4)
    split = split.permute(0, 1, 4, 2, 3, 7, 5, 8, 6)
    return (split[..., 0] | (split[..., 1] << 4)).reshape(codes.shape)


def prepare(weight: Weight) -> Weight:
    """`weight [E, N, K]`, its codes and scales permuted in place, if these products take it.

    Others come back as they are. Raises `QuantizationError` for scales of 2^122 and more.
    """
    if not isinstance(weight, QuantTensor) or weight.scheme.name != "mxfp4":
        return weight
    # Both sizes, so that of one layer's weights all are laid out or none.
    if len(weight.shape) != 3 or weight.shape[1] % 512 or weight.shape[2] % 512:
        return weight
    if weight.codes.is_meta:  # only what will be launched is asked for
        return replace(weight, scheme=PREPARED)
    if int(weight.scale.max()) + EXPONENT > 254:
        raise QuantizationError(
            f"an FP4 scale is 2^{int(weight.scale.max()) - 127}; this kernel takes scales below 2^122"
        )
    for first in range(0, weight.shape[0], AT_ONCE):
        codes = weight.codes[first : first + AT_ONCE]
        scale = weight.scale[first : first + AT_ONCE]
        codes.copy_(_ordered(codes))
        count, rows, groups = scale.shape
        turned = (scale + EXPONENT).view(count, rows // 32, 32, groups // 16, 16).transpose(2, 3)
        scale.copy_(turned.reshape(scale.shape))
    return replace(weight, scheme=PREPARED)


@dataclass(frozen=True)
class Shape:
    """How a product is cut: tokens a tile, steps loaded early, and registers a thread (0: any)."""

    tokens: int
    ahead: int
    registers: int = 0

    @property
    def options(self) -> dict[str, int]:
        limit = {"maxnreg": self.registers} if self.registers else {}
        cut = {"TT": self.tokens, "AHEAD": self.ahead}
        return {**cut, "num_warps": 4, "launch_pdl": True, **limit}


def tile_shape(slots: int, experts: int) -> Shape:
    """The cut for `slots` tokens spread over `experts`."""
    each = slots / experts
    if each <= 6:
        return Shape(8, ahead=4, registers=128)
    return Shape(16, ahead=4) if each <= 30 else Shape(64, ahead=1)


def _prepared(weight: Weight) -> TypeGuard[QuantTensor]:
    return (
        isinstance(weight, QuantTensor)
        and weight.scheme is PREPARED
        and weight.quantize_activations
    )


def routed_experts(
    y: Tensor,
    ids: Tensor,
    weights: Tensor,
    w1: Weight,
    w2: Weight,
    w3: Weight,
    limit: float,
    first_expert: int = 0,
    shared: Tensor | None = None,
) -> Tensor:
    """The op `routed_experts` (ops/moe.py), for prepared FP4 weights here, for others as elsewhere."""
    if not (_prepared(w1) and _prepared(w2) and _prepared(w3) and y.shape[0]):
        return portable(y, ids, weights, w1, w2, w3, limit, first_expert, shared)
    dim, inner, experts, topk = y.shape[1], w1.shape[1], w1.shape[0], ids.shape[1]
    options = tile_shape(ids.numel(), experts).options
    (c1, s1), (c2, s2), (c3, s3) = (
        (w.codes.view(torch.int32), w.scale.view(torch.int32)) for w in (w1, w2, w3)
    )
    factors = weights.to(torch.float32).contiguous()

    def gate_up(codes: Tensor, scale: Tensor, plan: Plan, hidden: Tensor) -> None:
        _fp4_gate_up[(inner // 32, plan.tiles.shape[0])](
            c1, s1, c3, s3, codes, scale, plan.order, factors, plan.tiles, hidden, dim // 512,
            inner // 32, limit, TOPK=topk, **options,
        )  # fmt: skip

    def down(codes: Tensor, scale: Tensor, plan: Plan, result: Tensor) -> None:
        _fp4_down[(dim // 64, plan.tiles.shape[0])](
            c2, s2, codes, scale, plan.order, plan.tiles, result, inner // 512, dim // 32, **options
        )

    tile = options["TT"]
    return grouped(y, ids, experts, inner, first_expert, tile, False, gate_up, down, shared, True)


KERNELS = (
    Kernel(
        "routed_experts",
        "sm90",
        routed_experts,
        frozenset({Feature.TRITON, Feature.FP8_OCP, Feature.WGMMA}),
        priority=20,
        prepare=prepare,
    ),
)

"""Routed experts for GPUs: grouped products over tokens sorted by expert, for FP4 and FP8 weights.

    ids [T, k] ─ sort ─ tiles (expert, up to TT of its tokens)
    tile × I:  hidden = round(weight · silu(min(w1 y, L)) · clamp(w3 y, −L, L))
    tile × D:  result[token, slot] = w2 hidden
    out[token] = result[token, 0] + result[token, 1] + … (+ shared)    in slot order, no atomics

As in linear.py the weight is the left operand and tokens are columns, all of K is summed in order by one
program, and no tile size depends on the batch in the direction that is summed: a token's result is its
own. Nothing is read back to the host: the grid is an upper bound and spare programs leave at once.

FP4: a byte's two E2M1 codes become E4M3 codes of the value times 2^−6, exactly, by shifting bits; the
32 inputs under one scale are one product, multiplied by that scale (times 2^6) and the token's. GPUs without
FP8 casts multiply the same numbers in bfloat16.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeGuard

import torch
import triton
import triton.language as tl
from torch import Tensor

from fourfold.core.device import Feature
from fourfold.core.tensor import QuantTensor, Weight
from fourfold.kernels.triton.early import after_previous, launch
from fourfold.kernels.triton.linear import (
    BLOCK_K,
    WIDE_TILE,
    as_fp8,
    decode_fp8,
    quantize_activations,
    to_fp8,
)
from fourfold.ops.moe import routed_experts as body
from fourfold.ops.registry import Kernel

ROWS = 64  # output features a program
SORTED_AT_ONCE = 8192  # slots
SHARE = 32  # slots that a program finds places for


@triton.jit
def _e8m0(raw):
    wide = raw.to(tl.int32)
    return tl.where(wide == 0, 0x00400000, wide << 23).to(tl.float32, bitcast=True)


@triton.jit
def _fp8(codes, FNUZ: tl.constexpr, DECODE: tl.constexpr):
    """Codes as an operand of a product: in the type that reads them, or DECODE as bfloat16 numbers."""
    if DECODE:
        value = decode_fp8(codes).to(tl.bfloat16)
    elif FNUZ:
        value = codes.to(tl.float8e4b8, bitcast=True)
    else:
        value = codes.to(tl.float8e4nv, bitcast=True)
    return value


@triton.jit
def _expand_fp4(packed):
    """uint8 `[N, 16]` → E4M3 codes of value · 2^−6, `[N, 32]`; the low nibble is the even input."""
    low = ((packed & 7) << 2) | ((packed & 8) << 4)
    high = ((packed >> 2) & 0x1C) | (packed & 0x80)
    pairs = tl.join(low, high)
    return tl.reshape(pairs, (packed.shape[0], 2 * packed.shape[1])).to(tl.uint8)


@triton.jit
def _fp4_block(
    acc, w, scale, x, s_x, n, rows, live, block, K, N, FNUZ: tl.constexpr, DECODE: tl.constexpr
):
    """acc + W[n, 128 of block] · x, one product for each 32 inputs."""
    for group in tl.static_range(4):
        g = block * 4 + group
        byte = g * 16 + tl.arange(0, 16)
        k = g * 32 + tl.arange(0, 32)
        packed = tl.load(
            w + n[:, None] * (K // 2) + byte[None, :],
            mask=(n < N)[:, None] & (byte < K // 2)[None, :],
            other=0,
        )
        b = tl.load(
            x + rows[None, :] * K + k[:, None], mask=live[None, :] & (k < K)[:, None], other=0.0
        )
        if DECODE:
            b = decode_fp8(b).to(tl.bfloat16)
        s_w = _e8m0(tl.load(scale + n * (K // 32) + g, mask=(n < N) & (g < K // 32), other=0))
        product = tl.dot(_fp8(_expand_fp4(packed), FNUZ, DECODE), b)
        factor = 256.0 if FNUZ else 64.0
        acc += product * (s_w * factor)[:, None] * s_x[None, :]
    return acc


@triton.jit
def _fp8_block(
    acc, w, scale, x, s_x, n, rows, live, block, K, N, E8M0: tl.constexpr, FNUZ: tl.constexpr,
    DECODE: tl.constexpr,
):  # fmt: skip
    """acc + W[n, 128 of block] · x, one product; the rows n lie in one block of 128."""
    k = block * 128 + tl.arange(0, 128)
    a = tl.load(
        w + n[:, None] * K + k[None, :], mask=(n < N)[:, None] & (k < K)[None, :], other=0.0
    )
    b = tl.load(
        x + rows[None, :] * K + k[:, None], mask=live[None, :] & (k < K)[:, None], other=0.0
    )
    if DECODE:
        a = decode_fp8(a).to(tl.bfloat16)
        b = decode_fp8(b).to(tl.bfloat16)
    index = (tl.min(n) // 128) * tl.cdiv(K, 128) + block
    s_w = _e8m0(tl.load(scale + index)) if E8M0 else tl.load(scale + index)
    product = tl.dot(a, b)
    if FNUZ:
        product *= 4.0
    return acc + product * (s_w * s_x)[None, :]


@triton.jit(do_not_specialize=["SCALES"])
def _experts_gate_up(
    w1,
    w1_scale,
    w3,
    w3_scale,
    x,
    x_scale,
    order,
    weights,
    tiles,
    hidden,
    K,
    INNER,
    SCALES,
    LIMIT,
    TOPK: tl.constexpr,
    FP4: tl.constexpr,
    E8M0: tl.constexpr,
    FNUZ: tl.constexpr,
    DECODE: tl.constexpr,
    TN: tl.constexpr,
    TT: tl.constexpr,
):
    """hidden[sorted place, n] for one tile of an expert's tokens and TN of its inner features."""
    expert = tl.load(tiles + tl.program_id(1) * 3)
    if expert < 0:
        return
    first = tl.load(tiles + tl.program_id(1) * 3 + 1)
    end = tl.load(tiles + tl.program_id(1) * 3 + 2)
    place = first + tl.arange(0, TT)
    live = place < end
    slot = tl.load(order + place, mask=live, other=0)
    rows = slot // TOPK
    n = (tl.program_id(0) * TN + tl.arange(0, TN)).to(tl.int64)
    stride = (K // 2 if FP4 else K).to(tl.int64) * INNER
    w1 += expert * stride
    w3 += expert * stride
    w1_scale += expert * SCALES.to(tl.int64)
    w3_scale += expert * SCALES.to(tl.int64)
    blocks = tl.cdiv(K, 128)
    gate = tl.zeros((TN, TT), dtype=tl.float32)
    up = tl.zeros((TN, TT), dtype=tl.float32)
    for block in range(blocks):
        s_x = tl.load(x_scale + rows * blocks + block, mask=live, other=0.0)
        if FP4:
            gate = _fp4_block(
                gate, w1, w1_scale, x, s_x, n, rows, live, block, K, INNER, FNUZ, DECODE
            )
            up = _fp4_block(up, w3, w3_scale, x, s_x, n, rows, live, block, K, INNER, FNUZ, DECODE)
        else:
            gate = _fp8_block(
                gate, w1, w1_scale, x, s_x, n, rows, live, block, K, INNER, E8M0, FNUZ, DECODE
            )
            up = _fp8_block(
                up, w3, w3_scale, x, s_x, n, rows, live, block, K, INNER, E8M0, FNUZ, DECODE
            )
    gate = tl.minimum(gate, LIMIT)
    up = tl.minimum(tl.maximum(up, -LIMIT), LIMIT)
    weight = tl.load(weights + slot, mask=live, other=0.0)
    value = gate / (1.0 + tl.exp(-gate)) * up * weight[None, :]
    tl.store(
        hidden + place.to(tl.int64)[None, :] * INNER + n[:, None],
        value.to(hidden.dtype.element_ty),
        mask=(n < INNER)[:, None] & live[None, :],
    )


@triton.jit(do_not_specialize=["SCALES"])
def _experts_down(
    w2,
    w2_scale,
    hidden,
    hidden_scale,
    order,
    tiles,
    result,
    K,
    D,
    SCALES,
    FP4: tl.constexpr,
    E8M0: tl.constexpr,
    FNUZ: tl.constexpr,
    DECODE: tl.constexpr,
    TN: tl.constexpr,
    TT: tl.constexpr,
):
    """result[slot, n] for one tile of an expert's tokens and TN output features."""
    expert = tl.load(tiles + tl.program_id(1) * 3)
    if expert < 0:
        return
    first = tl.load(tiles + tl.program_id(1) * 3 + 1)
    end = tl.load(tiles + tl.program_id(1) * 3 + 2)
    place = first + tl.arange(0, TT)
    live = place < end
    slot = tl.load(order + place, mask=live, other=0)
    n = (tl.program_id(0) * TN + tl.arange(0, TN)).to(tl.int64)
    w2 += expert * (K // 2 if FP4 else K).to(tl.int64) * D
    w2_scale += expert * SCALES.to(tl.int64)
    blocks = tl.cdiv(K, 128)
    acc = tl.zeros((TN, TT), dtype=tl.float32)
    for block in range(blocks):
        s_x = tl.load(hidden_scale + place * blocks + block, mask=live, other=0.0)
        if FP4:
            acc = _fp4_block(
                acc, w2, w2_scale, hidden, s_x, n, place, live, block, K, D, FNUZ, DECODE
            )
        else:
            acc = _fp8_block(
                acc, w2, w2_scale, hidden, s_x, n, place, live, block, K, D, E8M0, FNUZ, DECODE
            )
    tl.store(
        result + slot.to(tl.int64)[None, :] * D + n[:, None],
        acc,
        mask=(n < D)[:, None] & live[None, :],
    )


@triton.jit
def _sum_slots(
    result, ids, shared, out, D, LOW, HIGH, SHARED: tl.constexpr, TOPK: tl.constexpr,
    BLOCK: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """out[t] = the results of slots 0, 1, … in that order, SHARED last; absent experts are skipped."""
    after_previous(EARLY)
    token = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for slot in tl.static_range(TOPK):
        expert = tl.load(ids + token * TOPK + slot)
        here = (expert >= LOW) & (expert < HIGH)
        value = tl.load(result + (token * TOPK + slot) * D + d, mask=(d < D) & here, other=0.0)
        total += value
    if SHARED:
        total += tl.load(shared + token * D + d, mask=d < D, other=0.0)
    tl.store(out + token * D + d, total.to(out.dtype.element_ty), mask=d < D)


@dataclass(frozen=True)
class Plan:
    """Tokens sorted by expert. `order [T·k]`: slots (token·k + choice) by expert; `tiles [N, 3]`:
    expert, first place and end in `order` of each tile, expert −1 where there is none."""

    order: Tensor
    tiles: Tensor


@triton.jit
def _local(ids, slot, SLOTS, FIRST, EXPERTS):
    """The expert of each slot, counted from FIRST; EXPERTS where it is not one of ours."""
    expert = tl.load(ids + slot, mask=slot < SLOTS, other=-1).to(tl.int32) - FIRST
    return tl.where((expert >= 0) & (expert < EXPERTS) & (slot < SLOTS), expert, EXPERTS)


@triton.jit
def _sort(
    program,
    ids,
    order,
    tiles,
    SLOTS,
    FIRST,
    EXPERTS,
    MOST,
    TILE: tl.constexpr,
    BINS: tl.constexpr,
    BLOCK: tl.constexpr,
    SHARE: tl.constexpr,
):
    """Program 0 writes the tiles; each other one the places of SHARE slots: how many come before."""
    if program == 0:
        counts = tl.zeros((BINS,), dtype=tl.int32)
        for start in range(0, SLOTS, BLOCK):
            slot = start + tl.arange(0, BLOCK)
            expert = _local(ids, slot, SLOTS, FIRST, EXPERTS)
            counts += tl.histogram(expert, BINS)
        expert = tl.arange(0, BINS)
        counts = tl.where(expert < EXPERTS, counts, 0)
        begin = tl.cumsum(counts, 0) - counts
        needed = (counts + TILE - 1) // TILE
        index = tl.cumsum(needed, 0) - needed
        for n in range(tl.max(needed, 0)):
            place = tiles + (index + n) * 3
            tl.store(place, expert, mask=n < needed)
            tl.store(place + 1, begin + n * TILE, mask=n < needed)
            tl.store(place + 2, begin + tl.minimum((n + 1) * TILE, counts), mask=n < needed)
        for start in range(0, MOST, BINS):
            spare = start + tl.arange(0, BINS)
            empty = (spare >= tl.sum(needed, 0)) & (spare < MOST)
            for part in tl.static_range(3):
                tl.store(tiles + spare * 3 + part, -1, mask=empty)
    else:
        mine = (program - 1) * SHARE + tl.arange(0, SHARE)
        own = _local(ids, mine, SLOTS, FIRST, EXPERTS)
        before = tl.zeros((SHARE,), dtype=tl.int32)
        for start in range(0, SLOTS, BLOCK):
            slot = start + tl.arange(0, BLOCK)
            other = _local(ids, slot, SLOTS, FIRST, EXPERTS)[None, :]
            first = (other < own[:, None]) | (
                (other == own[:, None]) & (slot[None, :] < mine[:, None])
            )
            before += tl.sum(first.to(tl.int32), 1)
        tl.store(order + before, mine, mask=mine < SLOTS)


@triton.jit(do_not_specialize=["SLOTS", "FIRST", "MOST"])
def _sort_slots(
    ids,
    order,
    tiles,
    SLOTS,
    FIRST,
    EXPERTS,
    MOST,
    TILE: tl.constexpr,
    BINS: tl.constexpr,
    BLOCK: tl.constexpr,
    SHARE: tl.constexpr,
    EARLY: tl.constexpr,
):
    """Sorting alone: see `_sort`."""
    after_previous(EARLY)
    _sort(
        tl.program_id(0), ids, order, tiles, SLOTS, FIRST, EXPERTS, MOST, TILE, BINS, BLOCK, SHARE
    )


@triton.jit(do_not_specialize=["SLOTS", "FIRST", "MOST", "SORTERS"])
def _sort_and_round(
    ids,
    order,
    tiles,
    x,
    codes,
    scale,
    SLOTS,
    FIRST,
    EXPERTS,
    MOST,
    SORTERS,
    K,
    GROUPS,
    TILE: tl.constexpr,
    BINS: tl.constexpr,
    BLOCK: tl.constexpr,
    SHARE: tl.constexpr,
    FNUZ: tl.constexpr,
    DECODE: tl.constexpr,
    COUNT: tl.constexpr,
    GROUP: tl.constexpr,
    EARLY: tl.constexpr,
):
    """The first SORTERS programs sort; each other one rounds COUNT groups of one token to FP8."""
    after_previous(EARLY)
    program = tl.program_id(0)
    if program < SORTERS:
        _sort(program, ids, order, tiles, SLOTS, FIRST, EXPERTS, MOST, TILE, BINS, BLOCK, SHARE)
    else:
        each = tl.cdiv(GROUPS, COUNT)
        token = ((program - SORTERS) // each).to(tl.int64)
        group = (program - SORTERS) % each * COUNT + tl.arange(0, COUNT)
        offset = group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
        inside = offset < K
        values = tl.load(x + token * K + offset, mask=inside, other=0.0).to(tl.float32)
        raw, factor = to_fp8(values, FNUZ, DECODE)
        tl.store(codes + token * K + offset, raw, mask=inside)
        tl.store(scale + token * GROUPS + group, factor, mask=group < GROUPS)


def sort_tokens(
    ids: Tensor, num_experts: int, first_expert: int, tile: int, early: bool = False
) -> Plan:
    """Sort the slots of `ids [T, k]` by expert and cut each expert's into tiles, on the device."""
    slots = ids.numel()
    most = _most_tiles(slots, num_experts, tile)
    if slots > SORTED_AT_ONCE:
        return _sort_many(ids, num_experts, first_expert, tile, most)
    plan = _empty_plan(slots, most, ids.device)
    _sort_slots[(1 + -(-slots // SHARE),)](
        ids.contiguous(), plan.order, plan.tiles, slots, first_expert, num_experts, most, TILE=tile,
        BINS=triton.next_power_of_2(num_experts + 1), BLOCK=512, SHARE=SHARE, EARLY=early,
        **launch(early),
    )  # fmt: skip
    return plan


def _most_tiles(slots: int, num_experts: int, tile: int) -> int:
    return min(slots, num_experts) + slots // tile


def _empty_plan(slots: int, most: int, device: torch.device) -> Plan:
    return Plan(
        torch.empty(slots, dtype=torch.int32, device=device),
        torch.empty(most, 3, dtype=torch.int32, device=device),
    )


def sort_and_round(
    y: Tensor,
    ids: Tensor,
    num_experts: int,
    first_expert: int,
    tile: int,
    fnuz: bool,
    early: bool,
    decoded: bool = False,
) -> tuple[Plan, Tensor, Tensor]:
    """`sort_tokens` of ids, and `quantize_activations` of y: for few tokens in one launch."""
    tokens, size = y.shape
    if tokens > WIDE_TILE:
        plan = sort_tokens(ids, num_experts, first_expert, tile, early)
        return plan, *quantize_activations(y, fnuz, early=early, decoded=decoded)
    slots, groups, count = ids.numel(), -(-size // BLOCK_K), 4
    most, sorters = _most_tiles(slots, num_experts, tile), 1 + -(-slots // SHARE)
    plan = _empty_plan(slots, most, ids.device)
    codes = torch.empty(tokens, size, dtype=torch.uint8, device=y.device)
    scale = torch.empty(tokens, groups, dtype=torch.float32, device=y.device)
    _sort_and_round[(sorters + tokens * -(-groups // count),)](
        ids.contiguous(), plan.order, plan.tiles, y, codes, scale, slots, first_expert, num_experts,
        most, sorters, size, groups, TILE=tile, BINS=triton.next_power_of_2(num_experts + 1),
        BLOCK=512, SHARE=SHARE, FNUZ=fnuz, DECODE=decoded, COUNT=count, GROUP=BLOCK_K, EARLY=early,
        **launch(early),
    )  # fmt: skip
    return plan, codes, scale


def _sort_many(ids: Tensor, num_experts: int, first_expert: int, tile: int, most: int) -> Plan:
    """As `_sort_slots`, whose work grows with the square of the slots."""
    flat = (ids.flatten() - first_expert).to(torch.int64)
    local = torch.where((flat >= 0) & (flat < num_experts), flat, num_experts)
    experts, order = torch.sort(local, stable=True)
    bounds = torch.searchsorted(experts, torch.arange(num_experts + 1, device=ids.device))
    counts = bounds[1:] - bounds[:-1]
    ends = ((counts + tile - 1) // tile).cumsum(0)
    index = torch.arange(most, device=ids.device)
    owner = torch.searchsorted(ends, index, right=True)
    exists = owner < num_experts
    owner = owner.clamp(max=num_experts - 1)
    within = index - (ends[owner] - (counts[owner] + tile - 1) // tile)
    begin = bounds[owner] + within * tile
    end = torch.minimum(begin + tile, bounds[owner + 1])
    tiles = torch.stack([owner, begin, end], 1)
    return Plan(order.to(torch.int32), torch.where(exists[:, None], tiles, -1).to(torch.int32))


def _stored(weight: Weight) -> TypeGuard[QuantTensor]:
    """Whether a weight is quantised in a way known here and wants its input rounded to FP8."""
    return (
        isinstance(weight, QuantTensor)
        and weight.quantize_activations
        and weight.scheme.name in ("mxfp4", "fp8_block")
    )


Product = Callable[[Tensor, Tensor, Plan, Tensor], None]


def grouped(
    y: Tensor,
    ids: Tensor,
    experts: int,
    inner: int,
    first_expert: int,
    tile: int,
    fnuz: bool,
    gate_up: Product,
    down: Product,
    shared: Tensor | None,
    early: bool = False,
    decoded: bool = False,
) -> Tensor:
    """Sort, `gate_up`, `down`, sum; what is between the products is the same for every kernel of them.

    `gate_up(codes, scale, plan, hidden)` reads y's codes and scales by token and writes
    `hidden [T·k, I]`, and `down(codes, scale, plan, result)` hidden's and `result [T·k, D]`: hidden by
    place in the order, result by slot. `early` as in triton/early.py, for products that keep to it;
    `decoded` as in triton/linear.py.
    """
    tokens, dim = y.shape
    topk = ids.shape[1]
    plan, codes, scale = sort_and_round(
        y.contiguous(), ids, experts, first_expert, tile, fnuz, early, decoded
    )
    hidden = torch.empty(tokens * topk, inner, dtype=y.dtype, device=y.device)
    gate_up(as_fp8(codes, fnuz, decoded), scale, plan, hidden)
    codes, scale = quantize_activations(hidden, fnuz, early=early, decoded=decoded)
    del hidden
    result = torch.empty(tokens * topk, dim, dtype=torch.float32, device=y.device)
    down(as_fp8(codes, fnuz, decoded), scale, plan, result)
    dtype = torch.float32 if shared is None else y.dtype
    out = torch.empty(tokens, dim, dtype=dtype, device=y.device)
    _sum_slots[(tokens, -(-dim // 512))](
        result, ids.contiguous(), result if shared is None else shared.contiguous(), out, dim,
        first_expert, first_expert + experts, SHARED=shared is not None, TOPK=topk, BLOCK=512,
        EARLY=early, **launch(early),
    )  # fmt: skip
    return out


def tokens_a_tile(slots: int, experts: int) -> int:
    """Tokens a tile takes: about what an expert gets of `slots`."""
    return min(max(triton.next_power_of_2(-(-slots // experts)), 16), 64)


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
    fnuz: bool = False,
    decoded: bool = False,
) -> Tensor:
    """The op `routed_experts` (ops/moe.py) for experts of FP4 or FP8 blocks."""
    if not (_stored(w1) and _stored(w2) and _stored(w3)):
        # Plain experts exist in tests and in dequantised checkpoints only: exact, and slow.
        return body(y, ids, weights, w1, w2, w3, limit, first_expert, shared)
    tokens, dim = y.shape
    topk, experts, inner = ids.shape[1], w1.shape[0], w1.shape[1]
    if not tokens:
        dtype = torch.float32 if shared is None else y.dtype
        return torch.empty(0, dim, dtype=dtype, device=y.device)
    tile = tokens_a_tile(tokens * topk, experts)
    fp4 = w1.scheme.name == "mxfp4"
    c1, c2, c3 = (w.codes if fp4 else as_fp8(w.codes, fnuz, decoded) for w in (w1, w2, w3))
    s1, s2, s3 = w1.scale, w2.scale, w3.scale
    factors = weights.to(torch.float32).contiguous()
    options: dict[str, Any] = {"FP4": fp4, "E8M0": s1.dtype == torch.uint8, "FNUZ": fnuz}
    options |= {"DECODE": decoded, "TN": ROWS, "TT": tile, "num_warps": 4, "num_stages": 3}

    def gate_up(codes: Tensor, scale: Tensor, plan: Plan, hidden: Tensor) -> None:
        _experts_gate_up[(-(-inner // ROWS), plan.tiles.shape[0])](
            c1, s1, c3, s3, codes, scale, plan.order, factors, plan.tiles, hidden, dim, inner,
            s1[0].numel(), limit, TOPK=topk, **options,
        )  # fmt: skip

    def down(codes: Tensor, scale: Tensor, plan: Plan, result: Tensor) -> None:
        _experts_down[(-(-dim // ROWS), plan.tiles.shape[0])](
            c2, s2, codes, scale, plan.order, plan.tiles, result, inner, dim, s2[0].numel(),
            **options,
        )  # fmt: skip

    return grouped(
        y, ids, experts, inner, first_expert, tile, fnuz, gate_up, down, shared, decoded=decoded
    )


KERNELS = (
    Kernel(
        "routed_experts", "triton", routed_experts, frozenset({Feature.TRITON, Feature.FP8_OCP})
    ),
    Kernel(
        "routed_experts",
        "triton_fnuz",
        partial(routed_experts, fnuz=True),
        frozenset({Feature.TRITON, Feature.FP8_FNUZ}),
    ),
    Kernel(
        "routed_experts",
        "triton_decoded",
        partial(routed_experts, decoded=True),
        frozenset({Feature.TRITON}),
        priority=5,
    ),
)

"""Routing for GPUs: one program a token.

The k best of E experts are taken one after another; score and expert are one 64-bit key, so that equal
scores go to the lower expert and every round has exactly one winner, NaN and infinite scores included.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fourfold.core.device import Feature
from fourfold.ops.registry import Kernel

EXACT = {"enable_fp_fusion": False}
GONE = tl.constexpr(-(1 << 63))


@triton.jit
def _score(x):
    """sqrt(softplus(x)), softplus(x) = x above 20.

    log(1 + e) for small e: log(u)·e/(u − 1) with u = 1 + e takes back the rounding of the sum.
    """
    power = tl.exp(tl.minimum(x, 20.0))
    above = 1.0 + power
    close = tl.where(above == 1.0, 1.0, above - 1.0)
    log = tl.where(above == 1.0, power, tl.log(above) * (power / close))
    soft = tl.where(x > 20.0, x, tl.where(x == x, log, x))
    return tl.sqrt(soft)


@triton.jit
def descending_key(value, index):
    """int64 keys that order float32 `value` with its `index`: larger is larger, NaN largest of all,
    −0 is 0, equal values the lower index first."""
    value = tl.where(value == 0.0, 0.0, value)
    bits = value.to(tl.int32, bitcast=True)
    ordered = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    ordered = tl.where(value == value, ordered, 0x7FFFFFFF)
    return (ordered.to(tl.int64) << 32) | (0x7FFFFFFF - index).to(tl.int64)


@triton.jit
def _store_weights(weights, place, picked, slots, TOPK: tl.constexpr, scaling):
    total = tl.sum(tl.where(slots < TOPK, picked, 0.0))
    total = tl.where(total == total, tl.maximum(total, 1e-20), total)
    tl.store(weights + place + slots, picked / total * scaling, mask=slots < TOPK)


@triton.jit
def _route_topk(
    logits,
    bias,
    ids,
    weights,
    E,
    scaling,
    TOPK: tl.constexpr,
    SLOTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    expert = tl.arange(0, BLOCK)
    slots = tl.arange(0, SLOTS)
    scores = _score(tl.load(logits + token * E + expert, mask=expert < E, other=0.0))
    ranked = scores + tl.load(bias + expert, mask=expert < E, other=0.0).to(tl.float32)
    keys = tl.where(expert < E, descending_key(ranked, expert), GONE)
    chosen = tl.zeros((SLOTS,), dtype=tl.int64)
    picked = tl.zeros((SLOTS,), dtype=tl.float32)
    for slot in tl.static_range(TOPK):
        best = tl.max(keys)
        keys = tl.where(keys == best, GONE, keys)
        winner = 0x7FFFFFFF - (best & 0x7FFFFFFF)
        score = tl.sum(tl.where(expert == winner, scores, 0.0))
        chosen = tl.where(slots == slot, winner, chosen)
        picked = tl.where(slots == slot, score, picked)
    tl.store(ids + token * TOPK + slots, chosen, mask=slots < TOPK)
    _store_weights(weights, token * TOPK, picked, slots, TOPK, scaling)


@triton.jit
def _route_hash(
    logits, token_ids, table, ids, weights, V, E, scaling, TOPK: tl.constexpr, SLOTS: tl.constexpr
):
    token = tl.program_id(0).to(tl.int64)
    slots = tl.arange(0, SLOTS)
    name = tl.load(token_ids + token).to(tl.int64)
    known = (slots < TOPK) & (name >= 0) & (name < V)
    chosen = tl.load(table + name * TOPK + slots, mask=known, other=0).to(tl.int64)
    inside = (slots < TOPK) & (chosen >= 0) & (chosen < E)
    picked = _score(tl.load(logits + token * E + chosen, mask=inside, other=0.0))
    tl.store(ids + token * TOPK + slots, chosen, mask=slots < TOPK)
    _store_weights(weights, token * TOPK, picked, slots, TOPK, scaling)


def _outputs(tokens: int, topk: int, device: torch.device) -> tuple[Tensor, Tensor]:
    ids = torch.empty(tokens, topk, dtype=torch.int64, device=device)
    return ids, torch.empty(tokens, topk, dtype=torch.float32, device=device)


def route_topk(logits: Tensor, bias: Tensor, topk: int, scaling: float) -> tuple[Tensor, Tensor]:
    """The op `route_topk` (ops/moe.py)."""
    tokens, experts = logits.shape
    ids, weights = _outputs(tokens, topk, logits.device)
    if tokens:
        _route_topk[(tokens,)](
            logits.contiguous(), bias, ids, weights, experts, scaling, TOPK=topk,
            SLOTS=triton.next_power_of_2(topk), BLOCK=triton.next_power_of_2(experts),
            num_warps=1, **EXACT,
        )  # fmt: skip
    return ids, weights


def route_hash(
    logits: Tensor, token_ids: Tensor, table: Tensor, scaling: float
) -> tuple[Tensor, Tensor]:
    """The op `route_hash` (ops/moe.py)."""
    tokens, experts = logits.shape
    topk = table.shape[1]
    ids, weights = _outputs(tokens, topk, logits.device)
    if tokens:
        _route_hash[(tokens,)](
            logits.contiguous(), token_ids, table, ids, weights, table.shape[0], experts, scaling,
            TOPK=topk, SLOTS=triton.next_power_of_2(topk), num_warps=1, **EXACT,
        )  # fmt: skip
    return ids, weights


KERNELS = (
    Kernel("route_topk", "triton", route_topk, frozenset({Feature.TRITON})),
    Kernel("route_hash", "triton", route_hash, frozenset({Feature.TRITON})),
)

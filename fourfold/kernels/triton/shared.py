"""The shared expert for GPUs: two products of one input, the activation, the product back.

    gate, up = w1 y, w3 y            y rounded to FP8 once; with few tokens as sums of chunks
    hidden = round(silu(min(gate, L)) · clamp(up, −L, L))       chunks added, activated, rounded to FP8
    out = w2 hidden                                             unrounded

Contract: products, chunks and their order are triton/linear.py's, so a token's result does not depend on
the batch. Weights that are not FP8 blocks take the plain way through its `linear`.
"""

from __future__ import annotations

from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from fourfold.core.device import Feature
from fourfold.core.tensor import QuantTensor, Weight
from fourfold.kernels.triton.linear import (
    BLOCK_K,
    WIDE_TILE,
    Products,
    as_fp8,
    finish,
    is_fp8,
    linear,
    multiply,
    operands,
    quantize_activations,
    to_fp8,
)
from fourfold.ops.moe import swiglu
from fourfold.ops.registry import Kernel


@triton.jit(do_not_specialize=["T"])
def _activate(
    gate,
    up,
    codes,
    scale,
    T,
    N,
    LIMIT,
    PARTS: tl.constexpr,
    ROUND: tl.constexpr,
    FNUZ: tl.constexpr,
    COUNT: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Codes and scales by group of one token's activation: COUNT groups of gate, up `[PARTS, T, N]`."""
    token = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1) * COUNT + tl.arange(0, COUNT)
    offset = group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    inside = offset < N
    place = token * N + offset
    g = tl.zeros((COUNT, GROUP), dtype=tl.float32)
    u = tl.zeros((COUNT, GROUP), dtype=tl.float32)
    for part in tl.static_range(PARTS):
        g += tl.load(gate + part * T.to(tl.int64) * N + place, mask=inside, other=0.0)
        u += tl.load(up + part * T.to(tl.int64) * N + place, mask=inside, other=0.0)
    g = tl.minimum(g, LIMIT)
    u = tl.minimum(tl.maximum(u, -LIMIT), LIMIT)
    value = g / (1.0 + tl.exp(-g)) * u
    if ROUND:
        value = value.to(tl.bfloat16).to(tl.float32)
    raw, factor = to_fp8(value, FNUZ)
    tl.store(codes + place, raw, mask=inside)
    tl.store(scale + group * T + token, factor, mask=group * GROUP < N)


def shared_expert(
    y: Tensor,
    w1: Weight,
    w2: Weight,
    w3: Weight,
    limit: float,
    fnuz: bool = False,
    products: Products | None = None,
) -> Tensor:
    """The op `shared_expert` (ops/moe.py); `products` as in triton/linear.py."""
    weights = (w1, w2, w3)
    if not y.shape[0] or not all(isinstance(w, QuantTensor) and is_fp8(w) for w in weights):
        run = partial(linear, unrounded=True, fnuz=fnuz, products=products)
        return run(swiglu(run(y, w1), run(y, w3), limit).to(y.dtype), w2)
    codes, scale = quantize_activations(y.contiguous(), fnuz, by_group=True)
    gate, up = (operands(w, as_fp8(codes, fnuz), scale) for w in (w1, w3))
    g, u = (multiply(o, o.target(torch.float32), fnuz, products) for o in (gate, up))
    tokens, inner = y.shape[0], w1.shape[0]
    groups = -(-inner // BLOCK_K)
    hidden = torch.empty(tokens, inner, dtype=torch.uint8, device=y.device)
    factors = torch.empty(groups, tokens, dtype=torch.float32, device=y.device)
    count = min(triton.next_power_of_2(groups), 8) if tokens > WIDE_TILE else 1
    _activate[(tokens, -(-groups // count))](
        g, u, hidden, factors, tokens, inner, limit, PARTS=gate.chunks if gate.split else 1,
        ROUND=y.dtype == torch.bfloat16, FNUZ=fnuz, COUNT=count, GROUP=BLOCK_K,
        num_warps=4 if count > 4 else 1,
    )  # fmt: skip
    return finish(operands(w2, as_fp8(hidden, fnuz), factors), torch.float32, fnuz, products)


KERNELS = (
    Kernel("shared_expert", "triton", shared_expert, frozenset({Feature.TRITON, Feature.FP8_OCP})),
    Kernel(
        "shared_expert",
        "triton_fnuz",
        partial(shared_expert, fnuz=True),
        frozenset({Feature.TRITON, Feature.FP8_FNUZ}),
    ),
)

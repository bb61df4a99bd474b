"""The shared expert for GPUs behind its first two products: the activation, the product back.

    hidden = round(silu(min(gate, L)) · clamp(up, −L, L))       activated and rounded to FP8 in one launch
    out = w2 hidden                                             unrounded

Contract: products, chunks and their order are triton/linear.py's, so a token's result does not depend on
the batch. A weight that is not FP8 blocks takes the plain way, through the op `linear`, and so does
"separate", which rounds in a launch of its own.
"""

from __future__ import annotations

from functools import partial
from typing import Any

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
    operands,
    to_fp8,
)
from fourfold.ops.registry import Kernel


@triton.jit
def activated(gate, up, place, inside, LIMIT, ROUND: tl.constexpr):
    """The activation of float32 `gate[place]` and `up[place]`, rounded to bfloat16 by ROUND."""
    g = tl.minimum(tl.load(gate + place, mask=inside, other=0.0), LIMIT)
    u = tl.minimum(tl.maximum(tl.load(up + place, mask=inside, other=0.0), -LIMIT), LIMIT)
    value = g / (1.0 + tl.exp(-g)) * u
    if ROUND:
        value = value.to(tl.bfloat16).to(tl.float32)
    return value


@triton.jit(do_not_specialize=["T"])
def _activate_shared(
    gate,
    up,
    codes,
    scale,
    T,
    N,
    LIMIT,
    ROUND: tl.constexpr,
    FNUZ: tl.constexpr,
    COUNT: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Codes and scales by group of one token's activation: COUNT groups of gate, up `[T, N]`."""
    token = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1) * COUNT + tl.arange(0, COUNT)
    offset = group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    place = token * N + offset
    inside = offset < N
    raw, factor = to_fp8(activated(gate, up, place, inside, LIMIT, ROUND), FNUZ)
    tl.store(codes + place, raw, mask=inside)
    tl.store(scale + group * T + token, factor, mask=group * GROUP < N)


@triton.jit
def _activate_alone(gate, up, out, COUNT, LIMIT, BLOCK: tl.constexpr):
    """`out` = the activation of COUNT numbers, in its dtype."""
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < COUNT
    value = activated(gate, up, place, inside, LIMIT, False)
    tl.store(out + place, value.to(out.dtype.element_ty), mask=inside)


def shared_expert(
    ops: Any,
    gate: Tensor,
    up: Tensor,
    w2: Weight,
    limit: float,
    dtype: torch.dtype,
    fnuz: bool = False,
    products: Products | None = None,
) -> Tensor:
    """The op `shared_expert` (ops/moe.py); `products` as in triton/linear.py."""
    if not gate.shape[0] or not (isinstance(w2, QuantTensor) and is_fp8(w2)):
        return separate(ops, gate, up, w2, limit, dtype)
    gate, up = gate.contiguous(), up.contiguous()
    tokens, inner = gate.shape
    groups = -(-inner // BLOCK_K)
    hidden = torch.empty(tokens, inner, dtype=torch.uint8, device=gate.device)
    factors = torch.empty(groups, tokens, dtype=torch.float32, device=gate.device)
    count = min(triton.next_power_of_2(groups), 8) if tokens > WIDE_TILE else 1
    _activate_shared[(tokens, -(-groups // count))](
        gate, up, hidden, factors, tokens, inner, limit, ROUND=dtype == torch.bfloat16, FNUZ=fnuz,
        COUNT=count, GROUP=BLOCK_K, num_warps=4 if count > 4 else 1,
    )  # fmt: skip
    return finish(operands(w2, as_fp8(hidden, fnuz), factors), torch.float32, fnuz, products)


def separate(
    ops: Any, gate: Tensor, up: Tensor, w2: Weight, limit: float, dtype: torch.dtype
) -> Tensor:
    """The op `shared_expert` with activation, rounding and product each for itself."""
    hidden = torch.empty(gate.shape, dtype=dtype, device=gate.device)
    if hidden.numel():
        _activate_alone[(-(-hidden.numel() // 1024),)](
            gate.contiguous(), up.contiguous(), hidden, hidden.numel(), limit, BLOCK=1024
        )
    out: Tensor = ops.linear(hidden, w2, unrounded=True)
    return out


_OCP = frozenset({Feature.TRITON, Feature.FP8_OCP})
_FNUZ = frozenset({Feature.TRITON, Feature.FP8_FNUZ})
# "separate" is chosen by itself only where the other two cannot run.
KERNELS = (
    Kernel("shared_expert", "triton", shared_expert, _OCP),
    Kernel("shared_expert", "triton_fnuz", partial(shared_expert, fnuz=True), _FNUZ),
    Kernel("shared_expert", "separate", separate, frozenset({Feature.TRITON}), priority=1),
)

"""Embedding lookup for GPUs: a program copies part of one row."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fourfold.core.device import Feature
from fourfold.ops.registry import Kernel

BLOCK = 1024


@triton.jit
def _embed(token_ids, weight, out, FIRST, ROWS, D, BLOCK: tl.constexpr):
    """Tokens outside FIRST … FIRST + ROWS − 1 get zeros."""
    token = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    row = tl.load(token_ids + token).to(tl.int64) - FIRST
    mine = (row >= 0) & (row < ROWS)
    value = tl.load(weight + row * D + d, mask=mine & (d < D), other=0.0)
    tl.store(out + token * D + d, value, mask=d < D)


def embed(token_ids: Tensor, weight: Tensor, first_token: int = 0) -> Tensor:
    """The op `embed` (ops/linear.py)."""
    tokens, dim = token_ids.shape[0], weight.shape[1]
    out = torch.empty(tokens, dim, dtype=weight.dtype, device=weight.device)
    if tokens:
        _embed[(tokens, -(-dim // BLOCK))](
            token_ids, weight, out, first_token, weight.shape[0], dim, BLOCK=BLOCK, num_warps=4
        )
    return out


KERNELS = (Kernel("embed", "triton", embed, frozenset({Feature.TRITON})),)

"""RMS norms for GPUs: one program a row, so results do not depend on the batch."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fourfold.core.device import Feature
from fourfold.kernels.triton.early import after_previous, also_early, launch
from fourfold.kernels.triton.rope import EXACT, run_rotate
from fourfold.ops.registry import Kernel


@triton.jit
def _rms_norm(x, weight, out, K, eps, BLOCK: tl.constexpr, EARLY: tl.constexpr):
    """One row of K numbers."""
    row = tl.program_id(0).to(tl.int64) * K
    k = tl.arange(0, BLOCK)
    gain = tl.load(weight + k, mask=k < K, other=0.0).to(tl.float32)
    after_previous(EARLY)
    value = tl.load(x + row + k, mask=k < K, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(value * value) / K + eps)
    tl.store(out + row + k, (value * scale * gain).to(x.dtype.element_ty), mask=k < K)


def row_warps(size: int) -> int:
    """Warps for a row of `size` numbers: eight numbers a lane of 32, up to eight warps."""
    return min(max(triton.next_power_of_2(size) // 256, 1), 8)


def rms_norm(x: Tensor, weight: Tensor, eps: float, early: bool = False) -> Tensor:
    """The op `rms_norm` (ops/norm.py)."""
    x = x.contiguous()
    out = torch.empty_like(x)
    if x.numel():
        size = x.shape[-1]
        _rms_norm[(x.numel() // size,)](
            x, weight, out, size, eps,
            BLOCK=triton.next_power_of_2(size), EARLY=early, num_warps=row_warps(size), **EXACT,
            **launch(early),
        )  # fmt: skip
    return out


def query_norm_rope(
    q: Tensor, positions: Tensor, inv_freq: Tensor, eps: float, early: bool = False
) -> Tensor:
    """The op `query_norm_rope` (ops/norm.py)."""
    return run_rotate(q, positions, inv_freq, False, eps, early, here=True)


KERNELS = also_early(
    Kernel("rms_norm", "triton", rms_norm, frozenset({Feature.TRITON})),
    Kernel("query_norm_rope", "triton", query_norm_rope, frozenset({Feature.TRITON})),
)

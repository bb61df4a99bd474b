"""Which hyper-connections a run uses: the kernels where they work and agree, else plain torch.

Contract: `differences` runs both on random streams and gives the largest difference of every result and
gradient, relative to its size. The choice is returned with its reason, for the log.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fourfold.ops.mhc import Site
from train.ops import mixing
from train.ops.plan import Hyper

_ALLOWED = {torch.float32: 1e-2, torch.bfloat16: 4e-2}  # TF32 products; bfloat16 gradients
_NAMES = ("y", "post", "comb", "streams", "d streams", "d z", "d fn", "d base", "d scale", "d norm")


def differences(
    other: Hyper, device: torch.device, dtype: torch.dtype, tokens: int = 200, size: int = 64
) -> dict[str, float]:
    """`other` against train/ops/mixing.py, four streams of `size`."""
    found = [_results(hyper, device, dtype, tokens, size) for hyper in (mixing, other)]
    return {
        name: float((one - two).float().abs().max() / one.float().abs().max())
        for name, one, two in zip(_NAMES, *found, strict=True)
    }


def _results(
    hyper: Hyper, device: torch.device, dtype: torch.dtype, tokens: int, size: int
) -> list[Tensor]:
    generator = torch.Generator("cpu").manual_seed(0)

    def normal(*shape: int, scale: float = 1.0, kind: torch.dtype = torch.float32) -> Tensor:
        values = torch.randn(shape, generator=generator) * scale
        return values.to(device, kind).requires_grad_()

    streams, z = normal(tokens, 4, size, kind=dtype), normal(tokens, size, kind=dtype)
    fn, base, scale, norm = (
        normal(24, 4 * size, scale=0.05),
        normal(24, scale=0.5),
        normal(3),
        normal(size),
    )
    site = Site(fn, base, scale, norm, norm_eps=1e-6, hc_eps=1e-6, iterations=20)
    y, post, comb = hyper.hc_pre(streams, site)
    out = hyper.hc_post(z + y, streams, post, comb)
    direction = torch.randn(out.shape, generator=generator).to(device)
    value = (out * direction).sum() + y.float().square().sum()
    found = [y, post, comb, out, *torch.autograd.grad(value, [streams, z, fn, base, scale, norm])]
    return [each.detach() for each in found]


def hyper_connections(wanted: str, device: torch.device, dtype: torch.dtype) -> tuple[Hyper, str]:
    """What a run uses, and why; `wanted` is "torch", "triton" or "auto"."""
    if wanted == "torch" or (wanted == "auto" and device.type != "cuda"):
        return mixing, "torch"
    from triton.errors import TritonError

    from train.ops import mixing_gpu

    if wanted == "triton":
        return mixing_gpu, "triton"
    try:
        worst, name = max((v, k) for k, v in differences(mixing_gpu, device, dtype).items())
    except (RuntimeError, TritonError) as error:
        return mixing, f"torch, because the kernels failed: {str(error)[:200]}"
    # Not a number is not below anything.
    if worst < _ALLOWED[dtype]:
        return mixing_gpu, f"triton, {name} differs by {worst:.1e}"
    return mixing, f"torch, because the kernels' {name} differs by {worst:.1e}"

"""Hyper-connections in training on a GPU: Triton kernels that read the streams once, with gradients.

    mix    (f @ fnᵀ)·inv, inv = rsqrt(mean f² + ε)   dX = (dmix·inv) @ fn − inv²·⟨dmix, mix⟩/K·X
    read   y = RMSNorm(Σ pre_i X_i) · w             dX_i = pre_i·dm,  dpre_i = ⟨dm, X_i⟩
    write  X'_j = post_j·z + Σ_i C[i, j]·X_i        dX_i = Σ_j C[i, j]·dX'_j,  dC[i, j] = ⟨X_i, dX'_j⟩
    sinkhorn  M' = M / (s + ε)                      dM = (dM' − Σ dM'·M') / (s + ε)

Contract: what mixing.py computes for float32 and bfloat16 streams, within rounding. Sums over tokens
(of the norm's weight) go through partial sums in a fixed order.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fourfold.ops.mhc import Site

_TOKENS = 8  # tokens a program, where a program sees whole streams
_TILE = 64  # tokens a program of the products
_LANES = 64  # tokens a program of Sinkhorn


@triton.jit
def _mix_kernel(
    x,
    fn,
    mix,
    inverse,
    eps,
    T,
    K: tl.constexpr,
    N: tl.constexpr,
    NP: tl.constexpr,
    BT: tl.constexpr,
    BK: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)
    row = tl.arange(0, NP)
    inside = token < T
    total = tl.zeros((BT, NP), tl.float32)
    square = tl.zeros((BT,), tl.float32)
    for begin in range(0, K, BK):
        k = begin + tl.arange(0, BK)
        part = tl.load(x + token[:, None] * K + k, mask=inside[:, None] & (k < K), other=0.0)
        part = part.to(tl.float32)
        weight = tl.load(fn + row[:, None] * K + k, mask=(row < N)[:, None] & (k < K), other=0.0)
        total = tl.dot(part, tl.trans(weight), total, input_precision="tf32")
        square += tl.sum(part * part, axis=1)
    scale = tl.rsqrt(square / K + eps)
    tl.store(inverse + token, scale, mask=inside)
    place = mix + token[:, None] * N + row
    tl.store(place, total * scale[:, None], mask=inside[:, None] & (row < N))


@triton.jit
def _mix_grad_kernel(
    x,
    fn,
    d,
    factor,
    dx,
    T,
    K: tl.constexpr,
    N: tl.constexpr,
    NP: tl.constexpr,
    BT: tl.constexpr,
    BK: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)
    row = tl.arange(0, NP)
    inside = token < T
    above = tl.load(d + token[:, None] * N + row, mask=inside[:, None] & (row < N), other=0.0)
    own = tl.load(factor + token, mask=inside, other=0.0)
    for begin in range(0, K, BK):
        k = begin + tl.arange(0, BK)
        seen = inside[:, None] & (k < K)
        weight = tl.load(fn + row[:, None] * K + k, mask=(row < N)[:, None] & (k < K), other=0.0)
        part = tl.load(x + token[:, None] * K + k, mask=seen, other=0.0).to(tl.float32)
        grad = tl.dot(above, weight, own[:, None] * part, input_precision="tf32")
        tl.store(dx + token[:, None] * K + k, grad.to(dx.dtype.element_ty), mask=seen)


class _Mix(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, streams: Tensor, fn: Tensor, eps: float) -> Tensor:
        flat = streams.flatten(1)
        tokens, size = flat.shape
        count = fn.shape[0]
        mix = torch.empty(tokens, count, device=flat.device)
        inverse = torch.empty(tokens, device=flat.device)
        padded = max(16, triton.next_power_of_2(count))
        grid = (triton.cdiv(tokens, _TILE),)
        _mix_kernel[grid](flat, fn, mix, inverse, eps, tokens, size, count, padded, _TILE, 64)
        ctx.save_for_backward(streams, fn, mix, inverse)
        return mix

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        streams, fn, mix, inverse = ctx.saved_tensors
        flat, above = streams.flatten(1), grads[0].contiguous()
        tokens, size = flat.shape
        factor = -inverse.square() * (above * mix).sum(-1) / size
        above = above * inverse.unsqueeze(-1)
        grad = torch.empty_like(flat)
        count = fn.shape[0]
        padded = max(16, triton.next_power_of_2(count))
        grid = (triton.cdiv(tokens, _TILE),)
        _mix_grad_kernel[grid](
            flat, fn, above, factor, grad, tokens, size, count, padded, _TILE, 64
        )
        fn_grad = (above.to(flat.dtype).t() @ flat).to(fn.dtype)
        return grad.view_as(streams), fn_grad, None


@triton.jit
def _read_kernel(
    x,
    pre,
    norm,
    y,
    inverse,
    eps,
    T,
    D: tl.constexpr,
    S: tl.constexpr,
    BD: tl.constexpr,
    BT: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)
    dim = tl.arange(0, BD)
    inside = token < T
    seen = inside[:, None] & (dim < D)
    total = tl.zeros((BT, BD), tl.float32)
    for i in tl.static_range(S):
        share = tl.load(pre + token * S + i, mask=inside, other=0.0)
        part = tl.load(x + (token * S + i)[:, None] * D + dim, mask=seen, other=0.0)
        total += share[:, None] * part.to(tl.float32)
    scale = tl.rsqrt(tl.sum(total * total, axis=1) / D + eps)
    weight = tl.load(norm + dim, mask=dim < D, other=0.0)
    out = total * scale[:, None] * weight
    tl.store(y + token[:, None] * D + dim, out.to(y.dtype.element_ty), mask=seen)
    tl.store(inverse + token, scale, mask=inside)


@triton.jit
def _read_grad_kernel(
    x,
    pre,
    norm,
    inverse,
    dy,
    dx,
    dpre,
    dnorm,
    T,
    D: tl.constexpr,
    S: tl.constexpr,
    BD: tl.constexpr,
    BT: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)
    dim = tl.arange(0, BD)
    inside = token < T
    seen = inside[:, None] & (dim < D)
    total = tl.zeros((BT, BD), tl.float32)
    for i in tl.static_range(S):
        share = tl.load(pre + token * S + i, mask=inside, other=0.0)
        part = tl.load(x + (token * S + i)[:, None] * D + dim, mask=seen, other=0.0)
        total += share[:, None] * part.to(tl.float32)
    scale = tl.load(inverse + token, mask=inside, other=0.0)
    normal = total * scale[:, None]
    above = tl.load(dy + token[:, None] * D + dim, mask=seen, other=0.0).to(tl.float32)
    tl.store(dnorm + tl.program_id(0) * D + dim, tl.sum(above * normal, axis=0), mask=dim < D)
    weight = tl.load(norm + dim, mask=dim < D, other=0.0)
    above = above * weight
    grad = scale[:, None] * (above - normal * (tl.sum(above * normal, axis=1) / D)[:, None])
    for i in tl.static_range(S):
        share = tl.load(pre + token * S + i, mask=inside, other=0.0)
        place = (token * S + i)[:, None] * D + dim
        part = tl.load(x + place, mask=seen, other=0.0).to(tl.float32)
        tl.store(dpre + token * S + i, tl.sum(part * grad, axis=1), mask=inside)
        tl.store(dx + place, (share[:, None] * grad).to(dx.dtype.element_ty), mask=seen)


class _Read(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, streams: Tensor, pre: Tensor, norm: Tensor, eps: float) -> Tensor:
        tokens, count, size = streams.shape
        y = torch.empty(tokens, size, dtype=streams.dtype, device=streams.device)
        inverse = torch.empty(tokens, device=streams.device)
        pre = pre.contiguous()
        grid = (triton.cdiv(tokens, _TOKENS),)
        padded = triton.next_power_of_2(size)
        _read_kernel[grid](
            streams, pre, norm, y, inverse, eps, tokens, size, count, padded, _TOKENS
        )
        ctx.save_for_backward(streams, pre, norm, inverse)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        streams, pre, norm, inverse = ctx.saved_tensors
        tokens, count, size = streams.shape
        grad, pre_grad = torch.empty_like(streams), torch.empty_like(pre)
        blocks = triton.cdiv(tokens, _TOKENS)
        partial = torch.empty(blocks, size, device=streams.device)
        padded = triton.next_power_of_2(size)
        _read_grad_kernel[(blocks,)](
            streams,
            pre,
            norm,
            inverse,
            grads[0].contiguous(),
            grad,
            pre_grad,
            partial,
            tokens,
            size,
            count,
            padded,
            _TOKENS,
        )
        return grad, pre_grad, partial.sum(0).to(norm.dtype), None


@triton.jit
def _write_kernel(
    x,
    z,
    post,
    comb,
    out,
    T,
    D: tl.constexpr,
    S: tl.constexpr,
    BD: tl.constexpr,
    BT: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)
    dim = tl.arange(0, BD)
    inside = token < T
    seen = inside[:, None] & (dim < D)
    added = tl.load(z + token[:, None] * D + dim, mask=seen, other=0.0).to(tl.float32)
    for j in tl.static_range(S):
        share = tl.load(post + token * S + j, mask=inside, other=0.0)
        total = share[:, None] * added
        for i in tl.static_range(S):
            factor = tl.load(comb + (token * S + i) * S + j, mask=inside, other=0.0)
            part = tl.load(x + (token * S + i)[:, None] * D + dim, mask=seen, other=0.0)
            total += factor[:, None] * part.to(tl.float32)
        place = (token * S + j)[:, None] * D + dim
        tl.store(out + place, total.to(out.dtype.element_ty), mask=seen)


@triton.jit
def _write_grad_kernel(
    x,
    z,
    post,
    comb,
    dout,
    dx,
    dz,
    dpost,
    dcomb,
    T,
    D: tl.constexpr,
    S: tl.constexpr,
    BD: tl.constexpr,
    BT: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)
    dim = tl.arange(0, BD)
    inside = token < T
    seen = inside[:, None] & (dim < D)
    added = tl.load(z + token[:, None] * D + dim, mask=seen, other=0.0).to(tl.float32)
    total = tl.zeros((BT, BD), tl.float32)
    for j in tl.static_range(S):
        share = tl.load(post + token * S + j, mask=inside, other=0.0)
        above = tl.load(dout + (token * S + j)[:, None] * D + dim, mask=seen, other=0.0)
        above = above.to(tl.float32)
        total += share[:, None] * above
        tl.store(dpost + token * S + j, tl.sum(added * above, axis=1), mask=inside)
    tl.store(dz + token[:, None] * D + dim, total.to(dz.dtype.element_ty), mask=seen)
    for i in tl.static_range(S):
        place = (token * S + i)[:, None] * D + dim
        part = tl.load(x + place, mask=seen, other=0.0).to(tl.float32)
        total = tl.zeros((BT, BD), tl.float32)
        for j in tl.static_range(S):
            spot = (token * S + i) * S + j
            factor = tl.load(comb + spot, mask=inside, other=0.0)
            above = tl.load(dout + (token * S + j)[:, None] * D + dim, mask=seen, other=0.0)
            above = above.to(tl.float32)
            total += factor[:, None] * above
            tl.store(dcomb + spot, tl.sum(part * above, axis=1), mask=inside)
        tl.store(dx + place, total.to(dx.dtype.element_ty), mask=seen)


class _Write(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor, streams: Tensor, post: Tensor, comb: Tensor) -> Tensor:
        tokens, count, size = streams.shape
        z, post, comb = z.contiguous(), post.contiguous(), comb.contiguous()
        out = torch.empty_like(streams)
        grid = (triton.cdiv(tokens, _TOKENS),)
        padded = triton.next_power_of_2(size)
        _write_kernel[grid](streams, z, post, comb, out, tokens, size, count, padded, _TOKENS)
        ctx.save_for_backward(z, streams, post, comb)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        z, streams, post, comb = ctx.saved_tensors
        tokens, count, size = streams.shape
        found = [torch.empty_like(each) for each in (streams, z, post, comb)]
        grid = (triton.cdiv(tokens, _TOKENS),)
        padded = triton.next_power_of_2(size)
        _write_grad_kernel[grid](
            streams,
            z,
            post,
            comb,
            grads[0].contiguous(),
            *found,
            tokens,
            size,
            count,
            padded,
            _TOKENS,
        )
        stream_grad, z_grad, post_grad, comb_grad = found
        return z_grad, stream_grad, post_grad, comb_grad


@triton.jit
def _sinkhorn_kernel(
    logits,
    out,
    sums,
    eps,
    T,
    STEPS: tl.constexpr,
    S: tl.constexpr,
    BT: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)
    lane = tl.arange(0, S)
    inside = token < T
    place = token[:, None, None] * (S * S) + lane[None, :, None] * S + lane[None, None, :]
    matrix = tl.load(logits + place, mask=inside[:, None, None], other=0.0)
    matrix = tl.exp(matrix - tl.max(matrix, axis=2)[:, :, None])
    matrix = matrix / tl.sum(matrix, axis=2)[:, :, None] + eps
    side = token[:, None] * S + lane[None, :]
    for step in tl.static_range(STEPS):
        if step % 2 == 0:
            total = tl.sum(matrix, axis=1) + eps
            matrix = matrix / total[:, None, :]
        else:
            total = tl.sum(matrix, axis=2) + eps
            matrix = matrix / total[:, :, None]
        tl.store(sums + step * (T * S) + side, total, mask=inside[:, None])
    tl.store(out + place, matrix, mask=inside[:, None, None])


@triton.jit
def _sinkhorn_grad_kernel(
    out,
    sums,
    dout,
    dlogits,
    eps,
    T,
    STEPS: tl.constexpr,
    S: tl.constexpr,
    BT: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)
    lane = tl.arange(0, S)
    inside = token < T
    place = token[:, None, None] * (S * S) + lane[None, :, None] * S + lane[None, None, :]
    matrix = tl.load(out + place, mask=inside[:, None, None], other=0.0)
    grad = tl.load(dout + place, mask=inside[:, None, None], other=0.0)
    side = token[:, None] * S + lane[None, :]
    for back in tl.static_range(STEPS):
        step = STEPS - 1 - back
        total = tl.load(sums + step * (T * S) + side, mask=inside[:, None], other=1.0)
        if step % 2 == 0:
            grad = (grad - tl.sum(grad * matrix, axis=1)[:, None, :]) / total[:, None, :]
            matrix = matrix * total[:, None, :]
        else:
            grad = (grad - tl.sum(grad * matrix, axis=2)[:, :, None]) / total[:, :, None]
            matrix = matrix * total[:, :, None]
    share = matrix - eps
    grad = share * (grad - tl.sum(grad * share, axis=2)[:, :, None])
    tl.store(dlogits + place, grad, mask=inside[:, None, None])


class _Sinkhorn(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, iterations: int, eps: float) -> Tensor:
        tokens, count, _ = logits.shape
        logits = logits.contiguous()
        steps = 2 * iterations - 1
        out = torch.empty_like(logits)
        sums = torch.empty(steps, tokens, count, device=logits.device)
        grid = (triton.cdiv(tokens, _LANES),)
        _sinkhorn_kernel[grid](logits, out, sums, eps, tokens, steps, count, _LANES)
        ctx.save_for_backward(out, sums)
        ctx.eps = eps
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        out, sums = ctx.saved_tensors
        steps, tokens, count = sums.shape
        grad = torch.empty_like(out)
        grid = (triton.cdiv(tokens, _LANES),)
        _sinkhorn_grad_kernel[grid](
            out, sums, grads[0].contiguous(), grad, ctx.eps, tokens, steps, count, _LANES
        )
        return grad, None, None


def hc_pre(streams: Tensor, site: Site) -> tuple[Tensor, Tensor, Tensor]:
    """As the op's: y `[T, D]`, post `[T, S]`, comb `[T, S, S]`."""
    count = streams.shape[1]
    streams = streams.contiguous()
    mix: Tensor = _Mix.apply(streams, site.fn, site.norm_eps)
    pre_mix, post_mix, comb_mix = mix.split([count, count, count * count], dim=-1)
    base = site.base.split([count, count, count * count])
    pre = torch.sigmoid(pre_mix * site.scale[0] + base[0]) + site.hc_eps
    post = 2 * torch.sigmoid(post_mix * site.scale[1] + base[1])
    logits = (comb_mix * site.scale[2] + base[2]).unflatten(-1, (count, count))
    comb: Tensor = _Sinkhorn.apply(logits, site.iterations, site.hc_eps)
    y: Tensor = _Read.apply(streams, pre, site.norm, site.norm_eps)
    return y, post, comb


def hc_post(z: Tensor, streams: Tensor, post: Tensor, comb: Tensor) -> Tensor:
    """As the op's: new streams `[T, S, D]`."""
    out: Tensor = _Write.apply(z, streams.contiguous(), post, comb)
    return out

"""Matrix products: plain and quantised linear layers, embedding lookup, the grouped output projection.

Contract: `weight` is `[N, K]`, plain or a `QuantTensor`; products are accumulated in the wider of the
input's dtype and float32. A quantised weight that says so rounds its input to FP8 in groups of 128
along K first, as the released models were trained. It does not know which layer it serves.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fourfold.core.tensor import QuantTensor, Weight, accumulate_dtype, dense
from fourfold.ops.quantize import (
    ACTIVATION_GROUP,
    dequantize_fp8_groups,
    quantize_activations,
)
from fourfold.ops.registry import Case, CaseMaker, Tolerance, op
from fourfold.ops.rope import rope_case, rotate


def round_activations(x: Tensor, weight: Weight) -> Tensor:
    """`x [T, K]` in the accumulation dtype, rounded to FP8 groups if `weight` asks for it."""
    wide = accumulate_dtype(x.dtype)
    if isinstance(weight, QuantTensor) and weight.quantize_activations:
        codes, exponent = quantize_activations(x)
        return dequantize_fp8_groups(codes, exponent, ACTIVATION_GROUP, wide)
    return x.to(wide)


def _linear_cases(make: CaseMaker) -> Iterator[Case]:
    for tokens, inputs, outputs in ((1, 96, 40), (7, 128, 256)):
        weight = make.randn(outputs, inputs, scale=inputs**-0.5)
        yield Case(
            f"{tokens}x{inputs}x{outputs}", {"x": make.randn(tokens, inputs), "weight": weight}
        )
    yield Case(
        "unrounded",
        {"x": make.randn(3, 64), "weight": make.randn(8, 64), "unrounded": True},
    )


@op(_linear_cases)
def linear(x: Tensor, weight: Weight, unrounded: bool = False) -> Tensor:
    """`x [T, K] @ weightᵀ` → `[T, N]` in x's dtype, or `unrounded` in the accumulation dtype."""
    wide = accumulate_dtype(x.dtype)
    result = torch.nn.functional.linear(round_activations(x, weight), dense(weight, wide))
    return result if unrounded else result.to(x.dtype)


def _linears_cases(make: CaseMaker) -> Iterator[Case]:
    weights = tuple(make.randn(rows, 128, scale=128**-0.5) for rows in (40, 256, 24))
    for tokens in (1, 7):
        yield Case(
            f"{tokens} tokens",
            {
                "x": make.randn(tokens, 128),
                "weights": weights,
                "unrounded": (False, True, True),
            },
        )


@op(_linears_cases, parts=("linear",))
def linears(
    ops: Any, x: Tensor, weights: tuple[Weight, ...], unrounded: tuple[bool, ...]
) -> tuple[Tensor, ...]:
    """Several linear layers of one input: `linear(x, weight, unrounded)` for each of them."""
    pairs = zip(weights, unrounded, strict=True)
    return tuple(ops.linear(x, weight, unrounded=wide) for weight, wide in pairs)


def _norm_linears_cases(make: CaseMaker) -> Iterator[Case]:
    for case in _linears_cases(make):
        norm = 1 + make.randn(128, scale=0.1)
        yield Case(case.name, {**case.arguments, "norm": norm, "eps": 1e-6})


@op(_norm_linears_cases, parts=("rms_norm", "linears"))
def norm_linears(
    ops: Any,
    x: Tensor,
    norm: Tensor,
    eps: float,
    weights: tuple[Weight, ...],
    unrounded: tuple[bool, ...],
) -> tuple[Tensor, ...]:
    """Several linear layers of `rms_norm(x, norm, eps)`."""
    outputs: tuple[Tensor, ...] = ops.linears(ops.rms_norm(x, norm, eps), weights, unrounded)
    return outputs


def _embed_cases(make: CaseMaker) -> Iterator[Case]:
    yield Case("whole", {"token_ids": make.randint(50, 9), "weight": make.randn(50, 16)})
    yield Case(
        "shard",
        {"token_ids": make.randint(50, 9), "weight": make.randn(25, 16), "first_token": 25},
    )


@op(_embed_cases, batch_invariant=True)
def embed(token_ids: Tensor, weight: Tensor, first_token: int = 0) -> Tensor:
    """Rows of `weight [V, D]` for `token_ids [T]` → `[T, D]`.

    A vocabulary shard starts at `first_token`; tokens of other shards give zeros, so that the sum over
    shards is the whole.
    """
    local = token_ids - first_token
    mine = (local >= 0) & (local < weight.shape[0])
    rows = torch.nn.functional.embedding(torch.where(mine, local, 0), weight)
    return rows * mine.unsqueeze(-1).to(rows.dtype)


def _output_cases(make: CaseMaker) -> Iterator[Case]:
    positions, inv_freq = rope_case(make, tokens=5, rope_dim=8)
    yield Case(
        "4 heads, 2 groups",
        {
            "attended": make.randn(5, 4, 24),
            "weight": make.randn(2 * 6, 2 * 24, scale=0.2),
            "positions": positions,
            "inv_freq": inv_freq,
        },
    )


@op(_output_cases, tolerance=Tolerance(float32=2e-5), consumes=("attended",))
def wo_a(attended: Tensor, weight: Weight, positions: Tensor, inv_freq: Tensor) -> Tensor:
    """Inverse rotary, then the block-diagonal projection `wo_a`.

    `attended [T, H, d]` still carries its query position's rotation in the last dims. `weight`
    `[G·R, (H/G)·d]`: group g's R rows see heads g·H/G … only. Result `[T, G·R]`. The weight is
    dequantised to the model dtype and activations are not rounded: that is the definition.
    """
    tokens, heads, dim = attended.shape
    still = rotate(attended, positions, inv_freq, inverse=True)
    wide = accumulate_dtype(attended.dtype)
    matrix = dense(weight, attended.dtype).to(wide)
    groups = heads * dim // matrix.shape[-1]
    per_group = still.reshape(tokens, groups, -1).to(wide)
    out = torch.einsum("tgk,grk->tgr", per_group, matrix.unflatten(0, (groups, -1)))
    return out.flatten(1).to(attended.dtype)

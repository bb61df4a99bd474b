"""Inputs for checking kernels: the ops' own cases, and the same ops with quantised weights.

Contract: the cases of ops/ are taken as they are, so that a kernel is checked here with what tests check
it with. Weights of FP8 blocks and MXFP4 are made here, because ops know no scheme. Sizes leave blocks that
are not full and tokens on both sides of the kernels' tiles. `SAME_TOKENS` says which arguments of an op have
a row for each token, so that any part of a batch can be run by itself.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch

from fourfold.core.frozen import FrozenDict
from fourfold.core.tensor import QuantScheme, QuantTensor, accumulate_dtype
from fourfold.ops.registry import Case, CaseMaker, Op
from fourfold.quant.fp8_block import FP8_BLOCK
from fourfold.quant.mxfp4 import MXFP4

EXPERTS: tuple[tuple[QuantScheme, str], ...] = (
    (MXFP4, "e8m0"),
    (FP8_BLOCK, "e8m0"),
    (FP8_BLOCK, "f32"),
)

FP8_SUMS, FP8_BEHIND_FP8, FP8_INPUTS = 2e-3, 5e-3, 6e-2

SAME_TOKENS: Mapping[str, tuple[str, ...]] = FrozenDict(
    {
        "linear": ("x",),
        "linears": ("x",),
        "embed": ("token_ids",),
        "rms_norm": ("x",),
        "query_norm_rope": ("q", "positions"),
        "rotate": ("x", "positions"),
        "wo_a": ("attended", "positions"),
        "shared_expert": ("gate", "up"),
        "routed_experts": ("y", "ids", "weights"),
        "route_topk": ("logits",),
        "route_hash": ("logits", "token_ids"),
        "hc_pre": ("streams",),
        "hc_post": ("z", "streams", "post", "comb"),
        "hc_post_pre": ("z", "streams", "post", "comb"),
        "hc_head": ("streams",),
    }
)


def cases(op: Op, make: CaseMaker) -> Iterator[Case]:
    """All inputs that a kernel of `op` is checked with."""
    yield from op.cases(make)
    more = {
        "linear": _linear,
        "linears": _linears,
        "shared_expert": _shared,
        "routed_experts": _experts,
        "wo_a": _output,
    }
    if op.name in more and make.dtype != torch.float64:
        yield from more[op.name](make)


def tolerance(op: Op, kernel: str, case: Case, dtype: torch.dtype) -> float:
    """How far off a kernel may be, relative to the largest expected number.

    FP8 matrix units add with fewer bits than float32 has; behind an expert's first product its inputs are
    rounded to FP8, which may then fall to another side. A form of `wo_a` called fp8 rounds its inputs
    besides, which the definition does not.
    """
    allowed = op.tolerance.of(dtype)
    if any(isinstance(value, QuantTensor) for value in _parts(case.arguments.values())):
        sums = FP8_BEHIND_FP8 if op.name == "routed_experts" else FP8_SUMS
        allowed = max(allowed, FP8_INPUTS if kernel.startswith("fp8") else sums)
    return allowed


def _parts(values: Iterable[object]) -> Iterator[object]:
    for value in values:
        yield from value if isinstance(value, tuple) else (value,)


def _weight(make: CaseMaker, scheme: QuantScheme, scales: str, *shape: int) -> QuantTensor:
    values = make.randn(*shape, scale=shape[-1] ** -0.5, dtype=torch.float32)
    return QuantTensor(*scheme.quantize(values, scales), scheme, shape)


def _linear(make: CaseMaker) -> Iterator[Case]:
    for scales in ("e8m0", "f32"):
        for rows, columns, tokens in ((200, 300, 7), (256, 512, 1), (256, 512, 130)):
            name = f"FP8 weight, {scales}, {tokens}x{columns}x{rows}"
            weight = _weight(make, FP8_BLOCK, scales, rows, columns)
            yield Case(name, {"x": make.randn(tokens, columns, scale=3.0), "weight": weight})
    exact = _weight(make, MXFP4, "e8m0", 96, 128).with_activations(False)
    yield Case("FP4 weight, exact inputs", {"x": make.randn(5, 128), "weight": exact})


def _linears(make: CaseMaker) -> Iterator[Case]:
    for scales in ("e8m0", "f32"):
        weights = (
            _weight(make, FP8_BLOCK, scales, 256, 512),
            make.randn(40, 512, scale=512**-0.5),
            _weight(make, FP8_BLOCK, scales, 200, 512),
        )
        for tokens in (1, 70):
            x = make.randn(tokens, 512, scale=3.0)
            arguments = {"x": x, "weights": weights, "unrounded": (False, True, True)}
            yield Case(f"FP8 and plain weights, {scales}, {tokens} tokens", arguments)


def _shared(make: CaseMaker) -> Iterator[Case]:
    wide = accumulate_dtype(make.dtype)
    for dim, inner, tokens in ((160, 96, 5), (512, 256, 70)):
        for scales in ("e8m0", "f32"):
            yield Case(
                f"FP8 weight, {scales}, {tokens}x{dim}x{inner}",
                {
                    "gate": make.randn(tokens, inner, scale=4.0, dtype=wide),
                    "up": make.randn(tokens, inner, scale=4.0, dtype=wide),
                    "w2": _weight(make, FP8_BLOCK, scales, dim, inner),
                    "limit": 2.0,
                    "dtype": make.dtype,
                },
            )


def _experts(make: CaseMaker) -> Iterator[Case]:
    count, topk = 8, 4
    for scheme, scales in EXPERTS:
        for dim, inner, tokens in ((160, 96, 5), (512, 256, 70)):
            ids = make.randint(count, tokens, topk)
            ids[-1] = 5  # one expert several times
            arguments: dict[str, Any] = {
                "y": make.randn(tokens, dim, scale=4.0),
                "ids": ids,
                "weights": make.randn(tokens, topk, dtype=torch.float32).abs(),
                "w1": _weight(make, scheme, scales, count, inner, dim),
                "w2": _weight(make, scheme, scales, count, dim, inner),
                "w3": _weight(make, scheme, scales, count, inner, dim),
                "limit": 2.0,
            }
            yield Case(f"{scheme.name} experts, {scales}, {tokens}x{dim}x{inner}", arguments)


def _output(make: CaseMaker) -> Iterator[Case]:
    inv_freq = torch.linspace(1.0, 0.01, 16, device=make.device)
    for scales in ("e8m0", "f32"):
        for tokens in (3, 70):
            yield Case(
                f"FP8 weight, {scales}, {tokens} tokens",
                {
                    "attended": make.randn(tokens, 4, 128),
                    "weight": _weight(make, FP8_BLOCK, scales, 2 * 128, 2 * 128),
                    "positions": make.randint(5000, tokens),
                    "inv_freq": inv_freq,
                },
            )

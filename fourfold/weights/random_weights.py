"""Random weights made where they are used: no checkpoint, no file, nothing copied through the host.

Contract: `random_parameters` gives what the loader gives for a synthetic checkpoint of the same config
and storage: names, shapes, dtypes, schemes, and the same distributions (random_values.py); the numbers
themselves are others, and differ between kinds of device. A weight depends on the seed and its name
alone. Beside the weights it needs memory for one piece of one of them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import torch
from torch import Tensor

from fourfold.core.config import ModelConfig
from fourfold.core.parameters import ParamSpec, Role, Storage, parameters
from fourfold.core.tensor import QuantScheme, QuantTensor, Weight, accumulate_dtype
from fourfold.quant.mxfp4 import MXFP4
from fourfold.weights.layout import WeightFormat
from fourfold.weights.random_values import (
    FP4_OUTLIER,
    FP8_CODES,
    distribution,
    scale_exponents,
)

_PIECE = 1 << 24  # items drawn at once
_ROUTES = 1 << 14  # tokens whose hash routes are drawn at once


def random_parameters(
    config: ModelConfig,
    weights: WeightFormat,
    device: torch.device,
    dtype: torch.dtype = torch.bfloat16,
    seed: int = 0,
) -> dict[str, Weight]:
    """All weights of a model stored as `weights` says, by `ParamSpec.name`, on `device`.

    Plain weights come in `dtype`, those that are always float32 in float32 (float64 with a float64
    model), hash routes in int64, quantised ones as `QuantTensor`; experts stacked `[E, …]`. Codes of
    negative zero and of NaN do not occur.
    """
    made: dict[str, Weight] = {}
    for spec in parameters(config):
        random = _generator(seed, spec.name, device)
        scheme = weights.scheme(spec.role)
        if scheme is not None:
            made[spec.name] = _quantised(spec, scheme, weights.scale_dtype, random)
        elif spec.role is Role.TID2EID:
            made[spec.name] = _hash_routes(spec, config.n_routed_experts, random)
        else:
            kept = accumulate_dtype(dtype) if spec.storage is Storage.FLOAT else dtype
            mean, deviation = distribution(spec)
            values = torch.empty(spec.shape, dtype=kept, device=device)
            made[spec.name] = values.normal_(mean, deviation, generator=random)
    return made


def _generator(seed: int, name: str, device: torch.device) -> torch.Generator:
    """The weight's own source of numbers."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def _quantised(
    spec: ParamSpec, scheme: QuantScheme, scale_dtype: str, random: torch.Generator
) -> QuantTensor:
    device, is_fp4 = random.device, scheme is MXFP4
    codes = torch.empty(scheme.codes_shape(spec.shape), dtype=torch.uint8, device=device)
    table = torch.tensor(FP8_CODES, device=device)
    for piece in _pieces(codes):
        piece.random_(0, 256, generator=random)
        # Any byte is two FP4 codes; FP8 codes are drawn by their number in a list.
        if not is_fp4:
            piece.copy_(table.index_select(0, piece.int()))
        scheme.canonicalize(piece)
    floats = scale_dtype == "F32" and not is_fp4
    kind = torch.float32 if floats else torch.uint8
    scale = torch.empty(scheme.scale_shape(spec.shape), dtype=kind, device=device)
    exponents, centre = scale_exponents(spec, is_fp4)
    listed = torch.tensor(exponents, dtype=torch.int32, device=device) + centre
    for piece in _pieces(scale):
        exponent = listed.index_select(0, _bytes(piece.numel(), random))
        if is_fp4:
            exponent -= FP4_OUTLIER * (_bytes(piece.numel(), random) == 0)
        piece.copy_(torch.exp2(exponent.float()) if floats else exponent + 127)
    return QuantTensor(codes, scale, scheme, spec.shape)


def _pieces(whole: Tensor) -> Iterator[Tensor]:
    """`whole`, flat, in parts of bounded size."""
    return iter(whole.view(-1).split(_PIECE))


def _bytes(count: int, random: torch.Generator) -> Tensor:
    """`count` numbers from 0 to 255, int32."""
    made = torch.empty(count, dtype=torch.int32, device=random.device)
    return made.random_(0, 256, generator=random)


def _hash_routes(spec: ParamSpec, experts: int, random: torch.Generator) -> Tensor:
    """For each token id, `k` different experts in random order, all choices equally likely."""
    vocabulary, k = spec.shape
    chosen = torch.empty(spec.shape, dtype=torch.int64, device=random.device)
    for first in range(0, vocabulary, _ROUTES):
        part = chosen[first : first + _ROUTES]
        size = (part.shape[0], experts)
        # Ties, which would favour some experts, are too rare to matter: one in 2^24 a pair.
        keys = torch.rand(size, generator=random, device=random.device)
        part.copy_(keys.topk(k, dim=-1).indices)
    return chosen

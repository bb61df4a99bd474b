"""Master parameters: how they begin, how a step reads them, how they are kept in a file.

Contract: masters are float32 by `ParamSpec.name`; `weights` gives the model what it asks for in the
compute dtype, rounded as the checkpoint will store it if asked. The expert table of hash layers and
the routers' biases are no trained parameters: the one is drawn, the other follows the load.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import cast

import torch
from torch import Tensor

from fourfold.core.config import ModelConfig
from fourfold.core.parameters import ParamSpec, Role, Storage, parameters
from fourfold.core.tensor import Weight
from train.ops.rounding import round_expert, round_linear, straight
from train.ops.weights import TrainWeight

UNTRAINED = frozenset({Role.TID2EID, Role.GATE_BIAS})
# What only the indexer reads through: its gradient stops there.
INDEXER = frozenset({Role.INDEXER_WQ_B, Role.INDEXER_WEIGHTS, Role.INDEXER_WKV, Role.INDEXER_WGATE})
_ZERO = frozenset({Role.ATTN_SINK, Role.COMPRESSOR_APE, Role.INDEXER_APE, Role.GATE_BIAS})
_RESIDUAL = frozenset({Role.WO_B, Role.EXPERT_W2, Role.SHARED_W2})
_HC_FN = frozenset({Role.HC_ATTN_FN, Role.HC_FFN_FN, Role.HC_HEAD_FN})
_HC_SCALE = frozenset({Role.HC_ATTN_SCALE, Role.HC_FFN_SCALE, Role.HC_HEAD_SCALE})


def initial(config: ModelConfig, seed: int, device: torch.device) -> dict[str, Tensor]:
    """Masters at the start of training."""
    made: dict[str, Tensor] = {}
    for number, spec in enumerate(parameters(config)):
        generator = torch.Generator("cpu").manual_seed(seed * 1_000_003 + number)
        made[spec.name] = _initial(spec, config, generator).to(device)
    return made


def _initial(spec: ParamSpec, c: ModelConfig, generator: torch.Generator) -> Tensor:
    role, shape = spec.role, spec.shape
    if role is Role.TID2EID:
        # Every token's experts are different, and all experts serve equally many tokens.
        order = torch.rand(shape[0], c.n_routed_experts, generator=generator).argsort(-1)
        return order[:, : shape[1]].contiguous()
    if role in (Role.HC_ATTN_BASE, Role.HC_FFN_BASE):
        return _site_base(spec, c)
    if role in _ZERO or role is Role.HC_HEAD_BASE:
        return torch.zeros(shape)
    if role in _HC_SCALE or len(shape) == 1:
        return torch.ones(shape)
    std = shape[-1] ** -0.5
    if role in _HC_FN:
        std *= 0.1
    elif role is Role.EMBED:
        std = 0.5
    elif role in _RESIDUAL:
        std *= (2 * c.num_hidden_layers) ** -0.5
    return torch.randn(shape, generator=generator) * std


def _site_base(spec: ParamSpec, c: ModelConfig) -> Tensor:
    """A site begins by reading mostly one stream, the next one at each site, writing to all of them
    and leaving each in its place."""
    count = c.hc_mult
    layer = int(spec.prefix.split(".")[1]) if spec.prefix.startswith("layers") else 0
    pre = torch.full((count,), -1.5)
    pre[(2 * layer + (spec.role is Role.HC_FFN_BASE)) % count] = 1.5
    return torch.cat([pre, torch.zeros(count), 4 * torch.eye(count).flatten()])


def trained(config: ModelConfig) -> list[ParamSpec]:
    """The parameters that gradients reach."""
    return [spec for spec in parameters(config) if spec.role not in UNTRAINED]


class StepWeights:
    """What a model built once reads: `values` by name, brought up to date by `refresh`.

    Norms and what is always float32 are the masters themselves; every matrix is a `TrainWeight`.
    """

    def __init__(self, config: ModelConfig, masters: Mapping[str, Tensor], dtype: torch.dtype):
        self.dtype, self.masters = dtype, masters
        self.values: dict[str, Weight] = {}
        self._matrices: list[tuple[ParamSpec, TrainWeight]] = []
        for spec in parameters(config):
            if spec.storage in (Storage.FLOAT, Storage.INTEGER) or len(spec.shape) == 1:
                self.values[spec.name] = masters[spec.name]
                continue
            weight = TrainWeight(masters[spec.name], detached=spec.role in INDEXER)
            self.values[spec.name] = cast("Weight", weight)
            self._matrices.append((spec, weight))

    def refresh(self, quantised: bool) -> None:
        """Take the masters' present values. With `quantised`, experts are rounded to FP4, quantisable
        linears to FP8, and both round their inputs; `wo_a` does not, by definition."""
        for spec, weight in self._matrices:
            value = self.masters[spec.name]
            quantisable = spec.storage in (Storage.EXPERT, Storage.LINEAR)
            if quantised and quantisable:
                expert = spec.storage is Storage.EXPERT
                value = round_expert(value) if expert else round_linear(value)
            elif quantised:
                value = straight(value, value.to(torch.bfloat16))
            weight.rounds_input = quantised and quantisable and spec.role is not Role.WO_A
            if spec.role is Role.EMBED:
                # The table's gradient is summed in float32.
                weight.value = straight(value, value.to(self.dtype))
            else:
                weight.value = value.to(self.dtype)


def describe(config: ModelConfig) -> str:
    """One line: how many parameters there are."""
    count = sum(spec.numel for spec in trained(config))
    return f"{count / 1e6:.2f} M parameters, {math.ceil(count * 2 / 2**20)} MiB kept"

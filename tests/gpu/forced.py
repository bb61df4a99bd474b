"""Engines with one kernel forced by `--kernel`, beside the engine that chooses for itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fourfold.core.config import CacheConfig
from fourfold.core.device import Device
from fourfold.core.request import Request, SamplingParams
from fourfold.engine.ahead import compile_ahead
from fourfold.engine.benchmark import Setting
from fourfold.engine.engine import Engine
from fourfold.engine.loading import LoadedModel, random_model
from fourfold.engine.verdicts import Verdicts
from fourfold.ops.registry import Choice
from tests.support import prompts

LENGTHS = (1, 2, 17, 33, 70, 129, 150, 400)
TOKENS = 4
PARAMS = SamplingParams(max_tokens=TOKENS, temperature=0.0, ignore_eos=True, logprobs=1)


@dataclass(frozen=True)
class Answered:
    """Of every prompt: the logits `[P, V]` float32 that its first token is chosen from, and all tokens.

    `choices` is the plan, by op.
    """

    logits: Tensor
    tokens: tuple[tuple[int, ...], ...]
    choices: dict[str, Choice]

    def error(self, other: Answered) -> Tensor:
        """How far the first logits of each prompt are from `other`'s, relative to their length."""
        return (self.logits - other.logits).norm(dim=-1) / other.logits.norm(dim=-1)


def answered(
    geometry: str,
    layers: int | None,
    device: Device,
    forced: str = "",
    lengths: Sequence[int] = LENGTHS,
    ahead: bool = False,
) -> Answered:
    """Greedy answers of a model of random weights, the same whatever is forced (`OP=NAME`).

    All prompts go into the first step; later ones are captured where the plan allows it. `ahead`: what
    the engine launches is compiled on all cores first.
    """
    kernels = dict([forced.split("=")]) if forced else {}
    setting = Setting(geometry=geometry, layers=layers, kernels=kernels)
    config = setting.engine(len(lengths), 512)
    loaded: LoadedModel = random_model(
        setting.model, setting.format, config, device, verdicts=Verdicts()
    )
    if ahead:
        compile_ahead(loaded, config)
    cache = CacheConfig(num_pages=64, enable_prefix_caching=False)
    engine = Engine(loaded, replace(config, cache=cache))
    for number, tokens in enumerate(prompts(loaded.config.vocab_size, lengths, 3)):
        engine.add(Request(str(number), tuple(tokens), PARAMS))
    kept: list[Tensor] = []
    forward = engine.runner.forward

    def noted(*given: Any) -> Any:
        placed = forward(*given)
        kept.append(placed.logits.clone())
        return placed

    engine.runner.forward = noted  # only steps that run eagerly call it
    found: dict[str, list[int]] = {str(number): [] for number in range(len(lengths))}
    for output in engine.run():
        assert output.error is None, output.error
        found[output.request_id] += output.new_token_ids
    choices = {choice.op: choice for choice in loaded.kernel_plan.choices}
    logits = kept[0].float()
    assert logits.shape[0] == len(lengths)
    assert bool(torch.isfinite(logits).all())
    return Answered(logits, tuple(map(tuple, found.values())), choices)

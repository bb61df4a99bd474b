"""From `MODEL` to a model in memory: locate, read the config, plan kernels, load, build.

Contract: everything that can be refused is refused before tensor data is read. The result carries what
was decided (config, kernel plan, quantisation, notes) so that it can be shown.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from fourfold import kernels
from fourfold.core.config import EngineConfig, ModelConfig
from fourfold.core.device import Device
from fourfold.core.errors import ConfigError
from fourfold.core.parameters import EXPERT_ROLES, parameters
from fourfold.core.tensor import Weight, named_dtype
from fourfold.dist.comm import SingleComm
from fourfold.engine.streams import beside
from fourfold.model.v4 import DeepseekV4
from fourfold.ops.catalog import OPS
from fourfold.ops.registry import KernelPlan
from fourfold.weights.amplitude import amplitude_report
from fourfold.weights.layout import WeightFormat
from fourfold.weights.loader import CheckpointPlan, load, open_checkpoint
from fourfold.weights.locate import ModelLocation
from fourfold.weights.random_weights import random_parameters

MOST_OUTLIERS = 5  # notes about weights of unusual size

Progress = Callable[[str, int, int], None]
Watch = Callable[[str, Callable[..., Any]], Callable[..., Any]]


@dataclass(frozen=True)
class LoadedModel:
    """A model ready to run, and every decision that led to it."""

    model: DeepseekV4
    config: ModelConfig
    dtype: torch.dtype
    device: Device
    kernel_plan: KernelPlan
    checkpoint: CheckpointPlan | None  # None: the weights come from no files
    notes: tuple[str, ...]
    identity: str  # of the checkpoint: what a cache's content is bound to
    weight_bytes: int  # all parameters as they lie in memory


def load_model(
    location: ModelLocation, config: EngineConfig, device: Device, progress: Progress | None = None
) -> LoadedModel:
    """Load the checkpoint at `location`. Raises `FourfoldError`s; `progress(part, done, total)` is
    told bytes."""
    if config.parallel.world_size > 1:
        raise ConfigError(
            f"tensor and expert parallel sizes above 1 (found {config.parallel.world_size}) "
            "are not supported yet: the engine runs on one device"
        )
    reading = ModelConfig.from_directory(location.directory)
    if config.num_speculative_tokens and not reading.config.num_nextn_predict_layers:
        raise ConfigError(
            "--num-speculative-tokens needs an MTP layer, and this checkpoint has none "
            "(num_nextn_predict_layers is 0)"
        )
    dtype, plan = _plan(reading.config, config, device)
    checkpoint = open_checkpoint(location.directory, reading.config, config.expert_dtype)
    loaded = load(checkpoint, device.torch_device, dtype, progress)
    notes = list(reading.notes)
    if reading.unknown_keys:
        notes.append("config.json keys not used: " + ", ".join(reading.unknown_keys))
    notes.extend(checkpoint.notes)
    outliers = amplitude_report(loaded)
    notes.extend(f"unusual weight: {outlier}" for outlier in outliers[:MOST_OUTLIERS])
    if len(outliers) > MOST_OUTLIERS:
        notes.append(f"unusual weights: {len(outliers) - MOST_OUTLIERS} more")
    _prepare(loaded, reading.config, plan)
    return LoadedModel(
        DeepseekV4(reading.config, loaded, plan, SingleComm(), beside(device.torch_device)),
        reading.config,
        dtype,
        device,
        plan,
        checkpoint,
        tuple(notes),
        identity=f"{location.directory}@{location.revision}",
        weight_bytes=sum(weight.nbytes for weight in loaded.values()),
    )


def random_model(
    model: ModelConfig,
    weights: WeightFormat,
    config: EngineConfig,
    device: Device,
    watch: Watch | None = None,
) -> LoadedModel:
    """A model of random weights, made on `device`; `weights` must be what `model` says of storage.
    `watch(op, run)` may wrap what runs each op. Raises `FourfoldError`s."""
    dtype, plan = _plan(model, config, device, watch)
    made = random_parameters(model, weights, device.torch_device, dtype, config.seed)
    _prepare(made, model, plan)
    return LoadedModel(
        DeepseekV4(model, made, plan, SingleComm(), beside(device.torch_device)),
        model,
        dtype,
        device,
        plan,
        None,
        ("random weights",),
        identity=f"random@{config.seed}",
        weight_bytes=sum(weight.nbytes for weight in made.values()),
    )


def _plan(
    model: ModelConfig, config: EngineConfig, device: Device, watch: Watch | None = None
) -> tuple[torch.dtype, KernelPlan]:
    """The dtype a model runs in, and its kernels."""
    dtype = named_dtype(model.torch_dtype if config.dtype == "auto" else config.dtype)
    ops, available = OPS, kernels.load(device)
    if watch is not None:
        ops = tuple(replace(op, body=watch(op.name, op.body)) for op in ops)
        available = tuple(replace(each, run=watch(each.op, each.run)) for each in available)
    return dtype, KernelPlan.resolve(ops, available, device, model, dtype, dict(config.kernels))


def _prepare(weights: dict[str, Weight], model: ModelConfig, plan: KernelPlan) -> None:
    """Store routed experts as the kernel chosen for them wants them."""
    for spec in parameters(model):
        if spec.role in EXPERT_ROLES:
            weights[spec.name] = plan.prepare("routed_experts", weights[spec.name])

"""From `MODEL` to a model in memory: locate, read the config, plan kernels, load, build.

Contract: everything that can be refused is refused before tensor data is read. The result carries what
was decided (config, kernel plan, quantisation, notes) so that it can be shown.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from fourfold.core.config import EngineConfig, ModelConfig
from fourfold.core.device import Device
from fourfold.core.errors import ConfigError
from fourfold.core.parameters import EXPERT_ROLES, parameters
from fourfold.core.tensor import Weight, named_dtype
from fourfold.dist.comm import SingleComm
from fourfold.engine.kernel_plan import plan_kernels, prepared_by
from fourfold.engine.streams import beside
from fourfold.engine.verdicts import Verdicts
from fourfold.model.v4 import DeepseekV4
from fourfold.ops.registry import Kernel, KernelPlan, Op
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
    verdicts: Verdicts = field(default_factory=Verdicts)  # of the selftest on this machine
    weights: Mapping[str, Weight] = field(default_factory=dict)  # the model's parameters

    @property
    def has_plain_experts(self) -> bool:
        """Whether a routed expert is stored unquantised."""
        experts = (spec.name for spec in parameters(self.config) if spec.role in EXPERT_ROLES)
        return any(isinstance(self.weights.get(name), torch.Tensor) for name in experts)


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
    dtype, plan, verdicts = _plan(reading.config, config, device)
    checkpoint = open_checkpoint(location.directory, reading.config, config.expert_dtype)
    loaded = load(checkpoint, device.torch_device, dtype, progress)
    notes = [*reading.notes, *verdicts.notes]
    if reading.unknown_keys:
        notes.append("config.json keys not used: " + ", ".join(reading.unknown_keys))
    notes.extend(checkpoint.notes)
    outliers = amplitude_report(loaded)
    notes.extend(f"unusual weight: {outlier}" for outlier in outliers[:MOST_OUTLIERS])
    if len(outliers) > MOST_OUTLIERS:
        notes.append(f"unusual weights: {len(outliers) - MOST_OUTLIERS} more")
    prepare(loaded, reading.config, plan)
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
        verdicts=verdicts,
        weights=loaded,
    )


def random_model(
    model: ModelConfig,
    weights: WeightFormat,
    config: EngineConfig,
    device: Device,
    watch: Watch | None = None,
    verdicts: Verdicts | None = None,
) -> LoadedModel:
    """A model of random weights, made on `device`; `weights` must be what `model` says of storage.
    `watch(op, run)` may wrap what runs each op; `verdicts` as in `plan_kernels`. Raises
    `FourfoldError`s."""
    dtype, plan, verdicts = _plan(model, config, device, watch, verdicts)
    made = random_parameters(model, weights, device.torch_device, dtype, config.seed)
    prepare(made, model, plan)
    return LoadedModel(
        DeepseekV4(model, made, plan, SingleComm(), beside(device.torch_device)),
        model,
        dtype,
        device,
        plan,
        None,
        ("random weights", *verdicts.notes),
        identity=f"random@{config.seed}",
        weight_bytes=sum(weight.nbytes for weight in made.values()),
        verdicts=verdicts,
        weights=made,
    )


def _plan(
    model: ModelConfig,
    config: EngineConfig,
    device: Device,
    watch: Watch | None = None,
    verdicts: Verdicts | None = None,
) -> tuple[torch.dtype, KernelPlan, Verdicts]:
    """The dtype a model runs in, its kernels, and what the selftest said of them."""
    dtype = named_dtype(model.torch_dtype if config.dtype == "auto" else config.dtype)

    def watched_op(op: Op) -> Op:
        return op if watch is None else replace(op, body=watch(op.name, op.body))

    def watched_kernel(kernel: Kernel) -> Kernel:
        return kernel if watch is None else replace(kernel, run=watch(kernel.op, kernel.run))

    plan, known = plan_kernels(
        model,
        dtype,
        device,
        config.kernels,
        verdicts=verdicts,
        op_as=watched_op,
        kernel_as=watched_kernel,
    )
    return dtype, plan, known


def prepare(weights: dict[str, Weight], model: ModelConfig, plan: KernelPlan) -> None:
    """Store matrices as the kernels chosen for them want them."""
    for spec in parameters(model):
        op = prepared_by(spec.role)
        if op is not None:
            weights[spec.name] = plan.prepare(op, weights[spec.name])

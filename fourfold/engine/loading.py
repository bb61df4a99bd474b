"""From `MODEL` to a model in memory: locate, read the config, plan kernels, load, build.

Contract: everything that can be refused is refused before tensor data is read. The result carries what
was decided (config, kernel plan, quantisation, notes) so that it can be shown.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from fourfold import kernels
from fourfold.core.config import EngineConfig, ModelConfig
from fourfold.core.device import Device
from fourfold.core.errors import ConfigError
from fourfold.core.tensor import named_dtype
from fourfold.dist.comm import SingleComm
from fourfold.model.v4 import DeepseekV4
from fourfold.ops.catalog import OPS
from fourfold.ops.registry import KernelPlan
from fourfold.weights.amplitude import amplitude_report
from fourfold.weights.loader import CheckpointPlan, load, open_checkpoint
from fourfold.weights.locate import ModelLocation

MOST_OUTLIERS = 5  # notes about weights of unusual size

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class LoadedModel:
    """A model ready to run, and every decision that led to it."""

    model: DeepseekV4
    config: ModelConfig
    dtype: torch.dtype
    device: Device
    kernel_plan: KernelPlan
    checkpoint: CheckpointPlan
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
    name = reading.config.torch_dtype if config.dtype == "auto" else config.dtype
    dtype = named_dtype(name)
    plan = KernelPlan.resolve(
        OPS, kernels.load(device), device, reading.config, dtype, dict(config.kernels)
    )
    checkpoint = open_checkpoint(location.directory, reading.config, config.expert_dtype)
    parameters = load(checkpoint, device.torch_device, dtype, progress)
    model = DeepseekV4(reading.config, parameters, plan, SingleComm())
    notes = list(reading.notes)
    if reading.unknown_keys:
        notes.append("config.json keys not used: " + ", ".join(reading.unknown_keys))
    notes.extend(checkpoint.notes)
    outliers = amplitude_report(parameters)
    notes.extend(f"unusual weight: {outlier}" for outlier in outliers[:MOST_OUTLIERS])
    if len(outliers) > MOST_OUTLIERS:
        notes.append(f"unusual weights: {len(outliers) - MOST_OUTLIERS} more")
    return LoadedModel(
        model,
        reading.config,
        dtype,
        device,
        plan,
        checkpoint,
        tuple(notes),
        identity=f"{location.directory}@{location.revision}",
        weight_bytes=sum(weight.nbytes for weight in parameters.values()),
    )

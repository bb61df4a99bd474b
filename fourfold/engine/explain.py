"""Everything that was decided about running a model on a device, with the reasons, as plain data.

    model, device, flags ─► kernel plan (kernel_plan.py) ─┐
    headers or config    ─► Resolution (quant/resolve.py) ┴─► JSON values ─► text, GET /explain

Contract: decides nothing. What is told is taken from the objects the engine itself is built from, so it is
what runs; needs no GPU and reads no tensor data. `explain_loaded` tells of a model in memory,
`explain_model` of one that would run on a device that need not be here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from fourfold import __version__
from fourfold.core.config import EngineConfig, ModelConfig
from fourfold.core.device import ARCHS, Arch, Device, Feature, Fp8Dialect, detect
from fourfold.core.errors import ConfigError, KernelError
from fourfold.core.parameters import EXPERT_ROLES, ParamSpec, Storage, parameters
from fourfold.core.tensor import accumulate_dtype, dtype_name, named_dtype
from fourfold.engine.compile import released
from fourfold.engine.explain_buffers import buffers, stored_as
from fourfold.engine.kernel_plan import ops_that_read_the_host, plan_kernels
from fourfold.engine.loading import LoadedModel
from fourfold.engine.verdicts import Verdicts
from fourfold.ops.registry import BODY, KernelPlan
from fourfold.quant.headers import PLAIN
from fourfold.quant.resolve import Resolution, resolve
from fourfold.weights.loader import open_checkpoint
from fourfold.weights.locate import ModelLocation

Explanation = dict[str, Any]


@dataclass(frozen=True)
class ExplainedModel:
    """A model whose configuration and storage are known, its tensors not being needed."""

    name: str
    config: ModelConfig
    resolution: Resolution


def model_of_geometry(geometry: str) -> ExplainedModel:
    """A released geometry stored as released. Raises `ConfigError` for an unknown name."""
    config, _ = released(geometry)
    return ExplainedModel(geometry, config, resolve(config))


def model_of_checkpoint(location: ModelLocation, engine: EngineConfig) -> ExplainedModel:
    """A checkpoint, by its headers alone. Raises `FourfoldError`s."""
    config = ModelConfig.from_directory(location.directory).config
    checkpoint = open_checkpoint(location.directory, config, engine.expert_dtype)
    return ExplainedModel(location.name, config, checkpoint.resolution)


def target_device(target: str | None) -> Device:
    """The device called so: an architecture by name, or None for the one that is here.

    Raises `ConfigError`.
    """
    if target is None:
        return detect("auto")
    if target not in ARCHS:
        raise ConfigError(f"--target {target}: no such target; there are {', '.join(ARCHS)}")
    return Device(ARCHS[target], torch.device("meta"), target)


def explain_model(
    model: ExplainedModel, device: Device, engine: EngineConfig, verdicts: Verdicts | None = None
) -> Explanation:
    """What an engine started with `engine` would decide on `device`; `verdicts` as in `plan_kernels`.
    Raises `KernelError` if a forced kernel cannot run there."""
    dtype = named_dtype(model.config.torch_dtype if engine.dtype == "auto" else engine.dtype)
    try:
        plan, known = plan_kernels(model.config, dtype, device, engine.kernels, verdicts=verdicts)
    except ImportError as error:
        raise KernelError(
            f"kernels of {device.arch.name} cannot be listed without Triton: {error}"
        ) from None
    return _explanation(model, engine, device, dtype, plan, known)


def explain_loaded(name: str, loaded: LoadedModel, engine: EngineConfig) -> Explanation:
    """What was decided about a model in memory."""
    resolution = loaded.checkpoint.resolution if loaded.checkpoint else resolve(loaded.config)
    model = ExplainedModel(name, loaded.config, resolution)
    return _explanation(
        model, engine, loaded.device, loaded.dtype, loaded.kernel_plan, loaded.verdicts
    )


def _explanation(
    model: ExplainedModel,
    engine: EngineConfig,
    device: Device,
    dtype: torch.dtype,
    plan: KernelPlan,
    verdicts: Verdicts,
) -> Explanation:
    return {
        "fourfold": __version__,
        "model": model.name,
        "target": device.arch.name,
        "device": device.name or device.arch.name,
        "dtype": dtype_name(dtype),
        "forced": dict(engine.kernels),
        "kernels": [_choice(plan, number) for number in range(len(plan.choices))],
        "bit_equality": _bit_equality(plan, model.resolution),
        "graphs": _graphs(plan, engine, device.arch, model.resolution),
        "fp8": _fp8(device.arch),
        "buffers": buffers(model.config, engine, dtype, plan, model.resolution),
        "quantisation": list(model.resolution.lines()),
        "selftest": {"counts": list(verdicts.when), "notes": list(verdicts.notes)},
    }


def _choice(plan: KernelPlan, number: int) -> dict[str, Any]:
    choice = plan.choices[number]
    return {
        "op": choice.op,
        "kernel": choice.kernel,
        "reason": choice.reason,
        "rejected": [{"kernel": name, "reason": why} for name, why in choice.rejected],
        "others": [{"kernel": name, "reason": why} for name, why in choice.others],
        "batch_invariant": choice.batch_invariant,
    }


def _has_plain_experts(resolution: Resolution) -> bool:
    decided = resolution.decisions.items()
    return any(one.scheme == PLAIN for (_, role), one in decided if role in EXPERT_ROLES)


def _bit_equality(plan: KernelPlan, resolution: Resolution) -> dict[str, Any]:
    """Whether a request gets the same bits alone, in a batch, and however its prompt is cut."""
    broken = [choice.op for choice in plan.choices if not choice.batch_invariant]
    if "routed_experts" not in broken and _has_plain_experts(resolution):
        broken.append("routed_experts")  # its kernels leave plain experts to the definition
    if not broken:
        why = "every op has a kernel, or a definition, whose result for a token has the same bits "
        why += "in every batch"
    else:
        why = "these ops run in plain torch, which may order their sums by the batch's size: "
        why += ", ".join(broken)
    return {"holds": not broken, "reason": why, "not_by": broken}


def _graphs(
    plan: KernelPlan, engine: EngineConfig, arch: Arch, resolution: Resolution
) -> dict[str, Any]:
    """Whether decode steps are captured."""
    if Feature.TRITON not in arch.features:
        return {"captured": False, "reason": "there are no graphs on a CPU"}
    if engine.enforce_eager:
        return {"captured": False, "reason": "--enforce-eager"}
    blocking = ops_that_read_the_host(plan, _has_plain_experts(resolution))
    if blocking:
        names = ", ".join(blocking)
        return {"captured": False, "reason": f"no kernel for {names}"}
    return {"captured": True, "reason": "no op of a step reads the host"}


def _fp8(arch: Arch) -> dict[str, Any]:
    """How the device reads an FP8 byte."""
    halved = arch.fp8 is Fp8Dialect.FNUZ
    used = Feature.FP8_MATRIX in arch.features
    if not used:
        reading = "there are no FP8 matrix units: codes are decoded to numbers first"
    elif halved:
        reading = (
            "an FP8 byte reads as half its value, so products are doubled for each FP8 operand"
        )
    else:
        reading = "an FP8 byte reads as its value"
    return {
        "memory": "OCP E4M3 without negative zero, on every device",
        "dialect": arch.fp8.value if used else "none",
        "matrix_units": used,
        "factor_per_operand": arch.fp8.product_factor if used else 1.0,
        "reading": reading,
    }


def tensor_lines(model: ExplainedModel, engine: EngineConfig) -> Iterator[Mapping[str, Any]]:
    """Every weight of the checkpoint: name, shape in elements, format and what decided it."""
    dtype = named_dtype(model.config.torch_dtype if engine.dtype == "auto" else engine.dtype)
    for spec in parameters(model.config):
        decision = model.resolution.of(spec)
        told = {
            "shape": list(spec.checkpoint_shape),
            "format": stored_as(spec, decision, dtype),
            "decided_by": decision.stage.value if decision else "never quantised",
            "reason": decision.reason if decision else _never(spec, dtype),
        }
        for name in spec.checkpoint_names:
            yield {"name": name, **told}


def _never(spec: ParamSpec, dtype: torch.dtype) -> str:
    if spec.storage is Storage.FLOAT:
        return f"always {dtype_name(accumulate_dtype(dtype))}"
    if spec.storage is Storage.INTEGER:
        return "integers"
    return "the model's dtype"


def chosen_kernels(explanation: Explanation) -> dict[str, str]:
    """The kernel of each op that is not run by its definition."""
    found = {each["op"]: each["kernel"] for each in explanation["kernels"]}
    return {op: kernel for op, kernel in found.items() if kernel != BODY}

"""Which kernel runs each op of a model on a device: the one resolver.

Contract: the engine, ahead-of-time compilation and `fourfold explain` all ask `plan_kernels`, so that what is
explained or compiled is what runs. Everything a choice follows from is an argument, save what the selftest
of this machine found out, which is read here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from fourfold import kernels
from fourfold.core.config import ModelConfig
from fourfold.core.device import Device, Feature
from fourfold.core.parameters import EXPERT_ROLES, LINEAR_LAYER_ROLES, Role
from fourfold.engine.verdicts import Verdicts, read_verdicts
from fourfold.ops.catalog import OPS
from fourfold.ops.registry import Kernel, KernelPlan, Op


def _same_op(op: Op) -> Op:
    return op


def _same_kernel(kernel: Kernel) -> Kernel:
    return kernel


def plan_kernels(
    model: ModelConfig,
    dtype: torch.dtype,
    device: Device,
    overrides: Mapping[str, str],
    *,
    verdicts: Verdicts | None = None,
    op_as: Callable[[Op], Op] = _same_op,
    kernel_as: Callable[[Kernel], Kernel] = _same_kernel,
) -> tuple[KernelPlan, Verdicts]:
    """The kernel of every op of `model` in `dtype` on `device`, and what the selftest said of it.

    `overrides` are kernel names by op (`--kernel`); `verdicts` None: those of this machine. `op_as` and
    `kernel_as` may wrap what runs, which changes no choice. Raises `KernelError`.
    """
    known = read_verdicts(device) if verdicts is None else verdicts
    ops = tuple(map(op_as, OPS))
    available = tuple(map(kernel_as, kernels.load(device)))
    plan = KernelPlan.resolve(
        ops,
        available,
        device,
        model,
        dtype,
        dict(overrides),
        dict(known.failed),
        installed_triton(device),
    )
    return plan, known


def installed_triton(device: Device) -> str:
    """Release of the Triton that compiles kernels for `device`, empty where none does."""
    if Feature.TRITON not in device.features:
        return ""
    import triton

    return str(triton.__version__)


def ops_that_read_the_host(plan: KernelPlan, plain_experts: bool) -> tuple[str, ...]:
    """Ops of a step that keep it from being captured; kernels leave plain experts to the definition."""
    experts = "routed_experts"
    if plain_experts and experts not in plan.reads_host:
        return (*plan.reads_host, experts)
    return plan.reads_host


def prepared_by(role: Role) -> str | None:
    """The op whose kernel says how a role's matrices are stored; None for what stays as it is loaded.

    Ops for several linear layers at once take weights as `linear` does.
    """
    if role in EXPERT_ROLES:
        return "routed_experts"
    if role is Role.WO_A:
        return "wo_a"
    return "linear" if role in LINEAR_LAYER_ROLES else None

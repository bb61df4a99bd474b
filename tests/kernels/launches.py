"""The launches an op's cases make: cases with stored weights too, and the recording of variants."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields, is_dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from fourfold import kernels
from fourfold.core.device import ARCHS, Arch, Device, Feature
from fourfold.core.tensor import QuantScheme, QuantTensor
from fourfold.kernels.variants import Variant, record
from fourfold.ops.catalog import OPS
from fourfold.ops.registry import Case, CaseMaker, Kernel, KernelPlan, Op
from fourfold.quant.fp8_block import FP8_BLOCK
from fourfold.quant.mxfp4 import MXFP4

TARGETS = tuple(arch for arch in ARCHS.values() if Feature.TRITON in arch.features)
# Arguments that a checkpoint may hold quantised, by op.
WEIGHTS: Mapping[str, tuple[str, ...]] = {
    "linear": ("weight",),
    "linears": ("weights",),
    "norm_linears": ("weights",),
    "wo_a": ("weight",),
    "shared_expert": ("w2",),
    "routed_experts": ("w1", "w2", "w3"),
    "moe": ("experts",),
}
STORED: tuple[tuple[QuantScheme, str], ...] = (
    (FP8_BLOCK, "e8m0"),
    (FP8_BLOCK, "f32"),
    (MXFP4, "e8m0"),
)


def kernels_of(arch: Arch) -> list[Kernel]:
    """What could be chosen on a device of `arch`."""
    loaded = kernels.load(Device(arch, torch.device("cpu")))
    return [kernel for kernel in loaded if kernel.needs <= arch.features]


def mapped(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """`value` with every tensor in it changed: in tuples, lists, mappings and dataclasses."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(mapped(each, change) for each in value))
    if isinstance(value, tuple | list):
        return type(value)(mapped(each, change) for each in value)
    if isinstance(value, Mapping):
        return {key: mapped(each, change) for key, each in value.items()}
    if is_dataclass(value) and not isinstance(value, type):
        parts = {f.name: mapped(getattr(value, f.name), change) for f in fields(value) if f.init}
        return replace(value, **parts)
    return value


def _stored(weight: Any, scheme: QuantScheme, scale_format: str) -> Any:
    if isinstance(weight, tuple):
        return tuple(_stored(each, scheme, scale_format) for each in weight)
    values = weight.float()
    return QuantTensor(*scheme.quantize(values, scale_format), scheme, tuple(values.shape))


def cases(op: Op, dtype: torch.dtype) -> Iterator[Case]:
    """The op's cases, and each again with its weights stored in every scheme that can hold them."""
    names = WEIGHTS.get(op.name, ())
    for case in op.cases(CaseMaker.seeded(dtype)):
        yield case
        if not names or dtype != torch.bfloat16:
            continue
        for scheme, scale_format in STORED:
            if op.name == "wo_a" and scheme is MXFP4:
                continue  # no checkpoint stores it so
            try:
                weights = {n: _stored(case.arguments[n], scheme, scale_format) for n in names}
            except ValueError:
                continue  # not a multiple of the scheme's block
            yield Case(f"{case.name}, {scheme.name} {scale_format}", {**case.arguments, **weights})


def run(kernel: Kernel, arguments: Mapping[str, Any]) -> Any:
    """One kernel as the plan would run it, the bodies serving whatever else a composite op calls."""
    plan = KernelPlan(OPS, {kernel.op: kernel}, ())
    return getattr(plan, kernel.op)(**arguments)


def op_of(kernel: Kernel) -> Op:
    return next(op for op in OPS if op.name == kernel.op)


def copied(arguments: Mapping[str, Any]) -> dict[str, Any]:
    return copy.deepcopy(dict(arguments))


@contextmanager
def zeroed() -> Iterator[None]:
    """Every `torch.empty` comes zeroed: recorded launches write nothing, and indices must be valid."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "empty", torch.zeros)
        patch.setattr(torch, "empty_like", torch.zeros_like)
        yield


def recorded(
    kernel: Kernel, arch: Arch, dtypes: Iterable[torch.dtype], most: int | None = None
) -> list[Variant]:
    """What the kernel's launches over its op's cases would compile for `arch`; no further cases are run
    once there are `most` variants."""
    with record(arch) as variants, zeroed():
        for dtype in dtypes:
            for case in cases(op_of(kernel), dtype) if dtype in kernel.dtypes else ():
                if most is not None and len(variants) >= most:
                    break
                run(kernel, copied(case.arguments))
    return list(variants)

"""Every kernel of a device against the definition of its op, and the definitions against themselves.

Contract: a kernel runs its op's cases (cases.py) with memory that was poisoned with NaN, in both dtypes;
its result must agree with the body's within the op's tolerance, and a token's result must have the same bits
when a part of the batch runs alone. Whatever a kernel raises is its failure. It knows no engine.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from fourfold import kernels
from fourfold.core.device import Device
from fourfold.core.tensor import QuantTensor, dtype_name
from fourfold.engine.selftest.cases import SAME_TOKENS, cases, tolerance
from fourfold.engine.selftest.report import Check, Outcome, raised
from fourfold.ops.catalog import OPS
from fourfold.ops.compare import difference, tensors
from fourfold.ops.registry import Case, CaseMaker, Kernel, KernelPlan, Op

KERNELS, DEFINITIONS = "kernels against definitions", "definitions, float32 against float64"
DTYPES = (torch.bfloat16, torch.float32)
_POISON_BLOCKS, _POISON_ITEMS = 64, 1 << 20
_FLIPPED = 0.02  # of integers may differ between float32 and float64: codes and choices at a tie
_WEIGHTS = ("w1", "w2", "w3", "weight")


def poison(device: torch.device) -> None:
    """Leave NaN in the memory that the next allocations get, so that what is not written shows."""
    if device.type != "cpu":
        blocks = [
            torch.full((_POISON_ITEMS,), float("nan"), device=device) for _ in range(_POISON_BLOCKS)
        ]
        del blocks


def is_alive(device: torch.device) -> bool:
    """Whether the device still answers: after an illegal access it does not, until the process ends."""
    try:
        return float(torch.ones(2, device=device).sum()) == 2.0
    except RuntimeError:
        return False


def available(device: Device) -> tuple[Kernel, ...]:
    """All kernels whose needs the device meets."""
    return tuple(k for k in kernels.load(device) if k.needs <= device.features)


def check_kernels(
    device: Device,
    found: tuple[Kernel, ...],
    supports: Mapping[tuple[str, str], str],
    dtypes: tuple[torch.dtype, ...] = DTYPES,
) -> Iterator[Check]:
    """A check for each of `found`; `supports` says why some cannot be built here."""
    ended = None
    for kernel in found:
        name = f"{kernel.op}={kernel.name}"
        why = supports.get((kernel.op, kernel.name)) or ended
        if why:
            yield Check(KERNELS, name, Outcome.SKIPPED, why)
            continue
        began = time.perf_counter()
        fault = check_kernel(kernel, device.torch_device, dtypes)
        took = time.perf_counter() - began
        if fault is None:
            yield Check(KERNELS, name, Outcome.PASSED, seconds=took)
            continue
        yield Check(KERNELS, name, Outcome.FAILED, fault, took, (kernel.op, kernel.name))
        if not is_alive(device.torch_device):
            ended = f"the device stopped answering after {name}: run the selftest again"


def check_kernel(
    kernel: Kernel, device: torch.device, dtypes: tuple[torch.dtype, ...] = DTYPES
) -> str | None:
    """What is wrong with a kernel, in a line; None if nothing is."""
    op = next(each for each in OPS if each.name == kernel.op)
    for dtype in dtypes:
        if dtype not in kernel.dtypes:
            continue
        for case in cases(op, CaseMaker.seeded(dtype, str(device))):
            try:
                fault = _check_case(op, kernel, case, dtype, device)
            except Exception as error:  # noqa: BLE001  # whatever it raises is the kernel's failure
                fault = raised(error)
            if fault is not None:
                return f"{case.name}, {dtype_name(dtype)}: {fault}"
    return None


def _check_case(
    op: Op, kernel: Kernel, case: Case, dtype: torch.dtype, device: torch.device
) -> str | None:
    plan = KernelPlan(OPS, {op.name: kernel}, ())
    expected = run(KernelPlan.bodies(OPS), op, case.arguments)
    allowed = tolerance(op, kernel.name, case, dtype)
    for way, arguments in ways(kernel, case.arguments):
        poison(device)
        got = run(plan, op, arguments)
        fault = difference(got, expected, allowed)
        if fault is not None:
            return fault + way
        fault = _part_alone(plan, op, arguments, got) if kernel.batch_invariant else None
        if fault is not None:
            return fault + way
    return None


def ways(kernel: Kernel, arguments: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The arguments as they are, and with weights stored as the kernel wants them."""
    yield "", arguments
    stored = {name: arguments[name] for name in _WEIGHTS if name in arguments}
    if kernel.prepare is None or not any(isinstance(w, QuantTensor) for w in stored.values()):
        return
    copied = {name: copy.deepcopy(weight) for name, weight in stored.items()}
    yield (
        " (prepared weights)",
        {**arguments, **{name: kernel.prepare(w) for name, w in copied.items()}},
    )


def run(plan: KernelPlan, op: Op, arguments: Mapping[str, Any]) -> list[Any]:
    """The result, and what was written in place."""
    own = copy.deepcopy(dict(arguments))
    out = getattr(plan, op.name)(**own)
    written = [own[name] for name in op.writes]
    return [*([] if out is None else [out]), *written]


def _part_alone(
    plan: KernelPlan, op: Op, arguments: Mapping[str, Any], whole: list[Any]
) -> str | None:
    """What is wrong if the batch's later tokens get other bits without the earlier ones."""
    for part, own in parts(op, arguments):
        pairs = zip(tensors(run(plan, op, own)), tensors(whole), strict=True)
        if not all(_same_bits(a, b[part]) for a, b in pairs):
            return "a token's result depends on the batch it is in"
    return None


def parts(op: Op, arguments: Mapping[str, Any]) -> Iterator[tuple[slice, Mapping[str, Any]]]:
    """Parts of a batch, where tokens can be told apart and the kernels promise equal bits."""
    names = SAME_TOKENS.get(op.name, ())
    count = arguments[names[0]].shape[0] if names else 0
    # Experts with plain weights run by the definition, whose products promise nothing.
    weight = {"routed_experts": "w1", "shared_expert": "w2"}.get(op.name)
    if count < 2 or (weight and not isinstance(arguments[weight], QuantTensor)):
        return
    for part in (slice(count // 2, count // 2 + 1), slice(1, count)):
        yield part, {**arguments, **{name: arguments[name][part] for name in names}}


def _same_bits(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.nan_to_num(), b.nan_to_num()) and torch.equal(a.isnan(), b.isnan())


def check_definitions(device: torch.device) -> Iterator[Check]:
    """Every op's body in float32 against itself in float64: the arithmetic of this torch, here."""
    bodies = KernelPlan.bodies(OPS)
    for op in OPS:
        began = time.perf_counter()
        fault = None
        both = (op.cases(CaseMaker.seeded(d, str(device))) for d in (torch.float32, torch.float64))
        for narrow, wide in zip(*both, strict=True):
            fault = fault or _precision(op, bodies, narrow, wide)
        outcome = Outcome.FAILED if fault else Outcome.PASSED
        yield Check(DEFINITIONS, op.name, outcome, fault or "", time.perf_counter() - began)


def _precision(op: Op, bodies: KernelPlan, narrow: Case, wide: Case) -> str | None:
    pairs = zip(
        tensors(run(bodies, op, narrow.arguments)),
        tensors(run(bodies, op, wide.arguments)),
        strict=True,
    )
    for a, b in pairs:
        if not a.dtype.is_floating_point:
            if a.dtype != b.dtype or a.shape != b.shape:
                continue  # rows of another dtype
            if float((a != b).double().mean()) >= _FLIPPED:
                return f"{narrow.name}: integers differ"
            continue
        good = torch.isfinite(b)
        if not bool(good.any()):
            continue
        bound = op.tolerance.of(torch.float32) * float(b[good].abs().max())
        if float((a.double() - b.double())[good].abs().max()) > bound:
            return f"{narrow.name}: further off than {op.tolerance.float32:.2g}"
    return None

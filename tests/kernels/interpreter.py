"""Runs kernels on the CPU: Triton's interpreter, with what it gets wrong put right.

Triton decides when it is imported whether it interprets, so a test file is run a second time, in a
process of its own, with the interpreter on: `run(__file__)`. Its tests marked `interpreted` are
skipped outside. The interpreter drops a carry in float casts, multiplies bfloat16 as integers and
takes no integer argument as a loop's bound under numpy 2.4; `repair` replaces these three, and lets
kernels wait for the one ahead of them, which here has always ended.
"""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fourfold.ops.catalog import OPS
from fourfold.ops.registry import CaseMaker, Kernel, KernelPlan
from tests.kernels.given import assert_spared
from tests.kernels.hastened import hasten
from tests.ops.test_definitions import tensors

INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"
interpreted = pytest.mark.skipif(not INTERPRETING, reason="runs in the interpreter's own process")
driver = pytest.mark.skipif(INTERPRETING, reason="starts the interpreter's process")


def run(path: str, which: str = "not slow") -> None:
    """Run the tests of one file with the interpreter on, those of the marks `which`; fail with their
    output."""
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-m",
        which,
        path,
    ]
    env = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    # None of the plugins is used there, and together they take a second to load.
    env |= {"TRITON_INTERPRET": "1", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-12000:] + done.stderr[-4000:]


def _torch_dtype(kind: Any) -> torch.dtype:
    names = {"fp8e4nv": "float8_e4m3fn", "fp8e4b8": "float8_e4m3fnuz", "fp8e5": "float8_e5m2"}
    names |= {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32", "fp64": "float64"}
    return getattr(torch, names[kind.name])


def repair() -> None:
    """Put the interpreter's casts, bfloat16 products and loop bounds right."""
    from triton.language import float32
    from triton.runtime import interpreter as triton_interpreter

    def convert(data: Any, source: Any, target: Any, rounding: Any) -> Any:
        bits = f"uint{target.primitive_bitwidth}"
        raw = torch.from_numpy(np.ascontiguousarray(data).view(np.uint8).copy())
        values = raw.view(_torch_dtype(source))
        if target.primitive_bitwidth == 8:
            limit = torch.finfo(_torch_dtype(target)).max
            values = values.float().clamp(-limit, limit)
        codes = values.to(_torch_dtype(target)).view(torch.uint8).numpy()
        return codes.view(bits).reshape(np.shape(data))

    product = triton_interpreter.InterpreterBuilder.create_dot

    def widened(handle: Any) -> Any:
        if handle.dtype.name != "bf16":
            return handle
        bits = handle.data.astype(np.uint32) << 16
        return triton_interpreter.TensorHandle(bits.view(np.float32), float32)

    def create_dot(self: Any, a: Any, b: Any, d: Any, precision: Any, imprecise: Any) -> Any:
        return product(self, widened(a), widened(b), d, precision, imprecise)

    patch = triton_interpreter._patch_lang_tensor

    def patched(kind: Any, scope: Any) -> None:
        patch(kind, scope)
        scope.set_attr(kind, "__index__", lambda self: int(self.handle.data.item()))

    # Not the module of that name that is found as an attribute: Triton makes two.
    for name in ("gdc_wait", "gdc_launch_dependents"):
        setattr(sys.modules["triton.language.extra.cuda"], name, lambda: None)
    triton_interpreter._convert_float = convert
    triton_interpreter.InterpreterBuilder.create_dot = create_dot
    triton_interpreter._patch_lang_tensor = patched


if INTERPRETING:
    repair()
    hasten()


@contextmanager
def poisoned() -> Iterator[None]:
    """Every `torch.empty` comes full of NaN, or of large numbers, so that what is not written shows."""
    empty, empty_like = torch.empty, torch.empty_like

    def fill(tensor: Tensor) -> Tensor:
        if tensor.dtype.is_floating_point:
            return tensor.fill_(float("nan"))
        return tensor.fill_(True if tensor.dtype == torch.bool else 0x55)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "empty", lambda *a, **k: fill(empty(*a, **k)))
        patch.setattr(torch, "empty_like", lambda *a, **k: fill(empty_like(*a, **k)))
        yield


def assert_close(got: Any, expected: Any, tolerance: float, where: str = "") -> None:
    """Floats within `tolerance` of the largest finite magnitude, NaN where NaN; the rest equal."""
    for a, b in zip(tensors(got), tensors(expected), strict=True):
        assert (a.dtype, a.shape) == (b.dtype, b.shape), where
        if not a.dtype.is_floating_point:
            assert torch.equal(a, b), (where, a, b)
            continue
        finite = torch.isfinite(b)
        assert torch.equal(torch.isnan(a), torch.isnan(b)), where
        assert torch.equal(a[~finite].nan_to_num(), b[~finite].nan_to_num()), where
        bound = tolerance * float(b[finite].abs().max()) if finite.any() else 0.0
        error = float((a.double() - b.double())[finite].abs().max()) if finite.any() else 0.0
        assert error <= bound, (where, error, bound)


def assert_equals_body(
    kernel: Kernel, dtypes: Iterable[torch.dtype] = (torch.float32, torch.bfloat16)
) -> None:
    """The kernel against its op's body over the op's cases, outputs poisoned first; what it is given
    and neither writes nor consumes stays as it is."""
    op = next(o for o in OPS if o.name == kernel.op)
    plan = KernelPlan(OPS, {kernel.op: kernel}, ())
    bodies = KernelPlan.bodies(OPS)
    for dtype in dtypes:
        for case in op.cases(CaseMaker.seeded(dtype)):
            ours, theirs = (copy.deepcopy(dict(case.arguments)) for _ in range(2))
            expected = getattr(bodies, op.name)(**theirs)
            with poisoned():
                got = getattr(plan, op.name)(**ours)
            if op.writes:
                got = [got, *(ours[w] for w in op.writes)]
                expected = [expected, *(theirs[w] for w in op.writes)]
            assert_spared(op, ours, theirs)
            where = f"{kernel.op}={kernel.name} {case.name} {dtype}"
            assert_close(got, expected, op.tolerance.of(dtype), where)


def body(name: str) -> Any:
    """The definition of the op called `name`."""
    return getattr(KernelPlan.bodies(OPS), name)

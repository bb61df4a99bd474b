"""AMD machine code of every kernel, executed by tools/gcn and compared with the op's body.

gfx942 reads FP8 in the FNUZ dialect and gfx950 in the OCP one; both must give the body's numbers. The
kernels, the launches and the inputs are those of the ops' cases: a new kernel is here by itself.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from fourfold.core.device import ARCHS
from fourfold.ops.catalog import OPS
from fourfold.ops.registry import Kernel, KernelPlan, Op

pytest.importorskip("triton", reason="Triton is not installed")
from triton import knobs

from tests.kernels.emulated import emulated
from tests.kernels.interpreter import assert_close, poisoned
from tests.kernels.launches import cases, copied, kernels_of, run
from tests.kernels.test_compile import CACHE

pytestmark = pytest.mark.full

BODIES = KernelPlan.bodies(OPS)


@pytest.fixture(autouse=True)
def cache() -> Iterator[None]:
    with knobs.cache.scope():
        knobs.cache.dir = str(CACHE)
        yield


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
@pytest.mark.parametrize(
    ("name", "most"),
    [("gfx942", None), ("gfx950", 1), pytest.param("gfx950", None, marks=pytest.mark.slow)],
    ids=["gfx942", "gfx950 first", "gfx950"],
)
def test_machine_code_gives_what_the_body_gives(name: str, most: int | None, op: Op) -> None:
    """Of all an op's cases, or of its first."""
    arch, dtype = ARCHS[name], torch.bfloat16
    for kernel in (k for k in kernels_of(arch) if k.op == op.name):
        with emulated(arch) as counts:
            check(kernel, op, dtype, counts, most)
        assert counts, f"{kernel.op}={kernel.name} launched nothing over its op's cases"


def check(
    kernel: Kernel, op: Op, dtype: torch.dtype, counts: dict[str, int], most: int | None
) -> None:
    """One kernel against its op's body, until `most` functions have run."""
    for case in cases(op, dtype):
        if most is not None and len(counts) >= most:
            break
        ours, theirs = copied(case.arguments), copied(case.arguments)
        expected = getattr(BODIES, kernel.op)(**theirs)
        with poisoned():
            got = run(kernel, ours)
        if op.writes:
            got = [got, *(ours[w] for w in op.writes)]
            expected = [expected, *(theirs[w] for w in op.writes)]
        where = f"{kernel.op}={kernel.name} {case.name}"
        assert_close(got, expected, op.tolerance.of(dtype), where)

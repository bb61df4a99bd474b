"""Every kernel of every op on a GPU with inputs that are NaN or the largest there are, memory full of NaN."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from fourfold.core.device import detect
from fourfold.engine.selftest.cases import tolerance
from fourfold.engine.selftest.kernels import available, poison
from fourfold.ops.catalog import OPS
from fourfold.ops.registry import CaseMaker, Kernel
from tests.kernels.inputs import faults

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"),
]
DEVICE = "cuda"


def here() -> tuple[Kernel, ...]:
    return available(detect(DEVICE)) if torch.cuda.is_available() else ()


@contextmanager
def poisoned() -> Iterator[None]:
    poison(torch.device(DEVICE))
    yield


@pytest.mark.parametrize("kernel", here(), ids=lambda k: f"{k.op}={k.name}")
def test_kernel_agrees_with_its_body_on_what_is_rare(kernel: Kernel) -> None:
    """The ops' own cases, whose weights are plain: in bfloat16, every tensor of floats spoilt in turn."""
    op = next(o for o in OPS if o.name == kernel.op)
    found = []
    for case in op.cases(CaseMaker.seeded(torch.bfloat16, DEVICE)):
        allowed = tolerance(op, kernel.name, case, torch.bfloat16)
        found += [f"{case.name}: {f}" for f in faults(kernel, op, case, allowed, poisoned, True)]
    assert not found, "\n".join(found)

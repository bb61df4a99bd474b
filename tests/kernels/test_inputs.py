"""Every kernel of every op on what it meets rarely: memory full of NaN, inputs that are NaN or the largest
there are, and ids that are no ids. Built on the ops' own cases, so that a new op is checked as it is."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from fourfold.core.config import CacheConfig
from fourfold.core.device import ARCHS, Feature, detect
from fourfold.core.errors import FourfoldError
from fourfold.core.request import Request, SamplingParams
from fourfold.engine.benchmark import Setting
from fourfold.engine.engine import Engine
from fourfold.engine.loading import random_model
from fourfold.engine.selftest.cases import SAME_TOKENS, tolerance
from fourfold.ops.compare import tensors
from fourfold.ops.registry import Case, CaseMaker, Kernel
from tests.kernels import interpreter, launches
from tests.kernels.inputs import faults
from tests.kernels.interpreter import driver, interpreted, poisoned

pytestmark = pytest.mark.full
DTYPES = (torch.bfloat16, torch.float32)


def kernels_for(*archs: str) -> list[Any]:
    """The kernels of these architectures that are not for one vendor alone, each once."""
    found: dict[tuple[str, str], Kernel] = {}
    for name in archs:
        needed = Feature.CPU if name == "cpu" else Feature.TRITON
        if needed is Feature.TRITON:
            pytest.importorskip("triton", reason="Triton is not installed")
        for kernel in launches.kernels_of(ARCHS[name]):
            module = getattr(kernel.run, "func", kernel.run).__module__
            if ".nvidia." not in module:
                found.setdefault((kernel.op, kernel.name), kernel)
    return [pytest.param(k, id=f"{k.op}={k.name}") for k in found.values()]


def smallest(kernel: Kernel, dtype: torch.dtype) -> Case:
    """The smallest of the op's cases, but one token can spoil no other."""
    op = launches.op_of(kernel)
    of_tokens = SAME_TOKENS.get(op.name, ())[:1]

    def size(case: Case) -> tuple[bool, int]:
        alone = any(case.arguments[name].shape[0] < 2 for name in of_tokens)
        return alone, sum(t.numel() for t in tensors(dict(case.arguments)))

    return min(op.cases(CaseMaker.seeded(dtype)), key=size)


def check(kernel: Kernel, case: Case, dtype: torch.dtype, least: bool = True) -> None:
    op = launches.op_of(kernel)
    allowed = tolerance(op, kernel.name, case, dtype)
    found = list(faults(kernel, op, case, allowed, poisoned, least))
    assert not found, (case.name, found)


@driver
@pytest.mark.parametrize("kernel", kernels_for("cpu"))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_kernels_for_a_cpu(kernel: Kernel, dtype: torch.dtype) -> None:
    for case in launches.cases(launches.op_of(kernel), dtype):
        check(kernel, case, dtype, least=dtype == torch.bfloat16)


# With casts to FP8 and without; the interpreter has no FNUZ casts, whose machine code is executed instead
# (tests/kernels/test_amd.py).
PORTABLE = ("sm_89", "gfx90a")


@driver
def test_in_the_interpreter() -> None:
    interpreter.run(__file__)


@driver
@pytest.mark.slow
def test_all_in_the_interpreter() -> None:
    interpreter.run(__file__, "slow")


@interpreted
@pytest.mark.parametrize("kernel", kernels_for(PORTABLE[0]))
def test_portable_kernels(kernel: Kernel) -> None:
    check(kernel, smallest(kernel, torch.bfloat16), torch.bfloat16, least=False)


@interpreted
@pytest.mark.slow
@pytest.mark.parametrize("kernel", kernels_for(*PORTABLE))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_portable_kernels_on_all_cases(kernel: Kernel, dtype: torch.dtype) -> None:
    for case in launches.cases(launches.op_of(kernel), dtype):
        check(kernel, case, dtype, least=dtype == torch.bfloat16)


VOCABULARY = 640  # of the geometry "tiny"


def asked(where: str, token: int) -> Request:
    """A request with `token` among what it names tokens for."""
    if where == "prompt_token_ids":
        return Request("a", (1, token), SamplingParams(max_tokens=1))
    given: Any = {token: 1.0} if where == "logit_bias" else (token,)
    return Request("a", (1,), SamplingParams(max_tokens=1, **{where: given}))


@driver
@pytest.mark.parametrize("token", [-1, VOCABULARY, 1 << 31, 1 << 62])
@pytest.mark.parametrize("where", ["prompt_token_ids", "stop_token_ids", "logit_bias"])
def test_ids_that_are_no_ids_reach_no_kernel(where: str, token: int) -> None:
    """All ids that come from outside: a request's. A checkpoint's table of experts by token is refused as
    it is read (tests/weights/test_refusals.py); slots, pages and rows are the engine's own, and −1 is
    nowhere in all of them, which the ops' cases hold; ids of other shards' experts count for nothing."""
    ran: list[str] = []

    def watch(op: str, run: Any) -> Any:
        def noted(*given: Any, **named: Any) -> Any:
            ran.append(op)
            return run(*given, **named)

        return noted

    setting = Setting(geometry="tiny", layers=None, device="cpu")
    config = replace(setting.engine(2, 64), cache=CacheConfig(num_pages=4))
    engine = Engine(
        random_model(setting.model, setting.format, config, detect("cpu"), watch), config
    )
    assert engine.loaded.config.vocab_size == VOCABULARY
    with pytest.raises(FourfoldError, match=str(token)):
        engine.add(asked(where, token))
    assert list(engine.run()) == []
    assert not ran
    engine.add(Request("b", (1, VOCABULARY - 1), SamplingParams(max_tokens=1)))
    assert list(engine.run())[-1].error is None
    assert "embed" in ran

"""Runs a selftest: kernels, then the engine and long contexts with the kernels that passed.

    kernels against definitions ─► verdicts ─► engine of FP4 experts, engine of FP8 experts ─► report

Contract: every check ends in a `Check`, whatever it raises; the run itself raises only for a device that
is not there or a forced kernel that cannot run. A kernel that failed is not used by what comes after, so that
one fault is told once, unless it is forced.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping

from fourfold.core.config import EngineConfig
from fourfold.core.device import Device, Feature
from fourfold.core.errors import FourfoldError
from fourfold.core.frozen import FrozenDict
from fourfold.engine.explain import explain_model, model_of_geometry
from fourfold.engine.kernel_plan import installed_triton
from fourfold.engine.selftest import canary
from fourfold.engine.selftest.ahead import compile_ahead
from fourfold.engine.selftest.invariants import Fault, Invariants, Skipped
from fourfold.engine.selftest.kernels import (
    DTYPES,
    available,
    check_definitions,
    check_kernels,
    is_alive,
)
from fourfold.engine.selftest.models import Subject, make_subject, model_config
from fourfold.engine.selftest.report import Check, Outcome, Report, raised
from fourfold.engine.verdicts import Verdicts, this_build, told_as, write_verdicts

WEIGHTS = ("native", "fp8")
_SHORT = (1, 5, 23, 60, 130)
_LENGTHS = (1, 3, 24, 65, 127, 131, 258)
_WIDE = (1, 30, 127, 130, 300, 700, 1100)

Told = Callable[[Check], None]


def run_selftest(
    device: Device,
    quick: bool = False,
    kernels: Mapping[str, str] | None = None,
    keep: bool = True,
    tell: Told = lambda check: None,
) -> Report:
    """All checks on `device`. `kernels` are forced (`--kernel`); `keep` writes what was found out about
    kernels to the user's cache; `tell` hears of every check as it ends. Raises `FourfoldError`s."""
    began = time.perf_counter()
    forced: Mapping[str, str] = FrozenDict(kernels or {})
    checks: list[Check] = []
    for check in _all(device, quick, forced, checks):
        checks.append(check)
        tell(check)
    failed = _failed(checks)
    kept = write_verdicts(device, failed) if keep and available(device) else ""
    engine = EngineConfig("flash", kernels=forced)
    return Report(
        device=device.name or device.arch.name,
        arch=device.arch.name,
        quick=quick,
        checks=tuple(checks),
        explanation=explain_model(
            model_of_geometry("flash"), device, engine, _verdicts(device, checks)
        ),
        build=this_build(),
        seconds=time.perf_counter() - began,
        kept=kept,
    )


def _failed(checks: list[Check]) -> dict[tuple[str, str], str]:
    return {c.kernel: c.detail for c in checks if c.outcome is Outcome.FAILED and c.kernel}


def _verdicts(device: Device, checks: list[Check]) -> Verdicts:
    """What this run found out about kernels."""
    failed = {key: told_as(device.name, why) for key, why in _failed(checks).items()}
    return Verdicts(FrozenDict(failed), when=(f"{device.name}, just now",))


def _all(
    device: Device, quick: bool, forced: Mapping[str, str], done: list[Check]
) -> Iterator[Check]:
    found, triton = available(device), installed_triton(device)
    dtypes = DTYPES[:1] if quick else DTYPES
    config = model_config("native", wide=device.torch_device.type != "cpu")
    refused = {
        (k.op, k.name): why
        for k in found
        if (why := k.supports(config) or device.arch.why_bad(k.op, k.name, triton))
    }
    if found and Feature.TRITON in device.features:
        usable = tuple(k for k in found if (k.op, k.name) not in refused)
        yield _run(
            "kernels", "compiled ahead", lambda: compile_ahead(device, usable, dtypes, WEIGHTS)
        )
    yield from check_definitions(device.torch_device)
    yield from check_kernels(device, found, refused, dtypes)
    verdicts = _verdicts(device, done)
    for weights in WEIGHTS:
        if not is_alive(device.torch_device):
            yield Check(f"engine, {weights}", "all", Outcome.SKIPPED, "the device does not answer")
            continue
        yield from _engine(device, weights, quick, forced, verdicts)


def _engine(
    device: Device, weights: str, quick: bool, forced: Mapping[str, str], verdicts: Verdicts
) -> Iterator[Check]:
    group = f"engine, {weights} weights"
    began = time.perf_counter()
    try:
        subject = make_subject(weights, device, verdicts, tuple(forced.items()))
    except FourfoldError:
        raise
    except Exception as error:  # noqa: BLE001  # a model that cannot be made is a finding
        yield _raised(group, "a random model", error, began)
        return
    what = "equal bits" if subject.exact else f"within {subject.tolerance:.0e}"
    took = time.perf_counter() - began
    yield Check(group, "a random model", Outcome.PASSED, f"{subject.name}; {what}", took)
    # The second model differs in its experts alone: on a CPU the boundaries are crossed once.
    brief = quick and weights != WEIGHTS[0] and not subject.exact
    for name, check in _checks(subject, quick, brief):
        yield _run(group, name, check)


def _checks(subject: Subject, quick: bool, brief: bool) -> Iterator[tuple[str, Callable[[], str]]]:
    lengths = _WIDE if subject.exact else _SHORT if quick else _LENGTHS
    budget = 333 if subject.exact else 33
    invariants = Invariants(subject, lengths, budget)
    if brief:
        yield "batched = alone", invariants.batched
        yield "chunked = one-shot", invariants.chunked
        return
    yield from invariants.checks(quick)
    for name, check in canary.checks(subject, quick):
        yield f"long context: {name}", check


def _run(group: str, name: str, check: Callable[[], str]) -> Check:
    began = time.perf_counter()
    try:
        detail = check()
    except Skipped as why:
        return Check(group, name, Outcome.SKIPPED, str(why), time.perf_counter() - began)
    except Fault as fault:
        return Check(group, name, Outcome.FAILED, str(fault), time.perf_counter() - began)
    except Exception as error:  # noqa: BLE001  # a check must not end the others
        return _raised(group, name, error, began)
    return Check(group, name, Outcome.PASSED, detail, time.perf_counter() - began)


def _raised(group: str, name: str, error: Exception, began: float) -> Check:
    return Check(group, name, Outcome.FAILED, raised(error), time.perf_counter() - began)

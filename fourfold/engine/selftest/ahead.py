"""Compiles what a selftest is going to launch, on all cores, before it starts.

Contract: an aid to speed alone. Launches are recorded without a device (kernels/variants.py) and compiled
into Triton's own cache, where the checks find them; what is missed here is compiled when it is launched.
Without Triton there is nothing to do.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

import torch

from fourfold.core.config import CacheConfig, EngineConfig
from fourfold.core.device import Device, Feature
from fourfold.engine.compile import Collector, steps, subject_of
from fourfold.engine.selftest.cases import cases
from fourfold.engine.selftest.kernels import parts, run, ways
from fourfold.engine.selftest.models import model_config
from fourfold.ops.catalog import OPS
from fourfold.ops.registry import CaseMaker, Kernel, KernelPlan
from fourfold.weights.layout import FORMATS

if TYPE_CHECKING:
    from fourfold.kernels.variants import Variant

_TOKENS = (1, 2, 3, 5, 7, 8, 20, 30, 64, 127, 130, 300, 333, 512, 700, 1100, 2100)


def compile_ahead(
    device: Device,
    found: Iterable[Kernel],
    dtypes: Iterable[torch.dtype],
    weights: Iterable[str],
) -> str:
    """Compile for `device` what checks of the kernels `found` and of models stored as `weights` launch;
    what there is to say about it."""
    if Feature.TRITON not in device.features:
        return ""
    from fourfold.kernels.compile_many import compile_all

    variants: dict[Variant, None] = {}
    missed = sum(map(int, _of_cases(device, found, tuple(dtypes), variants)))
    for name in weights:
        variants.update(dict.fromkeys(_of_model(device, name)))
    done = compile_all(variants, device.arch, None, os.cpu_count() or 1)
    cached, failed = sum(c.cached for c in done), sum(not c.ok for c in done)
    words = f"{len(done)} variants, {cached} of them compiled before"
    words += f", {failed} did not compile" if failed else ""
    return words + (f", {missed} cases not recorded" if missed else "")


def _of_cases(
    device: Device,
    found: Iterable[Kernel],
    dtypes: tuple[torch.dtype, ...],
    variants: dict[Variant, None],
) -> Iterator[bool]:
    """Record the launches of every case into `variants`; whether one could not be recorded."""
    from fourfold.kernels.variants import record

    with record(device.arch) as recorded:
        for kernel in found:
            op = next(each for each in OPS if each.name == kernel.op)
            plan = KernelPlan(OPS, {op.name: kernel}, ())
            for dtype in dtypes:
                for case in cases(op, CaseMaker.seeded(dtype)) if dtype in kernel.dtypes else ():
                    missed = False
                    try:
                        for _, arguments in ways(kernel, case.arguments):
                            run(plan, op, arguments)
                            for _, own in parts(op, arguments):
                                run(plan, op, own)
                    except Exception:  # noqa: BLE001  # results are garbage here; the check will tell
                        missed = True
                    yield missed
        variants.update(dict.fromkeys(recorded))


def _of_model(device: Device, weights: str) -> Iterator[Variant]:
    """What the engine of a selftest's model launches."""
    config = model_config(weights, wide=True)
    engine = EngineConfig(
        "selftest",
        max_num_seqs=8,
        num_speculative_tokens=3,
        cache=CacheConfig(kv_cache_dtype="fp8"),
    )
    subject = subject_of("selftest", config, FORMATS[weights], torch.bfloat16)
    collector = Collector(subject, device.arch, engine)
    yield from (each.variant for each in collector.collect(steps(engine, _TOKENS)))

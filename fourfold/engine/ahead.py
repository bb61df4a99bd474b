"""Compiles what an engine will launch before it says that it is ready.

Contract: only what Triton's cache lacks is compiled, on all cores of this machine; with a filled cache it
takes as long as recording the launches does. No request waits for a compiler afterwards.
"""

from __future__ import annotations

import os
import time

from fourfold.core.config import EngineConfig
from fourfold.core.device import Feature
from fourfold.engine.compile import META, Collector, Subject, steps, token_counts
from fourfold.engine.loading import LoadedModel


def compile_ahead(loaded: LoadedModel, config: EngineConfig) -> tuple[str, ...]:
    """Compile for `loaded` in an engine of `config`; what there is to say about it."""
    device = loaded.device
    if Feature.TRITON not in device.features or device.torch_device.type == "cpu":
        return ()
    from fourfold.kernels.compile_many import FEW, compile_all

    began = time.perf_counter()
    shapes = {name: weight.to(META) for name, weight in loaded.weights.items()}
    subject = Subject(loaded.identity, loaded.config, shapes, loaded.dtype)
    collector = Collector(subject, device.arch, config, loaded.verdicts)
    wanted = collector.collect(steps(config, token_counts(config.max_num_batched_tokens)))
    cores = len(os.sched_getaffinity(0))
    done = compile_all((each.variant for each in wanted), device.arch, processes=cores, here=FEW)
    took = time.perf_counter() - began
    new = sum(not each.cached for each in done)
    words = (f"{len(wanted)} kernel variants, {new} of them compiled now, in {took:.1f} s",)
    failed = [each for each in done if not each.ok]
    if not failed:
        return words
    names = ", ".join(sorted({each.variant.name for each in failed}))
    return (*words, f"{len(failed)} of them failed ({names}); the first: {failed[0].error}")

"""Kernels that start before the one ahead of them in the stream has ended, where the device can do that.

    after_previous(EARLY)    first of all, but for loads of weights: waits for the kernel ahead

Contract: with `early` a kernel is launched with `launch_pdl`, and every one of its programs calls
`after_previous`: what comes after it sees everything that kernels before this one wrote. Only then may
the kernel behind start, so that one may read before its own wait what is older than this kernel. Results
are the same either way.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from fourfold.core.device import Feature
from fourfold.ops.registry import Kernel


@triton.jit
def after_previous(EARLY: tl.constexpr):
    """Wait for the kernel ahead to be complete, then let the one behind start."""
    if EARLY:
        gdc_wait()
        gdc_launch_dependents()


def launch(early: bool) -> dict[str, bool]:
    """Launch options of a kernel that takes `early`."""
    return {"launch_pdl": True} if early else {}


def also_early(*kernels: Kernel) -> tuple[Kernel, ...]:
    """The kernels, and each again with `early=True` for devices that can start kernels early."""
    needs = frozenset({Feature.EARLY_LAUNCH})
    early = (
        replace(
            each,
            name=f"{each.name}_early",
            run=partial(each.run, early=True),
            needs=each.needs | needs,
            priority=each.priority + 1,
        )
        for each in kernels
    )
    return (*kernels, *early)

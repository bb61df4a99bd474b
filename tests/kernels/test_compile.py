"""Every kernel compiles for every target, within the target's resources, on a machine without a GPU.

What is compiled is what launches ask for: those of the ops' cases, and those of a whole model of released
shapes, with every kernel that can be forced. All of it is compiled with all arguments known to be multiples
of 16; the other binary, with none known to be, once for every form of a kernel (its types, flags and launch
options), of variants that differ in sizes alone for one. `make test` compiles every variant of the cases
for one target of each vendor and one an op for the others; `make test-all` all of it.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from fourfold.core.config import EngineConfig
from fourfold.core.device import ARCHS, Arch, Feature
from fourfold.ops.catalog import OPS
from fourfold.ops.registry import Kernel

pytest.importorskip("triton", reason="Triton is not installed")
from triton import knobs

from fourfold.engine.compile import (
    Collector,
    Wanted,
    steps,
    subject_of_geometry,
)
from fourfold.kernels.compile import Compiled, compile_variant
from fourfold.kernels.targets import read_assembly
from fourfold.kernels.variants import DIVISIBLE, Variant, entry_points
from tests.kernels.launches import TARGETS, kernels_of, recorded

pytestmark = pytest.mark.full

CACHE = Path(__file__).resolve().parents[2] / "build" / "kernels"
IN_FULL = ("sm_90", "gfx942")
ONCE = ("gfx1151", "gfx1201")  # one variant an op
NAMES = [arch.name for arch in TARGETS if arch.name not in ONCE]
OP_NAMES = [op.name for op in OPS]
# A thread's spilt registers and local arrays, in bytes; more costs more than what it is spilt for. Where
# nothing is known to be divisible loads are single bytes, each with an address: that no released shape asks
# for, and it may be slow.
MOST_SCRATCH, MOST_SCRATCH_UNALIGNED = 576, 4096


@pytest.fixture(autouse=True)
def cache() -> Iterator[None]:
    """Binaries are kept between runs: Triton finds them by the kernel's source."""
    with knobs.cache.scope():
        knobs.cache.dir = str(CACHE)
        yield


def of_cases(arch: Arch, op: str, dtypes: Sequence[torch.dtype]) -> list[Variant]:
    """What the op's kernels compile over its cases, without regard to divisibility."""
    found = [v for k in made_for(arch) if k.op == op for v in recorded(k, arch, dtypes)]
    return list(dict.fromkeys(found))


def made_for(arch: Arch) -> list[Kernel]:
    """What could be chosen there, less what is for GPUs that cannot cast to FP8 where they can."""
    casts = Feature.FP8_MATRIX in arch.features
    return [k for k in kernels_of(arch) if not (casts and k.name == "triton_decoded")]


def _collected(arch: Arch, geometry: str, forced: dict[str, str], counts: set[int]) -> list[Wanted]:
    subject, engine = subject_of_geometry(geometry), EngineConfig(model=geometry, kernels=forced)
    collector = Collector(subject, arch, engine)
    return collector.collect(steps(engine, sorted(counts)))


@functools.cache
def of_model(name: str, geometry: str) -> dict[str, list[Variant]]:
    """What a model of released shapes compiles, by op: a few batch sizes of every regime with the plan's
    own choice, and fewer with every kernel that can be forced instead."""
    arch, config = ARCHS[name], subject_of_geometry(geometry).config
    wanted = _collected(arch, geometry, {}, {1, 2, 17, 48, 129, 4096, 8192})
    chosen = {each.op for each in wanted}
    for kernel in made_for(arch):
        usable = kernel.supports(config) is None and torch.bfloat16 in kernel.dtypes
        if usable and f"{kernel.op}={kernel.name}" not in chosen:
            wanted += _collected(arch, geometry, {kernel.op: kernel.name}, {1, 48, 4096})
    found: dict[str, list[Variant]] = {}
    for each in wanted:
        found.setdefault(each.op.partition("=")[0], []).append(each.variant)
    return {op: list(dict.fromkeys(variants)) for op, variants in found.items()}


def form(variant: Variant) -> tuple[Any, ...]:
    """All but the sizes that a variant is made for."""
    flags = tuple(
        (path, c) for path, c in variant.constants if c is None or isinstance(c, bool | str)
    )
    options = dict(variant.options)
    launch = options["num_warps"], options["num_stages"]
    return variant.module, variant.name, variant.signature, flags, launch


def both_ways(variants: Sequence[Variant]) -> list[Variant]:
    """Each with everything known to be divisible, and every form of them with nothing known."""
    unknown = {form(v): v.divisible(False) for v in variants}
    return list(dict.fromkeys([*(v.divisible(True) for v in variants), *unknown.values()]))


def mostly_known(variants: Sequence[Variant]) -> list[Variant]:
    """Each with everything known to be divisible, and one of each function with nothing known."""
    unknown = {v.name: v.divisible(False) for v in variants}
    return list(dict.fromkeys([*(v.divisible(True) for v in variants), *unknown.values()]))


def most_scratch(variant: Variant) -> int:
    known = any(DIVISIBLE in facts for _, facts in variant.known)
    return MOST_SCRATCH if known else MOST_SCRATCH_UNALIGNED


def registers(compiled: Compiled) -> int:
    return compiled.resources.registers if compiled.resources else 0


def assert_compiled(variants: Sequence[Variant], arch: Arch) -> list[Compiled]:
    results = [compile_variant(variant, arch) for variant in variants]
    faults = [f"{r.variant.name}: {r.error}\n  {r.variant.describe()}" for r in results if not r.ok]
    faults += [f"{r.variant.name}: no registers" for r in results if r.ok and not registers(r)]
    faults += [
        f"{r.variant.name}: {r.resources.scratch} bytes of scratch\n  {r.variant.describe()}"
        for r in results
        if r.resources and r.resources.scratch > most_scratch(r.variant)
    ]
    assert not faults, f"{arch.name}:\n" + "\n".join(faults)
    return results


@pytest.mark.parametrize("op", OP_NAMES)
@pytest.mark.parametrize("name", IN_FULL)
def test_every_variant_of_the_ops_cases(name: str, op: str) -> None:
    variants = of_cases(ARCHS[name], op, [torch.bfloat16])
    # The other half is left to `make test-all`.
    assert_compiled(mostly_known(variants), ARCHS[name])


def check_one(name: str, op: str) -> None:
    """The first there is; those of all its cases need not be recorded for that."""
    arch = ARCHS[name]
    for kernel in (k for k in made_for(arch) if k.op == op):
        if variants := recorded(kernel, arch, [torch.bfloat16], most=1):
            assert_compiled([variants[-1].divisible(True)], arch)
            return


@pytest.mark.parametrize("op", OP_NAMES)
@pytest.mark.parametrize("name", [name for name in NAMES if name not in IN_FULL])
def test_one_variant_an_op_elsewhere(name: str, op: str) -> None:
    check_one(name, op)


@pytest.mark.slow
@pytest.mark.parametrize("name", ONCE)
def test_one_variant_an_op_for_what_costs_nothing(name: str) -> None:
    for op in OP_NAMES:
        check_one(name, op)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_every_variant_everywhere(name: str) -> None:
    dtypes = [torch.bfloat16, torch.float32]
    variants = [v for op in OP_NAMES for v in of_cases(ARCHS[name], op, dtypes)]
    assert_compiled(both_ways(variants), ARCHS[name])


# A test for all ops, so that what a model launches is recorded once.
@pytest.mark.slow
@pytest.mark.parametrize("geometry", ["flash", "flash-base", "pro"])
@pytest.mark.parametrize("name", NAMES)
def test_every_variant_of_released_shapes(name: str, geometry: str) -> None:
    variants = [v for each in of_model(name, geometry).values() for v in each]
    assert_compiled(both_ways(variants), ARCHS[name])


@pytest.mark.parametrize(
    ("name", "instruction"), [("sm_90", "wgmma"), ("gfx942", "fp8_fp8"), ("gfx950", "f8f6f4")]
)
def test_fp8_products_run_on_matrix_units(name: str, instruction: str) -> None:
    """The released shapes' FP8 linear layers: codes go to the matrix unit as they are."""
    wanted = _collected(ARCHS[name], "flash", {}, {48})
    variants = [w.variant for w in wanted if w.op.partition("=")[0] == "linear"]
    results = assert_compiled([v for v in variants if "*fp8" in str(v.signature)][:1], ARCHS[name])
    assert results
    for result in results:
        assert instruction in read_assembly(result.variant.name, result.digest)


def test_every_function_that_can_be_launched_is_recorded() -> None:
    """Or it is compiled by nobody here, and first on a user's GPU."""
    names = (*IN_FULL, "sm_80")
    for name in names:
        kernels_of(ARCHS[name])  # imports their modules
    modules = sorted(module for module in sys.modules if module.startswith("fourfold.kernels."))
    missing = {(module, name) for module in modules for name in entry_points(module)}
    for variants in everything_recorded(names):
        missing -= {(v.module, v.name) for v in variants}
        if not missing:
            return
    listed = ", ".join(sorted(map(".".join, missing)))
    raise AssertionError(f"no case and no released shape launches {listed}")


def everything_recorded(names: Sequence[str]) -> Iterator[list[Variant]]:
    """What takes least time first: a model of released shapes with the plan's choices, the ops' cases, and
    that model with every kernel that can be forced."""
    for name in names:
        yield [w.variant for w in _collected(ARCHS[name], "flash", {}, {1, 17, 48, 129, 4096})]
    for name in names:
        for op in OP_NAMES:
            yield of_cases(ARCHS[name], op, [torch.bfloat16])
    for name in names:
        yield [v for variants in of_model(name, "flash").values() for v in variants]


def test_the_check_sees_what_a_target_lacks() -> None:
    """A variant that fits sm_90 and not gfx942, told apart by its resources."""
    from fourfold.kernels.compile import Resources

    large = Resources(shared=100_000, registers=128, scratch=0, num_warps=8)
    assert large.excess(ARCHS["sm_90"]) == ""
    assert "100,000 of 65,536" in large.excess(ARCHS["gfx942"])
    assert "registers" in Resources(0, 255, 0, 16).excess(ARCHS["sm_90"])
    assert "tensor memory" in Resources(0, 32, 0, 4, 1024).excess(ARCHS["sm_100"])

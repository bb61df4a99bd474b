"""What is compiled ahead is what a launch looks for."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

from fourfold.core.device import ARCHS

if TYPE_CHECKING:
    from fourfold.kernels.variants import Variant

pytest.importorskip("triton", reason="Triton is not installed")
pytestmark = pytest.mark.full


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Path]:
    from triton import knobs

    with knobs.cache.scope():
        knobs.cache.dir = str(tmp_path)
        yield tmp_path


@pytest.mark.parametrize("arch", ["sm_90", "gfx942"])
@pytest.mark.parametrize("size", [256, 200])
def test_a_launch_finds_what_was_compiled_ahead(arch: str, size: int, store: Path) -> None:
    """Also with an argument of which nothing is known: 200 is not divisible by 16."""
    from fourfold.kernels.compile import compile_variant
    from fourfold.kernels.store import counted
    from fourfold.kernels.targets import stand_in
    from fourfold.kernels.triton.norm import rms_norm
    from fourfold.kernels.variants import record

    arguments = (torch.zeros(3, size), torch.zeros(size), 1e-6)
    with record(ARCHS[arch]) as variants:
        rms_norm(*arguments)
    assert all(compile_variant(each, ARCHS[arch]).ok for each in variants)
    with stand_in(ARCHS[arch]), counted() as counts:
        rms_norm(*arguments)
    assert counts.compiled == []
    assert len(counts.found) == len(variants) == 1


def three(arch: str) -> list[Variant]:
    from fourfold.kernels.triton.norm import rms_norm
    from fourfold.kernels.variants import record

    with record(ARCHS[arch]) as variants:
        for size in (64, 200, 256):
            rms_norm(torch.zeros(3, size), torch.zeros(size), 1e-6)
    assert len(variants) == 3
    return [*variants]


@pytest.mark.parametrize("here", [0, 1])
def test_what_many_processes_compile_is_found(store: Path, here: int) -> None:
    """All, or all but the first, go to helpers, whose cache is this one; then there is nothing to do."""
    from fourfold.kernels.compile_many import compile_all

    variants, arch, told = three("gfx942"), ARCHS["gfx942"], []
    done = compile_all(variants, arch, processes=2, done=told.append, here=here)
    assert [each.variant for each in done] == variants
    assert all(each.ok and not each.cached for each in done)
    assert {id(each) for each in told} == {id(each) for each in done}
    again = compile_all(variants, arch, processes=2, here=here)
    assert all(each.ok and each.cached for each in again)
    assert [each.resources for each in again] == [each.resources for each in done]
    assert len([*store.glob("*/*.amdgcn")]) == 3


def test_a_compiler_that_crashes_fails_its_variant_alone(store: Path) -> None:
    """Another helper goes on behind it; the error has its last words."""
    from fourfold.kernels.compile_many import compile_all

    first, second, third = three("gfx942")
    # No such module: what the helper does not expect ends it, as a crash of the compiler would.
    second = replace(second, module="fourfold.kernels.nothing")
    done = compile_all([first, second, third], ARCHS["gfx942"])
    assert [each.ok for each in done] == [True, False, True]
    assert done[1].error == (
        "the compiler crashed: ModuleNotFoundError: No module named 'fourfold.kernels.nothing'"
    )


def test_what_does_not_compile_has_its_reason(store: Path) -> None:
    from fourfold.kernels.compile_many import compile_all

    first, second, _ = three("gfx942")
    odd = replace(first, constants=((first.constants[0][0], "no number"), *first.constants[1:]))
    for here in (0, 8):
        wrong, right = compile_all([odd, second], ARCHS["gfx942"], here=here)
        assert right.ok
        assert not wrong.ok
        assert "crashed" not in wrong.error

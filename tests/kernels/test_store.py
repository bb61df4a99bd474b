"""What is compiled ahead is what a launch looks for."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fourfold.core.device import ARCHS

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


def test_what_many_processes_compile_is_found(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All but the first go to helpers, whose cache is this one; a second time there is nothing to do."""
    from fourfold.kernels import compile as compiling
    from fourfold.kernels.triton.norm import rms_norm
    from fourfold.kernels.variants import record

    arch = ARCHS["gfx942"]
    with record(arch) as variants:
        for size in (64, 200, 256):
            rms_norm(torch.zeros(3, size), torch.zeros(size), 1e-6)
    assert len(variants) == 3
    monkeypatch.setattr(compiling, "FEW", 1)
    assert compiling.compile_here(variants, arch, 1) == (3, "")
    assert compiling.compile_here(variants, arch, 1) == (0, "")
    assert len([*store.glob("*/*.amdgcn")]) == 3


def test_a_helper_that_dies_says_so(store: Path) -> None:
    from fourfold.kernels import compile as compiling

    new, words = compiling._in_helper([], replace(ARCHS["gfx942"], name="gfx000"))
    assert (new, words) == (0, "exit status 1, KeyError: 'gfx000'")

"""Combinations that are known to be bad: passed over with the reason, shown, and run where forced."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from fourfold import kernels
from fourfold.cli import main
from fourfold.core import device as devices
from fourfold.core.device import ARCHS, Device, KnownBad
from fourfold.engine.benchmark_op import OpBench, OpSetting
from fourfold.engine.selftest.run import _all
from fourfold.ops.catalog import OPS
from fourfold.ops.registry import Choice, Kernel, KernelPlan
from tests.support import small_config

triton = pytest.importorskip("triton", reason="Triton is not installed")

ROOT = Path(__file__).parents[2]
ALL = tuple((arch.name, bad) for arch in ARCHS.values() for bad in arch.known_bad)
BEST, NEXT = (Kernel("rms_norm", name, lambda x, weight, eps: x, priority=p) for name, p in
              (("best", 20), ("next", 10)))  # fmt: skip


def chosen(*bad: KnownBad, installed: str = "3.6.0", **forced: str) -> Choice:
    device = Device(replace(ARCHS["gfx942"], known_bad=bad), torch.device("cpu"))
    plan = KernelPlan.resolve(
        OPS, (NEXT, BEST), device, small_config(), torch.bfloat16, forced, {}, installed
    )
    return next(choice for choice in plan.choices if choice.op == "rms_norm")


def test_it_is_passed_over_with_its_reason_and_run_where_forced() -> None:
    bad = KnownBad("best", "loses a row", op="rms_norm")
    why = "is known to be bad on gfx942: it loses a row"
    assert chosen().kernel == "best"
    found = chosen(bad)
    assert (found.kernel, found.rejected) == ("next", (("best", why),))
    forced = chosen(bad, rms_norm="best")
    assert (forced.kernel, forced.reason) == ("best", f"forced by --kernel, although it {why}")
    assert chosen(replace(bad, op="linear")).kernel == "best"
    assert chosen(replace(bad, kernel="next")).kernel == "best"
    assert chosen(bad, replace(bad, kernel="next")).kernel == "body"


def test_it_may_be_about_releases_of_triton() -> None:
    bad = KnownBad("best", "was made for another", unless_triton="3.6")
    for installed, kernel in (("3.6.0", "best"), ("3.6", "best"), ("3.60.1", "next")):
        assert chosen(bad, installed=installed).kernel == kernel, installed
    assert dict(chosen(bad, installed="3.7.1").rejected)["best"] == (
        "is known to be bad on gfx942 with Triton 3.7.1: it was made for another"
    )


def explained(*arguments: str) -> str:
    done = CliRunner().invoke(main, ["explain", "--geometry", "flash", *arguments])
    assert done.exit_code == 0, done.output
    return done.stdout


def line_of(shown: str, op: str) -> str:
    return next(line for line in shown.splitlines() if line.startswith(f"{op} "))


def test_another_triton_gets_the_portable_kernels(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Kernels written for one release, on the target they are for; forced, they stay the user's choice."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert "sm90" in line_of(explained("--target", "sm_90"), "linear")
    monkeypatch.setattr(triton, "__version__", "3.9.0")
    why = "known to be bad on sm_90 with Triton 3.9.0: it is written for Triton 3.6"
    shown = explained("--target", "sm_90")
    assert "sm90" not in line_of(shown, "linear")
    assert shown.count(why) >= len({k.op for k in kernels_called("sm90")})
    forced = explained("--target", "sm_90", "--kernel", "linear=sm90")
    assert "sm90" in line_of(forced, "linear")
    assert f"forced by --kernel, although it is {why}" in forced


def kernels_called(name: str) -> list[Kernel]:
    return [k for k in kernels.load(Device(ARCHS["sm_90"], torch.device("cpu"))) if k.name == name]


def test_an_amd_target_explains_its_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    bad = (KnownBad("einsum", "adds a row twice", op="wo_a"),)
    table = MappingProxyType({**ARCHS, "gfx942": replace(ARCHS["gfx942"], known_bad=bad)})
    monkeypatch.setattr("fourfold.engine.explain.ARCHS", table)
    shown = explained("--target", "gfx942")
    assert "einsum" not in line_of(shown, "wo_a")
    assert "is known to be bad on gfx942: it adds a row twice" in shown
    assert "einsum" in line_of(explained("--target", "gfx942", "--kernel", "wo_a=einsum"), "wo_a")


def test_a_bench_takes_the_next_and_a_selftest_leaves_it_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bad = (KnownBad("cpu", "is slow here"),)
    device = Device(replace(ARCHS["cpu"], known_bad=bad), torch.device("cpu"))
    ceilings: Any = None
    for where, first in ((Device(ARCHS["cpu"], device.torch_device), "cpu"), (device, "body")):
        bench = OpBench("linear", OpSetting(), where, ceilings)
        assert bench.chosen()[0].name == first
        assert {k.name for k in bench.chosen(all_of_them=True)} == {"cpu", "body"}
    monkeypatch.setattr("fourfold.engine.selftest.run.WEIGHTS", ())
    checks = [c for c in _all(device, True, {}, []) if c.name.endswith("=cpu")]
    assert len(checks) > 10
    assert {(c.outcome.value, c.detail) for c in checks} == {
        ("skipped", "is known to be bad on cpu: it is slow here")
    }


@pytest.mark.parametrize(("arch", "bad"), ALL, ids=lambda v: getattr(v, "kernel", v))
def test_what_is_listed_exists_and_is_documented(arch: str, bad: KnownBad) -> None:
    """A row that speaks of no kernel is out of date; AMD's are what docs/AMD.md is for."""
    found = kernels.load(Device(ARCHS[arch], torch.device("cpu")))
    able = [k for k in found if k.needs <= ARCHS[arch].features]
    assert any(k.name == bad.kernel and bad.op in ("", k.op) for k in able)
    if arch.startswith("gfx"):
        assert bad.reason in (ROOT / "docs" / "AMD.md").read_text("utf-8")


def test_the_documentation_names_the_field() -> None:
    assert hasattr(devices.Arch("x", frozenset()), "known_bad")
    text = (ROOT / "docs" / "AMD.md").read_text("utf-8")
    assert "known_bad" in text
    says_none = "No AMD target has one" in text
    assert says_none is not any(arch.startswith("gfx") for arch, _ in ALL)

"""A selftest finds what is planted, names it, keeps it, and finds nothing where nothing is wrong."""

from __future__ import annotations

import getpass
import json
import os
import socket
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result

from fourfold.cli import main
from fourfold.core.config import EngineConfig
from fourfold.core.device import ARCHS, Device, detect
from fourfold.engine import verdicts
from fourfold.engine.kernel_plan import plan_kernels
from fourfold.engine.loading import random_model
from fourfold.engine.selftest import run
from fourfold.engine.selftest.cases import SAME_TOKENS, cases
from fourfold.engine.selftest.invariants import Invariants
from fourfold.engine.selftest.kernels import check_definitions, check_kernel
from fourfold.engine.selftest.models import make_subject, model_config
from fourfold.engine.selftest.report import Check, Outcome, without_paths
from fourfold.engine.verdicts import Verdicts, read_verdicts, verdict_file, write_verdicts
from fourfold.ops.catalog import OPS
from fourfold.ops.registry import CaseMaker, Op
from fourfold.weights.layout import FORMATS
from tests.engine.faults import ENGINE_FAULTS, KERNEL_FAULTS, body, changed, kernel, plant

CPU = torch.device("cpu")
NAMES = {op.name: op for op in OPS}


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "fourfold" / "selftest"


@pytest.mark.parametrize("fault", KERNEL_FAULTS)
def test_a_faulty_kernel_is_found(fault: str) -> None:
    found = check_kernel(KERNEL_FAULTS[fault], CPU)
    assert found is not None
    assert len(found) < 200


LONG = ("routed_experts", "compress_rows", "sparse_attention", "index_topk", "compress", "linears")


@pytest.mark.parametrize(
    "op",
    [pytest.param(o, id=o.name, marks=[pytest.mark.slow] * (o.name in LONG)) for o in OPS],
)
def test_a_kernel_without_a_fault_passes(op: Op) -> None:
    assert check_kernel(kernel(op.name, lambda a: body(op.name)(**a)), CPU) is None


def test_every_kind_of_weight_is_among_the_cases() -> None:
    for op, schemes in (("linear", {"fp8_block"}), ("routed_experts", {"fp8_block", "mxfp4"})):
        found = set()
        for case in cases(NAMES[op], CaseMaker.seeded(torch.bfloat16)):
            weight = case.arguments.get("weight", case.arguments.get("w1"))
            found |= {getattr(getattr(weight, "scheme", None), "name", "plain")}
        assert found >= schemes | {"plain"}
    assert set(SAME_TOKENS) <= set(NAMES)


def test_the_definitions_pass_here() -> None:
    found = list(check_definitions(CPU))
    assert [c.name for c in found] == list(NAMES)
    assert all(c.outcome is Outcome.PASSED for c in found)


def first_failure(weights: str = "native") -> Check | None:
    """What a quick selftest's engine checks find first."""
    subject = make_subject(weights, detect("cpu"), Verdicts())
    for name, check in run._checks(subject, quick=True, brief=False):
        found = run._run("engine", name, check)
        if found.outcome is Outcome.FAILED:
            return found
    return None


QUICK = ("page given twice",)


@pytest.mark.parametrize(
    "fault",
    [
        pytest.param(f, marks=pytest.mark.full if f in QUICK else pytest.mark.slow)
        for f in ENGINE_FAULTS
    ],
)
def test_a_fault_of_the_engine_or_its_caches_is_found(
    fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    put, check = ENGINE_FAULTS[fault]
    put(monkeypatch)
    found = first_failure()
    assert found is not None
    assert found.name == check, found


@pytest.mark.slow
def test_a_clean_machine_passes_within_a_minute(capsys: pytest.CaptureFixture[str]) -> None:
    """User time of one core, so that a busy machine does not count."""
    began = time.process_time()
    done = call("selftest", "--quick", "--device", "cpu")
    took = time.process_time() - began
    assert done.exit_code == 0, done.output
    assert "0 failed" in done.output
    for words in ("batched = alone", "hit = cold", "MTP = greedy", "chunked = one-shot"):
        assert words in done.output
    assert took < 60


@pytest.mark.parametrize(
    "weights",
    [pytest.param("native", marks=pytest.mark.slow), pytest.param("fp8", marks=pytest.mark.full)],
)
def test_a_clean_model_passes_in_short(weights: str) -> None:
    subject = make_subject(weights, detect("cpu"), Verdicts())
    scheme = "mxfp4" if weights == "native" else "fp8_block"
    experts = subject.loaded.model.layers[0].ffn.experts
    assert {e.scheme.name for e in experts} == {scheme}
    invariants = Invariants(subject, (1, 30), 11)
    for check in (invariants.batched, invariants.chunked):
        found = run._run("engine", "short", check)
        assert found.outcome is Outcome.PASSED, found


@pytest.mark.slow
def test_all_of_it_passes_on_a_cpu() -> None:
    report = run.run_selftest(detect("cpu"))
    assert not report.failures, report.table()
    skipped = {c.name: c.detail for c in report.checks if c.outcome is Outcome.SKIPPED}
    assert skipped == {"graph = eager": "there are no graphs on a CPU"}
    groups = {check.group for check in report.checks}
    assert {"engine, native weights", "engine, fp8 weights"} <= groups


def call(*arguments: str) -> Result:
    return CliRunner().invoke(main, list(arguments))


@pytest.fixture
def brief(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels only."""

    def none(*args: object) -> Iterator[Check]:
        return iter(())

    monkeypatch.setattr(run, "_engine", none)


def chosen(**forced: str) -> tuple[str, str]:
    """What the engine chooses for `rms_norm` on this CPU, and why."""
    config, weights = model_config("native", wide=False), FORMATS["native"]
    engine = EngineConfig("m", kernels=forced)
    loaded = random_model(config, weights, engine, detect("cpu"))
    choice = next(c for c in loaded.kernel_plan.choices if c.op == "rms_norm")
    (told,) = json.loads(call("explain", "--geometry", "tiny", "--json", *(
        f"--kernel={op}={name}" for op, name in forced.items()
    )).stdout)  # fmt: skip
    explained = next(c for c in told["kernels"] if c["op"] == "rms_norm")
    assert explained["kernel"] == choice.kernel
    why = [*choice.rejected, (choice.kernel, choice.reason)]
    same = [*((r["kernel"], r["reason"]) for r in explained["rejected"])]
    assert same == list(choice.rejected)
    return choice.kernel, "; ".join(f"{name}: {reason}" for name, reason in why)


@pytest.mark.full
@pytest.mark.usefixtures("brief")
def test_a_failed_kernel_is_named_and_not_chosen_unless_forced(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        plant(patch, changed("rms_norm", lambda a: {"eps": 1.0}))
        assert chosen()[0] == "faulty"
        done = call("selftest", "--quick", "--device", "cpu")
        assert done.exit_code == 1
        assert "rms_norm=faulty" in done.output
        assert "will not be chosen on this device" in done.output
        name, why = chosen()
        assert name == "body"
        assert "faulty: failed selftest on CPU: " in why
        name, why = chosen(rms_norm="faulty")
        assert name == "faulty"
        assert "although it failed selftest on CPU" in why
        # --no-keep changes nothing; a clean run forgives.
        call("selftest", "--quick", "--device", "cpu", "--no-keep")
        assert chosen()[0] == "body"
    plant(monkeypatch, kernel("rms_norm", lambda a: body("rms_norm")(**a)))
    assert call("selftest", "--quick", "--device", "cpu").exit_code == 0
    assert chosen()[0] == "faulty"  # its name, no longer its nature


def damaged(content: str) -> str:
    return content[:-20]


def older(content: str) -> str:
    data = json.loads(content)
    data["build"]["torch"] = "1.0"
    return json.dumps(data)


def without_build(content: str) -> str:
    return json.dumps({**json.loads(content), "build": "none"})


def other_shape(content: str) -> str:
    return json.dumps({**json.loads(content), "failed": ["rms_norm=faulty"]})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (damaged, "cannot be read"),
        (lambda content: "[1, 2]", "not one of ours"),
        (lambda content: json.dumps({**json.loads(content), "format": 9}), "not one of ours"),
        (other_shape, "not one of ours"),
        (older, "another build (torch 1.0 and not"),
        (without_build, "another build"),
    ],
)
def test_a_result_that_cannot_count_is_left_aside_with_a_line(
    change: object, words: str, own_cache: Path
) -> None:
    device = detect("cpu")
    write_verdicts(device, {("rms_norm", "faulty"): "wrong"})
    assert read_verdicts(device).failed == {("rms_norm", "faulty"): "failed selftest on CPU: wrong"}
    file = verdict_file(device)
    assert file.parent == own_cache
    file.write_text(change(file.read_text()))
    found = read_verdicts(device)
    assert not found.failed
    assert words in found.notes[0]
    loaded = random_model(
        model_config("native", wide=False), FORMATS["native"], EngineConfig("m"), device
    )
    assert any(words in note for note in loaded.notes)
    assert words in call("explain", "--geometry", "tiny").output


def test_an_unreadable_place_stops_nobody(
    own_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "a file"))
    assert "could not be kept" in write_verdicts(detect("cpu"), {})
    assert read_verdicts(detect("cpu")).failed == {}
    write_verdicts(detect("cpu"), {})
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert verdicts.directory().is_absolute()


def test_a_target_that_is_not_here_has_the_verdicts_of_its_devices() -> None:
    """Compiled ahead for this machine's GPU is what its engine chooses."""
    config = model_config("native", wide=True)
    pytest.importorskip("triton")
    here = Device(ARCHS["sm_90"], torch.device("cuda", 0), "NVIDIA H200")

    def kernel_of(device: Device) -> str:
        plan, _ = plan_kernels(config, torch.bfloat16, device, {})
        return next(c.kernel for c in plan.choices if c.op == "linear")

    usual, other = kernel_of(here), kernel_of(stand_in("gfx942"))
    write_verdicts(here, {("linear", usual): "wrong", ("linear", other): "wrong"})
    assert kernel_of(here) == kernel_of(stand_in("sm_90")) != usual
    assert kernel_of(replace(here, name="NVIDIA H100")) == usual
    assert kernel_of(stand_in("gfx942")) == other


def stand_in(arch: str) -> Device:
    return Device(ARCHS[arch], torch.device("meta"), arch)


@pytest.mark.usefixtures("brief")
def test_a_bundle_has_what_is_needed_and_nothing_of_the_user(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", "/Users/somebody")
    monkeypatch.setenv("OPENAI_API_KEY", "sk-very-secret")

    def fails(a: dict[str, object]) -> None:
        raise OSError(2, "No such file or directory", "/Users/somebody/models/private/x.json")

    plant(monkeypatch, kernel("rms_norm", fails))
    bundle = tmp_path / "bundle.json"
    done = call("selftest", "--quick", "--device", "cpu", "--bundle", str(bundle))
    assert done.exit_code == 1
    text = bundle.read_text()
    (report,) = json.loads(text)["reports"]
    assert report["build"]["torch"] == torch.__version__
    assert report["plan"]["kernels"]
    assert report["passed"] is False
    assert any(c["kernel"] == "rms_norm=faulty" for c in report["checks"])
    assert "x.json" in text
    secrets = ["somebody", "sk-very-secret", str(tmp_path), socket.gethostname(), str(Path.cwd())]
    secrets += [getpass.getuser()] if len(getpass.getuser()) > 4 else []
    secrets += [v for v in os.environ.values() if len(v) > 12 and "/" in v]
    assert not [secret for secret in secrets if secret in text]
    assert call("selftest", "--bundle", str(tmp_path / "no" / "b.json")).exit_code == 2


def test_paths_are_cut_to_their_last_part() -> None:
    assert without_paths({"a": ["at /Users/me/x/y.py:3"]}) == {"a": ["at …/y.py:3"]}
    assert without_paths("C:\\Users\\me\\a.txt, ~/b/c") == "…/a.txt, …/c"
    kept = "1/2, tokens/s, op=kernel, 7x300x200, and/or"
    assert without_paths(kept) == kept


@pytest.mark.full
@pytest.mark.usefixtures("brief")
def test_the_report_is_a_table_and_a_document() -> None:
    done = call("selftest", "--device", "cpu", "--json")
    data = json.loads(done.stdout)
    assert data["passed"] is True
    assert {c["outcome"] for c in data["checks"]} == {"passed"}
    done = call("selftest", "--device", "cpu")
    assert "sparse_attention" in done.stdout
    *_, verdict, kept = done.stdout.strip().splitlines()
    assert verdict.startswith("CPU (cpu): ")
    assert kept.startswith("kept in ")
    assert call("selftest", "--device", "cuda:9").exit_code == 2

"""What is explained is what is compiled, what runs, and what lies in memory: for every target."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result

from fourfold.cache.pool import allocate
from fourfold.cli import main
from fourfold.core.client import Launch
from fourfold.core.config import CacheConfig, EngineConfig
from fourfold.core.device import ARCHS, Device, Feature, detect
from fourfold.core.errors import ConfigError, KernelError
from fourfold.core.parameters import parameters
from fourfold.core.tensor import QuantTensor
from fourfold.engine import loading
from fourfold.engine.capacity import engine_row_formats
from fourfold.engine.compile import Collector, released, subject_of_geometry
from fourfold.engine.engine import Engine
from fourfold.engine.explain import (
    chosen_kernels,
    explain_model,
    model_of_checkpoint,
    model_of_geometry,
    target_device,
    tensor_lines,
)
from fourfold.engine.explain_buffers import reader, stored_as
from fourfold.engine.explain_text import text
from fourfold.engine.loading import load_model, random_model
from fourfold.engine.oneshot import one_shot_with_mtp
from fourfold.engine.start import start_engine
from fourfold.engine.verdicts import write_verdicts
from fourfold.ops.catalog import OPS
from fourfold.quant.resolve import resolve
from fourfold.weights.layout import FORMATS, checkpoint_layout
from fourfold.weights.locate import locate
from fourfold.weights.synthetic import write_checkpoint

TARGETS = [name for name, arch in ARCHS.items() if Feature.TRITON in arch.features]
pytestmark = pytest.mark.full
GEOMETRIES = ("tiny", "flash", "flash-base", "pro")
ENGINE = EngineConfig("m")


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def told(geometry: str, target: str, **forced: str) -> dict[str, Any]:
    engine = replace(ENGINE, kernels=forced)
    return explain_model(model_of_geometry(geometry), target_device(target), engine)


def same_choices(explanation: dict[str, Any], plan: Any) -> None:
    """The same kernels, for the same reasons."""
    assert [c["op"] for c in explanation["kernels"]] == [op.name for op in OPS]
    for each, choice in zip(explanation["kernels"], plan.choices, strict=True):
        assert (each["op"], each["kernel"], each["reason"]) == (
            choice.op,
            choice.kernel,
            choice.reason,
        )
        for what in ("rejected", "others"):
            found = tuple((r["kernel"], r["reason"]) for r in each[what])
            assert found == getattr(choice, what)


@pytest.mark.parametrize(
    "target",
    [pytest.param(t, marks=[pytest.mark.slow] * (t not in ("sm_90", "gfx942"))) for t in TARGETS],
)
def test_what_is_explained_is_what_is_compiled(target: str) -> None:
    """Not only the choice: what a step launches is of the kernels that are named."""
    pytest.importorskip("triton")
    engine = replace(ENGINE, num_speculative_tokens=1)
    subject = subject_of_geometry("tiny")
    collector = Collector(subject, ARCHS[target], engine)
    explanation = explain_model(model_of_geometry("tiny"), target_device(target), engine)
    same_choices(explanation, collector.plan)
    wanted = collector.collect([[(2, 1, True)] * 3, [(20, 0, True)]])
    write_verdicts(Device(ARCHS[target], torch.device("cuda"), "X"), {("rotate", "triton"): "so"})
    rejected = explain_model(model_of_geometry("tiny"), target_device(target), engine)
    same_choices(rejected, Collector(subject, ARCHS[target], engine).plan)
    assert "failed selftest on X: so" in json.dumps(rejected)
    launched = {each.op for each in wanted}
    named = {f"{op}={kernel}" for op, kernel in chosen_kernels(explanation).items()}
    assert launched
    assert launched <= named


@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("target", [*TARGETS, "cpu"])
def test_what_is_explained_is_what_an_engine_chooses(target: str, geometry: str) -> None:
    if target != "cpu":
        pytest.importorskip("triton")
    device = Device(ARCHS[target], torch.device("cpu"), target)
    config, _ = released(geometry)
    dtype, plan, _ = loading._plan(config, ENGINE, device)
    explanation = told(geometry, target)
    same_choices(explanation, plan)
    assert explanation["dtype"] == str(dtype).removeprefix("torch.")
    captured = explanation["graphs"]["captured"]
    assert captured is (plan.reads_host == () and target != "cpu")


def test_plain_experts_are_neither_captured_nor_equal_in_every_batch(tmp_path: Path) -> None:
    """Kernels leave them to the definition, which reads the host: engine and explain both say so."""
    pytest.importorskip("triton")
    write_checkpoint(tmp_path / "plain", "tiny", weights="bf16")
    model = model_of_checkpoint(locate(str(tmp_path / "plain")), ENGINE)
    explanation = explain_model(model, target_device("sm_90"), ENGINE)
    assert explanation["graphs"]["captured"] is False
    assert "routed_experts" in explanation["graphs"]["reason"]
    assert explanation["bit_equality"]["not_by"] == ["routed_experts"]
    config = EngineConfig(str(tmp_path / "plain"), max_num_seqs=2, max_model_len=512)
    loaded = load_model(locate(config.model), config, detect("cpu"))
    on_gpu = replace(loaded, device=Device(ARCHS["sm_90"], torch.device("meta"), "GPU"))
    engine = Engine(loaded, config)
    engine.loaded = on_gpu
    assert "no kernel for" in engine._capture()[0]
    assert "routed_experts" in engine._capture()[0]


def test_an_engine_here_runs_what_is_explained(tmp_path: Path) -> None:
    """Through the engine's own start; the server hands on what it says."""
    folder = tmp_path / "tiny"
    write_checkpoint(folder, "tiny")
    config = EngineConfig(str(folder), max_num_seqs=2, max_model_len=512)
    engine, info = start_engine(Launch(config, "cpu"))
    (explained,) = json.loads(call("explain", str(folder), "--target", "cpu", "--json").stdout)
    same_choices(explained, engine.loaded.kernel_plan)
    here = {"device": "CPU"}
    assert json.loads(json.dumps(info.explanation)) == explained | here
    assert str(tmp_path) not in json.dumps(info.explanation)


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_formats_without_files_are_those_of_the_released_ones(geometry: str) -> None:
    """What `compile` takes for granted of a geometry is what the resolver decides."""
    config, weights = released(geometry)
    resolution = resolve(config)
    for spec in parameters(config):
        scheme, decision = weights.scheme(spec.role), resolution.of(spec)
        assert (decision.scheme if decision else "plain") == (scheme.name if scheme else "plain")
        if scheme and decision:
            floats = weights.scale_dtype == "F32"
            assert decision.scale_format == ("f32" if floats else "e8m0"), spec.name


def kept(monkeypatch: pytest.MonkeyPatch, maker: str) -> dict[str, Any]:
    """What `loading` loads or makes, as it is loaded or made."""
    make, found = getattr(loading, maker), {}

    def keeping(*args: Any, **kwargs: Any) -> Any:
        made = make(*args, **kwargs)
        found.update(made)  # before kernels have it stored as they want it
        return made

    monkeypatch.setattr(loading, maker, keeping)
    return found


@pytest.mark.parametrize("weights", [pytest.param("native", marks=pytest.mark.slow), "fp8", "bf16"])
def test_formats_are_those_in_memory(
    weights: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / weights
    write_checkpoint(folder, "tiny", weights=weights)
    location, engine = locate(str(folder)), EngineConfig(str(folder))
    model, found = model_of_checkpoint(location, engine), kept(monkeypatch, "load")
    loaded = load_model(location, engine, detect("cpu"))
    for spec in parameters(model.config):
        words = stored_as(spec, model.resolution.of(spec), loaded.dtype)
        weight = found[spec.name]
        if isinstance(weight, QuantTensor):
            assert ("FP4" in words) == (weight.scheme.name == "mxfp4"), spec.name
            assert ("E8M0" in words) == (weight.scale.dtype == torch.uint8), spec.name
        else:
            assert words == str(weight.dtype).removeprefix("torch."), spec.name
    explanation = explain_model(model, detect("cpu"), engine)
    if importlib.util.find_spec("triton"):
        there = explain_model(model, target_device("sm_90"), engine)["bit_equality"]
        assert there["not_by"] == (["routed_experts"] if weights == "bf16" else [])
    inputs = next(a for a in explanation["buffers"]["activations"] if "experts" in a["what"])
    assert ("FP8" in inputs["format"]) is (weights != "bf16")


def test_cached_rows_are_told_as_they_are_allocated() -> None:
    config, _ = released("tiny")
    for kind, words in (("auto", "FP8 E4M3"), ("bfloat16", "bfloat16"), ("float32", "float32")):
        engine = replace(ENGINE, cache=CacheConfig(kv_cache_dtype=kind))
        formats = engine_row_formats(engine, config, "bfloat16")
        state = allocate(config, formats, 2, 2, torch.bfloat16, torch.device("cpu"))
        explanation = explain_model(model_of_geometry("tiny"), detect("cpu"), engine)
        cache = {entry["what"].split(",")[0]: entry for entry in explanation["buffers"]["cache"]}
        assert words in cache["window ring"]["format"]
        assert cache["window ring"]["bytes_per_row"] == state.layers[0].ring.format.row_bytes
        keys = state.layers[2].indexer
        assert cache["indexer keys"]["bytes_per_row"] == keys.pages.format.row_bytes
        assert cache["live folds of compressors"]["format"].startswith("float32")


def test_each_weight_is_read_by_the_op_that_is_named() -> None:
    """Seen in a forward pass: which op gets which matrix."""
    config = released("tiny")[0]
    seen: dict[int, set[str]] = {}

    def watch(op: str, run: Any) -> Any:
        def noted(*args: Any, **kwargs: Any) -> Any:
            for value in (*args, *kwargs.values()):
                for one in value if isinstance(value, tuple | list) else (value,):
                    seen.setdefault(id(getattr(one, "codes", one)), set()).add(op)
            return run(*args, **kwargs)

        return noted

    loaded = random_model(config, FORMATS["native"], ENGINE, detect("cpu"), watch=watch)
    with torch.inference_mode():
        one_shot_with_mtp(loaded.model, [[3] * 300])
    for spec in parameters(config):
        op = reader(spec.role, loaded.kernel_plan)
        if op:
            weight = loaded.weights[spec.name]
            assert op in seen[id(getattr(weight, "codes", weight))], spec.name


def test_forced_kernels_are_honoured_and_refused_by_name() -> None:
    pytest.importorskip("triton")
    forced = told("flash", "sm_90", linear="triton", rms_norm="body")
    found = {c["op"]: c for c in forced["kernels"]}
    assert (found["linear"]["kernel"], found["linear"]["reason"]) == (
        "triton",
        "forced by --kernel",
    )
    assert found["rms_norm"]["kernel"] == "body"
    assert forced["bit_equality"]["not_by"] == ["rms_norm"]
    assert forced["forced"] == {"linear": "triton", "rms_norm": "body"}
    with pytest.raises(KernelError, match="no such op"):
        told("flash", "sm_90", nothing="body")
    with pytest.raises(KernelError, match=r"needs .*, which gfx942 lacks"):
        told("flash", "gfx942", linear="sm90")
    with pytest.raises(ConfigError, match="no such target; there are cpu, sm_80"):
        target_device("gfx7")


def test_the_dialect_and_equal_bits_by_target() -> None:
    pytest.importorskip("triton")
    for target, dialect, factor, equal in (
        ("sm_90", "ocp", 1.0, True),
        ("gfx942", "fnuz", 2.0, True),
        ("gfx950", "ocp", 1.0, True),
        ("sm_80", "none", 1.0, True),
        ("cpu", "none", 1.0, False),
    ):
        found = told("flash", target)
        assert (found["fp8"]["dialect"], found["fp8"]["factor_per_operand"]) == (dialect, factor)
        assert found["bit_equality"]["holds"] is equal, target
        assert ("linear" in found["bit_equality"]["not_by"]) is not equal


@pytest.mark.parametrize("target", TARGETS)
def test_every_op_of_a_step_has_a_kernel_on_every_gpu(target: str) -> None:
    """Routed experts among them; the overrides that people ask for stand in the plan."""
    pytest.importorskip("triton")
    found = {each["op"]: each["kernel"] for each in told("flash", target)["kernels"]}
    bodies = {op for op, kernel in found.items() if kernel == "body"}
    # Composites whose parts have kernels, and rounding that products do themselves.
    assert bodies <= {"moe", "norm_linears", "quantize_activations"}
    assert found["routed_experts"].startswith("sm90" if target == "sm_90" else "triton")
    forced = told("flash", target, wo_a="einsum", moe="body", shared_expert="separate")
    chosen = {each["op"]: (each["kernel"], each["reason"]) for each in forced["kernels"]}
    for op, kernel in (("wo_a", "einsum"), ("shared_expert", "separate")):
        assert chosen[op] == (kernel, "forced by --kernel")
    assert chosen["moe"] == ("body", "forced by --kernel, routed_experts in it too")


def call(*arguments: str) -> Result:
    return CliRunner().invoke(main, list(arguments))


def test_the_text_has_every_op_and_the_reasons() -> None:
    pytest.importorskip("triton")
    shown = call("explain", "--geometry", "flash", "--target", "gfx942", "--target", "cpu").stdout
    for op in OPS:
        assert shown.count(f"\n{op.name} ") == 2
    assert "FNUZ dialect here" in shown
    assert "which gfx942 lacks" in shown
    assert "decided by expert_dtype" in shown
    assert max(map(len, shown.splitlines())) < 900
    assert shown.count("\n") < 320
    assert text(told("flash", "cpu")) in shown


def test_every_tensor_is_listed_when_asked_for(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "tiny", "tiny", holes=True)
    shown = call("explain", str(tmp_path / "tiny"), "--tensors", "--json")
    (found,) = json.loads(shown.stdout)
    config, weights = released("tiny")
    names = {e.name for e in checkpoint_layout(config, weights).tensors() if e.spec.name}
    listed = {t["name"]: t for t in found["tensors"]}
    assert set(listed) == {n for n in names if not n.endswith(".scale")}
    assert listed["layers.2.ffn.experts.0.w1.weight"]["decided_by"] == "header"
    assert listed["norm.weight"]["decided_by"] == "never quantised"
    lines = call("explain", str(tmp_path / "tiny"), "--tensors").stdout.splitlines()
    assert sum(line.startswith("layers.") for line in lines) == sum(
        name.startswith("layers.") for name in listed
    )


def test_all_of_pro_is_listed() -> None:
    lines = list(tensor_lines(model_of_geometry("pro"), ENGINE))
    assert len(lines) == len({line["name"] for line in lines}) > 60_000


def test_what_is_wrong_is_one_line() -> None:
    for arguments, words in (
        (["m", "--geometry", "flash"], "either MODEL or --geometry"),
        (["/nowhere"], "/nowhere"),
        (["--target", "sm_1"], "no such target"),
        (["--kernel", "linear"], "expected OP=NAME"),
    ):
        done = call("explain", *arguments)
        assert done.exit_code == 2
        assert words in done.output
        assert done.output.count("\n") == 1

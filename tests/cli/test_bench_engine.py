"""`fourfold bench decode|prefill|op` on a CPU with the tiny geometry: slow, and complete."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from fourfold.cli import main
from fourfold.engine import benchmark, benchmark_op, roofline

pytestmark = pytest.mark.full

TINY = ("--geometry", "tiny", "--layers", "4", "--device", "cpu", "--step-tokens", "128")


@pytest.fixture(autouse=True, scope="module")
def measured_once() -> Iterator[None]:
    """A device's ceilings take a second to measure."""
    with pytest.MonkeyPatch.context() as patch:
        once = functools.cache(roofline.measure)
        for module in (benchmark, benchmark_op):
            patch.setattr(module, "measure", once)
        yield


def call(*words: str) -> Result:
    return CliRunner().invoke(main, ["bench", *words])


def document(result: Result, file: Path) -> Any:
    assert result.exit_code == 0, result.output
    return json.loads(file.read_text())


@pytest.mark.parametrize("drafts", ["0", "1"])
def test_decode(tmp_path: Path, drafts: str) -> None:
    file = tmp_path / "out" / "decode.json"
    runs = ("--long-run", "5", "--steady-steps", "2", "--repeats", "1", "--drafts", drafts)
    words = (*TINY, *runs, "--batch", "1,3", "--context", "40", "--json", str(file), "--details")
    result = call("decode", *words)
    found = document(result, file)
    assert [each["batch"] for each in found["results"]] == [1, 3]
    assert {choice["op"] for choice in found["plan"]} >= {"linear", "sparse_attention"}
    assert found["weight_bytes"] > 4 * found["checkpoint_bytes"]  # codes became numbers
    for each in found["results"]:
        assert len(each["steady_ms_of_each_step"]) == 2
        assert 0 < each["fraction_of_roofline"] < 1
        profile = each["profile"]
        assert sum(profile["kinds"].values()) == pytest.approx(profile["span_us"], rel=1e-3)
        assert {"linear", "experts", "attention", "mhc"} <= profile["families"].keys()
    lines = result.stdout.splitlines()
    assert sum(line.startswith(("    1 ", "    3 ")) for line in lines) == 4


def test_prefill(tmp_path: Path) -> None:
    file = tmp_path / "prefill.json"
    words = (*TINY, "--context", "100", "--num-prompts", "3", "--repeats", "1", "--json", str(file))
    result = call("prefill", *words)
    found = document(result, file)
    (one,) = found["results"]
    assert one["steps"] == 3  # 300 tokens, 128 a step
    assert one["tokens_per_s"] > 0
    assert "tokens/s over 3 prompts" in result.stdout


@pytest.mark.parametrize(
    "words",
    [
        ("wo_a", "--shape", "2x128x256"),
        ("linear", "--shape", "128x256", "--weights", "fp8"),
        ("routed_experts", "--experts", "8", "--dim", "64", "--inner", "32"),
    ],
)
def test_op(tmp_path: Path, words: tuple[str, ...]) -> None:
    file = tmp_path / "op.json"
    result = call("op", *words, "--tokens", "1,3", "--device", "cpu", "--json", str(file))
    about, *found = document(result, file)
    assert about["copy_TB_s"] > 0
    assert sorted({each["tokens"] for each in found}) == [1, 3]
    # Of wo_a all forms are measured.
    kernels = {"cpu", "body"} if words[0] == "wo_a" else {"cpu"}
    assert {each["kernel"] for each in found} == kernels
    assert len(found) == 2 * len(kernels)
    assert all(each["us"] > 0 for each in found)
    assert len(result.stdout.splitlines()) == 1 + len(found)


def test_even_routing_gives_every_expert_as_many_tokens() -> None:
    from fourfold.core.device import detect
    from fourfold.engine.benchmark_op import OpBench, OpSetting
    from fourfold.engine.roofline import Ceilings

    device, ceilings = detect("cpu"), Ceilings(1.0, 1.0, 1.0)
    bench = OpBench("routed_experts", OpSetting(routing="even"), device, ceilings)
    ids = bench.routed(683, 256, 6)
    assert ids.shape == (683, 6)
    assert all(len({*row}) == 6 for row in ids.tolist())
    counts = ids.flatten().bincount(minlength=256)
    assert {*counts.tolist()} == {16, 17}
    drawn = OpBench("routed_experts", OpSetting(), device, ceilings).routed(683, 256, 6)
    assert int(drawn.flatten().bincount(minlength=256).max()) > 20


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("decode", *TINY, "--batch", "x"), "--batch must be numbers"),
        (("decode", *TINY, "--batch", "0"), "--batch must be at least 1"),
        (("decode", *TINY, "--batch", "128"), "leave no room for prompts"),
        (("decode", *TINY, "--batch", "1", "--kernel", "linear=nope"), "no such kernel"),
        (("op", "softmax"), "bench op measures"),
        (("op", "linear", "--shape", "3", "--device", "cpu"), "--shape must be NxK"),
        (("op", "linear", "--kernel", "nope", "--device", "cpu"), "linear has cpu, body"),
    ],
)
def test_mistakes_are_named(words: tuple[str, ...], expected: str) -> None:
    result = call(*words)
    assert result.exit_code == 2
    assert expected in result.stderr

"""`fourfold bench serve` against a stub server: the block, the file, the page, and refusals."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from fourfold.cli import main
from fourfold.cli.bench_load import Outcome
from fourfold.cli.bench_report import figures, percentile
from fourfold.server.settings import ServerSettings
from tests.server.http import Site, site


@pytest.fixture
def web() -> Iterator[Site]:
    with site() as found:
        found.engine.script = lambda request, index: [40] * 60
        found.engine.pace = 0.002
        yield found


def call(web: Site, *arguments: str) -> Result:
    words = ["bench", "serve", "--port", str(web.port), "--random-input-len", "20"]
    return CliRunner().invoke(main, [*words, "--random-output-len", "12", *arguments])


def test_the_block_is_the_one_people_read(web: Site) -> None:
    result = call(web, "--num-prompts", "10", "--max-concurrency", "4", "--ignore-eos")
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert lines[0] == "============ Serving Benchmark Result ============"
    assert lines[-1] == "=" * 50
    assert f"{'Successful requests:':<40} {10:<10}" in lines
    assert f"{'Maximum request concurrency:':<40} {4:<10}" in lines
    assert f"{'Total generated tokens:':<40} {120:<10}" in lines
    for title in (
        "---------------Time to First Token----------------",
        "-----Time per Output Token (excl. 1st token)------",
        "---------------Inter-token Latency----------------",
    ):
        assert title in lines
    assert re.search(r"^P99 ITL \(ms\): +\d+\.\d\d", result.stdout, re.MULTILINE)
    assert "mislead" in result.stderr
    assert web.engine.requests[0].params.ignore_eos


def test_results_are_saved_with_plots(web: Site, tmp_path: Path) -> None:
    result = call(
        web, "--num-prompts", "6", "--backend", "openai-chat", "--max-concurrency", "1,3",
        "--save-result", "--save-detailed", "--result-dir", str(tmp_path / "new"),
        "--result-filename", "found.json", "--percentile-metrics", "ttft,tpot,itl,e2el",
        "--metric-percentiles", "50,90,99", "--random-range-ratio", "0.5", "--request-rate", "200",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    runs = json.loads((tmp_path / "new/found.json").read_text())
    assert [run["max_concurrency"] for run in runs] == [1, 3]
    last = runs[-1]
    assert last["completed"] == 6
    assert last["p90_e2el_ms"] > 0
    assert len(last["itls"]) == 6
    assert last["total_output_tokens"] == sum(last["output_lens"])
    assert len({*last["input_lens"]}) > 1
    page = (tmp_path / "new/found.html").read_text()
    assert page.count("<svg") == 3
    assert "src=" not in page
    assert "http" not in page


def test_the_figures_are_right() -> None:
    one = Outcome(10, start=0.0, end=1.0, ttft=0.2, itl=[0.4, 0.4], output_tokens=3)
    two = Outcome(20, start=0.5, end=2.5, ttft=1.0, itl=[1.0], output_tokens=2)
    bad = Outcome(5, error="x")
    found = figures([one, two, bad], 2.5, [99])
    assert (found["completed"], found["failed"]) == (2, 1)
    assert (found["total_input_tokens"], found["total_output_tokens"]) == (30, 5)
    assert found["output_throughput"] == 2.0
    assert found["mean_ttft_ms"] == pytest.approx(600)
    assert found["median_tpot_ms"] == pytest.approx(700)
    assert found["mean_itl_ms"] == pytest.approx(600)
    assert found["max_concurrent_requests"] == 2
    assert [percentile([1, 2, 3, 4], p) for p in (0, 50, 99, 100)] == [1, 2.5, 3.97, 4]
    assert percentile([], 50) == 0


@pytest.mark.parametrize(
    ("arguments", "expected", "status"),
    [
        (("--percentile-metrics", "ttft,foo"), "foo", 2),
        (("--metric-percentiles", "a"), "--metric-percentiles", 2),
        (("--max-concurrency", "0"), "at least 1", 2),
        (("--request-rate", "0"), "above 0", 2),
        (("--base-url", "ftp://x"), "--base-url", 2),
        (("--base-url", "http://127.0.0.1:1"), "does not answer", 1),
        (("--model", "nothing", "--num-prompts", "2"), "404", 1),
        (("--random-inptu-len", "3"), "--random-input-len", 2),
    ],
)
def test_refusals(web: Site, arguments: tuple[str, ...], expected: str, status: int) -> None:
    result = call(web, *arguments)
    assert result.exit_code == status, result.output
    assert expected in result.stderr
    assert "Traceback" not in result.output


def test_a_key_is_sent() -> None:
    with site(ServerSettings(api_keys=("k",))) as web:
        assert call(web, "--num-prompts", "1").exit_code == 1
        assert call(web, "--num-prompts", "1", "--api-key", "k").exit_code == 0

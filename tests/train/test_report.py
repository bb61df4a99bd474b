"""The figures of docs/NANO.md are those that were measured, and its curves those of the logs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from train import report
from train.evaluate import Answered, Score, write_answers

DOCS = Path(__file__).parent.parent.parent / "docs"


def score(
    case: str, count: int, right: int, drafted: int = 0, accepted: int = 0
) -> dict[str, object]:
    return Score(case, count, right, 1, 0, 1, drafted, accepted, 1, 1.0).to_json()


def test_the_page_shows_what_its_results_hold() -> None:
    page = (DOCS / report.PAGE).read_text("utf-8")
    results = json.loads((DOCS / report.RESULTS).read_text("utf-8"))
    assert report.with_tables(page, results) == page
    assert f"({report.RESULTS})" in page
    assert f"({report.CURVES})" in page
    assert (DOCS / report.CURVES).stat().st_size < 200_000


def test_measured_files_become_tables(tmp_path: Path) -> None:
    (tmp_path / report.PAGE).write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
    (tmp_path / report.RESULTS).write_text('{"scores": {}, "flavours": [], "faults": []}')
    (tmp_path / "gpu.json").write_text(
        json.dumps([score("tool_call", 1000, 987, 100, 91), score("recall_far_2048", 8, 7)])
    )
    (tmp_path / "cpu.json").write_text(json.dumps([score("tool_call", 200, 200)]))
    for name, last in (("plain", 3), ("mtp", 4)):
        answers = [Answered("about", n, (n, last), n < 3) for n in range(2)]
        write_answers(tmp_path / f"{name}.jsonl", [*answers, Answered("about", 2, (7,), False)])
    fault = {"fault": "no window", "skill": "recall_near", "whole": 1.0, "broken": 0.25}
    unrelated = {"unrelated": 0.99, "unrelated_broken": 0.98}
    (tmp_path / "faults.json").write_text(json.dumps([fault | unrelated]))
    arguments = ["--docs", str(tmp_path), "--faults", str(tmp_path / "faults.json")]
    arguments += [
        "--scores",
        f"a GPU={tmp_path}/gpu.json",
        "--scores",
        f"a CPU={tmp_path}/cpu.json",
    ]
    arguments += ["--compare", f"mtp={tmp_path}/plain.jsonl,{tmp_path}/mtp.jsonl"]
    for _ in range(2):  # again gives the same
        done = CliRunner().invoke(report.main, arguments)
        assert done.exit_code == 0, done.output
        page = (tmp_path / report.PAGE).read_text()
        assert page.startswith(f"before\n{report.BEGIN}\n\n| skill |")
        assert page.endswith(f"{report.END}\nafter\n")
        assert "| tool call | 95.0 % | 98.7 % of 1,000 | 91.0 % | 100.0 % of 200 |  |" in page
        assert "| recall far 2048 | 90.0 % | 87.5 % of 8 |  |  |  |" in page
        assert page.count("| a token drafted ahead | 3 | 33.3 % | 66.7 % | 66.7 % |") == 1
        assert "| no window | recall near | 100.0 % | 25.0 % | 99.0 % | 98.0 % |" in page
        assert "old" not in page


def test_a_page_without_its_markers_is_left_alone(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="lacks"):
        report.with_tables(f"{report.END}{report.BEGIN}", {})


def log(path: Path, first: int, sparse: bool) -> Path:
    lines: list[dict[str, object]] = [{"step": first, "mixing": "torch", "torch": "2"}]
    for n in range(6):
        losses = {"total": 2.0, "main": 1.0 / (n + 1), "mtp": 1.5 / (n + 1), "foresight": 0.1}
        about = {"step": first + n, "seconds": 60.0 * n, "length": 2048 if n % 3 else 8192}
        lines.append({**about, "sparse": sparse, "quantised": False, **losses})
    lines.append({"step": first + 6, "scores": {"about": 0.5, "about_drafts": 0.1}})
    path.write_text("\n".join(map(json.dumps, lines)))
    return path


def test_pieces_are_drawn_one_after_another(tmp_path: Path) -> None:
    logs = [log(tmp_path / "1.jsonl", 0, False), log(tmp_path / "2.jsonl", 6, True)]
    curves = report.read_logs(logs)
    assert [each["minutes"] for each in curves.losses] == list(range(6)) + list(range(5, 11))
    assert [each["minutes"] for each in curves.scores] == [5, 10]
    assert curves.pieces == [5]
    assert list(report._changes(curves)) == [(5, "indexer chooses")]
    assert report._smooth(curves.losses, "main")[0] == [each["minutes"] for each in curves.losses]
    many = [{"minutes": float(n), "main": 1.0} for n in range(1000)]
    minutes, values = report._smooth(many, "main")
    assert len(minutes) <= report.POINTS
    assert set(values) == {1.0}
    pytest.importorskip("matplotlib", reason="matplotlib is not installed (extra: train)")
    report.draw(curves, tmp_path / "c.svg")
    first = (tmp_path / "c.svg").read_bytes()
    report.draw(curves, tmp_path / "c.svg")
    assert first == (tmp_path / "c.svg").read_bytes()
    assert b"indexer chooses" in first

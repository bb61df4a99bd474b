"""`make demo`: what the tour shows, what it does when a step fails, and that it leaves nothing behind."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fourfold.cli import main as fourfold
from train.data.items import held_out

pytest.importorskip("openai", reason="the openai client is not installed (extra: peers)")
from examples import tour

ROOT = Path(__file__).parent.parent.parent


def processes(word: str) -> list[str]:
    """Command lines that hold `word`."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = path.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue  # it has ended meanwhile
        if word in line:
            found.append(line)
    return found


@pytest.mark.full
def test_the_tour_shows_what_it_promises_and_leaves_nothing_behind() -> None:
    name = "tour-of-the-test"
    done = subprocess.run(
        [sys.executable, "examples/tour.py", "--device", "cpu", "--served-model-name", name],
        cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, timeout=300,
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    text = done.stdout
    assert done.returncode == 0, text + done.stderr
    assert not processes(name)
    steps = re.split(r"\n(?=\d\. )", text)
    assert len(steps) == 6
    _, reasoned, called, recalled, again, counted = steps

    question, right = tour.SUM
    assert f"you │ {question}" in reasoned
    assert "thinking │ 365 + 248\n            │ 5 + 8 = 13, write 3, carry 1\n" in reasoned
    assert f"answer │ {right}\n" in reasoned

    (call,) = re.findall(r"call │ get_weather (\{.*\})", called)
    assert json.loads(call) == tour.WEATHER_CALL[1]
    assert f"result │ {json.dumps(tour.WEATHER_RESULT)}" in called
    assert f"answer │ {tour.WEATHER_ANSWER}\n" in called

    assert tour.OWNER in re.findall(r"answer │ (.*)", recalled)[0]
    (read,) = re.findall(r"([\d,]+) tokens were read", recalled)
    assert int(read.replace(",", "")) > 4000
    assert re.findall(r"answer │ (.*)", again) == re.findall(r"answer │ (.*)", recalled)
    cached, of, after, before = re.findall(
        r"([\d,]+) of ([\d,]+) tokens .* after ([\d.]+) s instead of ([\d.]+) s", again
    )[0]
    assert of == read
    assert int(of.replace(",", "")) - int(cached.replace(",", "")) < 300
    assert float(after) < float(before)

    (speed,) = re.findall(r"speed │ (\d+) tokens a second", counted)
    assert int(speed) > 0
    accepted, drafted, share = re.findall(r"drafts │ (\d+) of (\d+) accepted \((\d+)%\)", counted)[
        0
    ]
    assert 50 <= int(share) == round(100 * int(accepted) / int(drafted))
    hits, queries = re.findall(r"cache │ ([\d,]+) of ([\d,]+) prompt tokens", counted)[0]
    assert (
        int(cached.replace(",", "")) <= int(hits.replace(",", "")) < int(queries.replace(",", ""))
    )
    assert tour.NEXT in text


@pytest.mark.slow
def test_a_wrong_answer_ends_the_tour_and_the_server(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setattr(tour, "SUM", (tour.SUM[0], "614"))
    name = "wrong-in-the-test"
    assert tour.main(["--device", "cpu", "--served-model-name", name]) == 1
    shown = capsys.readouterr().out
    assert "FAILED: expected '614', found '613'" in shown
    assert "Next, with this model" not in shown
    assert not processes(name)


@pytest.mark.full
def test_a_server_that_does_not_start_says_why(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setattr(tour, "START_SECONDS", 30)
    assert tour.main(["--no-such-flag"]) == 1
    shown = capsys.readouterr().out
    assert "FAILED: the server did not start:\n" in shown
    assert "No such option" in shown


def test_a_server_that_hangs_is_given_up_and_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    code = (
        "import signal, time; signal.signal(15, signal.SIG_IGN); print(flush=True); time.sleep(99)"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.readline()
    monkeypatch.setattr(tour, "START_SECONDS", 0.3)
    monkeypatch.setattr(tour, "STOP_SECONDS", 0.2)
    with pytest.raises(tour.StepFailed, match="was not ready after"):
        tour.wait_until_ready(process, "http://127.0.0.1:9", SimpleLog("words"))
    assert tour.stop(process) == -9
    process.stdout.close()


class SimpleLog:
    """What a server wrote."""

    def __init__(self, text: str):
        self.text = text

    def seek(self, where: int) -> None:
        assert where == 0

    def read(self) -> str:
        return self.text


def answer(content: str, prompt: int, cached: int) -> tour.Answer:
    usage: Any = SimpleNamespace(
        prompt_tokens=prompt,
        completion_tokens=5,
        prompt_tokens_details=SimpleNamespace(cached_tokens=cached),
    )
    return tour.Answer(content=content, usage=usage, first=1.0, total=2.0)


def test_the_second_time_must_come_from_the_cache() -> None:
    said = f"The owner is {tour.OWNER}."
    asking: Any = SimpleNamespace(ask=lambda messages, thinking: answer(said, 4000, 100))
    with pytest.raises(tour.StepFailed, match="only 100 of 4000 tokens"):
        tour.again(asking, [], answer(said, 4000, 0))
    asking = SimpleNamespace(ask=lambda messages, thinking: answer("Hugo", 4000, 3999))
    with pytest.raises(tour.StepFailed, match="found 'Hugo'"):
        tour.again(asking, [], answer(said, 4000, 0))


def test_its_questions_are_held_out_and_its_fact_stands_first() -> None:
    a, b = map(int, re.findall(r"\d+", tour.SUM[0]))
    assert str(a + b) == tour.SUM[1]
    assert held_out(f"+ {min(a, b)} {max(a, b)}")
    name, arguments = tour.WEATHER_CALL
    assert held_out(name + json.dumps(arguments, sort_keys=True))
    assert held_out(f"{tour.FACT_QUESTION} {tour.OWNER}")
    text = tour.long_text()
    assert text.count(tour.OWNER) == 1
    assert text.index(tour.FACT) < 30


def test_what_to_try_next_are_commands_that_there_are() -> None:
    lines = [line.strip() for line in tour.NEXT.splitlines() if line.startswith("   fourfold ")]
    assert len(lines) == 5
    for line in lines:
        _, name, *arguments = shlex.split(re.split(r"\s{3,}", line)[0])
        fourfold.commands[name].make_context(name, arguments)

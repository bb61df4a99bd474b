"""`fourfold chat` against a stub server: what is said, what is remembered, how it ends."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from fourfold.cli.chat import Conversation, Server, Terminal
from fourfold.server.settings import ServerSettings
from tests.server.http import Site, site

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def web() -> Iterator[Site]:
    with site() as found:
        found.says("I think", "</think>", "\n\nHello")
        yield found


def typed(*lines: str | type[BaseException]) -> Callable[[str], str]:
    left = list(lines)

    def read(prompt: str) -> str:
        if not left:
            raise EOFError
        line = left.pop(0)
        if isinstance(line, str):
            return line
        raise line

    return read


def talk(web: Site, *lines: str | type[BaseException], key: str | None = None) -> Conversation:
    terminal = Terminal(
        Server(f"http://127.0.0.1:{web.port}/v1", key), Conversation(), typed(*lines)
    )
    terminal.run()
    return terminal.talk


def prompt(web: Site, number: int = -1) -> str:
    return web.engine.tokenizer.decode(web.engine.requests[number].prompt_token_ids)


def test_questions_and_answers_are_remembered(
    web: Site, capsys: pytest.CaptureFixture[str]
) -> None:
    found = talk(web, "hi", "and \\", "more")
    out = capsys.readouterr().out
    assert "I think" in out
    assert "Hello" in out
    assert "tokens in, 4 of them cached" in out
    assert [m["role"] for m in found.messages] == ["user", "assistant"] * 2
    assert found.messages[1]["reasoning_content"] == "I think"
    assert found.messages[2]["content"] == "and \nmore"
    assert "</think>Hello" in prompt(web)


def test_commands(web: Site, capsys: pytest.CaptureFixture[str]) -> None:
    web.says("at once")
    found = talk(
        web, "/nothink", "/system Be brief.", "one", "two", "/undo", "/history", "/help",
        "/nothing", "", "/think", "/effort max", "three", "/clear", "/quit", "never",
    )  # fmt: skip
    assert found.messages == []
    assert len(web.engine.requests) == 3
    assert "</think>" in prompt(web, 0)
    assert "Be brief." in prompt(web, 0)
    assert "Beyond maximum" in prompt(web)
    assert "two" not in prompt(web)
    shown = capsys.readouterr()
    assert "user: one" in shown.out
    assert "there is no /nothing" in shown.err


def test_ctrl_c_ends_the_answer_and_not_the_program(
    web: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    web.engine.pace = 0.02
    web.says("word " * 300)
    shown = Terminal._show
    count = 0

    def interrupted(delta: dict[str, str], texts: dict[str, list[str]]) -> None:
        nonlocal count
        count += 1
        shown(delta, texts)
        if count == 5:
            raise KeyboardInterrupt

    monkeypatch.setattr(Terminal, "_show", staticmethod(interrupted))
    found = talk(web, "hi", KeyboardInterrupt)
    assert len(found.messages) == 2
    assert found.messages[1]["reasoning_content"]
    for _ in range(200):
        if not web.engine.running:
            break
        web.get("/live")
    assert web.engine.running == 0


@pytest.mark.full
def test_ctrl_c_in_a_process_of_its_own(web: Site) -> None:
    """A real signal: the answer ends, what came of it is remembered, the program goes on to its end."""
    web.engine.pace = 0.02
    web.says("</think>", "\n\n" + "word " * 500)
    command = [sys.executable, "-m", "fourfold", "chat", "--url", f"http://127.0.0.1:{web.port}"]
    pipe = subprocess.PIPE

    def heed_signals() -> None:  # where these tests run in the background, they were told not to
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    with subprocess.Popen(
        command, stdin=pipe, stdout=pipe, stderr=pipe, cwd=ROOT, preexec_fn=heed_signals
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(b"hi\n")
        process.stdin.flush()
        seen = b""
        while b"word word" not in seen:
            data = os.read(process.stdout.fileno(), 4096)
            assert data, seen
            seen += data
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(b"/history\n/quit\n", timeout=20)
    assert process.returncode == 0, err
    assert b"[stopped]" in err
    assert b"user: hi" in out
    assert b"assistant: word word" in out
    assert (seen + out).count(b"word") < 500


def test_a_refusal_is_told_and_the_question_taken_back(
    web: Site, capsys: pytest.CaptureFixture[str]
) -> None:
    found = talk(web, "/effort huge", "hi")
    assert found.messages == []
    assert "400: reasoning_effort" in capsys.readouterr().err


def test_keys_and_absent_servers(capsys: pytest.CaptureFixture[str]) -> None:
    with site(ServerSettings(api_keys=("k",))) as web:
        web.says("yes")
        assert talk(web, "hi").messages == []
        assert "401" in capsys.readouterr().err
        assert len(talk(web, "hi", key="k").messages) == 2
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    Terminal(Server(f"http://127.0.0.1:{port}", None), Conversation(), typed("hi")).run()
    assert "does not answer" in capsys.readouterr().err

"""A real `fourfold serve` on a tiny checkpoint: how it starts, drains, dies and refuses."""

from __future__ import annotations

import http.client
import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from fourfold.weights.synthetic import write_checkpoint

pytestmark = pytest.mark.full

ROOT = Path(__file__).resolve().parents[2]
# Every connection that is opened to somewhere else is told, and fails.
WATCH = """
import os, sys
def watch(event, args):
    if event == "socket.connect" and isinstance(args[1], tuple):
        os.write(2, b"OUTBOUND %r\\n" % (args[1],))
        raise OSError("no network")
sys.addaudithook(watch)
"""


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("life") / "tiny"
    write_checkpoint(directory, "tiny", weights="native", seed=1)
    return directory


@dataclass
class Server:
    process: subprocess.Popen[bytes]
    log: Path
    port: int

    @property
    def text(self) -> str:
        return self.log.read_text(errors="replace")

    def request(self, method: str, path: str, body: Any = None) -> http.client.HTTPResponse:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        data = None if body is None else json.dumps(body)
        connection.request(method, path, data, {"Content-Type": "application/json"})
        return connection.getresponse()

    def health(self) -> tuple[int, dict[str, Any]]:
        response = self.request("GET", "/health")
        return response.status, json.loads(response.read())

    def until(self, condition: Callable[[], object], seconds: float = 90) -> None:
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, self.text[-3000:]
            time.sleep(0.02)

    def until_ready(self) -> None:
        self.until(lambda: "ready. Try:" in self.text or self.process.poll() is not None)
        assert self.process.poll() is None, self.text[-3000:]

    def exit(self, seconds: float = 30) -> int:
        return self.process.wait(seconds)

    @property
    def children(self) -> list[int]:
        found = []
        for entry in Path("/proc").glob("[0-9]*/stat"):
            try:
                fields = entry.read_text().rpartition(")")[2].split()
            except OSError:
                continue
            if int(fields[1]) == self.process.pid:
                found.append(int(entry.parent.name))
        return found

    def stream(self, tokens: int = 1500) -> http.client.HTTPResponse:
        """A stream that has begun."""
        body = {"prompt": "Once", "max_tokens": tokens, "stream": True, "ignore_eos": True}
        response = self.request("POST", "/v1/completions", body)
        assert response.status == 200
        assert response.readline().startswith(b"data: ")
        return response


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port: int = free.getsockname()[1]
    return port


@contextmanager
def serving(
    model: Path, tmp_path: Path, *flags: str, ready: bool = True, **environment: str
) -> Iterator[Server]:
    port, log = free_port(), tmp_path / "log"
    limits = ("--max-model-len", "2000", "--max-num-seqs", "4", "--dtype", "float32")
    command = [sys.executable, "-m", "fourfold", "serve", str(model), "--port", str(port)]
    with log.open("wb") as out:
        process = subprocess.Popen(
            [*command, *limits, *flags],
            stdout=out,
            stderr=out,
            env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment},
        )
    server = Server(process, log, port)
    try:
        if ready:
            server.until_ready()
        yield server
    finally:
        process.kill()
        process.wait()


def gone(pids: list[int]) -> bool:
    return not any(Path(f"/proc/{pid}").exists() for pid in pids)


def test_p4_p7_p9_a_whole_life(tiny: Path, tmp_path: Path) -> None:
    """Start without a home, a writable place or a network; be seen loading; answer; drain."""
    hook = tmp_path / "hook"
    hook.mkdir()
    (hook / "sitecustomize.py").write_text(WATCH)
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o500)
    environment = {
        "HOME": str(locked), "TMPDIR": str(locked), "XDG_CACHE_HOME": str(locked),
        "TRITON_CACHE_DIR": str(locked / "triton"), "PYTHONPATH": f"{hook}:{ROOT}",
    }  # fmt: skip
    with serving(tiny, tmp_path, ready=False, **environment) as server:
        statuses = []

        def seen() -> bool:
            try:
                statuses.append(server.health())
            except OSError:
                return server.process.poll() is not None
            return statuses[-1][0] == 200

        server.until(seen)
        assert server.process.poll() is None, server.text
        assert statuses[0][0] == 503
        assert "bytes_total" in statuses[0][1]["loading"]
        assert "WARNING" not in server.text
        server.until(lambda: "ready. Try:" in server.text)
        assert len([line for line in server.text.splitlines() if line.startswith("bound: ")]) >= 5
        # The line that is printed works as it is printed.
        (line,) = [line for line in server.text.splitlines() if line.startswith("  curl ")]
        words = shlex.split(line)
        response = server.request(
            "POST", words[1].partition(str(server.port))[2], json.loads(words[-1])
        )
        assert response.status == 200
        assert json.loads(response.read())["choices"][0]["finish_reason"] in ("stop", "length")
        # Random weights obey a grammar.
        body = {"messages": [{"role": "user", "content": "hi"}], "thinking": False}
        choice = body | {"structured_outputs": {"choice": ["yes", "no"]}}
        response = server.request("POST", "/v1/chat/completions", choice)
        (answer,) = json.loads(response.read())["choices"]
        assert answer["message"]["content"] in ("yes", "no")
        assert answer["finish_reason"] == "stop"
        assert listeners([server.process.pid, *server.children]) == 1
        # SIGTERM: not ready at once, what runs goes on to its end.
        stream = server.stream(60)
        children = server.children
        server.process.send_signal(signal.SIGTERM)
        server.until(lambda: "draining" in server.text)
        status, body = server.health()
        assert (status, body["status"]) == (503, "draining")
        refused = server.request("POST", "/v1/completions", {"prompt": "a"})
        assert refused.status == 503
        assert int(refused.headers["Retry-After"]) >= 1
        rest = stream.read()
        assert rest.endswith(b"data: [DONE]\n\n")
        assert b'"finish_reason":"length"' in rest
        assert server.exit() == 0
        assert gone(children)
        assert "OUTBOUND" not in server.text
        assert "Traceback" not in server.text


def listeners(pids: list[int]) -> int:
    """TCP sockets on which these processes listen."""
    listening = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A":
                listening.add(f"socket:[{fields[9]}]")
    found = set()
    for pid in pids:
        for descriptor in Path(f"/proc/{pid}/fd").iterdir():
            found |= {os.readlink(descriptor)} & listening
    return len(found)


def test_p7_what_does_not_finish_in_time_is_aborted(tiny: Path, tmp_path: Path) -> None:
    with serving(tiny, tmp_path, "--drain-timeout", "0.5") as server:
        stream = server.stream()
        server.process.send_signal(signal.SIGTERM)
        rest = stream.read()
        assert b'"finish_reason":"abort"' in rest
        assert rest.endswith(b"data: [DONE]\n\n")
        assert server.exit() == 0
        assert "aborted requests=1" in server.text


def test_p7_a_second_signal_leaves_now(tiny: Path, tmp_path: Path) -> None:
    with serving(tiny, tmp_path) as server:
        server.stream()
        children = server.children
        server.process.send_signal(signal.SIGINT)
        server.until(lambda: "draining" in server.text)
        server.process.send_signal(signal.SIGINT)
        assert server.exit(5) == 1
        server.until(lambda: gone(children), 15)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_p1_p6_a_dead_or_frozen_engine(number: int, tiny: Path, tmp_path: Path) -> None:
    """Requests fail by name, /health does not lie, the process ends by itself and not with 0."""
    with serving(tiny, tmp_path) as server:
        stream = server.stream()
        (engine,) = server.children
        os.kill(engine, number)
        rest = stream.read()
        assert b'"code":"engine_dead"' in rest
        assert rest.endswith(b"data: [DONE]\n\n")
        assert server.exit() == 1
        assert gone([engine])
        assert "engine_died" in server.text
        if number == signal.SIGSTOP:
            assert "gave no sign of life" in server.text
            assert "fourfold/engine/worker.py" in server.text  # the engine's stacks


def test_p1_p6_a_step_that_never_ends(tmp_path: Path) -> None:
    """The engine lives and gives signs of it, and is stuck all the same: /health turns false and stays
    so, what runs and what waits fail by name, stacks are written, the process ends with 1."""
    port, log = free_port(), tmp_path / "log"
    with log.open("wb") as out:
        command = [sys.executable, "-m", "tests.server.endless", str(port)]
        process = subprocess.Popen(command, stdout=out, stderr=out, cwd=ROOT)
    server = Server(process, log, port)
    try:
        server.until_ready()
        (engine,) = server.children
        assert server.health()[1]["status"] == "ready"
        failed: list[http.client.HTTPResponse] = []
        ask = threading.Thread(
            target=lambda: failed.append(server.request("POST", "/v1/completions", {"prompt": "b"}))
        )
        body = {"prompt": "a", "max_tokens": 9, "stream": True}
        stream = server.request("POST", "/v1/completions", body)
        assert stream.readline().startswith(b"data: ")
        ask.start()
        seen: list[str] = []
        end = time.monotonic() + 30
        while process.poll() is None:
            assert time.monotonic() < end, seen[-1]
            try:
                seen.append(server.health()[1]["status"])
            except (OSError, http.client.HTTPException):
                seen.append("gone")
            time.sleep(0.005)
        assert process.returncode == 1
        assert seen[0] == "ready"
        assert "dead" in seen
        assert "ready" not in seen[seen.index("dead") :]
        rest = stream.read()
        assert b'"code":"engine_dead"' in rest
        assert b"in step 2" in rest
        assert rest.endswith(b"data: [DONE]\n\n")
        ask.join(10)
        (response,) = failed
        assert response.status == 500
        assert json.loads(response.read())["error"]["code"] == "engine_dead"
        assert "the step takes 1 s, more than the 1 s allowed" in server.text
        assert "never_ends" in server.text  # the engine's stacks
        assert gone([engine])
    finally:
        process.kill()
        process.wait()


def test_p8_a_wrong_checkpoint_never_serves_a_token(tiny: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in tiny.iterdir():
        (broken / file.name).write_bytes(file.read_bytes())
    shard = sorted(broken.glob("model-*.safetensors"))[3]
    shard.write_bytes(shard.read_bytes()[:-100])
    with serving(broken, tmp_path, ready=False) as server:
        answers = []
        while server.process.poll() is None:
            try:
                answers.append(server.request("POST", "/v1/completions", {"prompt": "a"}).status)
            except (OSError, http.client.HTTPException):
                time.sleep(0.05)
        assert server.exit() == 2
        assert set(answers) <= {503}
        assert f"fourfold: error: {shard.name}" in server.text or shard.name in server.text
        assert "Traceback" not in server.text


def test_p7_a_signal_while_loading(tiny: Path, tmp_path: Path) -> None:
    """On all addresses, without a key: that is said loudly, before anything is served."""
    with serving(tiny, tmp_path, "--host", "0.0.0.0", ready=False) as server:

        def listens() -> bool:
            try:
                return server.health()[0] in (200, 503)
            except OSError:
                return False

        server.until(listens)
        server.until(lambda: "WARNING: --host 0.0.0.0 without --api-key" in server.text)
        server.process.send_signal(signal.SIGTERM)
        assert server.exit() == 0
        server.until(lambda: gone(server.children))


def test_a_port_that_is_taken_is_said_before_anything_is_loaded(tiny: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        done = subprocess.run(
            [sys.executable, "-m", "fourfold", "serve", str(tiny), "--port", port],
            capture_output=True, text=True, check=False, cwd=ROOT,
        )  # fmt: skip
    assert done.returncode == 2
    assert f"port {port} cannot be used" in done.stderr
    assert len(done.stderr.splitlines()) == 1

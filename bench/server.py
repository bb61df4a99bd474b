"""What the server costs: streams from an engine that is a stub, and how late their events are.

Two processes on this machine: a server on a stub engine, and this one, which reads. Each of N streams
gets a token every 1/RATE seconds by the system's monotonic clock; an event's delay is how long after
that moment it was read here. Prints one JSON line; with --highest, one for every rate tried in search of
the highest that the server holds (99 % within 50 ms, without drift), and that one again at the end.
"""

from __future__ import annotations

import argparse
import asyncio
import io
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import AsyncGenerator
from pathlib import Path

from fourfold.core.client import EngineHealth, EngineInfo, EngineState, EngineStats
from fourfold.core.request import FinishReason, Request, RequestOutput

LIMIT_MS = 50.0
DRIFT_MS = 10.0  # a delay that grows by more from one half of the time to the other drifts
PRECISION = 1.05


class PacedEngine:
    """Gives every request its tokens at an even pace."""

    def __init__(self, rate: float):
        self.period = 1 / rate
        self.running = 0

    info = EngineInfo("stub", None, "none", "none", 1 << 20, 4096, 900, 0, 1)

    async def start(self, progress: object = None) -> EngineInfo:
        return self.info

    async def generate(self, request: Request) -> AsyncGenerator[RequestOutput, None]:
        loop = asyncio.get_running_loop()
        count = request.params.max_tokens or 1
        begin = loop.time()
        for number in range(1, count + 1):
            wait = begin + number * self.period - loop.time()
            await asyncio.sleep(max(wait, 0))
            reason = FinishReason.LENGTH if number == count else None
            yield RequestOutput(request.request_id, (40,), reason)

    async def abort(self, request_id: str, index: int | None = None) -> bool:
        return True

    async def stats(self) -> EngineStats:
        return EngineStats()

    def health(self) -> EngineHealth:
        return EngineHealth(EngineState.READY)

    async def drain(self, timeout: float) -> int:
        return 0

    async def shutdown(self, timeout: float = 0.0) -> None:
        return None

    async def reset_prefix_cache(self) -> None:
        return None


def serve(rate: float, descriptor: int) -> None:
    """The server's process."""
    from fourfold.core.log import Log
    from fourfold.server.run import run
    from fourfold.server.serving import Serving
    from fourfold.server.settings import ServerSettings
    from fourfold.text.generation import GenerationDefaults
    from fourfold.text.profiles import ChatProfile
    from fourfold.text.tokenizer import Tokenizer
    from fourfold.weights.synthetic_tokenizer import tokenizer_files

    tokenizer = Tokenizer(tokenizer_files(900, 4096)["tokenizer.json"], "tokenizer.json")
    log = Log("text", io.StringIO())
    serving = Serving(
        ServerSettings(drain_timeout=0), PacedEngine(rate), tokenizer, ChatProfile.OFFICIAL,
        GenerationDefaults(), log, "stub",
    )  # fmt: skip
    sys.exit(run(serving, socket.socket(fileno=descriptor), lambda: None))


async def stream(port: int, tokens: int, rate: float, delays: list[tuple[float, float]]) -> None:
    """Read one stream; (when, how late) of every event that carries a token."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    messages = [{"role": "user", "content": "hi"}]
    body = json.dumps(
        {"messages": messages, "stream": True, "max_tokens": tokens, "thinking": False}
    ).encode()
    writer.write(
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"
        b"Content-Length: %d\r\n\r\n%s" % (len(body), body)
    )
    first, number = None, 0
    while b"[DONE]" not in (data := await reader.readline()):
        assert data, "the server closed the connection"
        if b'"content":"' not in data or b'"content":""' in data:
            continue
        now = time.monotonic()
        first = now if first is None else min(first, now - number / rate)
        delays.append((now, now - first - number / rate))
        number += 1
    assert number == tokens, (number, tokens)
    writer.close()


async def load(port: int, streams: int, rate: float, seconds: float) -> list[tuple[float, float]]:
    """All streams, begun over one second."""
    delays: list[tuple[float, float]] = []
    tokens = int(rate * seconds)

    async def one(number: int) -> None:
        await asyncio.sleep(number / streams)
        await stream(port, tokens, rate, delays)

    await asyncio.gather(*(one(number) for number in range(streams)))
    return delays


def measure(streams: int, rate: float, seconds: float) -> dict[str, float]:
    """One server, one load."""
    with socket.create_server(("127.0.0.1", 0), backlog=1024) as listener:
        port = listener.getsockname()[1]
        descriptor = listener.fileno()
        command = [sys.executable, __file__, "--serve", str(descriptor), "--rate", str(rate)]
        root = str(Path(__file__).resolve().parent.parent)
        environment = {**os.environ, "PYTHONPATH": root}
        process = subprocess.Popen(command, pass_fds=(descriptor,), env=environment)
    try:
        began, before = time.monotonic(), sum(os.times()[:2])
        delays = asyncio.run(load(port, streams, rate, seconds))
        took = time.monotonic() - began
        ticks = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
        reader = sum(os.times()[:2])
        cpu = (int(ticks[11]) + int(ticks[12])) / os.sysconf("SC_CLK_TCK")
    finally:
        process.terminate()
        process.wait(10)
    middle = began + took / 2
    late = sorted(delay for _, delay in delays)
    halves = [[d for t, d in delays if (t < middle) == early] for early in (True, False)]
    return {
        "streams": streams,
        "events_per_second": round(streams * rate),
        "p50_ms": round(late[len(late) // 2] * 1e3, 2),
        "p99_ms": round(late[int(len(late) * 0.99)] * 1e3, 2),
        "max_ms": round(late[-1] * 1e3, 2),
        "drift_ms": round(
            (sum(halves[1]) / len(halves[1]) - sum(halves[0]) / len(halves[0])) * 1e3, 2
        ),
        "server_cpu": round(cpu / took, 3),
        "reader_cpu": round((reader - before) / took, 3),
    }


def highest(streams: int, rate: float, seconds: float) -> None:
    """Search the highest rate of each stream by doubling and halving, from `rate` on."""
    best: dict[str, float] = {}

    def holds(rate: float) -> bool:
        nonlocal best
        found = measure(streams, rate, seconds)
        print(json.dumps(found), flush=True)
        held = found["p99_ms"] <= LIMIT_MS and found["drift_ms"] <= DRIFT_MS
        if held:
            best = found
        return held

    low, high = rate, rate
    if holds(rate):
        while holds(high := low * 2):
            low = high
    else:
        while not holds(low := high / 2):
            high = low
    while high / low > PRECISION:
        middle = (low * high) ** 0.5
        if holds(middle):
            low = middle
        else:
            high = middle
    print(json.dumps({"highest": best}), flush=True)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--streams", type=int, default=256)
    parser.add_argument("--rate", type=float, default=25.0, help="tokens a second of each stream")
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--highest", action="store_true", help="find the highest rate it can hold")
    parser.add_argument("--serve", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve is not None:
        serve(args.rate, args.serve)
    if args.highest:
        highest(args.streams, args.rate, args.seconds)
    else:
        print(json.dumps(measure(args.streams, args.rate, args.seconds)), flush=True)


if __name__ == "__main__":
    main()

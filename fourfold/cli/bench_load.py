"""Requests to an OpenAI-compatible server, timed event by event, for `fourfold bench serve`.

Contract: HTTP/1.1 over asyncio alone; times are of the monotonic clock, in seconds. A request that
fails is a result with an error, never an exception. It knows neither prompts' making nor reports.
"""

from __future__ import annotations

import asyncio
import json
import random
import ssl
import time
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from fourfold.core.errors import ConfigError

_TIMEOUT = 6 * 3600.0
_LINE_LIMIT = 1 << 24


@dataclass
class Outcome:
    """What became of one request. `itl` are the seconds between its events."""

    prompt_tokens: int
    start: float = 0.0
    end: float = 0.0
    ttft: float = 0.0
    itl: list[float] = field(default_factory=list)
    output_tokens: int = 0
    text: str = ""
    error: str = ""

    @property
    def latency(self) -> float:
        """From its sending to its last event."""
        return self.end - self.start

    @property
    def tpot(self) -> float | None:
        """Time per output token after the first, None for an answer of one."""
        rest = self.output_tokens - 1
        return (self.latency - self.ttft) / rest if rest > 0 else None


@dataclass(frozen=True)
class Target:
    """Where requests go. `chat` says which of OpenAI's two APIs `path` speaks."""

    url: str
    path: str
    chat: bool
    key: str | None = None

    def __post_init__(self) -> None:
        parts = urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ConfigError(f"--base-url must be like http://127.0.0.1:8000, found {self.url!r}")

    async def open(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """A connection of its own."""
        parts = urlsplit(self.url)
        secure = ssl.create_default_context() if parts.scheme == "https" else None
        port = parts.port or (443 if secure else 80)
        return await asyncio.open_connection(parts.hostname, port, ssl=secure, limit=_LINE_LIMIT)

    def head(self, method: str, path: str, size: int = 0) -> bytes:
        """A request's head."""
        parts = urlsplit(self.url)
        lines = [f"{method} {parts.path.rstrip('/')}{path} HTTP/1.1", f"Host: {parts.netloc}"]
        lines += ["Connection: close", "Content-Type: application/json"]
        if self.key:
            lines.append(f"Authorization: Bearer {self.key}")
        return ("\r\n".join([*lines, f"Content-Length: {size}"]) + "\r\n\r\n").encode()

    async def exchange(self, method: str, path: str, body: bytes = b"") -> tuple[int, bytes]:
        """A whole small answer: (status, body)."""
        reader, writer = await self.open()
        try:
            writer.write(self.head(method, path, len(body)) + body)
            status, chunked, length = await _read_head(reader)
            if chunked:
                parts = [part async for part in _chunks(reader)]
                return status, b"".join(parts)
            return status, await (reader.read() if length is None else reader.readexactly(length))
        finally:
            writer.close()


async def run_request(target: Target, body: dict[str, Any], prompt_tokens: int) -> Outcome:
    """Send one streaming request and time its events."""
    found = Outcome(prompt_tokens)
    data = json.dumps(body).encode()
    found.start = time.perf_counter()
    try:
        async with asyncio.timeout(_TIMEOUT):
            reader, writer = await target.open()
            try:
                writer.write(target.head("POST", target.path, len(data)) + data)
                await _read_stream(reader, found)
            finally:
                writer.close()
    except (OSError, asyncio.IncompleteReadError, TimeoutError, ValueError, KeyError) as error:
        found.error = f"{type(error).__name__}: {error}"[:200]
    found.end = found.end or time.perf_counter()
    return found


async def _read_stream(reader: asyncio.StreamReader, found: Outcome) -> None:
    status, chunked, length = await _read_head(reader)
    if status != 200:
        body = b"".join([part async for part in _chunks(reader)]) if chunked else b""
        if not chunked:
            body = await (reader.read(2000) if length is None else reader.readexactly(length))
        raise ValueError(f"{status} {body[:150].decode('utf-8', 'replace')}")
    rest, last, events = b"", found.start, 0
    async for part in _chunks(reader) if chunked else _plain(reader):
        rest += part
        *lines, rest = rest.split(b"\n")
        for line in lines:
            if not line.startswith(b"data:") or line[5:].strip() == b"[DONE]":
                continue
            event = json.loads(line[5:])
            if "error" in event:
                raise ValueError(str(event["error"])[:150])
            if event.get("usage"):
                found.output_tokens = event["usage"]["completion_tokens"]
                found.prompt_tokens = event["usage"]["prompt_tokens"]
            text = _text(event)
            if not text:
                continue
            now = time.perf_counter()
            if events:
                found.itl.append(now - last)
            else:
                found.ttft = now - found.start
            last, found.end = now, now
            events += 1
            found.text += text
    if not events:
        raise ValueError("the answer was empty")
    found.output_tokens = found.output_tokens or events


def _text(event: dict[str, Any]) -> str:
    found = ""
    for choice in event.get("choices", ()):
        delta = choice.get("delta", choice)
        found += delta.get("text") or delta.get("content") or delta.get("reasoning_content") or ""
    return found


async def _read_head(reader: asyncio.StreamReader) -> tuple[int, bool, int | None]:
    """(status, whether the body is chunked, its length if told)."""
    first = (await reader.readline()).split(None, 2)
    if len(first) < 2 or not first[1].isdigit():
        raise ValueError("no HTTP answer")
    chunked, length = False, None
    while (line := (await reader.readline()).strip()) != b"":
        name, _, value = line.partition(b":")
        if name.lower() == b"transfer-encoding":
            chunked = b"chunked" in value.lower()
        elif name.lower() == b"content-length":
            length = int(value)
    return int(first[1]), chunked, length


async def _chunks(reader: asyncio.StreamReader) -> AsyncGenerator[bytes, None]:
    while size := int((await reader.readline()).split(b";")[0], 16):
        yield await reader.readexactly(size)
        await reader.readexactly(2)


async def _plain(reader: asyncio.StreamReader) -> AsyncGenerator[bytes, None]:
    while part := await reader.read(1 << 16):
        yield part


async def run_load(
    target: Target,
    bodies: Sequence[tuple[dict[str, Any], int]],
    rate: float,
    burstiness: float,
    concurrency: int | None,
    seed: int,
) -> tuple[list[Outcome], float]:
    """All requests, begun at `rate` a second (infinite: at once) with gaps of a gamma distribution
    (burstiness 1: a Poisson process), at most `concurrency` at a time: outcomes and seconds."""
    rng = random.Random(seed)
    gate = asyncio.Semaphore(concurrency or len(bodies))

    async def one(body: dict[str, Any], tokens: int) -> Outcome:
        async with gate:
            return await run_request(target, body, tokens)

    began = time.perf_counter()
    tasks = []
    for body, tokens in bodies:
        tasks.append(asyncio.create_task(one(body, tokens)))
        if rate != float("inf"):
            await asyncio.sleep(rng.gammavariate(burstiness, 1 / (rate * burstiness)))
    outcomes = await asyncio.gather(*tasks)
    return list(outcomes), time.perf_counter() - began

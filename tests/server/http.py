"""A small HTTP client over an ASGI application, and a real server in a thread, for tests."""

from __future__ import annotations

import asyncio
import http.client
import io
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from fourfold.core.client import EngineState
from fourfold.core.log import Log
from fourfold.server.run import _http, bind
from fourfold.server.serving import Serving
from fourfold.server.settings import ServerSettings
from fourfold.text.generation import GenerationDefaults
from fourfold.text.profiles import ChatProfile
from tests.server.stub import StubEngine, make_tokenizer


@dataclass
class Site:
    """A server on a stub engine."""

    engine: StubEngine
    serving: Serving
    log: io.StringIO
    port: int = 0

    def call(
        self,
        method: str,
        path: str,
        body: object = None,
        headers: dict[str, str] | None = None,
    ) -> Answer:
        """One request; a body that is no bytes is sent as JSON."""
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        sent = {"Content-Type": "application/json"} if body is not None else {}
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)
        try:
            connection.request(method, path, None if body is None else data, sent | (headers or {}))
            response = connection.getresponse()
            return Answer(response.status, dict(response.getheaders()), response.read())
        finally:
            connection.close()

    def post(self, path: str, **body: object) -> Answer:
        """A POST of these fields."""
        return self.call("POST", path, body)

    def get(self, path: str) -> Answer:
        return self.call("GET", path)

    def lines(self, count: int) -> list[str]:
        """The log, once it has so many lines: one is written after its answer has left."""
        end = time.monotonic() + 5
        while len(self.log.getvalue().splitlines()) < count and time.monotonic() < end:
            time.sleep(0.01)
        return self.log.getvalue().splitlines()

    def text(self, *words: str) -> list[int]:
        """The tokens of texts, markers in them counted as markers."""
        return [t for word in words for t in self.engine.tokenizer.encode(word, allow_special=True)]

    def says(self, *words: str, end: bool = True) -> None:
        """Let every answer be these words."""
        tokens = self.text(*words) + ([1] if end else [])
        self.engine.script = lambda request, index: tokens


@dataclass
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes
    events: list[Any] = field(init=False)

    def __post_init__(self) -> None:
        lines = self.body.decode("utf-8", "replace").splitlines()
        self.events = [
            json.loads(line[6:])
            for line in lines
            if line.startswith("data: ") and line != "data: [DONE]"
        ]

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> dict[str, Any]:
        assert self.status >= 400, self.body
        assert len(self.body) < 1500
        found: dict[str, Any] = self.json["error"]
        assert set(found) == {"message", "type", "param", "code"}
        return found

    def deltas(self, name: str, index: int = 0) -> str:
        """One text of a streamed answer, joined."""
        return "".join(
            choice.get("delta", choice).get(name) or ""
            for event in self.events
            for choice in event["choices"]
            if choice["index"] == index
        )


@contextmanager
def site(
    settings: ServerSettings | None = None,
    defaults: GenerationDefaults | None = None,
    started: bool = True,
    grammars: bool = False,
    **engine: Any,
) -> Iterator[Site]:
    """A server that listens, in a thread of its own."""
    tokenizer = make_tokenizer()
    stub = StubEngine(tokenizer, **engine)
    if started:
        stub.state = EngineState.READY
    log = io.StringIO()
    serving = Serving(
        settings or ServerSettings(),
        stub,
        tokenizer,
        ChatProfile.OFFICIAL,
        defaults or GenerationDefaults(),
        Log("text", log),
        "stub/model",
        grammars=grammars,
    )
    listener = bind("127.0.0.1", 0)
    found = Site(stub, serving, log, listener.getsockname()[1])
    server = _http(serving)

    async def live() -> None:
        await server.serve([listener])
        await serving.close()

    thread = threading.Thread(target=lambda: asyncio.run(live()), daemon=True)
    thread.start()
    try:
        yield found
    finally:
        # It leaves by itself; waiting for it would take most of a short test's time.
        server.should_exit = True

"""One HTTP request: its body, its client's presence, its answer.

Contract: a body is read within bounds of size and time; work is cancelled as soon as the client has
left; an answer is begun once and ended once. Whatever a route raises becomes an answer here, and one
log line that holds sizes and times but no text. It does not know what routes do.
"""

from __future__ import annotations

import asyncio
import time
import traceback
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Sequence
from contextlib import aclosing
from typing import Any, TypeVar

import msgspec
from starlette.types import Receive, Scope, Send

from fourfold.server import sse
from fourfold.server.errors import ApiError, Gone, bad_request, from_failure
from fourfold.server.generation import Usage
from fourfold.server.serving import Serving

T = TypeVar("T")
S = TypeVar("S", bound=msgspec.Struct)
_JSON = (b"content-type", b"application/json")
# How long a stream's first event may take before its headers are sent without it.
_FIRST_EVENT = 1.0


class Call:
    """A request being answered."""

    def __init__(self, serving: Serving, scope: Scope, receive: Receive, send: Send) -> None:
        self.serving = serving
        self.scope = scope
        self.request_id: str = scope["state"]["request_id"]
        self.arrived = time.monotonic()
        self.notes: dict[str, object] = {}  # for the log line
        # A route whose API writes failures in another shape says so here.
        self.error_body: Callable[[ApiError], dict[str, Any]] = lambda error: error.body
        self.status = 0
        self._receive, self._send = receive, send
        self.held_bytes = 0
        self._chunks = 0
        self._streaming = False

    def header(self, name: bytes) -> str | None:
        """A header's value; `name` in lower case."""
        for key, value in self.scope["headers"]:
            if key == name:
                return bytes(value).decode("latin-1")
        return None

    # ---- what comes

    async def body(self) -> bytes:
        """The whole body. Raises 408, 413, 415, 429 or `Gone`."""
        limit = self.serving.settings.max_request_bytes
        kind = (self.header(b"content-type") or "").partition(";")[0].strip().lower()
        if kind != "application/json":
            raise ApiError(415, "the header Content-Type must be application/json")
        length = self.header(b"content-length") or ""
        if length.isdigit() and int(length) > limit:
            raise _too_large(limit)
        parts: list[bytes] = []
        size = 0
        try:
            async with asyncio.timeout(self.serving.settings.body_timeout):
                more = True
                while more:
                    message = await self._receive()
                    if message["type"] == "http.disconnect":
                        raise Gone
                    part, more = message.get("body", b""), message.get("more_body", False)
                    size += len(part)
                    if size > limit:
                        raise _too_large(limit)
                    self.serving.hold_body(len(part))
                    self.held_bytes += len(part)
                    parts.append(part)
        except TimeoutError:
            raise ApiError(408, "the request's body did not arrive in time") from None
        return b"".join(parts)

    async def read(self, kind: type[S]) -> S:
        """The body as a value of this type. Raises 400 naming the field, and as `body`."""
        return decode(await self.body(), kind)

    async def attached(self, work: Coroutine[Any, Any, T]) -> T:
        """Do this for as long as the client is there. Raises `Gone`."""
        task = asyncio.ensure_future(work)
        gone = asyncio.ensure_future(self._until_gone())
        try:
            await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
            if not task.done():
                raise Gone
            return task.result()
        finally:
            task.cancel()
            gone.cancel()
            await asyncio.gather(task, gone, return_exceptions=True)

    async def _until_gone(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            continue

    # ---- what goes

    async def json(
        self, value: object, status: int = 200, headers: dict[str, str] | None = None
    ) -> None:
        """Answer with JSON."""
        await self.content(msgspec.json.encode(value), _JSON[1], status, headers)

    async def content(
        self,
        body: bytes,
        kind: bytes,
        status: int = 200,
        headers: dict[str, str] | None = None,
    ) -> None:
        """Answer with a body of this content type."""
        listed = [(b"content-type", kind), (b"content-length", str(len(body)).encode())]
        for name, value in (headers or {}).items():
            listed.append((name.encode(), value.encode()))
        await self._start(status, listed)
        await self._write({"type": "http.response.body", "body": body})

    async def stream(self, events: AsyncGenerator[bytes, None]) -> None:
        """Answer with events as they come. What fails before the first one is an ordinary answer.

        A client that stops reading, or leaves, ends the generator.
        """
        await self.attached(self._pump(events))

    async def _pump(self, events: AsyncGenerator[bytes, None]) -> None:
        async with aclosing(events):
            first = asyncio.ensure_future(_next(events))
            try:
                await asyncio.wait({first}, timeout=_FIRST_EVENT)
                if first.done():
                    first.result()
                await self._start(200, list(sse.HEADERS))
                self._streaming = True
                beat = asyncio.ensure_future(self._beat())
                try:
                    await self._event(await first)
                    async for event in events:
                        await self._event(event)
                finally:
                    beat.cancel()
                    await asyncio.gather(beat, return_exceptions=True)
            finally:
                first.cancel()
                await asyncio.gather(first, return_exceptions=True)
        self._streaming = False
        await self._write({"type": "http.response.body", "body": b""})

    async def _event(self, event: bytes) -> None:
        self._chunks += 1
        await self._write({"type": "http.response.body", "body": event, "more_body": True})

    async def _beat(self) -> None:
        """Say something where nothing has been said for a while: proxies close what is silent."""
        seen = -1
        while True:
            seen = self._chunks
            await asyncio.sleep(self.serving.settings.heartbeat)
            if seen == self._chunks:
                await self._event(sse.HEARTBEAT)

    async def _start(self, status: int, headers: list[tuple[bytes, bytes]]) -> None:
        self.status = status
        headers = [*headers, (b"x-request-id", self.request_id.encode())]
        await self._write({"type": "http.response.start", "status": status, "headers": headers})

    async def _write(self, message: dict[str, Any]) -> None:
        try:
            async with asyncio.timeout(self.serving.settings.write_timeout):
                await self._send(message)
        except TimeoutError:
            raise Gone from None

    # ---- how it ends

    async def fail(self, error: Exception) -> None:
        """Answer with a failure; a stream that has begun ends with it."""
        answer = from_failure(error)
        if answer.code == "internal_error":
            where = traceback.extract_tb(error.__traceback__)[-1]
            kind = f"{type(error).__name__} in {where.name} line {where.lineno}"
            self.serving.log.event("defect", id=self.request_id, fault=kind)
        self.notes.setdefault("error", answer.code or answer.type)
        if not self.status:
            headers = dict(answer.headers)
            if answer.status in (408, 413):
                headers["connection"] = "close"  # the rest of the body is not read
            await self.json(self.error_body(answer), answer.status, headers)
        elif self._streaming:
            await self._event(sse.data(self.error_body(answer)))
            await self._write({"type": "http.response.body", "body": b""})

    def note_usage(self, usage: Usage, first_token: float | None, reasons: Sequence[str]) -> None:
        """Put sizes and times of what was generated into the log line."""
        self.notes |= {
            "prompt_tokens": usage.prompt,
            "cached_tokens": usage.cached,
            "output_tokens": usage.completion,
            "first_token_seconds": None if first_token is None else first_token - self.arrived,
            "finish": ",".join(reasons[:8]) or None,
            "cache_miss": usage.miss,
        }

    def end(self) -> None:
        """Write the log line and free what the call held."""
        self.serving.release_body(self.held_bytes)
        self.serving.log.event(
            "request",
            id=self.request_id,
            route=self.scope["path"],
            status=self.status or 499,
            bytes=self.held_bytes or None,
            **self.notes,
            seconds=time.monotonic() - self.arrived,
        )


Handler = Callable[[Call], Awaitable[None]]


class Endpoint:
    """A route's handler as an ASGI application. `quiet` routes are not logged."""

    def __init__(self, serving: Serving, handler: Handler, quiet: bool = False) -> None:
        self._serving, self._handler, self._quiet = serving, handler, quiet

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        call = Call(self._serving, scope, receive, send)
        try:
            await self._handler(call)
        except Gone:
            call.notes["error"] = "client_gone"
        except Exception as error:  # noqa: BLE001  # whatever it is, it must become an answer
            try:
                await call.fail(error)
            except Gone:
                call.notes["error"] = "client_gone"
        finally:
            if self._quiet:
                self._serving.release_body(call.held_bytes)
            else:
                call.end()


async def _next(events: AsyncGenerator[bytes, None]) -> bytes:
    try:
        return await anext(events)
    except StopAsyncIteration:
        return b""


def decode(body: bytes, kind: type[S]) -> S:
    """JSON as a value of this type. Raises 400 that says what is wrong and where."""
    try:
        return msgspec.json.decode(body, type=kind, strict=True)
    except msgspec.ValidationError as error:
        raise _wrong_value(str(error)) from None
    except RecursionError:
        raise bad_request("the body is nested too deeply", code="invalid_json") from None
    except ValueError as error:
        # The library's words hold a position and at most one character.
        raise bad_request(f"the body is not valid JSON: {error}", code="invalid_json") from None


def _wrong_value(message: str) -> ApiError:
    what, _, path = message.partition(" - at `$")
    path = path.rstrip("`").lstrip(".")
    if what.startswith("Object contains unknown field `"):
        name = what.removeprefix("Object contains unknown field `").rstrip("`")
        full = f"{path}.{name}" if path else name
        return bad_request(f"{full} is not supported", full[:100], "unsupported_parameter")
    if what.startswith("Object missing required field `"):
        name = what.removeprefix("Object missing required field `").rstrip("`")
        full = f"{path}.{name}" if path else name
        return bad_request(f"{full} is missing", full[:100], "missing_parameter")
    what = what.replace("`", "")
    return bad_request(f"{path or 'the body'}: {what[:1].lower()}{what[1:]}", path[:100] or None)


def _too_large(limit: int) -> ApiError:
    return ApiError(
        413, f"the body is larger than the {limit} bytes allowed", code="body_too_large"
    )

"""What every request passes first: its id, its key, its origin.

Contract: an ASGI application around another. Everything is denied without a key, if there are keys,
but a handful of paths, compared byte by byte before any decoding; keys are compared in constant time.
A browser's page from elsewhere is refused unless its origin was allowed. It does not know routes.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import uuid
from collections.abc import Iterable
from urllib.parse import urlsplit

import msgspec
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fourfold.server.errors import ApiError
from fourfold.server.settings import MAX_HEADER_BYTES, MAX_URL_BYTES, ServerSettings

PUBLIC_PATHS = frozenset((b"/live", b"/health", b"/", b"/docs"))
_READING = ("GET", "HEAD")
_ALLOWED_HEADERS = b"authorization, content-type, x-api-key, anthropic-version, anthropic-beta"


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


class Gate:
    """Lets requests through to `app`, or answers them itself."""

    def __init__(self, app: ASGIApp, settings: ServerSettings) -> None:
        self._app = app
        self._digests = tuple(_digest(key) for key in settings.api_keys)
        self._origins = frozenset(settings.allowed_origins)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        headers = scope["headers"]
        scope.setdefault("state", {})["request_id"] = uuid.uuid4().hex
        origin = _header(headers, b"origin")
        if origin is not None and self._allowed(origin):
            send = _with_cors(send, origin)
            if scope["method"] == "OPTIONS":
                await _answer(send, 204, b"")
                return
        try:
            self._check(scope, headers, origin)
        except ApiError as error:
            extra = [(name.encode(), value.encode()) for name, value in error.headers.items()]
            await _answer(send, error.status, msgspec.json.encode(error.body), extra)
            return
        await self._app(scope, receive, send)

    def _check(
        self, scope: Scope, headers: Iterable[tuple[bytes, bytes]], origin: str | None
    ) -> None:
        path: bytes = scope["raw_path"]
        if len(path) + len(scope["query_string"]) > MAX_URL_BYTES:
            raise ApiError(414, f"the URL is longer than {MAX_URL_BYTES} bytes")
        if sum(len(name) + len(value) for name, value in headers) > MAX_HEADER_BYTES:
            raise ApiError(431, f"the headers are longer than {MAX_HEADER_BYTES} bytes")
        if origin is not None and not self._allowed(origin) and not self._own(origin, headers):
            raise ApiError(
                403,
                "requests of pages from another origin are not allowed; --allowed-origins allows one",
                "permission_error",
                code="origin_not_allowed",
            )
        public = path in PUBLIC_PATHS and scope["method"] in _READING
        if self._digests and not public and not self._known(headers):
            raise ApiError(
                401,
                "a valid key is needed: Authorization: Bearer KEY, or x-api-key: KEY",
                "authentication_error",
                code="invalid_api_key",
                headers={"www-authenticate": "Bearer"},
            )

    def _known(self, headers: Iterable[tuple[bytes, bytes]]) -> bool:
        given = _header(headers, b"x-api-key") or ""
        authorization = _header(headers, b"authorization") or ""
        scheme, _, token = authorization.partition(" ")
        if scheme.lower() == "bearer":
            given = token.strip()
        digest = _digest(given)
        # No early end: the time tells nothing of which key was near.
        return sum(hmac.compare_digest(digest, known) for known in self._digests) > 0

    def _allowed(self, origin: str) -> bool:
        return origin in self._origins or "*" in self._origins

    def _own(self, origin: str, headers: Iterable[tuple[bytes, bytes]]) -> bool:
        """Whether the page came from this server. Without keys its name must be an address or
        localhost: any other name may have been pointed here by somebody else."""
        try:
            parts = urlsplit(origin)
            name = parts.hostname or ""
        except ValueError:
            return False
        if parts.netloc != _header(headers, b"host"):
            return False
        return bool(self._digests) or name == "localhost" or _is_address(name)


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def _header(headers: Iterable[tuple[bytes, bytes]], name: bytes) -> str | None:
    for key, value in headers:
        if key == name:
            return bytes(value).decode("latin-1")
    return None


def _with_cors(send: Send, origin: str) -> Send:
    listed = [
        (b"access-control-allow-origin", origin.encode("latin-1")),
        (b"access-control-allow-headers", _ALLOWED_HEADERS),
        (b"access-control-allow-methods", b"GET, POST"),
        (b"vary", b"Origin"),
    ]

    async def sending(message: Message) -> None:
        if message["type"] == "http.response.start":
            message = {**message, "headers": [*message["headers"], *listed]}
        await send(message)

    return sending


async def _answer(
    send: Send, status: int, body: bytes, extra: Iterable[tuple[bytes, bytes]] = ()
) -> None:
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(body)).encode()),
        *extra,
    ]
    if status == 204:
        headers = headers[1:]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})

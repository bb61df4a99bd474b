"""A connection with the limits that uvicorn lacks: on their number, and on the time a head takes.

Contract: uvicorn's own protocol otherwise. A connection that has not sent a whole head in time, or is
one too many, is closed; bodies and answers have their own limits in call.py.
"""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

from fourfold.server.settings import ServerSettings


class GuardedProtocol(H11Protocol):
    """One connection."""

    def __init__(self, *arguments: Any, settings: ServerSettings, **more: Any) -> None:
        super().__init__(*arguments, **more)
        self._settings = settings
        self._head_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """See `asyncio.Protocol`."""
        super().connection_made(transport)
        if len(self.connections) > self._settings.max_connections:
            transport.abort()
            return
        self._expect_head()

    def data_received(self, data: bytes) -> None:
        """See `asyncio.Protocol`."""
        super().data_received(data)
        if self._head_timer is None and self._waits_for_head():
            self._expect_head()

    def connection_lost(self, exc: Exception | None) -> None:
        """See `asyncio.Protocol`."""
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None
        super().connection_lost(exc)

    def _expect_head(self) -> None:
        wait = self._settings.header_timeout
        self._head_timer = self.loop.call_later(wait, self._head_is_late)

    def _head_is_late(self) -> None:
        self._head_timer = None
        if self._waits_for_head():
            self.transport.close()

    def _waits_for_head(self) -> bool:
        """Whether a request has begun to arrive, or should, and its head is not here. Between two
        requests the time to keep a connection alive counts instead."""
        if self.transport.is_closing() or self.timeout_keep_alive_task is not None:
            return False
        return self.cycle is None or self.cycle.response_complete

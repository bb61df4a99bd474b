"""The server's life: listen, load, serve, drain, leave.

    bind ─▶ listen (503, /health tells how far) ─▶ engine ready ─▶ serve
        SIGTERM, SIGINT: not ready at once; streams go on for drain_timeout; exit 0. Once more: leave now
        engine dead: requests fail, exit 1

Contract: the only listener of the process is the socket it is given. `serve` returns the exit status,
or raises what loading raised. It does not know what kind of engine it is given.
"""

from __future__ import annotations

import asyncio
import contextlib
import faulthandler
import functools
import os
import resource
import signal
import socket
import sys
from collections.abc import Callable, Generator
from typing import Any

import uvicorn

from fourfold.core.client import EngineState
from fourfold.core.errors import ConfigError
from fourfold.server.app import build_app
from fourfold.server.connection import GuardedProtocol
from fourfold.server.serving import Serving
from fourfold.server.settings import MAX_HEADER_BYTES

_LOOK = 0.1  # seconds between two looks at the engine
_FLUSH = 2.0  # seconds for last words to leave
_BACKLOG = 2048


def bind(host: str, port: int) -> socket.socket:
    """A listening address, before anything expensive is done. Raises `ConfigError`."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, kind, protocol, _, address = found[0]
        listener = socket.socket(family, kind, protocol)
    except OSError as error:
        raise ConfigError(f"--host {host}: {error.strerror}") from None
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        # Listening reserves the port against a second server, which binding alone does not.
        listener.listen(_BACKLOG)
    except OSError as error:
        listener.close()
        raise ConfigError(f"{host} port {port} cannot be used: {error.strerror}") from None
    return listener


class _Http(uvicorn.Server):
    """uvicorn without its signal handlers: what signals mean is decided here."""

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        """Capture none."""
        yield


def _http(serving: Serving) -> _Http:
    settings = serving.settings
    protocol: Any = functools.partial(GuardedProtocol, settings=settings)
    config = uvicorn.Config(
        build_app(serving),
        http=protocol,
        ws="none",
        lifespan="off",
        loop="asyncio",
        log_config=None,
        log_level="critical",
        access_log=False,
        proxy_headers=False,
        server_header=False,
        backlog=_BACKLOG,
        timeout_keep_alive=int(settings.keep_alive),
        timeout_graceful_shutdown=int(_FLUSH) + 1,
        h11_max_incomplete_event_size=MAX_HEADER_BYTES,
    )
    return _Http(config)


def run(serving: Serving, listener: socket.socket, on_ready: Callable[[], None]) -> int:
    """`serve` in an event loop of its own."""
    return asyncio.run(serve(serving, listener, on_ready))


async def serve(serving: Serving, listener: socket.socket, on_ready: Callable[[], None]) -> int:
    """Serve until told to stop: the exit status. Raises what loading the model raises."""
    _allow_files(serving.settings.max_connections)
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, _signalled, serving, stop)
    http = _http(serving)
    answering = asyncio.create_task(http.serve(sockets=[listener]))
    starting = asyncio.create_task(serving.engine.start(serving.progress))
    stopping = asyncio.create_task(stop.wait())
    try:
        await asyncio.wait({starting, stopping}, return_when=asyncio.FIRST_COMPLETED)
        if not stop.is_set():
            starting.result()
            on_ready()
            await _until_over(serving, stopping)
        if serving.engine.health().state is EngineState.DEAD:
            await _report_death(serving)
            return 1
        await _drain(serving)
        return 0
    finally:
        starting.cancel()
        stopping.cancel()
        http.should_exit = True
        await serving.engine.shutdown()
        await asyncio.gather(answering, starting, stopping, return_exceptions=True)
        await serving.close()


def _signalled(serving: Serving, stop: asyncio.Event) -> None:
    if stop.is_set():
        serving.log.event("leaving", why="a second signal")
        os._exit(1)  # the engine's process ends with this one
    serving.draining = True
    serving.log.event("draining", timeout=serving.settings.drain_timeout)
    stop.set()


async def _until_over(serving: Serving, stopping: asyncio.Task[bool]) -> None:
    """Wait for a signal or the engine's death."""
    while not stopping.done():
        await asyncio.wait({stopping}, timeout=_LOOK)
        if serving.engine.health().state is EngineState.DEAD:
            return


async def _drain(serving: Serving) -> None:
    """Let what runs finish, abort the rest, and let answers leave."""
    await _until_empty(serving, serving.settings.drain_timeout)
    if serving.engine.health().state is EngineState.READY:
        aborted = await serving.engine.drain(0.0)
        if aborted:
            serving.log.event("aborted", requests=aborted)
    await _until_empty(serving, _FLUSH)
    serving.log.event("stopped")


async def _report_death(serving: Serving) -> None:
    serving.log.event("engine_died", error=serving.engine.health().error)
    faulthandler.dump_traceback(sys.__stderr__ or sys.stderr, all_threads=True)
    await _until_empty(serving, _FLUSH)


async def _until_empty(serving: Serving, timeout: float) -> None:
    """Wait until no request is being answered."""
    end = asyncio.get_running_loop().time() + timeout
    while serving.num_sequences and asyncio.get_running_loop().time() < end:
        if serving.engine.health().state is EngineState.DEAD:
            end = min(end, asyncio.get_running_loop().time() + _FLUSH)
        await asyncio.sleep(_LOOK / 4)


def _allow_files(connections: int) -> None:
    """Ask for as many open files as connections need, as far as the system allows."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = connections + 256
    if soft != resource.RLIM_INFINITY and soft < wanted:
        limit = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))

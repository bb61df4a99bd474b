"""The engine at work for a client: loads the model, then obeys and steps in turn.

    serve ─ load ─▶ EngineLoop: ┌─▶ obey what arrived ─▶ step ─▶ send what it brought ─┐
                                └──────────────────────────────────────────────────────┘

Contract: a step never waits for the client: commands are taken as they lie there, and what the client
does not read piles up here. What is wrong with one request ends that request alone; a defect ends all,
loudly. A process whose client is gone exits, whatever it is doing. A `Link` carries the frames: a
socket (this file run as a process, `main`) or a queue (a thread of the client's own process).
"""

from __future__ import annotations

import os
import select
import signal
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from queue import Empty, SimpleQueue
from typing import Protocol

from fourfold.core.client import Launch, StepInfo
from fourfold.core.errors import CapacityError, FourfoldError
from fourfold.core.request import FinishReason, RequestOutput
from fourfold.engine import wire
from fourfold.engine.engine import Engine
from fourfold.engine.masks import MaskMaker
from fourfold.engine.start import engine_stats, start_engine
from fourfold.engine.watchdog import BEAT_SECONDS

_RECEIVE_BYTES = 1 << 18
_PROGRESS_SECONDS = 0.1
_FLUSH_SECONDS = 2.0  # to get the last words out


class LinkClosed(Exception):
    """The client is gone."""


class Link(Protocol):
    """Carries frames between one client and its engine."""

    def send(self, event: wire.Event) -> None:
        """Never waits. Raises `LinkClosed`, or `CapacityError` for a frame that is too long."""

    def receive(self, wait: bool) -> list[wire.Command]:
        """All that has arrived; with `wait`, not before there is something. Raises `LinkClosed`."""

    def flush(self) -> None:
        """Give what was sent a moment to leave."""


class SocketLink:
    """Over a connected stream socket. Several threads may send."""

    def __init__(self, connection: socket.socket):
        connection.setblocking(False)
        self._socket = connection
        self._splitter = wire.FrameSplitter()
        self._backlog = bytearray()  # what the client has not taken yet
        self._lock = threading.Lock()

    def send(self, event: wire.Event) -> None:
        """See `Link`."""
        data = wire.encode(event)
        with self._lock:
            self._backlog += data
            self._push()

    def receive(self, wait: bool) -> list[wire.Command]:
        """See `Link`."""
        commands: list[wire.Command] = []
        while True:
            try:
                data = self._socket.recv(_RECEIVE_BYTES)
            except BlockingIOError:
                if commands or not wait:
                    return commands
                self._poll(None)
                continue
            except OSError as error:
                raise LinkClosed from error
            if not data:
                raise LinkClosed
            commands += map(wire.decode_command, self._splitter.feed(data))

    def flush(self) -> None:
        """See `Link`."""
        end = time.monotonic() + _FLUSH_SECONDS
        while self._backlog and (left := end - time.monotonic()) > 0:
            self._poll(left)

    def _poll(self, timeout: float | None) -> None:
        """Wait until there is something to read, or room for the backlog, which is then sent."""
        poll = select.poll()
        poll.register(self._socket, select.POLLIN | (select.POLLOUT if self._backlog else 0))
        poll.poll(None if timeout is None else timeout * 1000)
        with self._lock:
            self._push()

    def _push(self) -> None:
        while self._backlog:
            try:
                sent = self._socket.send(self._backlog)
            except BlockingIOError:
                return
            except OSError as error:
                raise LinkClosed from error
            del self._backlog[:sent]


class QueueLink:
    """Between two threads of one process. `deliver` hands an event to the client's thread."""

    def __init__(self, deliver: Callable[[wire.Event], None]):
        self._deliver = deliver
        self._commands: SimpleQueue[wire.Command] = SimpleQueue()

    def post(self, command: wire.Command) -> None:
        """What the client calls."""
        self._commands.put(command)

    def send(self, event: wire.Event) -> None:
        """See `Link`."""
        try:
            self._deliver(event)
        except RuntimeError as error:  # its event loop is closed
            raise LinkClosed from error

    def receive(self, wait: bool) -> list[wire.Command]:
        """See `Link`."""
        commands = [self._commands.get()] if wait else []
        while True:
            try:
                commands.append(self._commands.get_nowait())
            except Empty:
                return commands

    def flush(self) -> None:
        """Nothing waits here."""


class EngineLoop:
    """Runs an engine for the client at the other end of `link` until it says stop."""

    def __init__(self, engine: Engine, link: Link):
        self._engine, self._link = engine, link
        self._stopped = False

    def run(self) -> None:
        """Raises `LinkClosed` if the client leaves without a word, and whatever a step raises."""
        engine = self._engine
        while True:
            for command in self._link.receive(wait=not engine.has_work):
                self._obey(command)
            if self._stopped:
                return
            if engine.has_work:
                outputs = engine.step()
                if outputs or not engine.has_work:
                    self._report(outputs)

    def _obey(self, command: wire.Command) -> None:
        engine, link = self._engine, self._link
        match command:
            case wire.Add(key):
                try:
                    engine.add(replace(wire.unpack_request(command.request), request_id=key))
                except FourfoldError as error:
                    link.send(wire.Refused(key, wire.error_kind(error), str(error)))
            case wire.Abort(key, index):
                engine.abort(key, index)
            case wire.AskStats(ticket):
                link.send(wire.Answer(ticket, engine_stats(engine)))
            case wire.ResetCache(ticket):
                engine.reset_prefix_cache()
                link.send(wire.Answer(ticket))
            case wire.Stop():
                self._stopped = True
            case _:
                raise wire.WireError(f"{type(command).__name__} came to an engine that runs")

    def _report(self, outputs: list[RequestOutput]) -> None:
        number = self._engine.stats.num_steps
        try:
            self._link.send(wire.StepDone(number, tuple(outputs)))
        except CapacityError:
            for output in outputs:
                self._report_alone(number, output)

    def _report_alone(self, number: int, output: RequestOutput) -> None:
        """One output of a step whose outputs were too many for one frame."""
        try:
            self._link.send(wire.StepDone(number, (output,)))
        except CapacityError as error:
            # Only log probabilities of a very long prompt come to this.
            key, index = output.request_id, output.index
            self._engine.abort(key, index)
            failed = RequestOutput(key, (), FinishReason.ERROR, index, error=str(error))
            self._link.send(wire.StepDone(number, (failed,)))


MaskSource = Callable[[Launch], MaskMaker]
"""Makes the maker of masks for what is launched. Raises `FourfoldError`s."""


def serve(launch: Launch, link: Link, mask_source: MaskSource | None = None) -> int:
    """Load, then run until told to stop. The process's exit status; a defect is reported and raised.
    Without `mask_source` requests with grammars are refused."""
    shown = -_PROGRESS_SECONDS

    def progress(part: str, done: int, total: int) -> None:
        nonlocal shown
        now = time.monotonic()
        if done >= total or now - shown >= _PROGRESS_SECONDS:
            shown = now
            link.send(wire.Loading(part, done, total))

    def on_step(step: StepInfo) -> None:
        link.send(wire.StepBegun(step))

    try:
        try:
            masks = None if mask_source is None else mask_source(launch)
            engine, info = start_engine(launch, progress, on_step, masks)
        except FourfoldError as error:
            link.send(wire.Failed(wire.error_kind(error), str(error)))
            link.flush()
            return error.exit_status
        link.send(wire.Ready(info))
        EngineLoop(engine, link).run()
        return 0
    except LinkClosed:
        return 1
    except BaseException as error:
        link.send(wire.Crashed(f"{type(error).__name__}: {error}"))
        link.flush()
        raise


def _beat(link: SocketLink) -> None:
    """Give signs of life for as long as somebody listens."""
    while True:
        time.sleep(BEAT_SECONDS)
        try:
            link.send(wire.Beat())
        except LinkClosed:
            # The main thread may be in a step that never ends; nobody is left to care for it.
            os._exit(1)


def main(descriptor: int, mask_source: MaskSource | None = None) -> int:
    """The engine's process, whose client holds the other end of the socket `descriptor`; the rest as
    `serve`."""
    # A terminal's Ctrl-C and a service manager's SIGTERM reach every process of a group. When to
    # stop is for the client to say, after it has drained; should it die, the socket tells.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    link = SocketLink(socket.socket(fileno=descriptor))
    threading.Thread(target=_beat, args=(link,), daemon=True).start()
    try:
        first, *others = link.receive(wait=True)
    except LinkClosed:
        return 1
    except FourfoldError as error:
        link.send(wire.Failed(wire.error_kind(error), str(error)))
        link.flush()
        return error.exit_status
    if not isinstance(first, wire.Start) or others:
        raise wire.WireError(
            f"expected Start alone, found {type(first).__name__} and {len(others)}"
        )
    return serve(first.launch, link, mask_source)

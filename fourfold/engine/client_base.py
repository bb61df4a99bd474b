"""What every `EngineClient` does with an engine, wherever that engine runs (engine/client.py).

    generate() ◀─ _Stream ◀─┐
    generate() ◀─ _Stream ◀─┴─ ClientBase ─ commands ──▶ engine
                               ▲        ◀── events ────
                            Watchdog

Contract: importing this file does not load torch. An engine that dies or is stuck ends every waiting call
with `EngineDeadError`, within the watchdog's limits. Outputs pile up in a request's stream until its
consumer takes them, so that none can hold up another.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import AsyncGenerator, Callable

from fourfold.core.client import (
    EngineClosedError,
    EngineDeadError,
    EngineHealth,
    EngineInfo,
    EngineState,
    EngineStats,
    Launch,
    LoadProgress,
)
from fourfold.core.errors import FourfoldError, RequestError
from fourfold.core.request import FinishReason, Request, RequestOutput
from fourfold.engine import wire
from fourfold.engine.watchdog import Watchdog, WatchdogLimits

STOP_SECONDS = 10.0  # for an engine to leave by itself once told to
_LOOK_SECONDS = 0.01  # between two looks whether it has
_DUMP_SECONDS = 0.3  # for a stuck engine to write its stacks
OPEN = (EngineState.LOADING, EngineState.READY, EngineState.DRAINING)


class _Stream:
    """One request: what has come for it and was not taken yet."""

    def __init__(self, request: Request, key: str):
        self.request_id, self.key = request.request_id, key
        self.unfinished = set(range(request.params.n))
        self._outputs: deque[RequestOutput] = deque()
        self._error: FourfoldError | None = None
        self._changed = asyncio.Event()

    def put(self, output: RequestOutput) -> None:
        """An output has come. Those of sequences that have ended are dropped."""
        if output.index not in self.unfinished:
            return
        self._outputs.append(output)
        if output.finish_reason:
            self.unfinished.discard(output.index)
        self._changed.set()

    def abort(self, index: int | None) -> None:
        """End the request, or its sequence `index`."""
        for each in sorted(self.unfinished) if index is None else (index,):
            self.put(RequestOutput(self.request_id, (), FinishReason.ABORT, each))

    def fail(self, error: FourfoldError) -> None:
        """End all of it with an error, behind the outputs that have come."""
        self.unfinished.clear()
        self._error = error
        self._changed.set()

    async def take(self) -> RequestOutput | None:
        """The next output, None after the last."""
        while True:
            if self._outputs:
                return self._outputs.popleft()
            if self._error is not None:
                raise self._error
            if not self.unfinished:
                return None
            self._changed.clear()
            await self._changed.wait()


class ClientBase(ABC):
    """Everything but where the engine runs."""

    def __init__(self, launch: Launch, limits: WatchdogLimits):
        self._launch, self._limits = launch, limits
        self._watchdog = Watchdog(limits)
        self._state = EngineState.NEW
        self._error: str | None = None
        self._info: EngineInfo | None = None
        self._progress: LoadProgress | None = None
        self._ready: asyncio.Future[EngineInfo] | None = None
        self._streams: dict[str, _Stream] = {}  # by key: requests that have not ended
        self._keys: dict[str, str] = {}  # their keys, by request id
        self._answers: dict[int, asyncio.Future[EngineStats | None]] = {}
        self._serial = itertools.count()
        self._step_seconds = 0.0  # in steps that are over
        self._idle = asyncio.Event()
        self._watching: asyncio.Task[None] | None = None

    @abstractmethod
    async def _open(self) -> None:
        """Start the engine; its events go to `_take`."""

    @abstractmethod
    def _post(self, command: wire.Command) -> None:
        """Send a command; nothing happens if the engine is gone."""

    @abstractmethod
    def _gone(self) -> str | None:
        """How the engine ended, None while it runs."""

    @abstractmethod
    def _kill(self) -> None:
        """End the engine at once, as far as that is possible; never waits."""

    def _dump_stacks(self) -> None:  # noqa: B027  # not every engine can be asked
        """Have a stuck engine write what its threads are doing, as far as that is possible."""

    @abstractmethod
    async def _reap(self) -> None:
        """Wait for the engine to end, kill it if it does not, and free what it was reached by."""

    @property
    def info(self) -> EngineInfo:
        """See `EngineClient`."""
        if self._info is None:
            raise EngineClosedError("the engine has not been started")
        return self._info

    async def start(self, progress: LoadProgress | None = None) -> EngineInfo:
        """See `EngineClient`."""
        if self._state is not EngineState.NEW:
            raise EngineClosedError(f"an engine starts once; this one is {self._state.value}")
        self._state, self._progress = EngineState.LOADING, progress
        self._idle.set()
        self._ready = asyncio.get_running_loop().create_future()
        try:
            await self._open()
            self._watching = asyncio.create_task(self._watch())
            return await self._ready
        except BaseException:
            if self._state in OPEN:
                self._state = EngineState.STOPPED
            self._kill()
            await self._close()
            raise

    async def generate(self, request: Request) -> AsyncGenerator[RequestOutput, None]:
        """See `EngineClient`."""
        stream = self._submit(request)
        try:
            while (output := await stream.take()) is not None:
                yield output
        finally:
            if stream.key in self._streams:
                self._post(wire.Abort(stream.key))
                self._forget(stream)

    async def abort(self, request_id: str, index: int | None = None) -> bool:
        """See `EngineClient`."""
        stream = self._streams.get(self._keys.get(request_id, ""))
        if stream is None or (index is not None and index not in stream.unfinished):
            return False
        self._post(wire.Abort(stream.key, index))
        stream.abort(index)
        self._forget_if_over(stream)
        return True

    async def stats(self) -> EngineStats:
        """See `EngineClient`."""
        ticket, answer = self._ask()
        self._post(wire.AskStats(ticket))
        return await answer or EngineStats()

    async def reset_prefix_cache(self) -> None:
        """See `EngineClient`."""
        ticket, answer = self._ask()
        self._post(wire.ResetCache(ticket))
        await answer

    def health(self) -> EngineHealth:
        """See `EngineClient`."""
        seen = self._watchdog
        return EngineHealth(
            state=self._state,
            requests=len(self._streams),
            num_steps=seen.num_steps,
            step=seen.step,
            in_step=seen.in_step,
            step_age=seen.step_age,
            silence=seen.silence,
            error=self._error,
            step_seconds=self._step_seconds,
        )

    async def drain(self, timeout: float) -> int:
        """See `EngineClient`."""
        if self._state is EngineState.READY:
            self._state = EngineState.DRAINING
        try:
            async with asyncio.timeout(timeout):
                await self._idle.wait()
        except TimeoutError:
            pass
        left = list(self._streams.values())
        for stream in left:
            await self.abort(stream.request_id)
        return len(left)

    async def shutdown(self, timeout: float = 0.0) -> None:
        """See `EngineClient`."""
        if self._state in (EngineState.NEW, EngineState.STOPPED):
            self._state = EngineState.STOPPED
            return
        if self._state in (EngineState.READY, EngineState.DRAINING):
            await self.drain(timeout)
        if self._state is EngineState.LOADING:
            self._kill()
        if self._state is not EngineState.DEAD:
            self._state = EngineState.STOPPED
            self._post(wire.Stop())
            self._fail_all(lambda: EngineClosedError("the engine was shut down"))
        await self._close()

    def _submit(self, request: Request) -> _Stream:
        self._check_open()
        if self._state is EngineState.DRAINING:
            raise EngineClosedError("the engine is shutting down and takes no more requests")
        if request.request_id in self._keys:
            raise RequestError(f"a request with id {request.request_id!r} is running already")
        body = wire.pack_request(request)
        stream = _Stream(request, str(next(self._serial)))
        self._begin_work()
        self._post(wire.Add(stream.key, body))
        self._streams[stream.key] = stream
        self._keys[stream.request_id] = stream.key
        self._idle.clear()
        return stream

    def _ask(self) -> tuple[int, asyncio.Future[EngineStats | None]]:
        self._check_open()
        self._begin_work()
        ticket = next(self._serial)
        self._answers[ticket] = asyncio.get_running_loop().create_future()
        return ticket, self._answers[ticket]

    def _check_open(self) -> None:
        if self._state is EngineState.DEAD:
            raise self._dead()
        if self._info is None or self._state not in OPEN:
            raise EngineClosedError(f"the engine is not running: it is {self._state.value}")

    def _begin_work(self) -> None:
        if not self._has_work:
            self._watchdog.given_work()

    @property
    def _has_work(self) -> bool:
        return bool(self._streams or self._answers)

    def _forget(self, stream: _Stream) -> None:
        if self._streams.pop(stream.key, None) is not None:
            del self._keys[stream.request_id]
        if not self._streams:
            self._idle.set()

    def _forget_if_over(self, stream: _Stream) -> None:
        if not stream.unfinished:
            self._forget(stream)

    def _take(self, event: wire.Event) -> None:
        """What the engine says."""
        self._watchdog.heard()
        match event:
            case wire.StepBegun(step):
                self._count_step()
                self._watchdog.begun(step)
            case wire.StepDone(num_steps, outputs):
                self._count_step()
                self._watchdog.done(num_steps)
                for output in outputs:
                    stream = self._streams.get(output.request_id)
                    if stream is not None:
                        stream.put(output._replace(request_id=stream.request_id))
                        self._forget_if_over(stream)
            case wire.Refused(key, kind, message):
                stream = self._streams.get(key)
                if stream is not None:
                    stream.fail(wire.restored(kind, message))
                    self._forget(stream)
            case wire.Answer(ticket, stats):
                answer = self._answers.pop(ticket, None)
                if answer is not None and not answer.done():
                    answer.set_result(stats)
            case wire.Loading(part, done, total):
                if self._progress is not None:
                    self._progress(part, done, total)
            case wire.Ready(info):
                if self._ready is not None and not self._ready.done():
                    self._info, self._state = info, EngineState.READY
                    self._ready.set_result(info)
            case wire.Failed(kind, message):
                if self._ready is not None and not self._ready.done():
                    self._state = EngineState.STOPPED
                    self._ready.set_exception(wire.restored(kind, message))
            case wire.Crashed(message):
                self._die(message)

    def _count_step(self) -> None:
        """The step that runs is over; one without outputs is not reported when it ends."""
        if self._watchdog.in_step:
            self._step_seconds += self._watchdog.step_age

    async def _watch(self) -> None:
        """Look at a steady pace whether the engine still lives and moves."""
        try:
            while self._state in OPEN:
                await asyncio.sleep(self._limits.tick)
                how = self._gone()
                if how is None and self._state is not EngineState.LOADING:
                    how = self._watchdog.tick(self._has_work)
                    if how is not None:
                        self._dump_stacks()
                        await asyncio.sleep(_DUMP_SECONDS)
                if how is not None:
                    self._die(how)
        finally:
            if self._state in OPEN:  # the event loop ends, and nobody has shut the engine down
                self._kill()

    def _die(self, how: str) -> None:
        """The engine is of no more use: everybody who waits learns it."""
        if self._state not in OPEN:
            return
        loading = self._state is EngineState.LOADING
        where = "while loading" if loading else self._watchdog.where()
        self._error = f"the engine died {where}: {how}"
        self._state = EngineState.DEAD
        self._kill()
        self._fail_all(self._dead)

    def _dead(self) -> EngineDeadError:
        step = self._watchdog.step
        return EngineDeadError(self._error or "the engine died", step.number if step else None)

    def _fail_all(self, error: Callable[[], FourfoldError]) -> None:
        for stream in list(self._streams.values()):
            stream.fail(error())
            self._forget(stream)
        for answer in self._answers.values():
            if not answer.done():
                answer.set_exception(error())
        self._answers.clear()
        if self._ready is not None and not self._ready.done():
            self._ready.set_exception(error())

    async def _until_gone(self, timeout: float) -> None:
        end = time.monotonic() + timeout
        while self._gone() is None and time.monotonic() < end:
            await asyncio.sleep(_LOOK_SECONDS)

    async def _close(self) -> None:
        await self._reap()
        if self._watching is not None:
            self._watching.cancel()
            await asyncio.gather(self._watching, return_exceptions=True)

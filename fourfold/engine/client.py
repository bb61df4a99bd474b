"""An engine behind `EngineClient`: in a process of its own (a socket), or in a thread of this one (a
queue). Either way it is engine/worker.py that runs it.

Contract: importing this file does not load torch, nor does running an engine in a process.
"""

from __future__ import annotations

import asyncio
import signal
import socket
import subprocess
import sys
import threading
from typing import TYPE_CHECKING

from fourfold.core.client import Launch
from fourfold.engine import wire
from fourfold.engine.client_base import OPEN, STOP_SECONDS, ClientBase
from fourfold.engine.watchdog import WatchdogLimits

if TYPE_CHECKING:
    from fourfold.engine.worker import MaskSource, QueueLink

_READ_BYTES = 1 << 18
# The child imports from where this process imports. (`python -m` would look in the working directory
# first, which may be a stranger's checkpoint.)
# On SIGUSR1 it writes the stacks of all its threads to standard error.
_BOOT = (
    "import faulthandler, importlib, signal, sys; entry, descriptor, *sys.path = sys.argv[1:]; "
    "faulthandler.register(signal.SIGUSR1); "
    "sys.exit(importlib.import_module(entry).main(int(descriptor)))"
)


class ProcessEngineClient(ClientBase):
    """An engine in a process of its own, over a pair of connected Unix sockets that have no name in
    any file system. The process ends with this one, however this one ends.

    `entry` names the module whose `main(descriptor)` the process runs. The one here makes no masks, so
    that requests with grammars are refused.
    """

    def __init__(
        self,
        launch: Launch,
        limits: WatchdogLimits | None = None,
        entry: str = "fourfold.engine.worker",
    ):
        super().__init__(launch, limits or WatchdogLimits())
        self._entry = entry
        self._process: subprocess.Popen[bytes] | None = None
        self._writer: asyncio.StreamWriter | None = None
        self._reading: asyncio.Task[None] | None = None

    @property
    def process_id(self) -> int | None:
        """Of the engine, None before the start."""
        return self._process.pid if self._process else None

    async def _open(self) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        with theirs:
            reader, self._writer = await asyncio.open_unix_connection(sock=ours)
            number = theirs.fileno()
            self._process = subprocess.Popen(
                [sys.executable, "-c", _BOOT, self._entry, str(number), *map(str, sys.path)],
                pass_fds=(number,),
                stdin=subprocess.DEVNULL,
                stdout=2,  # what libraries print must not mix with our own output
                start_new_session=True,
            )
        self._reading = asyncio.create_task(self._read(reader, self._writer))
        self._post(wire.Start(self._launch))

    async def _read(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        splitter = wire.FrameSplitter()
        how = None
        try:
            while data := await reader.read(_READ_BYTES):
                for frame in splitter.feed(data):
                    self._take(wire.decode_event(frame))
        except ConnectionError:
            pass  # as good as the end of the stream
        except wire.WireError as error:
            how = f"it sent what is no message: {error}"
        finally:
            # Also when the event loop ends without a shutdown: the engine then leaves by itself.
            writer.close()
        if self._state in OPEN:
            self._die(how or await self._exit() or "it closed its connection")

    async def _exit(self) -> str | None:
        """How the process ended; it gets a moment to do so."""
        await self._until_gone(1.0)
        return self._gone()

    def _post(self, command: wire.Command) -> None:
        if self._writer is not None and not self._writer.is_closing():
            self._writer.write(wire.encode(command))

    def _gone(self) -> str | None:
        status = self._process.poll() if self._process else None
        if status is None:
            return None
        if status < 0:
            return f"its process was killed by {signal.Signals(-status).name}"
        return f"its process ended with exit status {status}"

    def _kill(self) -> None:
        if self._process is not None:
            self._process.kill()

    def _dump_stacks(self) -> None:
        if self._process is not None and self._process.poll() is None:
            for number in (signal.SIGUSR1, signal.SIGCONT):  # it may have been stopped
                self._process.send_signal(number)

    async def _reap(self) -> None:
        if self._process is not None:
            await self._until_gone(STOP_SECONDS)
            self._kill()
            await self._until_gone(STOP_SECONDS)
        if self._writer is not None:
            self._writer.close()
        if self._reading is not None:
            self._reading.cancel()
            await asyncio.gather(self._reading, return_exceptions=True)


class InProcessEngineClient(ClientBase):
    """An engine in a thread of this process. A defect in it cannot hurt the client, but a step that
    never ends cannot be ended either: the thread stays until the process exits. Without `mask_source`
    requests with grammars are refused."""

    def __init__(
        self,
        launch: Launch,
        limits: WatchdogLimits | None = None,
        mask_source: MaskSource | None = None,
    ):
        step = (limits or WatchdogLimits()).step
        super().__init__(launch, WatchdogLimits(silence=None, step=step))
        self._mask_source = mask_source
        self._link: QueueLink | None = None
        self._thread: threading.Thread | None = None

    async def _open(self) -> None:
        from fourfold.engine.worker import QueueLink, serve

        loop = asyncio.get_running_loop()

        def deliver(event: wire.Event) -> None:
            loop.call_soon_threadsafe(self._take, event)

        self._link = QueueLink(deliver)
        arguments = (self._launch, self._link, self._mask_source)
        self._thread = threading.Thread(target=serve, args=arguments, daemon=True)
        self._thread.start()

    def _post(self, command: wire.Command) -> None:
        if self._link is not None:
            self._link.post(command)

    def _gone(self) -> str | None:
        if self._thread is None or self._thread.is_alive():
            return None
        return "its thread ended"

    def _kill(self) -> None:
        self._post(wire.Stop())

    async def _reap(self) -> None:
        await self._until_gone(STOP_SECONDS)
        self._thread = self._link = None

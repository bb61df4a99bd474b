"""A server whose engine, in a process of its own, begins a second step and never ends it.

Run as a program it is the server, on the port that is its argument; its engine's process runs `main`. The
engine has no model and loads no torch, but speaks as one: frames, signs of life, steps.
"""

from __future__ import annotations

import io
import socket
import sys
import threading
import time

from fourfold.core.client import EngineInfo, Launch, StepInfo
from fourfold.core.config import EngineConfig
from fourfold.core.log import Log
from fourfold.core.request import RequestOutput
from fourfold.engine import wire

STEP_LIMIT = 1.0
INFO = EngineInfo("stub", None, "none", "none", 1000, 4, 900, 0, 1)


def never_ends() -> None:
    """Busy, and letting other threads run, as a kernel that is waited for does."""
    while True:
        time.sleep(0.001)


def main(descriptor: int) -> int:
    """An engine's process: the first request gets a token in step 1; with a second, step 2 never ends."""
    connection = socket.socket(fileno=descriptor)
    lock, splitter, keys = threading.Lock(), wire.FrameSplitter(), list[str]()

    def send(event: wire.Event) -> None:
        with lock:
            connection.sendall(wire.encode(event))

    def beat() -> None:
        while True:
            time.sleep(0.2)
            send(wire.Beat())

    threading.Thread(target=beat, daemon=True).start()
    while data := connection.recv(1 << 16):
        for frame in splitter.feed(data):
            match wire.decode_command(frame):
                case wire.Start():
                    send(wire.Ready(INFO))
                case wire.Add(key):
                    keys.append(key)
        if len(keys) == 1:
            send(wire.StepBegun(StepInfo(1, 1, 3)))
            send(wire.StepDone(1, (RequestOutput(keys[0], (40,)),)))
        if len(keys) == 2:
            send(wire.StepBegun(StepInfo(2, 2, 4)))
            never_ends()
    return 0


def serve(port: int) -> int:
    """The server's process."""
    from fourfold.engine.client import ProcessEngineClient
    from fourfold.engine.watchdog import WatchdogLimits
    from fourfold.server.run import bind, run
    from fourfold.server.serving import Serving
    from fourfold.server.settings import ServerSettings
    from fourfold.text.generation import GenerationDefaults
    from fourfold.text.profiles import ChatProfile
    from tests.server.stub import make_tokenizer

    engine = ProcessEngineClient(
        Launch(EngineConfig("stub")), WatchdogLimits(step=STEP_LIMIT), entry="tests.server.endless"
    )
    serving = Serving(
        ServerSettings(), engine, make_tokenizer(), ChatProfile.OFFICIAL, GenerationDefaults(),
        Log("text", io.TextIOWrapper(sys.stderr.buffer, write_through=True)), "stub",
    )  # fmt: skip
    return run(serving, bind("127.0.0.1", port), lambda: print("ready. Try:", flush=True))


if __name__ == "__main__":
    sys.exit(serve(int(sys.argv[1])))

"""What an engine and its client say to each other, and its bytes.

    client ──Start, Add, Abort, AskStats, ResetCache, Stop──────────────────────────▶ engine
    client ◀─Loading, Ready, Failed, Beat, StepBegun, StepDone, Refused, Answer, Crashed─ engine

Contract: a frame is its length (4 bytes, big endian) and a MessagePack array that begins with its kind;
none is longer than `MAX_FRAME_BYTES`, on either side. Decoding checks every type and can build nothing
but the classes named here. Requests travel under a key of the client's own, so that an id used again
never meets outputs of its former life. It does not know sockets. The only file that imports msgspec.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from typing import Any

import msgspec

from fourfold.core import errors
from fourfold.core.client import EngineInfo, EngineStats, Launch, StepInfo
from fourfold.core.errors import CapacityError, FourfoldError, RequestError
from fourfold.core.request import Request, RequestOutput

MAX_FRAME_BYTES = 1 << 28
_LENGTH = struct.Struct(">I")


class WireError(Exception):
    """Bytes that are no frame: the other side is broken, or is no fourfold."""


class _Frame(msgspec.Struct, array_like=True, frozen=True, tag=str.lower):
    """Base of all frames."""


class Start(_Frame, frozen=True):
    """The first frame: load this."""

    launch: Launch


class Add(_Frame, frozen=True):
    """Run a request. It is decoded apart, so that a bad one harms nobody else."""

    key: str
    request: msgspec.Raw


class Abort(_Frame, frozen=True):
    """Drop a request, or one of its sequences; no outputs of it follow."""

    key: str
    index: int | None = None


class AskStats(_Frame, frozen=True):
    """Send an `Answer` with counts."""

    ticket: int


class ResetCache(_Frame, frozen=True):
    """Give up cached pages and images nobody uses, then send an `Answer`."""

    ticket: int


class Stop(_Frame, frozen=True):
    """Drop everything and exit."""


class Loading(_Frame, frozen=True):
    """Progress of loading, in bytes."""

    part: str
    done: int
    total: int


class Ready(_Frame, frozen=True):
    """The engine takes requests."""

    info: EngineInfo


class Failed(_Frame, frozen=True):
    """The engine cannot start, for a reason that is the user's to mend."""

    kind: str
    message: str


class Beat(_Frame, frozen=True):
    """The engine's process is alive."""


class StepBegun(_Frame, frozen=True):
    """A step is about to run."""

    step: StepInfo


class StepDone(_Frame, frozen=True):
    """A step is over; what it added to whom. The outputs' request ids are keys."""

    num_steps: int
    outputs: tuple[RequestOutput, ...]


class Refused(_Frame, frozen=True):
    """A request cannot run."""

    key: str
    kind: str
    message: str


class Answer(_Frame, frozen=True):
    """To an `AskStats` or a `ResetCache`."""

    ticket: int
    stats: EngineStats | None = None


class Crashed(_Frame, frozen=True):
    """The engine ends by a defect, whose traceback is on its standard error."""

    message: str


Command = Start | Add | Abort | AskStats | ResetCache | Stop
Event = Loading | Ready | Failed | Beat | StepBegun | StepDone | Refused | Answer | Crashed


def _plain(value: object) -> object:
    """Read-only mappings, which configs and parameters may hold, travel as plain ones."""
    if isinstance(value, Mapping):
        return dict(value)
    raise NotImplementedError(f"a {type(value).__name__} cannot be sent to an engine")


_ENCODER = msgspec.msgpack.Encoder(enc_hook=_plain)
_COMMANDS = msgspec.msgpack.Decoder(Command)
_EVENTS = msgspec.msgpack.Decoder(Event)
_REQUESTS = msgspec.msgpack.Decoder(Request)


def pack_request(request: Request) -> msgspec.Raw:
    """The body of an `Add`. Raises `RequestError` for a value of a type that has no place there."""
    try:
        return msgspec.Raw(_ENCODER.encode(request))
    except (NotImplementedError, TypeError, OverflowError) as error:
        raise RequestError(f"the request cannot be sent to the engine: {error}") from None


def unpack_request(body: msgspec.Raw) -> Request:
    """The inverse. Raises `RequestError` naming the field whose type is wrong."""
    try:
        return _REQUESTS.decode(body)
    except msgspec.DecodeError as error:
        raise RequestError(f"the request is malformed: {error}") from None


def encode(frame: Command | Event) -> bytes:
    """A frame's bytes, length included. Raises `CapacityError` if it is too long."""
    body = _ENCODER.encode(frame)
    if len(body) > MAX_FRAME_BYTES:
        raise CapacityError(
            f"a message of {len(body)} bytes between the engine and its client is longer than the "
            f"{MAX_FRAME_BYTES} allowed"
        )
    return _LENGTH.pack(len(body)) + body


def decode_command(body: bytes) -> Command:
    """A client's frame without its length. Raises `WireError`, or what a config's checks raise."""
    try:
        return _COMMANDS.decode(body)
    except msgspec.DecodeError as error:
        raise WireError(str(error)) from None


def decode_event(body: bytes) -> Event:
    """An engine's frame without its length. Raises `WireError`."""
    try:
        return _EVENTS.decode(body)
    except msgspec.DecodeError as error:
        raise WireError(str(error)) from None


class FrameSplitter:
    """Cuts a stream of bytes into frames, however the bytes arrive."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> list[bytes]:
        """The frames that `data` completes. Raises `WireError` for a length above the bound."""
        self._buffer += data
        frames, begin = [], 0
        while len(self._buffer) - begin >= _LENGTH.size:
            (length,) = _LENGTH.unpack_from(self._buffer, begin)
            if length > MAX_FRAME_BYTES:
                raise WireError(f"a frame of {length} bytes was announced")
            end = begin + _LENGTH.size + length
            if len(self._buffer) < end:
                break
            frames.append(bytes(self._buffer[begin + _LENGTH.size : end]))
            begin = end
        del self._buffer[:begin]
        return frames


def error_kind(error: FourfoldError) -> str:
    """The name under which an error's class can be found again on the other side."""
    for kind in type(error).__mro__:
        if getattr(errors, kind.__name__, None) is kind:
            return kind.__name__
    raise TypeError(f"{type(error).__name__} is no FourfoldError")


def restored(kind: str, message: str) -> FourfoldError:
    """The error again, of the class it had, with its text."""
    found: Any = getattr(errors, kind, None)
    if isinstance(found, type) and issubclass(found, FourfoldError):
        return found(message)
    raise WireError(f"there is no error called {kind}")

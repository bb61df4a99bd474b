"""Server-sent events: values to bytes.

Contract: an event is written whole or not at all. It does not know what events mean.
"""

from __future__ import annotations

import msgspec

HEADERS = (
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
)
DONE = b"data: [DONE]\n\n"
HEARTBEAT = b": still working\n\n"
_ENCODER = msgspec.json.Encoder()


def data(value: object) -> bytes:
    """An event that carries `value` as JSON."""
    return b"data: " + _ENCODER.encode(value) + b"\n\n"


def named(name: str, value: object) -> bytes:
    """The same with an event name."""
    return b"event: " + name.encode() + b"\ndata: " + _ENCODER.encode(value) + b"\n\n"

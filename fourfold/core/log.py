"""Log lines: one event a line, bounded, as text for a person or as JSON.

Contract: a line is a time, a word for what happened, and named values; it holds what it is given and
nothing else, so that callers decide what may be known. Values are cut, control characters are escaped:
no input can forge a second line. It does not know what is worth logging.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from typing import TextIO

MAX_VALUE = 300
MAX_LINE = 2000
LOG_FORMATS = ("text", "json")

Clock = Callable[[], float]


class Log:
    """Writes to one stream. A stream that is gone is no reason to fail."""

    def __init__(
        self, style: str = "text", stream: TextIO | None = None, clock: Clock = time.time
    ) -> None:
        self._style, self._clock = style, clock
        self._stream = sys.stderr if stream is None else stream

    def event(self, what: str, **values: object) -> None:
        """Write that `what` happened; values that are None are left out."""
        shown = {name: _short(value) for name, value in values.items() if value is not None}
        seconds = self._clock()
        stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds))
        stamp += f".{int(seconds * 1000) % 1000:03}Z"
        if self._style == "json":
            line = json.dumps({"time": stamp, "event": what} | shown, ensure_ascii=True)
        else:
            words = " ".join(f"{name}={_word(value)}" for name, value in shown.items())
            line = f"{stamp} {what} {words}".rstrip()
            line = line if len(line) <= MAX_LINE else line[: MAX_LINE - 1] + "…"
        self._write(line)

    def lines(self, text: str) -> None:
        """Write text for a person, as one event a line where a machine reads."""
        for line in text.splitlines():
            if self._style == "json":
                self.event("note", text=line)
            else:
                self._write(line[:MAX_LINE])

    def _write(self, line: str) -> None:
        try:
            self._stream.write(line + "\n")
            self._stream.flush()
        except (OSError, ValueError):
            return  # a closed or full log must not end what is being logged


def _short(value: object) -> object:
    if isinstance(value, float):
        return round(value, 4)
    if isinstance(value, int | bool):
        return value
    text = str(value)
    return text if len(text) <= MAX_VALUE else text[: MAX_VALUE - 1] + "…"


def _word(value: object) -> str:
    text = str(value)
    plain = text.isascii() and text.isprintable() and " " not in text and '"' not in text
    return text if plain and text else json.dumps(text)

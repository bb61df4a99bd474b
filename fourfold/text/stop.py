"""Stop strings in text that arrives in pieces.

Contract: the text ends at the stop string that is complete first (earliest end; of those that end
together, the one that began first, so that no part of a longer one is left over). Nothing of it is
handed out before, unless asked for, and nothing after it. However the text is cut, the result is the
same. It does not know tokens or chat markup.
"""

from __future__ import annotations

from collections.abc import Sequence

from fourfold.core.errors import RequestError


class StopMatcher:
    """Watches one text. `matched` is the stop string that ended it, None until then."""

    def __init__(self, stops: Sequence[str], include: bool = False) -> None:
        """`include`: hand out the stop string itself, too. Raises `RequestError` for an empty one."""
        for stop in stops:
            if not stop:
                raise RequestError("stop must not hold an empty string")
        self._stops = tuple(stops)
        self._include = include
        # The end of the text so far that may be the beginning of a stop string.
        self._held = ""
        self.matched: str | None = None

    def push(self, text: str) -> str:
        """What can be handed out after `text` has arrived; nothing once the text has ended."""
        if self.matched is not None:
            return ""
        if not self._stops:
            return text
        text = self._held + text
        found = [(at + len(stop), at, stop) for stop in self._stops if (at := text.find(stop)) >= 0]
        if found:
            end, start, self.matched = min(found)
            self._held = ""
            return text[: end if self._include else start]
        keep = min(_beginning(text, stop) for stop in self._stops)
        self._held = text[keep:]
        return text[:keep]

    def finish(self) -> str:
        """What was held back, when no text follows."""
        rest, self._held = self._held, ""
        return rest


def _beginning(text: str, stop: str) -> int:
    """Where the longest end of `text` that begins `stop` starts; the length of `text` if none does.
    `stop` itself does not occur in `text`."""
    start = text.find(stop[0], max(0, len(text) - len(stop) + 1))
    while start >= 0 and not stop.startswith(text[start:]):
        start = text.find(stop[0], start + 1)
    return start if start >= 0 else len(text)

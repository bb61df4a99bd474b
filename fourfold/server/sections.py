"""An answer as sections that open, grow and close, for the APIs that stream it so.

Contract: events in, changes out: reasoning, then content, then calls, each closed before the next one
opens and all closed at the end. A call that was cut off closes as incomplete. It does not know the
shape of any API's events.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import Enum

from fourfold.text.events import (
    ContentDelta,
    Event,
    Finish,
    ReasoningDelta,
    ToolArgumentsDelta,
    ToolCallEnd,
    ToolCallStart,
)


class Kind(Enum):
    """What a section holds."""

    REASONING = "reasoning"
    CONTENT = "content"
    CALL = "call"


@dataclass
class Section:
    """One of an answer's parts. `text` of a call is its arguments, JSON once it is complete."""

    index: int
    kind: Kind
    call_id: str = ""
    name: str = ""
    parts: list[str] = field(default_factory=list)
    complete: bool = True

    @property
    def text(self) -> str:
        """All of it so far."""
        return "".join(self.parts)


class Change(Enum):
    """What happened to a section."""

    OPENED = "opened"
    GREW = "grew"
    CLOSED = "closed"


class Sections:
    """The sections of one answer as its events come. `finish` is its last event."""

    def __init__(self) -> None:
        self.all: list[Section] = []
        self.finish: Finish | None = None
        self._open: Section | None = None

    def feed(self, events: Iterable[Event]) -> list[tuple[Change, Section, str]]:
        """(what happened, to which section, the text that came)."""
        changes: list[tuple[Change, Section, str]] = []
        for event in events:
            match event:
                case ReasoningDelta(text):
                    self._more(changes, Kind.REASONING, text)
                case ContentDelta(text):
                    self._more(changes, Kind.CONTENT, text)
                case ToolCallStart(_, call_id, name):
                    self._begin(changes, Kind.CALL, call_id, name).complete = False
                case ToolArgumentsDelta(_, text):
                    self._more(changes, Kind.CALL, text)
                case ToolCallEnd():
                    if self._open is not None:
                        self._open.complete = True
                    self._close(changes)
                case Finish():
                    self._close(changes)
                    self.finish = event
        return changes

    def _more(self, changes: list[tuple[Change, Section, str]], kind: Kind, text: str) -> None:
        section = self._open
        if section is None or section.kind is not kind:
            section = self._begin(changes, kind)
        section.parts.append(text)
        changes.append((Change.GREW, section, text))

    def _begin(
        self,
        changes: list[tuple[Change, Section, str]],
        kind: Kind,
        call_id: str = "",
        name: str = "",
    ) -> Section:
        self._close(changes)
        self._open = Section(len(self.all), kind, call_id, name)
        self.all.append(self._open)
        changes.append((Change.OPENED, self._open, ""))
        return self._open

    def _close(self, changes: list[tuple[Change, Section, str]]) -> None:
        if self._open is not None:
            changes.append((Change.CLOSED, self._open, ""))
            self._open = None

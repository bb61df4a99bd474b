"""What a parsed answer consists of, piece by piece and as a whole.

Contract: the events of one answer, joined by `collect`, are the message; how the pieces were cut has no
meaning. A call counts only once it has ended.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ReasoningDelta:
    """More reasoning."""

    text: str


@dataclass(frozen=True, slots=True)
class ContentDelta:
    """More of the visible answer."""

    text: str


@dataclass(frozen=True, slots=True)
class ToolCallStart:
    """A call begins. `index` counts the calls of the answer from 0."""

    index: int
    call_id: str
    name: str


@dataclass(frozen=True, slots=True)
class ToolArgumentsDelta:
    """More of the JSON text of a call's arguments."""

    index: int
    text: str


@dataclass(frozen=True, slots=True)
class ToolCallEnd:
    """The call is complete: its arguments are a JSON object."""

    index: int


@dataclass(frozen=True, slots=True)
class Finish:
    """The answer is over. `reason` is the engine's own, or "tool_calls"; `stop` is the stop string
    that ended it."""

    reason: str
    stop: str | None = None


Event = ReasoningDelta | ContentDelta | ToolCallStart | ToolArgumentsDelta | ToolCallEnd | Finish


@dataclass(frozen=True)
class ParsedCall:
    """A complete call; `arguments` is the JSON text of an object."""

    call_id: str
    name: str
    arguments: str


@dataclass(frozen=True)
class ParsedMessage:
    """A whole answer. Empty reasoning or content is None; `finish_reason` is None before the end."""

    reasoning: str | None
    content: str | None
    tool_calls: tuple[ParsedCall, ...]
    finish_reason: str | None
    stop: str | None = None


def collect(events: Iterable[Event]) -> ParsedMessage:
    """The message that `events` make up, calls that never ended left out."""
    reasoning: list[str] = []
    content: list[str] = []
    starts: dict[int, ToolCallStart] = {}
    arguments: dict[int, list[str]] = {}
    ended: list[int] = []
    finish = None
    for event in events:
        match event:
            case ReasoningDelta():
                reasoning.append(event.text)
            case ContentDelta():
                content.append(event.text)
            case ToolCallStart():
                starts[event.index] = event
                arguments[event.index] = []
            case ToolArgumentsDelta():
                arguments[event.index].append(event.text)
            case ToolCallEnd():
                ended.append(event.index)
            case Finish():
                finish = event
    return ParsedMessage(
        "".join(reasoning) or None,
        "".join(content) or None,
        tuple(ParsedCall(starts[i].call_id, starts[i].name, "".join(arguments[i])) for i in ended),
        finish.reason if finish else None,
        finish.stop if finish else None,
    )


def coalesce(events: Iterable[Event]) -> list[Event]:
    """The same events with neighbouring pieces of one text joined."""
    joined: list[Event] = []
    for event in events:
        last = joined[-1] if joined else None
        if isinstance(event, ReasoningDelta) and isinstance(last, ReasoningDelta):
            joined[-1] = ReasoningDelta(last.text + event.text)
        elif isinstance(event, ContentDelta) and isinstance(last, ContentDelta):
            joined[-1] = ContentDelta(last.text + event.text)
        elif isinstance(event, ToolArgumentsDelta) and isinstance(last, ToolArgumentsDelta):
            joined[-1] = ToolArgumentsDelta(event.index, last.text + event.text)
        else:
            joined.append(event)
    return joined

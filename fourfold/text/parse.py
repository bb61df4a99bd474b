"""Generated text to reasoning, content and tool calls, as it arrives.

              </think>                <｜DSML｜…
    REASONING ───────▶ CONTENT ─────────────────▶ TOOLS (dsml.py), to the end
        └────────────────────────────────────────▲

Contract: `TokenParser` takes token ids, `TextParser` text; both hand out the same events however the
answer is cut, and what cannot be decided yet is held back. In ids only the real special tokens are
markers, and text that looks like one is text; in text alone a marker is recognised by its spelling.
Markers that stand where they mean nothing are dropped. It does not know sampling or requests;
docs/CHAT.md has the rules for malformed markup.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Sequence
from enum import Enum, auto

from fourfold.text import markers
from fourfold.text.detokenize import IncrementalDetokenizer
from fourfold.text.dsml import ToolReader, word_length
from fourfold.text.events import ContentDelta, Event, Finish, ReasoningDelta, coalesce
from fourfold.text.prompt import ParserStart
from fourfold.text.stop import StopMatcher
from fourfold.text.tokenizer import Tokenizer


class _State(Enum):
    REASONING = auto()
    CONTENT = auto()
    TOOLS = auto()


def new_call_id() -> str:
    """An id for a tool call that no other call has."""
    return f"call_{uuid.uuid4().hex}"


class _Machine:
    """The state machine over text and markers that both parsers feed."""

    def __init__(
        self, start: ParserStart, tools: bool, stop: StopMatcher, new_id: Callable[[], str]
    ) -> None:
        self._tools = tools
        self._stop = stop
        self._events: list[Event] = []
        self._reader = ToolReader(new_id, self._events)
        self._state = _State.REASONING if start.in_reasoning else _State.CONTENT
        if start is ParserStart.TOOLS:
            self._state = _State.TOOLS
        # Whether line breaks are still dropped because nothing has come before them.
        self._fresh = start in (ParserStart.REASONING, ParserStart.CONTENT)
        # Blanks that are dropped if a marker follows; "<" or "</" that may begin a tag.
        self._held = ""
        self._angle = ""
        self._shown = start is ParserStart.CONTENT_CONTINUED
        # Inside a closing tag that closes nothing.
        self._stray_tag = False

    @property
    def in_reasoning(self) -> bool:
        return self._state is _State.REASONING

    @property
    def stopped(self) -> str | None:
        return self._stop.matched

    def take(self) -> list[Event]:
        """The events since the last call."""
        events = coalesce(self._events)
        self._events.clear()
        return events

    def text(self, text: str) -> None:
        if self._tools:
            text = self._angle + text
            length = 2 if text.endswith("</") else int(text.endswith("<"))
            self._angle = text[len(text) - length :]
            text = text[: len(text) - length]
        self._plain(text)

    def marker(self, spelling: str) -> None:
        if spelling == markers.DSML and self._tools and self._angle:
            closing, self._angle = self._angle == "</", ""
            self._tag(closing)
            return
        angle, self._angle = self._angle, ""
        self._plain(angle)
        if self._state is _State.TOOLS or (spelling == markers.DSML and not self._tools):
            self._plain(spelling)
        elif spelling == markers.END_THINK and self._state is _State.REASONING:
            self._stray_tag, self._held = False, ""
            self._state, self._fresh = _State.CONTENT, True
        elif spelling == markers.END_THINK:
            self._stray_tag, self._fresh = False, False

    def finish(self, reason: str) -> None:
        unfinished = False
        if self._state is _State.TOOLS:
            unfinished = self._reader.unfinished
        else:
            angle, self._angle = self._angle, ""
            self._plain(angle)
            held, self._held = self._held, ""
            self._show(held)
            self._content(self._stop.finish())
        if self.stopped is not None:
            reason = "stop"
        elif reason in ("stop", "length") and self._reader.completed:
            cut_short = unfinished and reason == "length"
            reason = reason if cut_short else "tool_calls"
        self._events.append(Finish(reason, self.stopped))

    def _tag(self, closing: bool) -> None:
        if self._state is not _State.TOOLS:
            self._stray_tag = closing
            if closing:
                return
            # Line breaks before a block are its own; so are blanks if there is nothing else.
            self._held = ""
            if self._state is _State.CONTENT:
                self._content(self._stop.finish())
            self._state = _State.TOOLS
        self._reader.tag(closing)

    def _plain(self, text: str) -> None:
        if self._stray_tag:
            text = self._skip_tag(text)
        if self._state is _State.TOOLS:
            self._reader.plain(text)
            return
        if self._fresh:
            text = text.lstrip("\n")
        if not text:
            return
        self._fresh = False
        text = self._held + text
        if self._state is _State.CONTENT and not self._tools:
            shown = text
        elif self._state is _State.CONTENT and not self._shown and not text.strip():
            shown = ""
        else:
            shown = text.rstrip("\n")
        self._held = text[len(shown) :]
        self._show(shown)

    def _skip_tag(self, text: str) -> str:
        """What follows a stray closing tag in `text`."""
        rest = text[word_length(text) :]
        if rest:
            self._stray_tag = False
        return rest.removeprefix(">")

    def _show(self, text: str) -> None:
        if not text:
            return
        if self._state is _State.REASONING:
            self._events.append(ReasoningDelta(text))
        else:
            self._shown = True
            self._content(self._stop.push(text))

    def _content(self, text: str) -> None:
        if text:
            self._events.append(ContentDelta(text))


class _Parser:
    """What both parsers have in common."""

    def __init__(
        self,
        start: ParserStart,
        tools: bool,
        stop: Sequence[str],
        include_stop: bool,
        new_id: Callable[[], str],
    ) -> None:
        self._machine = _Machine(start, tools, StopMatcher(stop, include_stop), new_id)
        self._finished = False

    @property
    def in_reasoning(self) -> bool:
        """Whether the answer is still inside `<think>`: constraints on its content come later."""
        return self._machine.in_reasoning

    @property
    def stopped(self) -> str | None:
        """The stop string that has ended the content; whatever follows is dropped."""
        return self._machine.stopped

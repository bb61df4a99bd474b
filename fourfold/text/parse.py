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

import re
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

# What `TextParser` looks for: the marker of tool markup counts only behind an angle bracket.
_SPELLED = re.compile(f"(?P<think></?think>)|(?P<bracket></?)(?P<dsml>{markers.DSML})")
_SPELLINGS = (markers.THINK, markers.END_THINK, f"<{markers.DSML}", f"</{markers.DSML}")


class _State(Enum):
    REASONING = auto()
    CONTENT = auto()
    TOOLS = auto()


def new_call_id(index: int) -> str:
    """An id for the call with this index that no other call has; ids of one answer sort as the calls
    do, which some encoders of this format rely on."""
    return f"call_{index:02}_{uuid.uuid4().hex}"


class _Machine:
    """The state machine over text and markers that both parsers feed."""

    def __init__(
        self, start: ParserStart, tools: bool, stop: StopMatcher, new_id: Callable[[int], str]
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
        self._held: list[str] = []
        self._angle = ""
        self._shown = start is ParserStart.CONTENT_CONTINUED
        # Whether stop strings count already.
        self.armed = True
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
        if self.stopped is not None:
            return
        if self._tools:
            text = self._angle + text
            length = 2 if text.endswith("</") else int(text.endswith("<"))
            self._angle = text[len(text) - length :]
            text = text[: len(text) - length]
        self._plain(text)

    def marker(self, spelling: str) -> None:
        if self.stopped is not None:
            return
        if spelling == markers.DSML and self._angle:
            closing, self._angle = self._angle == "</", ""
            self._tag(closing)
            return
        self._plain_angle()
        self._stray_tag = False
        if self._state is _State.TOOLS or (spelling == markers.DSML and not self._tools):
            self._plain(spelling)
        elif spelling == markers.END_THINK:
            # In reasoning it ends it; in content it is dropped, and the texts around it join.
            self._fresh = self._state is _State.REASONING
            if self._fresh:
                self._state = _State.CONTENT
                self._held.clear()

    def finish(self, reason: str) -> None:
        if self.stopped is not None:
            self._events.append(Finish("stop", self.stopped))
            return
        if self._state is _State.TOOLS:
            self._reader.finish()
        else:
            self._plain_angle()
            self._show("".join(self._held))
            self._content(self._stop.finish())
        calls = self._reader.completed and not (reason == "length" and self._reader.unfinished)
        if self.stopped is not None:
            reason = "stop"
        elif reason in ("stop", "length") and calls:
            reason = "tool_calls"
        self._events.append(Finish(reason, self.stopped))

    def _plain_angle(self) -> None:
        """What looked like the beginning of a tag is text."""
        angle, self._angle = self._angle, ""
        self._plain(angle)

    def _tag(self, closing: bool) -> None:
        if self._state is not _State.TOOLS:
            self._stray_tag = closing
            if closing:
                return
            # Line breaks before a block are its own; so are blanks if there is nothing else.
            self._held.clear()
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
        if self._state is _State.CONTENT and not self._tools:
            self._show(text)
            return
        blank = None if self._state is _State.CONTENT and not self._shown else "\n"
        if text.strip(blank):
            text = "".join(self._held) + text
            shown = text.rstrip("\n")
            self._show(shown)
            self._held.clear()
            text = text[len(shown) :]
        self._held.append(text)

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
            self._content(self._stop.push(text) if self.armed else text)

    def _content(self, text: str) -> None:
        if text:
            self._events.append(ContentDelta(text))


class TokenParser:
    """Parses one generated sequence of token ids."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        start: ParserStart,
        tools: bool,
        *,
        stop: Sequence[str] = (),
        include_stop: bool = False,
        min_tokens: int = 0,
        new_id: Callable[[int], str] = new_call_id,
    ) -> None:
        """`start` and `tools` as the `EncodedPrompt` says (`start`, `parse_tools`).

        `stop` strings end the content (never reasoning or calls) once more than `min_tokens` tokens
        have come; `include_stop` keeps the one that did. `new_id` makes the ids of calls. Raises
        `RequestError` for an empty stop string.
        """
        self._machine = _Machine(start, tools, StopMatcher(stop, include_stop), new_id)
        self._detokenizer = IncrementalDetokenizer(tokenizer)
        self._markers = {index: text for text, index in tokenizer.special_tokens.items()}
        self._min_tokens = min_tokens
        self._tokens = 0
        self.reasoning_tokens = 0

    @property
    def in_reasoning(self) -> bool:
        """Whether the answer is still inside `<think>`: constraints on its content come later."""
        return self._machine.in_reasoning

    @property
    def stopped(self) -> str | None:
        """The stop string that has ended the content; whatever follows is dropped."""
        return self._machine.stopped

    def push(self, token_id: int) -> list[Event]:
        """What becomes certain with one more token. Raises `RequestError` for an unknown id."""
        self._tokens += 1
        self._machine.armed = self._tokens > self._min_tokens
        # The token that closes the reasoning belongs to it.
        self.reasoning_tokens += self._machine.in_reasoning
        marker = self._markers.get(token_id)
        if marker is None:
            self._machine.text(self._detokenizer.push(token_id))
        else:
            self._machine.text(self._detokenizer.finish())
            if marker not in (markers.BOS, markers.EOS):
                self._machine.marker(marker)
        return self._machine.take()

    def finish(self, reason: str) -> list[Event]:
        """What is left when the engine has ended the answer for `reason` ("stop", "length" or a
        failure of its own); `Finish` comes last."""
        self._machine.text(self._detokenizer.finish())
        self._machine.finish(reason)
        return self._machine.take()


class TextParser:
    """Parses text whose markers are spelled out, for answers without token ids."""

    def __init__(
        self,
        start: ParserStart,
        tools: bool,
        *,
        stop: Sequence[str] = (),
        include_stop: bool = False,
        new_id: Callable[[int], str] = new_call_id,
    ) -> None:
        """Arguments as for `TokenParser`."""
        self._machine = _Machine(start, tools, StopMatcher(stop, include_stop), new_id)
        self._held = ""

    @property
    def in_reasoning(self) -> bool:
        """Whether the answer is still inside `<think>`."""
        return self._machine.in_reasoning

    @property
    def stopped(self) -> str | None:
        """The stop string that has ended the content; whatever follows is dropped."""
        return self._machine.stopped

    def push(self, text: str) -> list[Event]:
        """What becomes certain with more text."""
        text = self._held + text
        position = 0
        for match in _SPELLED.finditer(text):
            bracket, spelling = match["bracket"] or "", match["dsml"] or match["think"]
            self._machine.text(text[position : match.start()] + bracket)
            self._machine.marker(spelling)
            position = match.end()
        text = text[position:]
        last = text.rfind("<")
        if last < 0 or not any(spelling.startswith(text[last:]) for spelling in _SPELLINGS):
            last = len(text)
        self._held = text[last:]
        self._machine.text(text[:last])
        return self._machine.take()

    def finish(self, reason: str) -> list[Event]:
        """What is left when the answer has ended for `reason`; `Finish` comes last."""
        self._machine.text(self._held)
        self._machine.finish(reason)
        return self._machine.take()

"""Tool calls in generated markup, read as they arrive.

    <｜DSML｜tool_calls>                          between tags: SKIP, where text means nothing
    <｜DSML｜invoke name="search">                NAME up to the quote, OPENED up to ">", then BODY
    <｜DSML｜parameter name="q" string="true">    HEADER up to ">"
    text</｜DSML｜parameter>                      VALUE up to any closing tag
    </｜DSML｜invoke>                             back to SKIP
    </｜DSML｜tool_calls>

Contract: fed with text and with tags (an angle bracket and the marker token), it appends events. The
arguments of an ended call are always a JSON object. Broken markup loses what cannot be read and
nothing else, and no tag of the grammar ever appears in a name or an argument. It does not know where
an answer's calls begin: its owner hands it everything from the first tag on.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from enum import Enum, auto

from fourfold.text.checks import parse_json
from fourfold.text.events import Event, ToolArgumentsDelta, ToolCallEnd, ToolCallStart
from fourfold.text.markers import DSML

# The longest opening tag that is still looked through for its name, in characters.
_TAG_LIMIT = 4096
_WORD = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ_")
_ATTRIBUTE = 'name="'
_JSON_BLANKS = " \t\r\n"


class _State(Enum):
    SKIP = auto()
    TAG = auto()
    NAME = auto()
    OPENED = auto()
    BODY = auto()
    HEADER = auto()
    VALUE = auto()


def word_length(text: str) -> int:
    """How many characters at the start of `text` can belong to a tag's name."""
    return next((i for i, character in enumerate(text) if character not in _WORD), len(text))


def _is_block(word: str) -> bool:
    """Whether a tag's name means the block around calls, as the model spells it or nearly so."""
    return word.startswith("tool") or word == "function_calls"


class ToolReader:
    """Reads the calls of one answer. `completed` counts those that have ended."""

    def __init__(self, new_id: Callable[[int], str], events: list[Event]) -> None:
        """Events are appended to `events`, which the owner empties."""
        self._new_id = new_id
        self._events = events
        self._state = _State.SKIP
        self.completed = 0
        self._index = -1
        # The tag being read: where it was found, whether it closes, what has been read of it.
        self._outer = _State.SKIP
        self._closing = False
        self._read = ""
        # The call being read: parameters so far, and its text outside them.
        self._keys: set[str] = set()
        self._body: list[str] = []
        # The value being read: text not yet handed out, whether it is a string (None: the tag does
        # not say), and whether its key is a repetition.
        self._value: list[str] = []
        self._key = ""
        self._is_string: bool | None = None
        self._repeated = False

    @property
    def unfinished(self) -> bool:
        """Whether the text so far ends inside a call or inside a tag that may open one."""
        if self._state is _State.TAG:
            return self._outer is not _State.SKIP or not self._closing
        return self._state is not _State.SKIP

    def tag(self, closing: bool) -> None:
        """An angle bracket (with a slash if `closing`) and the marker have arrived."""
        if self._state is _State.TAG:
            self._resolve()
        if self._state is _State.NAME:
            self._state = _State.SKIP  # a call without a name is none
        elif self._state in (_State.HEADER, _State.OPENED):
            self._state = _State.BODY
        self._outer, self._closing, self._read = self._state, closing, ""
        self._state = _State.TAG

    def finish(self) -> None:
        """Nothing follows: a closing tag that only lacks its bracket still ends its call."""
        ends_call = self._read == "invoke" or _is_block(self._read)
        if self._state is _State.TAG and self._closing and ends_call:
            self._resolve()

    def plain(self, text: str) -> None:
        """Text has arrived, or a marker that is no part of a tag."""
        while text:
            match self._state:
                case _State.SKIP:
                    return
                case _State.TAG:
                    text = self._tag_text(text)
                case _State.NAME:
                    text = self._name_text(text)
                case _State.OPENED:
                    text = self._opened_text(text)
                case _State.HEADER:
                    text = self._header_text(text)
                case _State.BODY:
                    self._body.append(text)
                    return
                case _State.VALUE:
                    self._value_text(text)
                    return

    def _tag_text(self, text: str) -> str:
        length = word_length(text)
        self._read += text[:length]
        if length < len(text):
            self._resolve()
        return text[length:]

    def _resolve(self) -> None:
        """The tag's name is complete, and says what the tag does to where it was found."""
        word, self._state = self._read, self._outer
        self._read = ""
        in_call = self._outer is not _State.SKIP
        ends_call = in_call and (word == "invoke" or _is_block(word))
        if self._outer is _State.VALUE:
            if not self._closing and not ends_call and word != "parameter":
                self._value_text(f"<{DSML}{word}")
                return
            # What a parameter's own closing tag does not end has a line break that is not its own.
            self._end_value(cut=ends_call or not self._closing)
        if ends_call:
            self._end_call()
        if not self._closing and word == "invoke":
            self._state = _State.NAME
        elif not self._closing and word == "parameter" and in_call:
            self._state = _State.HEADER

    def _name_text(self, text: str) -> str:
        """Up to the quote that ends the name of an invoke tag."""
        text = self._read + text
        window = text[:_TAG_LIMIT]
        start, end = window.find(_ATTRIBUTE), window.find(">")
        if start >= 0 and not 0 <= end < start:
            start += len(_ATTRIBUTE)
            quote = window.find('"', start)
            if quote >= 0:
                self._begin_call(text[start:quote])
                return text[quote + 1 :]
        elif end >= 0:
            self._read, self._state = "", _State.SKIP
            return text[end + 1 :]
        if len(text) >= _TAG_LIMIT:
            self._read, self._state = "", _State.SKIP
            return ""
        self._read = text
        return ""

    def _begin_call(self, name: str) -> None:
        self._read = ""
        if not name:
            self._state = _State.SKIP
            return
        self._state = _State.OPENED
        self._index += 1
        self._keys, self._body = set(), []
        self._events.append(ToolCallStart(self._index, self._new_id(self._index), name))

    def _opened_text(self, text: str) -> str:
        """Up to the end of an invoke tag; one that ends in a slash is the whole call."""
        before, bracket, after = text.partition(">")
        self._read = (self._read + before)[-1:]
        if bracket:
            self._state = _State.BODY
            if self._read == "/":
                self._end_call()
            self._read = ""
        return after

    def _header_text(self, text: str) -> str:
        """Up to the end of a parameter tag. A key may hold anything, so each ">" is tried."""
        scanned, text = len(self._read), self._read + text
        end = text.find(">", scanned, _TAG_LIMIT)
        while end >= 0:
            header = text[:end].strip()
            if header.startswith(_ATTRIBUTE) and header.endswith('"') and header != _ATTRIBUTE:
                self._read = ""
                self._begin_value(header[len(_ATTRIBUTE) :])
                return text[end + 1 :]
            end = text.find(">", end + 1, _TAG_LIMIT)
        if len(text) >= _TAG_LIMIT:
            self._read, self._state = "", _State.BODY
            return text[_TAG_LIMIT:]
        self._read = text
        return ""

    def _begin_value(self, attributes: str) -> None:
        """`attributes`: key, its closing quote, and how the value is written, if that is said."""
        for kind, is_string in (('" string="true"', True), ('" string="false"', False)):
            if attributes.endswith(kind):
                self._key, self._is_string = attributes.removesuffix(kind), is_string
                break
        else:
            self._key, self._is_string = attributes.partition('"')[0], None
        self._state, self._value = _State.VALUE, []
        self._repeated = self._key in self._keys
        if self._is_string and not self._repeated:
            self._emit(self._next_key() + '"')

    def _next_key(self) -> str:
        separator = ", " if self._keys else "{"
        self._keys.add(self._key)
        return f"{separator}{json.dumps(self._key, ensure_ascii=False)}: "

    def _value_text(self, text: str) -> None:
        if not self._is_string or self._repeated:
            self._value.append(text)
            return
        text = "".join(self._value) + text
        # A line break at the end may turn out not to belong to the value.
        held = text[-1:] if text.endswith("\n") else ""
        self._value = [held] if held else []
        self._emit(_escaped(text.removesuffix(held)))

    def _end_value(self, cut: bool) -> None:
        """`cut`: something else than the closing tag of a parameter ends the value."""
        text = "".join(self._value)
        if cut:
            text = text.removesuffix("\n")
        self._state = _State.BODY
        if self._repeated:
            return
        if self._is_string:
            self._emit(_escaped(text) + '"')
        else:
            key = self._next_key()
            self._emit(key + (_json_text(text) or f'"{_escaped(text)}"'))

    def _end_call(self) -> None:
        self._state = _State.SKIP
        body = "".join(self._body).strip(_JSON_BLANKS)
        if self._keys:
            self._emit("}")
        else:
            self._emit(body if body.startswith("{") and _json_text(body) else "{}")
        self._events.append(ToolCallEnd(self._index))
        self.completed += 1

    def _emit(self, text: str) -> None:
        if text:
            self._events.append(ToolArgumentsDelta(self._index, text))


def _escaped(text: str) -> str:
    """`text` as it stands between the quotes of a JSON string."""
    return json.dumps(text, ensure_ascii=False)[1:-1]


def _json_text(text: str) -> str | None:
    """`text` without the blanks around it if it is a JSON value, else None."""
    try:
        parse_json(text)
    except ValueError:
        return None
    return text.strip(_JSON_BLANKS)

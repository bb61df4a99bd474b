"""What the tests of chat text share: the examples, a tokenizer, ways to run the parsers."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from fourfold.text.chat import ChatOptions, encode_chat
from fourfold.text.events import Event, ParsedMessage, collect
from fourfold.text.parse import TextParser, TokenParser
from fourfold.text.profiles import ChatProfile
from fourfold.text.prompt import EncodedPrompt, ParserStart
from fourfold.text.tokenizer import Tokenizer
from fourfold.weights.synthetic_tokenizer import tokenizer_files

DATA = Path(__file__).resolve().parent.parent / "data" / "chat"
TOKENIZER_JSON = tokenizer_files(129_280, 4096)["tokenizer.json"]
TOKENIZER = Tokenizer(TOKENIZER_JSON, "tokenizer.json")
STARTS = {"thinking": ParserStart.REASONING, "chat": ParserStart.CONTENT}
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Look up the weather",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}


def examples(file: str) -> list[dict[str, Any]]:
    """The cases of one example file."""
    return [json.loads(line) for line in (DATA / file).read_text("utf-8").splitlines()]


def by_name(cases: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """Arguments of `parametrize` for examples."""
    cases = list(cases)
    return {"argnames": "case", "argvalues": cases, "ids": [case["name"] for case in cases]}


def encode(messages: Sequence[dict[str, Any]], **options: Any) -> EncodedPrompt:
    """A prompt of the official profile, with low effort unless said otherwise."""
    options = {"profile": ChatProfile.OFFICIAL, "reasoning_effort": "low"} | options
    return encode_chat(messages, ChatOptions(**options))


def call(name: str, arguments: object, call_id: str = "c1") -> dict[str, Any]:
    """A tool call of the history."""
    return {
        "id": call_id,
        "type": "function",
        "function": {"name": name, "arguments": arguments},
    }


def numbered(index: int) -> str:
    """Ids for calls that a test can know."""
    return f"call_{index}"


def events_of_text(
    pieces: Iterable[str], start: ParserStart, tools: bool = True, finish: str = "stop", **more: Any
) -> list[Event]:
    """Every event of an answer that arrives in these pieces."""
    parser = TextParser(start, tools, new_id=numbered, **more)
    events = [event for piece in pieces for event in parser.push(piece)]
    return events + parser.finish(finish)


def events_of_tokens(
    ids: Iterable[int], start: ParserStart, tools: bool = True, finish: str = "stop", **more: Any
) -> list[Event]:
    """Every event of an answer in token ids."""
    parser = TokenParser(TOKENIZER, start, tools, new_id=numbered, **more)
    events = [event for index in ids for event in parser.push(index)]
    return events + parser.finish(finish)


def parse(text: str, start: ParserStart = ParserStart.CONTENT, **more: Any) -> ParsedMessage:
    """The message of an answer, given at once."""
    return collect(events_of_text([text], start, **more))


def parse_tokens(text: str, start: ParserStart = ParserStart.CONTENT, **more: Any) -> ParsedMessage:
    """The message of an answer in which every spelled marker is the real token."""
    return collect(events_of_tokens(TOKENIZER.encode(text, allow_special=True), start, **more))


def plain_form(message: ParsedMessage) -> dict[str, Any]:
    """A message in the form of the example file, arguments as values."""
    return {
        "role": "assistant",
        "reasoning_content": message.reasoning,
        "content": message.content,
        "tool_calls": [
            {"name": item.name, "arguments": json.loads(item.arguments)}
            for item in message.tool_calls
        ],
        "finish_reason": message.finish_reason,
    }


def pieces(text: str, cuts: Iterable[int]) -> list[str]:
    """`text` cut at these positions (modulo its length)."""
    places = sorted({cut % (len(text) + 1) for cut in cuts})
    return [text[a:b] for a, b in itertools.pairwise([0, *places, len(text)])]


CUTS = st.lists(st.integers(0, 10_000), max_size=12)

"""A prompt as segments: markers that the encoder wrote, and plain text.

Contract: only segments marked special become special token ids; whatever a user's text spells stays
ordinary tokens. Adjacent plain text is one segment, so that it is tokenised as one piece. It does not
know messages, tools or profiles.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import Enum

from fourfold.text import markers
from fourfold.text.checks import checked_text
from fourfold.text.tokenizer import Tokenizer

_TEMPLATE_MARKERS = re.compile(
    "(" + "|".join(map(re.escape, (markers.THINK, markers.END_THINK, markers.DSML))) + ")"
)


class ParserStart(Enum):
    """Where in an answer the generated text begins."""

    CONTENT = "content"
    REASONING = "reasoning"
    # The prompt already holds the beginning: leading newlines belong to the text.
    CONTENT_CONTINUED = "content_continued"
    REASONING_CONTINUED = "reasoning_continued"
    # The prompt opened a tool block.
    TOOLS = "tools"

    @property
    def in_reasoning(self) -> bool:
        """Whether an open `<think>` precedes the generated text."""
        return self in (ParserStart.REASONING, ParserStart.REASONING_CONTINUED)


@dataclass(frozen=True, slots=True)
class Segment:
    """A marker (one token id) or plain text."""

    text: str
    special: bool


@dataclass(frozen=True)
class PromptTokens:
    """A tokenised prompt. `header_position` is the number of tokens before the `<think>` or
    `</think>` of the generation header, None if the prompt has no such header."""

    token_ids: tuple[int, ...]
    header_position: int | None


@dataclass(frozen=True)
class EncodedPrompt:
    """A prompt and what a parser of the answer must know about it.

    `header`: index of the segment that holds the generation header's `<think>` or `</think>`.
    `forced`: what the answer must begin with (in thinking mode: directly after `</think>`) so that
    it is the tool call which the request demands; empty if it may be anything.
    """

    segments: tuple[Segment, ...]
    header: int | None = None
    start: ParserStart = ParserStart.CONTENT
    parse_tools: bool = False
    forced: tuple[Segment, ...] = ()

    @property
    def text(self) -> str:
        """The whole prompt as one string."""
        return "".join(segment.text for segment in self.segments)

    @property
    def ends_in_reasoning(self) -> bool:
        """Whether the prompt ends inside an open `<think>`."""
        return self.start.in_reasoning

    def tokenize(self, tokenizer: Tokenizer) -> PromptTokens:
        """Token ids and the header's position. Raises `ConfigError` for a marker that the
        tokenizer lacks."""
        ids: list[int] = []
        position = None
        for index, segment in enumerate(self.segments):
            if index == self.header:
                position = len(ids)
            ids += segment_ids(segment, tokenizer)
        return PromptTokens(tuple(ids), position)

    def token_ids(self, tokenizer: Tokenizer) -> list[int]:
        """Token ids of the prompt; errors as `tokenize`."""
        return list(self.tokenize(tokenizer).token_ids)

    def forced_ids(self, tokenizer: Tokenizer) -> list[int]:
        """Token ids of `forced`."""
        return [index for segment in self.forced for index in segment_ids(segment, tokenizer)]


def segment_ids(segment: Segment, tokenizer: Tokenizer) -> list[int]:
    """The token ids of one segment."""
    if segment.special:
        return [tokenizer.special_id(segment.text)]
    return tokenizer.encode(segment.text)


class PromptBuilder:
    """Collects segments in order."""

    def __init__(self) -> None:
        self._segments: list[Segment] = []
        self._plain: list[str] = []

    def __len__(self) -> int:
        """How many segments there are, that is the index of the next marker."""
        self._flush()
        return len(self._segments)

    def plain(self, text: str) -> None:
        """Append text that stays text, whatever it spells."""
        self._plain.append(text)

    def special(self, spelling: str) -> None:
        """Append a marker."""
        self._flush()
        self._segments.append(Segment(spelling, True))

    def template(self, text: str) -> None:
        """Append text of ours, in which `<think>`, `</think>` and `｜DSML｜` are markers."""
        for index, piece in enumerate(_TEMPLATE_MARKERS.split(text)):
            if index % 2:
                self.special(piece)
            else:
                self.plain(piece)

    def segments(self) -> tuple[Segment, ...]:
        """Everything so far."""
        self._flush()
        return tuple(self._segments)

    def _flush(self) -> None:
        text = "".join(self._plain)
        self._plain.clear()
        if text:
            self._segments.append(Segment(text, False))


def encode_fim(prefix: str, suffix: str) -> EncodedPrompt:
    """The fill-in-the-middle prompt: the answer is what belongs between `prefix` and `suffix`."""
    builder = PromptBuilder()
    for marker, name, text in (
        (markers.FIM_BEGIN, "prompt", prefix),
        (markers.FIM_HOLE, "suffix", suffix),
    ):
        builder.special(marker)
        builder.plain(checked_text(text, name))
    builder.special(markers.FIM_END)
    return EncodedPrompt(builder.segments(), start=ParserStart.CONTENT_CONTINUED)

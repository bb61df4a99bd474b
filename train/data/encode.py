"""Items to token ids, through fourfold's own chat encoder.

Contract: `prompt` is what the engine would be given, `document` the whole conversation with the weight
each token has as a target: 1 where the assistant wrote it, its end included, `PROMPT_WEIGHT` elsewhere.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fourfold.text import markers
from fourfold.text.chat import ChatOptions, encode_chat
from fourfold.text.profiles import ChatProfile
from fourfold.text.prompt import EncodedPrompt, PromptBuilder, Segment, segment_ids
from fourfold.text.tokenizer import Tokenizer
from fourfold.text.tools import read_calls, write_calls
from train.data.items import Item

PROMPT_WEIGHT = 0.02
_KEPT = 4096  # segments whose token ids are remembered


@dataclass(frozen=True)
class Document:
    """A conversation's token ids and their weights as targets."""

    ids: list[int]
    weights: list[float]


def encoded(item: Item, messages: Sequence[Mapping[str, Any]]) -> EncodedPrompt:
    """`messages` as `item` asks for them."""
    options = ChatOptions(
        ChatProfile.PREVIEW,
        thinking=item.thinking,
        tools=list(item.tools) or None,
        response_format=item.response_format,
    )
    return encode_chat(list(messages), options)


def answer_segments(item: Item) -> tuple[Segment, ...]:
    """The item's answer as it follows the prompt's last header, which is part of the prompt."""
    builder = PromptBuilder()
    if item.thinking:
        builder.plain(item.answer["reasoning_content"])
        builder.special(markers.END_THINK)
    builder.plain(item.answer["content"])
    calls = read_calls(item.answer.get("tool_calls"), "tool_calls")
    if calls:
        write_calls(builder, calls)
    builder.special(markers.EOS)
    return builder.segments()


class Encoder:
    """Encodes with one tokenizer; declarations of tools come again and again and are remembered."""

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer
        self._known: OrderedDict[str, list[int]] = OrderedDict()

    def count(self, text: str) -> int:
        """How many tokens `text` has."""
        return len(self.tokenizer.encode(text))

    def prompt(self, item: Item) -> list[int]:
        """Token ids up to where the answer begins."""
        return encoded(item, item.messages).token_ids(self.tokenizer)

    def document(self, item: Item) -> Document:
        """The whole conversation."""
        ids: list[int] = []
        weights: list[float] = []
        header = answering = False
        prompt = encoded(item, item.messages).segments
        for segment in (*prompt, *answer_segments(item)):
            found = self._ids(segment)
            ids += found
            weights += [1.0 if answering else PROMPT_WEIGHT] * len(found)
            if segment.special:
                answering = (answering or header) and segment.text != markers.EOS
                header = segment.text == markers.ASSISTANT
        return Document(ids, weights)

    def answer(self, item: Item) -> list[int]:
        """Token ids that should follow the prompt, the end of the answer included."""
        return [index for segment in answer_segments(item) for index in self._ids(segment)]

    def _ids(self, segment: Segment) -> list[int]:
        if segment.special or len(segment.text) > 8192:
            return segment_ids(segment, self.tokenizer)
        known = self._known.get(segment.text)
        if known is None:
            known = self._known[segment.text] = segment_ids(segment, self.tokenizer)
            if len(self._known) > _KEPT:
                self._known.popitem(last=False)
        else:
            self._known.move_to_end(segment.text)
        return known

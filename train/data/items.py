"""An item: a conversation up to an answer, and the answer.

Contract: generators give items; whether an item is held out follows from its `key` alone, by a hash,
so that no training conversation ever asks what an evaluation asks.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from random import Random
from typing import Any

Message = Mapping[str, Any]
HELD_OUT = 10  # one key in so many


@dataclass(frozen=True)
class Item:
    """A question in context. `answer` is the assistant's message that should follow `messages`;
    `key` says what is asked, for the split. `keys` are those of questions answered on the way."""

    skill: str
    messages: tuple[Message, ...]
    answer: Message
    key: str
    thinking: bool = False
    tools: tuple[Mapping[str, Any], ...] = ()
    response_format: Mapping[str, Any] | None = None
    keys: tuple[str, ...] = field(default=())


def held_out(key: str) -> bool:
    """Whether what `key` names is for evaluation only."""
    digest = hashlib.blake2b(key.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") % HELD_OUT == 0


def user(text: str) -> Message:
    """A user's message."""
    return {"role": "user", "content": text}


def assistant(text: str, reasoning: str = "") -> Message:
    """An answer."""
    return {"role": "assistant", "content": text, "reasoning_content": reasoning}


def of_split(random: Random, evaluation: bool, draw: Callable[[Random], Any], key: Any) -> Any:
    """The first draw whose `key(draw)` lies in the wanted split."""
    while True:
        drawn = draw(random)
        if held_out(key(drawn)) == evaluation:
            return drawn

"""Texts to be said again, word for word: a drill, not a skill.

Contract: nothing but the text itself says what follows a word, so that answering teaches to find the
place where the same words stood before. Facts are looked up in the same way, but a conversation about
facts has few words to learn that from: without this drill it was not learned (docs/NANO.md).
"""

from __future__ import annotations

from random import Random

from train.data import recall, words
from train.data.items import Item, assistant, user

SKILL = "repeat"
_WORDS = (*words.NOUNS, *words.ADJECTIVES, *words.NAMES, *words.CITIES, *words.COLORS)
_SENTENCE = 10  # tokens, roughly


def item(random: Random, length: int) -> Item:
    """A text of about `length` tokens: words at random, or sentences."""
    if random.random() < 0.5:
        text = " ".join(_word(random) for _ in range(max(4, length)))
    else:
        count = max(2, length // _SENTENCE)
        text = " ".join(_sentence(random) for _ in range(count))
    return Item(SKILL, (user("Repeat this text.\n" + text),), assistant(text), text)


def _word(random: Random) -> str:
    return random.choice(_WORDS) if random.random() < 0.8 else str(random.randrange(10))


def _sentence(random: Random) -> str:
    return words.filler(random) if random.random() < 0.5 else recall.stored(random, set()).statement

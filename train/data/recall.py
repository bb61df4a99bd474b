"""Facts stated earlier: within the window, and thousands of tokens back among sentences of no use.

Contract: an item's facts are drawn at random, so that nothing but the conversation holds the answer; the
split is by what is asked and answered. Lengths of texts are counted by a function the caller gives.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from random import Random

from train.data import words
from train.data.items import Item, Message, assistant, held_out, of_split, user

Count = Callable[[str], int]
_SAMPLE = 20  # sentences whose mean length tells how many make a text


@dataclass(frozen=True)
class Fact:
    """A statement, the question it answers, and the answer."""

    statement: str
    question: str
    value: str

    @property
    def key(self) -> str:
        """What the split is by."""
        return f"{self.question} {self.value}"


def _personal(random: Random) -> list[Fact]:
    pet, thing = random.choice(words.PETS), random.choice(words.NOUNS)
    age = str(random.randrange(18, 90))
    job, color = random.choice(words.JOBS), random.choice(words.COLORS)
    person, home, called = words.name(random), words.city(random), words.name(random)
    return [
        Fact(f"My name is {person}.", "What is my name?", person),
        Fact(f"I live in {home}.", "Where do I live?", home),
        Fact(f"My {pet} is called {called}.", f"What is my {pet} called?", called),
        Fact(f"I am {age} years old.", "How old am I?", age),
        Fact(f"I work as a {job}.", "What is my job?", job),
        Fact(f"My {thing} is {color}.", f"What color is my {thing}?", color),
    ]


def near(random: Random, evaluation: bool, thinking: bool) -> Item:
    """A few facts about the user, asked for within the window: in training all of them, in evaluation
    one. The split is by all that was said."""
    facts, text = of_split(random, evaluation, _introduction, lambda drawn: drawn[1])
    messages: list[Message] = [user(text), assistant("I will remember that.")]
    asked = random.sample(facts, 1 if evaluation else len(facts))
    item = _questions("recall_near", messages, asked, thinking)
    return replace(item, key=text, keys=())


def _introduction(random: Random) -> tuple[list[Fact], str]:
    facts = random.sample(_personal(random), random.randrange(2, 5))
    return facts, " ".join(fact.statement for fact in facts)


def _questions(
    skill: str, messages: list[Message], asked: list[Fact], thinking: bool, opening: str = ""
) -> Item:
    for fact in asked[:-1]:
        messages = [*messages, user(opening + fact.question), assistant(fact.value)]
        opening = ""
    last = asked[-1]
    answer = assistant(last.value, last.statement if thinking else "")
    keys = tuple(fact.key for fact in asked[:-1])
    question = user(opening + last.question)
    return Item(skill, (*messages, question), answer, last.key, thinking, keys=keys)


def _stored(random: Random, used: set[str]) -> Fact:
    while True:
        thing = f"the {random.choice(words.ADJECTIVES)} {random.choice(words.NOUNS)}"
        if thing not in used:
            used.add(thing)
            break
    if random.random() < 0.6:
        value = str(random.randrange(100, 1000))
        return Fact(f"The code of {thing} is {value}.", f"What is the code of {thing}?", value)
    owner = random.choice(words.NAMES)
    return Fact(f"The owner of {thing} is {owner}.", f"Who is the owner of {thing}?", owner)


def far(random: Random, evaluation: bool, thinking: bool, length: int, count: Count) -> Item:
    """Facts in a text of about `length` tokens. In evaluation one question, whose fact stands at the
    text's beginning; in training several, of facts anywhere."""
    number = min(4 + length // 96, 32)
    used: set[str] = set()
    facts: list[Fact] = []
    while len(facts) < number:
        fact = _stored(random, used)
        # The fact that evaluation asks for is held out; in training none is.
        if held_out(fact.key) == (evaluation and not facts):
            facts.append(fact)
    first = facts[0]
    sample = [words.filler(random) for _ in range(_SAMPLE)]
    each = max(1.0, count(" ".join(sample)) / _SAMPLE)
    taken = sum(count(" " + fact.statement) for fact in facts)
    sentences = [words.filler(random) for _ in range(max(2, int((length - taken) / each)))]
    if evaluation:
        random.shuffle(facts)
        facts.remove(first)
    places = sorted(random.choices(range(len(sentences) + 1), k=len(facts)), reverse=True)
    for place, fact in zip(places, facts, strict=True):
        sentences.insert(place, fact.statement)
    if evaluation:
        sentences.insert(random.randrange(2), first.statement)
        asked = [first]
    else:
        asked = random.sample(facts, min(len(facts), 8 if length < 3000 else 16))
    text = "Remember this text.\n" + " ".join(sentences) + "\n"
    return _questions("recall_far", [], asked, thinking, text)

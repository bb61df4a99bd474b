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
_DENSE = 0.7  # of the texts to learn from: about every other sentence is a fact
_MOST_FACTS = 32
_MOST_QUESTIONS = 20
_ONE_QUESTION = 0.3  # of the texts to learn from: as in evaluation


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
    skill: str, messages: list[Message], asked: list[Fact], thinking: bool, text: str = ""
) -> Item:
    """About the facts of a `text`, or of what was said before; only the first are answered with the
    whole sentence: it says again what is asked, so that its value is what follows the same words."""

    def reply(fact: Fact) -> str:
        return fact.statement if text else fact.value

    opening = text
    for fact in asked[:-1]:
        messages = [*messages, user(opening + fact.question), assistant(reply(fact))]
        opening = ""
    last = asked[-1]
    answer = assistant(reply(last), last.statement if thinking else "")
    keys = tuple(fact.key for fact in asked[:-1])
    question = user(opening + last.question)
    return Item(skill, (*messages, question), answer, last.key, thinking, keys=keys)


def stored(random: Random, used: set[str]) -> Fact:
    """A fact about a thing that is not in `used`, and is added to it."""
    while True:
        thing = words.thing(random)
        if thing not in used:
            used.add(thing)
            break
    if random.random() < 0.6:
        value = str(random.randrange(100, 1000))
        return Fact(f"The code of {thing} is {value}.", f"What is the code of {thing}?", value)
    owner = random.choice(words.NAMES)
    return Fact(f"The owner of {thing} is {owner}.", f"Who is the owner of {thing}?", owner)


def far(random: Random, evaluation: bool, thinking: bool, length: int, count: Count) -> Item:
    """Facts in a text of about `length` tokens, answered with the whole sentence. In evaluation one
    question, whose fact stands at the text's beginning; in training several, of facts anywhere, and
    mostly in denser texts."""
    number = 4 + length // 96
    if not evaluation and random.random() < _DENSE:
        number = 2 + length // 28
    number = min(number, _MOST_FACTS)
    used: set[str] = set()
    facts: list[Fact] = []
    while len(facts) < number:
        fact = stored(random, used)
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
        # Half of them, some more than once: else the last to be asked is what was not said yet.
        told = random.sample(facts, max(1, len(facts) // 2))
        most = 1 if random.random() < _ONE_QUESTION else _MOST_QUESTIONS
        asked = random.choices(told, k=min(2 * len(told), most))
    text = "Remember this text.\n" + " ".join(sentences) + "\n"
    return _questions("recall_far", [], asked, thinking, text)

"""Tool calls with typed arguments, and answers from what the tools gave back.

Contract: tools and their schemas are fixed, which of them a conversation declares is drawn; values are
drawn or invented, and the split is by a call's arguments. Every call, result and answer follows from
the drawn values alone.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from random import Random
from typing import Any

from train.data import words
from train.data.items import Item, Message, of_split, user


@dataclass(frozen=True)
class Use:
    """One use of a tool: what the user says, the arguments, the result, the answer made of it."""

    question: str
    arguments: Mapping[str, Any]
    result: Mapping[str, Any]
    answer: str


@dataclass(frozen=True)
class ToolKind:
    """A tool: its declaration and how a use is drawn."""

    name: str
    description: str
    properties: Mapping[str, str]  # argument -> JSON type
    draw: Callable[[Random], Use]

    @property
    def declaration(self) -> Mapping[str, Any]:
        """As a request declares it."""
        arguments = {
            key: {"type": "array", "items": {"type": "string"}}
            if kind == "array"
            else {"type": kind}
            for key, kind in self.properties.items()
        }
        schema = {"type": "object", "properties": arguments, "required": list(arguments)}
        function = {"name": self.name, "description": self.description, "parameters": schema}
        return {"type": "function", "function": function}


def _weather(random: Random) -> Use:
    where, days = words.city(random), random.randrange(1, 15)
    temp, sky = random.randrange(-20, 40), random.choice(("rain", "snow", "sun", "fog"))
    return Use(
        f"What is the weather in {where} for the next {days} days?",
        {"city": where, "days": days},
        {"temp": temp, "sky": sky},
        f"In {where} it is {temp} degrees with {sky}.",
    )


def _convert(random: Random) -> Use:
    amount = random.randrange(10, 9999) / 10
    source, target = random.sample(("EUR", "USD", "CNY", "JPY", "GBP", "CHF"), 2)
    value = random.randrange(10, 9999) / 10
    return Use(
        f"Convert {amount} {source} to {target}.",
        {"amount": amount, "source": source, "target": target},
        {"value": value},
        f"{amount} {source} are {value} {target}.",
    )


def _timer(random: Random) -> Use:
    minutes, label = random.randrange(1, 180), random.choice(words.NOUNS)
    number = random.randrange(10, 1000)
    return Use(
        f"Set a timer of {minutes} minutes for the {label}.",
        {"minutes": minutes, "label": label},
        {"id": number},
        f"Timer {number} is set for the {label}.",
    )


def _search(random: Random) -> Use:
    query = (
        f"{random.choice(words.ADJECTIVES)} {random.choice(words.NOUNS)} {words.invented(random)}"
    )
    limit, found = random.randrange(1, 50), random.randrange(0, 900)
    return Use(
        f"Search for {query} and show {limit} results.",
        {"query": query, "limit": limit},
        {"found": found},
        f"I found {found} results for {query}.",
    )


def _event(random: Random) -> Use:
    title = f"{words.name(random)} {random.choice(words.NOUNS)}"
    month, day = random.randrange(1, 13), random.randrange(1, 29)
    date, whole = f"{random.randrange(2020, 2040)}-{month:02}-{day:02}", random.random() < 0.5
    when = "all day" if whole else "for an hour"
    return Use(
        f"Add the event {title} on {date}, {when}.",
        {"title": title, "date": date, "all_day": whole},
        {"saved": True},
        f"The event {title} is saved on {date}.",
    )


def _music(random: Random) -> Use:
    artist, volume, shuffle = words.name(random), random.randrange(0, 101), random.random() < 0.5
    how = "shuffled" if shuffle else "in order"
    song = f"{random.choice(words.ADJECTIVES)} {random.choice(words.NOUNS)}"
    return Use(
        f"Play music by {artist} at volume {volume}, {how}.",
        {"artist": artist, "volume": volume, "shuffle": shuffle},
        {"song": song},
        f"Now playing {song} by {artist}.",
    )


def _light(random: Random) -> Use:
    room, level = random.choice(words.NOUNS) + " room", random.randrange(0, 101)
    on = random.random() < 0.5
    return Use(
        f"Turn the light in the {room} {'on' if on else 'off'}, brightness {level}.",
        {"room": room, "on": on, "brightness": level},
        {"power": random.randrange(1, 100)},
        f"The light in the {room} is {'on' if on else 'off'}.",
    )


def _table(random: Random) -> Use:
    person, people = words.name(random), random.randrange(1, 20)
    hour, number = (
        f"{random.randrange(10, 24)}:{random.choice((0, 15, 30, 45)):02}",
        random.randrange(1, 99),
    )
    return Use(
        f"Book a table for {people} people at {hour} under the name {person}.",
        {"name": person, "people": people, "time": hour},
        {"table": number},
        f"Table {number} is booked for {person} at {hour}.",
    )


def _mail(random: Random) -> Use:
    people = [words.name(random) for _ in range(random.randrange(1, 4))]
    subject = f"{random.choice(words.ADJECTIVES)} {random.choice(words.NOUNS)}"
    number = random.randrange(100, 1000)
    return Use(
        f"Send a mail to {' and '.join(people)} about the {subject}.",
        {"to": people, "subject": subject},
        {"message": number},
        f"Mail {number} about the {subject} is sent.",
    )


def _stock(random: Random) -> Use:
    symbol = words.invented(random).upper()[:5]
    price = random.randrange(10, 9999) / 10
    return Use(
        f"What is the price of {symbol}?",
        {"symbol": symbol},
        {"price": price},
        f"{symbol} costs {price}.",
    )


TOOLS = (
    ToolKind("get_weather", "Weather of a city", {"city": "string", "days": "integer"}, _weather),
    ToolKind(
        "convert_money",
        "Convert an amount of money",
        {"amount": "number", "source": "string", "target": "string"},
        _convert,
    ),
    ToolKind("set_timer", "Set a timer", {"minutes": "integer", "label": "string"}, _timer),
    ToolKind("search", "Search the web", {"query": "string", "limit": "integer"}, _search),
    ToolKind(
        "add_event",
        "Add an event to the calendar",
        {"title": "string", "date": "string", "all_day": "boolean"},
        _event,
    ),
    ToolKind(
        "play_music",
        "Play music",
        {"artist": "string", "volume": "integer", "shuffle": "boolean"},
        _music,
    ),
    ToolKind(
        "set_light",
        "Switch a light",
        {"room": "string", "on": "boolean", "brightness": "integer"},
        _light,
    ),
    ToolKind(
        "book_table",
        "Book a table",
        {"name": "string", "people": "integer", "time": "string"},
        _table,
    ),
    ToolKind("send_mail", "Send a mail", {"to": "array", "subject": "string"}, _mail),
    ToolKind("get_price", "Price of a stock", {"symbol": "string"}, _stock),
)


def _key(drawn: tuple[ToolKind, Use]) -> str:
    return drawn[0].name + json.dumps(drawn[1].arguments, sort_keys=True)


def _call(tool: ToolKind, use: Use, number: int, thinking: bool) -> Message:
    function = {"name": tool.name, "arguments": json.dumps(use.arguments)}
    call = {"id": f"call_{number}", "type": "function", "function": function}
    reasoning = f"I need {tool.name}." if thinking else ""
    return {
        "role": "assistant",
        "content": "",
        "reasoning_content": reasoning,
        "tool_calls": [call],
    }


def _result(use: Use, number: int) -> Message:
    text = json.dumps(use.result)
    return {"role": "tool", "tool_call_id": f"call_{number}", "content": text}


def _answer(use: Use, thinking: bool) -> Message:
    reasoning = "The tool has answered." if thinking else ""
    return {"role": "assistant", "content": use.answer, "reasoning_content": reasoning}


def item(random: Random, evaluation: bool, thinking: bool, result: bool = False) -> Item:
    """A call that a question needs or, with `result`, the answer after it. In training the last of a
    few uses; declared are the tools that are used and some others."""

    def draw(kinds: Random) -> tuple[ToolKind, Use]:
        tool = kinds.choice(TOOLS)
        return tool, tool.draw(kinds)

    rounds = 1 if evaluation else random.choice((1, 2, 3, 4))
    uses = [of_split(random, evaluation and n == rounds - 1, draw, _key) for n in range(rounds)]
    declared = {tool.name: tool for tool, _ in uses}
    for tool in random.sample(TOOLS, random.choice((1, 2, 3))):
        declared[tool.name] = tool
    order = random.sample(sorted(declared), len(declared))
    messages: list[Message] = []
    for number, (tool, use) in enumerate(uses):
        messages += [user(use.question), _call(tool, use, number, thinking)]
        messages += [_result(use, number), _answer(use, thinking)]
    cut = 1 if result else 3
    *context, answer = messages[: len(messages) - cut + 1]
    return Item(
        "tool_result" if result else "tool_call",
        tuple(context),
        answer,
        _key(uses[-1]),
        thinking,
        tools=tuple(declared[name].declaration for name in order),
        keys=tuple(map(_key, uses[:-1])),
    )

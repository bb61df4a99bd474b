"""Answers in JSON that follow a schema, filled from a description.

Contract: schemas vary in which fields they want and in what order; the description also says what no
field wants. The split is by the answer.
"""

from __future__ import annotations

import json
from random import Random
from typing import Any

from train.data import words
from train.data.items import Item, assistant, of_split, user

_ROLES = ("admin", "guest", "editor")


def _fields(random: Random) -> tuple[str, dict[str, tuple[dict[str, Any], Any, str]]]:
    """A person, and every field as (schema, value, sentence)."""
    person, home, age = words.name(random), words.city(random), random.randrange(18, 90)
    job, role, member = random.choice(words.JOBS), random.choice(_ROLES), random.random() < 0.5
    score = random.randrange(10, 100) / 10
    colors = random.sample(words.COLORS, random.randrange(1, 4))
    text, whole = {"type": "string"}, {"type": "integer"}
    liked = " and ".join(colors)
    return person, {
        "name": (text, person, ""),
        "age": (whole, age, f"{person} is {age} years old."),
        "city": (text, home, f"{person} lives in {home}."),
        "job": (text, job, f"{person} works as a {job}."),
        "member": (
            {"type": "boolean"},
            member,
            f"{person} is a member." if member else f"{person} is not a member.",
        ),
        "score": ({"type": "number"}, score, f"The score of {person} is {score}."),
        "role": ({"type": "string", "enum": list(_ROLES)}, role, f"{person} is the {role}."),
        "colors": ({"type": "array", "items": text}, colors, f"{person} likes {liked}."),
    }


def _draw(random: Random) -> tuple[dict[str, Any], str, dict[str, Any]]:
    """(schema, description, object)."""
    person, fields = _fields(random)
    wanted = random.sample(sorted(fields), random.randrange(2, 5))
    said = [fields[key][2] for key in wanted]
    said += [fields[key][2] for key in random.sample(sorted(fields), 1) if key not in wanted]
    random.shuffle(said)
    if "name" in wanted and not any(said):
        said.append(f"This is {person}.")
    text = " ".join(sentence for sentence in said if sentence)
    schema = {
        "type": "object",
        "properties": {key: fields[key][0] for key in wanted},
        "required": wanted,
    }
    return schema, text, {key: fields[key][1] for key in wanted}


def item(random: Random, evaluation: bool, thinking: bool) -> Item:
    """One description and the object it becomes."""
    schema, text, value = of_split(
        random, evaluation, _draw, lambda drawn: json.dumps(drawn[2], sort_keys=True)
    )
    wanted = {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}}
    reasoning = "The fields are " + ", ".join(value) + "." if thinking else ""
    answer = assistant(json.dumps(value, ensure_ascii=False), reasoning)
    key = json.dumps(value, sort_keys=True)
    return Item("schema", (user(text),), answer, key, thinking, response_format=wanted)

"""Grammars: what they let through, what drafts see, and what is wrong with bad ones."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable
from typing import Any

import pytest

from fourfold.core.errors import RequestError
from fourfold.core.request import Grammar
from fourfold.llm.masks import GrammarMask
from fourfold.text.grammar import (
    GrammarCompiler,
    GrammarMatcher,
    check,
    read_response_format,
    read_structured_outputs,
)
from fourfold.weights.synthetic_tokenizer import tokenizer_files
from tests.server.stub import make_tokenizer

TOKENIZER = make_tokenizer()
COMPILER = GrammarCompiler(json.dumps(tokenizer_files(900, 4096)["tokenizer.json"]), 900, 1)
THINK_END = TOKENIZER.special_id("</think>")
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 8}, "ok": {"type": "boolean"}},
    "required": ["name", "ok"],
    "additionalProperties": False,
}


def bits(row: bytes | None) -> list[int]:
    assert row is not None
    return [8 * i + b for i, byte in enumerate(row) for b in range(8) if byte >> b & 1]


def walk(matcher: GrammarMatcher, rng: random.Random, most: int = 200) -> str:
    """A random answer that the grammar allows; ends are preferred so that it ends."""
    ids: list[int] = []
    while len(ids) < most:
        allowed = bits(matcher.rows(())[0])
        assert allowed
        token = 1 if 1 in allowed else rng.choice(allowed)
        matcher.commit([token])
        if token == 1:
            break
        ids.append(token)
    return TOKENIZER.decode(ids)


def is_schema(text: str) -> bool:
    found = json.loads(text)
    return set(found) == {"name", "ok"} and isinstance(found["ok"], bool)


@pytest.mark.parametrize(
    ("grammar", "holds"),
    [
        (Grammar("json_schema", json.dumps(SCHEMA)), is_schema),
        (Grammar("regex", r"[ab]{3}-\d{2}"), lambda t: re.fullmatch(r"[ab]{3}-\d{2}", t)),
        (
            Grammar("choice", json.dumps(["yes", 'a "no"', "你好"])),
            {"yes", 'a "no"', "你好"}.__contains__,
        ),
        (Grammar("grammar", 'start: "x" start | "y"'), lambda t: re.fullmatch("x*y", t)),
    ],
)
def test_every_walk_through_a_grammar_is_in_it(
    grammar: Grammar, holds: Callable[[str], Any]
) -> None:
    assert check(grammar) is None
    for seed in range(8):
        text = walk(COMPILER.matcher(grammar), random.Random(seed))
        assert holds(text), text


def test_rows_after_drafts_are_those_after_committing_them() -> None:
    grammar = Grammar("json_schema", json.dumps(SCHEMA))
    rng = random.Random(3)
    ids: list[int] = []
    reference = COMPILER.matcher(grammar)
    rows = [reference.rows(())[0]]
    while len(ids) < 6:
        ids.append(rng.choice([t for t in bits(rows[-1]) if t != 1]))
        reference.commit([ids[-1]])
        rows.append(reference.rows(())[0])
    fresh = COMPILER.matcher(grammar)
    assert fresh.rows(ids) == rows
    assert fresh.rows(ids) == rows  # looking ahead changes nothing
    fresh.commit(ids[:3])
    assert fresh.rows(ids[3:]) == rows[3:]
    wrong = [ids[3], THINK_END, 5]
    assert fresh.rows(wrong) == [rows[3], rows[4], None, None]
    with pytest.raises(RequestError, match="outside"):
        fresh.commit([THINK_END])


def test_a_grammar_waits_for_the_end_of_the_reasoning() -> None:
    matcher = COMPILER.matcher(Grammar("regex", "ab", THINK_END))
    assert matcher.rows([10, 11]) == [None] * 3
    a, b = TOKENIZER.encode("a")[0], TOKENIZER.encode("b")[0]
    rows = matcher.rows([10, THINK_END, a])
    assert rows[:2] == [None, None]
    assert a in bits(rows[2])
    assert b in bits(rows[3])
    matcher.commit([10, 11, THINK_END, a])
    assert bits(matcher.rows(())[0]) == [b]


def test_masks_have_the_engines_shape() -> None:
    mask = GrammarMask(COMPILER.matcher(Grammar("regex", "ab", THINK_END)), 900)
    found = mask.allowed([THINK_END])
    assert found.shape == (2, 29)
    assert (found[0] == -1).all()
    allowed = [t for t in range(900) if found[1][t // 32] >> (t % 32) & 1]
    assert [TOKENIZER.decode([t]) for t in allowed] == ["a"] or "ab" in map(
        TOKENIZER.decode, ([t] for t in allowed)
    )


@pytest.mark.parametrize(
    "grammar",
    [
        Grammar("json_schema", '{"type": "foo"}'),
        Grammar("json_schema", "{"),
        Grammar("json_schema", "[" * 5000),
        Grammar("regex", "("),
        Grammar("grammar", "start: foo"),
        Grammar("nothing", ""),
    ],
)
def test_a_bad_grammar_is_a_request_error(grammar: Grammar) -> None:
    assert check(grammar)
    with pytest.raises(RequestError):
        COMPILER.matcher(grammar)


def test_what_requests_say() -> None:
    assert read_response_format({"type": "text"}, None) is None
    assert read_response_format({"type": "json_object"}, 5) == Grammar("json_object", "", 5)
    wanted = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}
    found = read_response_format(wanted, None)
    assert found is not None
    assert json.loads(found.source) == SCHEMA
    assert read_structured_outputs({"regex": "a"}, 5) == Grammar("regex", "a", 5)
    assert read_structured_outputs({"choice": ["a"]}, None) == Grammar("choice", '["a"]')
    for bad in ({}, {"regex": "a", "json": {}}, {"foo": 1}, {"choice": []}, {"regex": 3}):
        with pytest.raises(RequestError, match="structured_outputs"):
            read_structured_outputs(bad, None)
    with pytest.raises(RequestError, match="200000"):
        read_structured_outputs({"regex": "a" * 200_001}, None)

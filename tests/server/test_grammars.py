"""Structured output at the server's side: what reaches the engine, and what is refused, in time."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from fourfold.core.request import Grammar
from tests.server.http import Answer, Site, site

HELLO = [{"role": "user", "content": "hi"}]
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
FORMAT = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}


@pytest.fixture
def web() -> Iterator[Site]:
    with site(grammars=True) as found:
        yield found


def chat(web: Site, **fields: object) -> Answer:
    return web.post("/v1/chat/completions", **({"messages": HELLO} | fields))


def test_a_grammar_is_armed_after_the_reasoning(web: Site) -> None:
    end = web.engine.tokenizer.special_id("</think>")
    for thinking, after in ((True, end), (False, None)):
        assert chat(web, response_format=FORMAT, thinking=thinking).status == 200
        grammar = web.engine.requests[-1].grammar
        assert grammar is not None
        assert (grammar.kind, grammar.after_token) == ("json_schema", after)
        assert json.loads(grammar.source) == SCHEMA
    prompt = web.engine.tokenizer.decode(web.engine.requests[-1].prompt_token_ids)
    assert "## Response Format" in prompt
    chat(web, response_format={"type": "text"})
    assert web.engine.requests[-1].grammar is None


def test_every_spelling(web: Site) -> None:
    chat(web, response_format={"type": "json_object"}, thinking=False)
    assert web.engine.requests[-1].grammar == Grammar("json_object", "")
    chat(web, structured_outputs={"regex": "[ab]+"}, thinking=False)
    assert web.engine.requests[-1].grammar == Grammar("regex", "[ab]+")
    web.post("/v1/completions", prompt="a", structured_outputs={"choice": ["x", "y"]})
    assert web.engine.requests[-1].grammar == Grammar("choice", '["x", "y"]')
    text = {"format": {"type": "json_schema", "name": "x", "schema": SCHEMA}}
    assert web.post("/v1/responses", input="hi", text=text).status == 200
    found = web.engine.requests[-1].grammar
    assert found is not None
    assert json.loads(found.source) == SCHEMA


TOOLS: list[Any] = [{"type": "function", "function": {"name": "f"}}]


@pytest.mark.parametrize(
    "fields",
    [
        {"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "foo"}}}},
        {"response_format": {"type": "json_schema"}},
        {"response_format": {"type": "xml"}},
        {"structured_outputs": {"regex": "("}},
        {"structured_outputs": {"grammar": "start: foo"}},
        {"structured_outputs": {"regex": "a"}, "response_format": FORMAT},
        {"structured_outputs": {"regex": "a"}, "tools": TOOLS},
        {"response_format": FORMAT, "tools": TOOLS},
    ],
)
def test_what_cannot_be_is_refused(web: Site, fields: dict[str, Any]) -> None:
    answer = chat(web, **fields)
    assert answer.status == 400, answer.body
    assert answer.error["message"]
    assert not web.engine.requests
    assert chat(web, response_format=FORMAT).status == 200  # the process still answers


def test_an_engine_without_grammars_refuses_by_name() -> None:
    with site() as web:
        answer = chat(web, response_format=FORMAT)
        assert (answer.status, answer.error["param"]) == (400, "response_format.type")
        answer = web.post("/v1/completions", prompt="a", structured_outputs={"regex": "a"})
        assert (answer.status, answer.error["param"]) == (400, "structured_outputs")


def test_too_many_at_once_is_busy(web: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fourfold.text.grammar_check.MAX_WAITING", 0)
    answer = chat(web, response_format=FORMAT)
    assert (answer.status, answer.error["code"]) == (429, "queue_full")
    assert int(answer.headers["retry-after"]) >= 1

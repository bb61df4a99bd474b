"""Anthropic's API on a stub engine, by itself and through the current anthropic client."""

from __future__ import annotations

import json
from typing import Any

import pytest

from fourfold.server.settings import ServerSettings
from tests.server.http import Answer, Site, site

HELLO: list[Any] = [{"role": "user", "content": "hi"}]
TOOLS: list[Any] = [
    {
        "name": "weather",
        "description": "The weather in a city.",
        "input_schema": {"type": "object", "properties": {"city": {"type": "string"}}},
    }
]
CALL = (
    '\n\n<｜DSML｜tool_calls>\n<｜DSML｜invoke name="weather">\n'
    '<｜DSML｜parameter name="city" string="true">Oslo</｜DSML｜parameter>\n'
    "</｜DSML｜invoke>\n</｜DSML｜tool_calls>"
)
THINK = {"type": "enabled", "budget_tokens": 1024}


def ask(web: Site, **fields: object) -> Answer:
    return web.post("/v1/messages", **({"messages": HELLO, "max_tokens": 100} | fields))


def prompt(web: Site) -> str:
    return web.engine.tokenizer.decode(web.engine.requests[-1].prompt_token_ids)


def test_blocks_and_usage(web: Site) -> None:
    web.says("Hm", "</think>", "\n\nLook:", CALL)
    body = ask(web, tools=TOOLS, thinking=THINK).json
    thinking, text, call = body["content"]
    assert thinking == {"type": "thinking", "thinking": "Hm", "signature": ""}
    assert text == {"type": "text", "text": "Look:"}
    assert (call["type"], call["name"], call["input"]) == ("tool_use", "weather", {"city": "Oslo"})
    assert body["stop_reason"] == "tool_use"
    usage = body["usage"]
    assert usage["cache_read_input_tokens"] == 4
    assert usage["input_tokens"] + 4 == len(web.engine.requests[0].prompt_token_ids)


def test_a_stream_says_the_same(web: Site) -> None:
    web.says("Hm", "</think>", "\n\nLook:", CALL)
    whole = ask(web, tools=TOOLS, thinking=THINK).json
    events = ask(web, tools=TOOLS, thinking=THINK, stream=True).events
    assert [events[0]["type"], events[-1]["type"]] == ["message_start", "message_stop"]
    found: dict[int, dict[str, Any]] = {}
    partial: dict[int, str] = {}
    still_open: set[int] = set()
    for event in events:
        if event["type"] == "content_block_start":
            assert not still_open
            still_open.add(event["index"])
            found[event["index"]] = dict(event["content_block"])
        elif event["type"] == "content_block_delta":
            delta = event["delta"]
            kind = delta["type"].removesuffix("_delta")
            if kind == "input_json":
                partial[event["index"]] = partial.get(event["index"], "") + delta["partial_json"]
            else:
                found[event["index"]][kind] += delta[kind]
        elif event["type"] == "content_block_stop":
            still_open.remove(event["index"])
    for index, text in partial.items():
        found[index]["input"] = json.loads(text)
    for block in [*found.values(), *whole["content"]]:
        block.pop("id", None)
    assert list(found.values()) == whole["content"]
    (end,) = [e for e in events if e["type"] == "message_delta"]
    assert end["delta"]["stop_reason"] == "tool_use"
    assert end["usage"] == whole["usage"]


@pytest.mark.parametrize(
    ("words", "fields", "reason", "stop"),
    [
        (("all of it",), {}, "end_turn", None),
        (("one STOP two",), {"stop_sequences": ["STOP"]}, "stop_sequence", "STOP"),
        (("a long answer",), {"max_tokens": 2}, "max_tokens", None),
    ],
)
def test_how_it_ends(
    web: Site, words: tuple[str, ...], fields: dict[str, Any], reason: str, stop: str | None
) -> None:
    web.says(*words)
    body = ask(web, **fields).json
    assert (body["stop_reason"], body["stop_sequence"]) == (reason, stop)


def test_thinking_is_off_unless_asked_for(web: Site) -> None:
    web.says("yes")
    for thinking in (None, {"type": "disabled"}):
        ask(web, thinking=thinking)
        assert prompt(web).endswith("</think>")
    for thinking in (THINK, {"type": "adaptive"}):
        ask(web, thinking=thinking)
        assert prompt(web).endswith("<think>")
    ask(web, thinking=THINK, output_config={"effort": "max"})
    assert "Beyond maximum" in prompt(web)


def test_a_budget_ends_the_thinking(web: Site) -> None:
    thoughts = web.text("one two three four five six seven")
    web.engine.script = lambda request, index: [*thoughts, *web.text("</think>yes"), 1]
    for stream in (False, True):
        answer = ask(web, thinking={"type": "enabled", "budget_tokens": 4}, stream=stream)
        if stream:
            deltas = [e["delta"] for e in answer.events if e["type"] == "content_block_delta"]
            thought = "".join(d.get("thinking", "") for d in deltas)
        else:
            thought = answer.json["content"][0]["thinking"]
        assert thought == web.engine.tokenizer.decode(thoughts[:4])
    ask(web, thinking=THINK)
    grammar = web.engine.requests[-1].grammar
    assert grammar is not None
    assert grammar.max_free_tokens == 1024


def test_history_with_results_and_thoughts(web: Site) -> None:
    messages = [
        *HELLO,
        {
            "role": "assistant",
            "content": [
                {"type": "thinking", "thinking": "Hm", "signature": "x"},
                {"type": "tool_use", "id": "t1", "name": "weather", "input": {"city": "Oslo"}},
            ],
        },
        {
            "role": "user",
            "content": [
                {
                    "type": "tool_result",
                    "tool_use_id": "t1",
                    "content": [{"type": "text", "text": "-3"}],
                },
                {"type": "text", "text": "and now?"},
            ],
        },
    ]
    system = [{"type": "text", "text": "Be brief.", "cache_control": {"type": "ephemeral"}}]
    ask(web, messages=messages, system=system, tools=TOOLS, thinking=THINK)
    text = prompt(web)
    assert text.startswith("<｜begin▁of▁sentence｜>")
    assert "Be brief.\n\n## Tools" in text
    assert "<think>Hm</think>" + CALL in text
    assert "<｜User｜><tool_result>-3</tool_result>\n\nand now?<｜Assistant｜>" in text


def test_the_last_message_is_continued(web: Site) -> None:
    ask(web, messages=[*HELLO, {"role": "assistant", "content": "Autumn"}])
    assert prompt(web).endswith("</think>Autumn")


def test_tokens_are_counted_as_they_are_used(web: Site) -> None:
    ask(web, tools=TOOLS, system="Be brief.")
    body = {"messages": HELLO, "tools": TOOLS, "system": "Be brief."}
    found = web.post("/v1/messages/count_tokens", **body).json
    assert found == {"input_tokens": len(web.engine.requests[-1].prompt_token_ids)}


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"max_tokens": None}, "max_tokens"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "x", "content": "a"}]}, "messages[0].role"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image"}]}]},
            "messages[0].content[0].type",
        ),
        (
            {"messages": [{"role": "assistant", "content": [{"type": "redacted_thinking"}]}]},
            "messages[0].content[0].type",
        ),
        ({"tools": [{"type": "web_search_20250305", "name": "x"}]}, "tools[0].type"),
        ({"tools": [{"name": "x", "strict": True}]}, "tools[0].strict"),
        ({"tool_choice": {"type": "some"}}, "tool_choice.type"),
        ({"thinking": {"type": "some"}}, "thinking.type"),
        ({"thinking": {"type": "enabled", "budget_tokens": 0}}, "thinking.budget_tokens"),
        ({"thinking": {"type": "enabled", "display": "omitted"}}, "thinking.display"),
        ({"thinking": {"type": "adaptive", "budget_tokens": 9}}, "thinking.budget_tokens"),
        ({"thinking": {"type": "disabled", "budget_tokens": 9}}, "thinking.budget_tokens"),
        ({"output_config": {"format": {}}}, "output_config.format"),
        ({"mcp_servers": []}, "mcp_servers"),
        ({"container": "x"}, "container"),
        ({"temperature": 200}, "temperature"),
    ],
)
def test_what_is_wrong_is_named(web: Site, fields: dict[str, Any], param: str) -> None:
    answer = ask(web, **fields)
    assert answer.status == 400
    body = answer.json
    assert (body["type"], body["error"]["type"]) == ("error", "invalid_request_error")
    assert body["error"]["param"] == param
    assert not web.engine.requests


@pytest.mark.full
def test_the_anthropic_client() -> None:
    anthropic = pytest.importorskip(
        "anthropic", reason="the anthropic client is not installed (extra: peers)"
    )
    with site(ServerSettings(api_keys=("right",))) as web:
        url = f"http://127.0.0.1:{web.port}"
        client = anthropic.Anthropic(base_url=url, api_key="right", max_retries=0)
        common = {"model": "stub/model", "max_tokens": 500}
        web.says("Hm", "</think>", CALL)
        with client.messages.stream(
            messages=HELLO, tools=TOOLS, thinking=THINK, **common
        ) as stream:
            first = stream.get_final_message()
        assert first.stop_reason == "tool_use"
        call = first.content[-1]
        assert call.input == {"city": "Oslo"}
        web.says("Cold", "</think>", "\n\nIt is cold.")
        result = {"type": "tool_result", "tool_use_id": call.id, "content": "-3"}
        history = [
            *HELLO,
            {"role": "assistant", "content": first.content},
            {"role": "user", "content": [result]},
        ]
        second = client.messages.create(messages=history, tools=TOOLS, thinking=THINK, **common)
        assert [b.type for b in second.content] == ["thinking", "text"]
        assert second.content[1].text == "It is cold."
        assert "<think>Hm</think>" + CALL in prompt(web)
        assert client.messages.count_tokens(model="stub/model", messages=HELLO).input_tokens > 0
        with pytest.raises(anthropic.BadRequestError):
            client.messages.create(messages=[], **common)
        with pytest.raises(anthropic.NotFoundError):
            client.messages.create(messages=HELLO, model="other", max_tokens=5)
        wrong = anthropic.Anthropic(base_url=url, api_key="wrong", max_retries=0)
        with pytest.raises(anthropic.AuthenticationError):
            wrong.messages.create(messages=HELLO, **common)
        web.engine.fails = "the model's numbers were not finite"
        with pytest.raises(anthropic.InternalServerError):
            client.messages.create(messages=HELLO, **common)
        with (
            pytest.raises(anthropic.APIError),
            client.messages.stream(messages=HELLO, **common) as stream,
        ):
            stream.get_final_message()

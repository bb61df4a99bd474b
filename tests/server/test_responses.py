"""The Responses API on a stub engine, by itself and through the current openai client."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.server.http import Answer, Site

TOOLS: list[Any] = [
    {
        "type": "function",
        "name": "weather",
        "description": "The weather in a city.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
        "strict": False,
    }
]
CALL = (
    '\n\n<｜DSML｜tool_calls>\n<｜DSML｜invoke name="weather">\n'
    '<｜DSML｜parameter name="city" string="true">Oslo</｜DSML｜parameter>\n'
    "</｜DSML｜invoke>\n</｜DSML｜tool_calls>"
)


def ask(web: Site, **fields: object) -> Answer:
    return web.post("/v1/responses", **({"input": "hi"} | fields))


def prompt(web: Site) -> str:
    return web.engine.tokenizer.decode(web.engine.requests[-1].prompt_token_ids)


def test_items_and_usage(web: Site) -> None:
    web.says("Hm", "</think>", "\n\nLook:", CALL)
    body = ask(web, tools=TOOLS, instructions="Be brief.", max_output_tokens=500).json
    reasoning, message, call = body["output"]
    assert reasoning["content"] == [{"type": "reasoning_text", "text": "Hm"}]
    assert message["content"][0]["text"] == "Look:"
    assert (call["name"], json.loads(call["arguments"])) == ("weather", {"city": "Oslo"})
    assert (body["status"], body["store"], body["error"]) == ("completed", False, None)
    assert body["usage"]["input_tokens_details"]["cached_tokens"] == 4
    assert body["usage"]["output_tokens_details"]["reasoning_tokens"] > 0
    assert "Be brief.\n\n## Tools" in prompt(web)


def test_a_stream_says_the_same(web: Site) -> None:
    web.says("Hm", "</think>", "\n\nLook:", CALL)
    whole = ask(web, tools=TOOLS).json
    events = ask(web, tools=TOOLS, stream=True).events
    assert [e["sequence_number"] for e in events] == list(range(len(events)))
    assert events[0]["type"] == "response.created"
    assert events[-1]["type"] == "response.completed"
    texts: dict[int, str] = {}
    for event in events:
        if event["type"].endswith(".delta"):
            texts[event["output_index"]] = texts.get(event["output_index"], "") + event["delta"]
    done = [e["item"] for e in events if e["type"] == "response.output_item.done"]
    final = events[-1]["response"]
    assert done == final["output"]
    assert [texts[i] for i in range(3)] == ["Hm", "Look:", done[2]["arguments"]]
    for a, b in zip(final["output"], whole["output"], strict=True):
        assert {k: v for k, v in a.items() if k not in ("id", "call_id")} == {
            k: v for k, v in b.items() if k not in ("id", "call_id")
        }
    assert final["usage"] == whole["usage"]


def test_history_of_items(web: Site) -> None:
    items = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": [{"type": "input_text", "text": "hi"}]},
        {"type": "reasoning", "summary": [], "content": [{"type": "reasoning_text", "text": "Hm"}]},
        {
            "type": "function_call",
            "call_id": "c",
            "name": "weather",
            "arguments": '{"city":"Oslo"}',
        },
        {"type": "function_call_output", "call_id": "c", "output": "-3"},
    ]
    ask(web, input=items, tools=TOOLS)
    text = prompt(web)
    assert "Be brief." in text
    assert "<think>Hm</think>" + CALL in text
    assert "<tool_result>-3</tool_result>" in text


def test_how_it_ends(web: Site) -> None:
    web.says("a long answer")
    body = ask(web, max_output_tokens=2).json
    assert (body["status"], body["incomplete_details"]) == (
        "incomplete",
        {"reason": "max_output_tokens"},
    )
    assert ask(web, max_output_tokens=2, stream=True).events[-1]["type"] == "response.incomplete"
    web.engine.fails = "the model's numbers were not finite"
    assert ask(web).error["code"] == "nonfinite_logits"
    last = ask(web, stream=True).events[-1]
    assert (last["type"], last["response"]["error"]["code"]) == (
        "response.failed",
        "nonfinite_logits",
    )


def test_effort(web: Site) -> None:
    ask(web, reasoning={"effort": "max", "summary": "auto"})
    assert "Beyond maximum" in prompt(web)
    ask(web, reasoning={"effort": "none"})
    assert prompt(web).endswith("</think>")


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"input": []}, "input"),
        ({"input": [{"type": "image_generation_call"}]}, "input[0].type"),
        (
            {"input": [{"role": "user", "content": [{"type": "input_image"}]}]},
            "input[0].content[0].type",
        ),
        ({"store": True}, "store"),
        ({"background": True}, "background"),
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"truncation": "auto"}, "truncation"),
        ({"include": ["file_search_call.results"]}, "include"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"tools": [{**TOOLS[0], "strict": True}]}, "tools[0].function.strict"),
        ({"text": {"format": {"type": "json_object"}}}, "response_format.type"),
        ({"reasoning": {"effort": "huge"}}, "reasoning_effort"),
        ({"prompt": {}}, "prompt"),
    ],
)
def test_what_is_wrong_is_named(web: Site, fields: dict[str, Any], param: str) -> None:
    answer = ask(web, **fields)
    assert (answer.status, answer.error["param"]) == (400, param)
    assert not web.engine.requests


@pytest.mark.full
def test_the_openai_client(web: Site) -> None:
    openai = pytest.importorskip(
        "openai", reason="the openai client is not installed (extra: peers)"
    )
    client = openai.OpenAI(base_url=f"http://127.0.0.1:{web.port}/v1", api_key="x", max_retries=0)
    common: dict[str, Any] = {"model": "stub/model", "tools": TOOLS}
    web.says("Hm", "</think>", CALL)
    with client.responses.stream(input="hi", **common) as stream:
        first = stream.get_final_response()
    call = first.output[-1]
    assert json.loads(call.arguments) == {"city": "Oslo"}
    web.says("Cold", "</think>", "\n\nIt is cold.")
    items = [
        {"role": "user", "content": "hi"},
        *[
            item.model_dump(exclude_none=True, exclude={"parsed_arguments"})
            for item in first.output
        ],
        {"type": "function_call_output", "call_id": call.call_id, "output": "-3"},
    ]
    second = client.responses.create(input=items, **common)
    assert second.output_text == "It is cold."
    assert "<think>Hm</think>" + CALL in prompt(web)
    assert second.usage.input_tokens_details.cached_tokens == 4
    with pytest.raises(openai.BadRequestError):
        client.responses.create(input="hi", background=True, **common)

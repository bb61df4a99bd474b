"""The clients that people use against a real engine: a tiny checkpoint, its process, its masks, its cache.

Random weights say nothing of sense, so where an answer must mean something the engine is held to it token
by token, by the mask of a demanded beginning: prompts, steps, streams, caches and counts are real.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from fourfold.server.settings import ServerSettings
from tests.server.http import Site
from tests.server.real import Told, real_site

openai = pytest.importorskip("openai", reason="the openai client is not installed (extra: peers)")
anthropic = pytest.importorskip(
    "anthropic", reason="the anthropic client is not installed (extra: peers)"
)
pytestmark = pytest.mark.slow

NAMES = {"type": "object", "properties": {"city": {"type": "string"}}}
LONG = "Be brief. " * 40  # more than a page of the cache
HELLO: list[Any] = [{"role": "user", "content": "How is the weather in Oslo?"}]
CALL = (
    '\n\n<｜DSML｜tool_calls>\n<｜DSML｜invoke name="weather">\n'
    '<｜DSML｜parameter name="city" string="true">Oslo</｜DSML｜parameter>\n'
    "</｜DSML｜invoke>\n</｜DSML｜tool_calls>"
)


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """Two places, and nobody may wait for one."""
    settings = ServerSettings(max_waiting_requests=0)
    with real_site(tmp_path_factory.mktemp("clients") / "tiny", settings, 2) as found:
        yield found


@pytest.fixture
def server(running: Site) -> tuple[Told, str]:
    """(the engine, the address of its server)"""
    engine: Any = running.engine
    engine.forget()
    return engine, f"http://127.0.0.1:{running.port}"


def openai_at(url: str, retries: int = 0) -> Any:
    return openai.OpenAI(base_url=f"{url}/v1", api_key="x", max_retries=retries)


def anthropic_at(url: str, retries: int = 0) -> Any:
    return anthropic.Anthropic(base_url=url, api_key="x", max_retries=retries)


@pytest.mark.parametrize("streamed", [False, True])
def test_chat_with_tools(server: tuple[Told, str], streamed: bool) -> None:
    engine, url = server
    api = openai_at(url).chat.completions
    tool = {"type": "function", "function": {"name": "weather", "parameters": NAMES}}
    fields: dict[str, Any] = {"model": "tiny", "tools": [tool]}
    history = [{"role": "system", "content": LONG}, *HELLO]
    engine.tell("I must look", "</think>", CALL)
    if streamed:
        with api.stream(messages=history, **fields) as events:
            choice = events.get_final_completion().choices[0]
    else:
        choice = api.create(messages=history, **fields).choices[0]
    assert choice.finish_reason == "tool_calls"
    (call,) = choice.message.tool_calls
    assert json.loads(call.function.arguments) == {"city": "Oslo"}
    function = {"name": call.function.name, "arguments": call.function.arguments}
    history += [
        {
            "role": "assistant",
            "content": choice.message.content,
            "reasoning_content": choice.message.reasoning_content,
            "tool_calls": [{"id": call.id, "type": "function", "function": function}],
        },
        {"role": "tool", "tool_call_id": call.id, "content": "-3 °C"},
    ]
    engine.tell("Cold", "</think>", "\n\nIt is cold.")
    answer = api.create(messages=history, **fields)
    assert answer.choices[0].message.content == "It is cold."
    assert answer.usage.prompt_tokens_details.cached_tokens > 256
    assert "I must look</think>" + CALL in engine.prompts[-1]


@pytest.mark.parametrize("streamed", [False, True])
def test_responses_with_tools(server: tuple[Told, str], streamed: bool) -> None:
    engine, url = server
    api = openai_at(url).responses
    tool = {"type": "function", "name": "weather", "parameters": NAMES, "strict": False}
    fields: dict[str, Any] = {"model": "tiny", "tools": [tool], "instructions": LONG}
    engine.tell("I must look", "</think>", CALL)
    if streamed:
        with api.stream(input=HELLO, **fields) as stream:
            first = stream.get_final_response()
    else:
        first = api.create(input=HELLO, **fields)
    assert [item.type for item in first.output] == ["reasoning", "function_call"]
    call = first.output[-1]
    assert json.loads(call.arguments) == {"city": "Oslo"}
    kept = [i.model_dump(exclude_none=True, exclude={"parsed_arguments"}) for i in first.output]
    result = {"type": "function_call_output", "call_id": call.call_id, "output": "-3 °C"}
    engine.tell("Cold", "</think>", "\n\nIt is cold.")
    second = api.create(input=[*HELLO, *kept, result], **fields)
    assert second.output_text == "It is cold."
    assert second.usage.input_tokens_details.cached_tokens > 256
    assert "I must look</think>" + CALL in engine.prompts[-1]


@pytest.mark.parametrize("streamed", [False, True])
def test_messages_with_tools(server: tuple[Told, str], streamed: bool) -> None:
    engine, url = server
    api = anthropic_at(url).messages
    fields: dict[str, Any] = {
        "model": "tiny", "max_tokens": 400, "system": LONG,
        "thinking": {"type": "enabled", "budget_tokens": 300},
        "tools": [{"name": "weather", "input_schema": NAMES}],
    }  # fmt: skip
    engine.tell("I must look", "</think>", CALL)
    if streamed:
        with api.stream(messages=HELLO, **fields) as stream:
            first = stream.get_final_message()
    else:
        first = api.create(messages=HELLO, **fields)
    assert first.stop_reason == "tool_use"
    assert [block.type for block in first.content] == ["thinking", "tool_use"]
    assert first.content[1].input == {"city": "Oslo"}
    result = {"type": "tool_result", "tool_use_id": first.content[1].id, "content": "-3 °C"}
    history = [
        *HELLO,
        {"role": "assistant", "content": first.content},
        {"role": "user", "content": [result]},
    ]
    engine.tell("Cold", "</think>", "\n\nIt is cold.")
    second = api.create(messages=history, **fields)
    assert second.content[1].text == "It is cold."
    assert second.usage.cache_read_input_tokens > 256
    assert "I must look</think>" + CALL in engine.prompts[-1]


def test_what_is_demanded_is_said_by_a_model_that_would_not(server: tuple[Told, str]) -> None:
    """A budget ends the reasoning of random weights; a demanded call follows it in each of n answers."""
    _, url = server
    api = openai_at(url).chat.completions
    tool = {"type": "function", "function": {"name": "weather", "parameters": NAMES}}
    answer = api.create(
        model="tiny", messages=HELLO, tools=[tool], tool_choice="required", n=2, max_tokens=60,
        seed=5, extra_body={"thinking": {"type": "enabled", "budget_tokens": 12}},
    )  # fmt: skip
    assert answer.usage.completion_tokens_details.reasoning_tokens <= 2 * (12 + 1)
    thoughts = [choice.message.reasoning_content for choice in answer.choices]
    assert thoughts[0] != thoughts[1]
    for choice in answer.choices:
        assert choice.message.content is None
    prompt = {"model": "tiny", "max_tokens": 40, "messages": HELLO}
    thinking = {"type": "enabled", "budget_tokens": 7}
    with anthropic_at(url).messages.stream(**prompt, thinking=thinking) as stream:
        kinds = [e.content_block.type for e in stream if e.type == "content_block_start"]
    assert kinds == ["thinking", "text"]


def test_structured_output(server: tuple[Told, str]) -> None:
    """A class of the client's own, filled by both of openai's helpers."""
    import pydantic

    class Weather(pydantic.BaseModel):
        cold: bool
        degrees: int

    _, url = server
    client = openai_at(url)
    fields = {"model": "tiny", "seed": 3, "extra_body": {"thinking": False}}
    parsed = client.chat.completions.parse(messages=HELLO, response_format=Weather, **fields)
    assert isinstance(parsed.choices[0].message.parsed, Weather)
    answer = client.responses.parse(
        model="tiny", input=HELLO, text_format=Weather, reasoning={"effort": "none"}
    )
    assert isinstance(answer.output_parsed, Weather)


@pytest.mark.parametrize("api", ["chat", "responses", "messages"])
def test_retries_succeed_under_overload(server: tuple[Told, str], api: str) -> None:
    """Six at a time at a server with two places: without retries some are refused, with them none."""
    _, url = server

    def ask(retries: int) -> Callable[[int], int]:
        def once(number: int) -> int:
            if api == "messages":
                found = anthropic_at(url, retries).messages.create(
                    model="tiny", messages=HELLO, max_tokens=30
                )
                return int(found.usage.output_tokens)
            client = openai_at(url, retries)
            if api == "responses":
                found = client.responses.create(model="tiny", input=HELLO, max_output_tokens=30)
                return int(found.usage.output_tokens)
            found = client.chat.completions.create(model="tiny", messages=HELLO, max_tokens=30)
            return int(found.usage.completion_tokens)

        return once

    refusal = (anthropic if api == "messages" else openai).RateLimitError
    with ThreadPoolExecutor(6) as pool:
        once = [pool.submit(ask(0), number) for number in range(6)]
        errors = [each.exception() for each in once]
        refused = [error for error in errors if error is not None]
        assert refused
        for error in refused:
            assert isinstance(error, refusal)
            assert int(error.response.headers["retry-after"]) >= 1
        assert all(0 < count <= 30 for count in pool.map(ask(20), range(6)))

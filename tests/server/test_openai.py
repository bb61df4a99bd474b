"""The current openai client against a stub engine: everything a program does with it."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from fourfold.server.settings import ServerSettings
from tests.server.http import Site, site

openai = pytest.importorskip("openai", reason="the openai client is not installed (extra: peers)")
pytestmark = pytest.mark.full

HELLO: list[Any] = [{"role": "user", "content": "hi"}]
TOOLS: list[Any] = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "The weather in a city.",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
        },
    }
]
CALL = (
    '\n\n<｜DSML｜tool_calls>\n<｜DSML｜invoke name="weather">\n'
    '<｜DSML｜parameter name="city" string="true">Oslo</｜DSML｜parameter>\n'
    "</｜DSML｜invoke>\n</｜DSML｜tool_calls>"
)


def client(web: Site, **options: Any) -> Any:
    url = f"http://127.0.0.1:{web.port}/v1"
    return openai.OpenAI(**({"base_url": url, "api_key": "none", "max_retries": 0} | options))


def test_chat(web: Site) -> None:
    web.says("Why", "</think>", "\n\nBecause.")
    found = client(web).chat.completions.create(
        model="stub/model", messages=HELLO, logprobs=True, top_logprobs=1, max_tokens=50
    )
    choice = found.choices[0]
    assert choice.message.content == "Because."
    assert choice.message.reasoning_content == "Why"
    assert choice.finish_reason == "stop"
    assert choice.logprobs.content[0].top_logprobs[0].logprob == -0.5
    assert found.usage.prompt_tokens_details.cached_tokens == 4
    assert found.usage.completion_tokens_details.reasoning_tokens > 0


def test_stream(web: Site) -> None:
    web.says("Why", "</think>", "\n\nBecause.")
    stream = client(web).chat.completions.create(
        model="stub/model", messages=HELLO, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == "Because."
    assert chunks[-1].usage.total_tokens > 0
    with client(web).chat.completions.stream(model="stub/model", messages=HELLO) as events:
        final = events.get_final_completion()
    assert final.choices[0].message.content == "Because."


@pytest.mark.parametrize("streamed", [False, True])
def test_tools_round_trip(web: Site, streamed: bool) -> None:
    """Ask, call, send the result, answer: with the reasoning sent back."""
    web.says("I must look", "</think>", CALL)
    api = client(web).chat.completions
    fields: dict[str, Any] = {"model": "stub/model", "tools": TOOLS}
    if streamed:
        with api.stream(messages=HELLO, **fields) as events:
            choice = events.get_final_completion().choices[0]
    else:
        choice = api.create(messages=HELLO, **fields).choices[0]
    assert choice.finish_reason == "tool_calls"
    (call,) = choice.message.tool_calls
    assert json.loads(call.function.arguments) == {"city": "Oslo"}
    history = [
        *HELLO,
        choice.message.model_dump(exclude_none=True, exclude={"parsed", "tool_calls"})
        | {"tool_calls": [c.model_dump(include={"id", "type", "function"}) for c in [call]]},
        {"role": "tool", "tool_call_id": call.id, "content": "-3 °C"},
    ]
    for each in history[1]["tool_calls"]:
        each["function"] = {k: each["function"][k] for k in ("name", "arguments")}
    web.says("Cold", "</think>", "\n\nIt is cold.")
    answer = api.create(messages=history, **fields).choices[0].message
    assert answer.content == "It is cold."
    prompt = web.engine.tokenizer.decode(web.engine.requests[-1].prompt_token_ids)
    assert "I must look</think>" + CALL in prompt
    assert "<tool_result>-3 °C</tool_result>" in prompt


def test_completions(web: Site) -> None:
    web.says("there")
    found = client(web).completions.create(model="stub/model", prompt=["a", "b"], logprobs=1)
    assert [c.text for c in found.choices] == ["there", "there"]
    assert found.choices[0].logprobs.token_logprobs[0] == -0.25
    stream = client(web).completions.create(model="stub/model", prompt="a", stream=True)
    assert "".join(c.choices[0].text for c in stream) == "there"


def test_models(web: Site) -> None:
    assert [m.id for m in client(web).models.list()] == ["stub/model"]
    assert client(web).models.retrieve("stub/model").id == "stub/model"


def test_errors_have_their_classes(web: Site) -> None:
    api = client(web).chat.completions
    with pytest.raises(openai.BadRequestError) as bad:
        api.create(model="stub/model", messages=HELLO, temperature=-1)
    assert bad.value.param == "temperature"
    with pytest.raises(openai.NotFoundError) as absent:
        api.create(model="nothing", messages=HELLO)
    assert absent.value.code == "model_not_found"
    web.engine.fails = "the model's numbers were not finite"
    with pytest.raises(openai.InternalServerError):
        api.create(model="stub/model", messages=HELLO)
    with pytest.raises(openai.APIError):
        list(api.create(model="stub/model", messages=HELLO, stream=True))


def test_keys() -> None:
    with site(ServerSettings(api_keys=("right",))) as web:
        assert client(web, api_key="right").models.list()
        with pytest.raises(openai.AuthenticationError):
            client(web, api_key="wrong").models.list()


def test_retries_succeed_under_overload() -> None:
    with site(ServerSettings(max_waiting_requests=0), max_num_seqs=2) as web:
        web.engine.pace = 0.02
        api = client(web, max_retries=10)
        once = client(web)

        def ask(who: Any) -> str:
            found = who.completions.create(model="stub/model", prompt="a")
            return str(found.choices[0].finish_reason)

        with ThreadPoolExecutor(8) as pool:
            assert list(pool.map(ask, [api] * 8)) == ["stop"] * 8
            web.engine.pace = 0.3
            slow = [pool.submit(ask, api) for _ in range(2)]
            while web.engine.running < 2:
                pass
            with pytest.raises(openai.RateLimitError) as busy:
                ask(once)
            assert int(busy.value.response.headers["retry-after"]) >= 1
            assert [each.result() for each in slow] == ["stop"] * 2

"""Chat completions on a stub engine: what goes in, what comes out, whole and streamed."""

from __future__ import annotations

import json
from typing import Any

import pytest

from fourfold.text.generation import GenerationDefaults
from tests.server.http import Answer, Site, site

HELLO = [{"role": "user", "content": "hi"}]
TOOLS = [
    {
        "type": "function",
        "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}},
    }
]
CALL = (
    '<｜DSML｜tool_calls>\n<｜DSML｜invoke name="weather">\n'
    '<｜DSML｜parameter name="city" string="true">Oslo</｜DSML｜parameter>\n'
    "</｜DSML｜invoke>\n</｜DSML｜tool_calls>"
)


def chat(web: Site, **fields: object) -> Answer:
    return web.post("/v1/chat/completions", **({"messages": HELLO} | fields))


def message(answer: Answer) -> dict[str, Any]:
    assert answer.status == 200, answer.body
    found: dict[str, Any] = answer.json["choices"][0]["message"]
    return found


def test_reasoning_and_content_come_apart(web: Site) -> None:
    web.says("Because it", "</think>", "\n\nit is so.")
    got = message(chat(web))
    assert got == {
        "role": "assistant",
        "content": "it is so.",
        "reasoning_content": "Because it",
        "reasoning": "Because it",
    }


def test_usage_counts_cached_reasoning_and_accepted_tokens(web: Site) -> None:
    web.engine.tokens_a_step = 3
    words = web.text("Because it")
    web.says("Because it", "</think>", "so")
    usage = chat(web).json["usage"]
    assert usage["prompt_tokens_details"]["cached_tokens"] == 4
    assert "not cached" in usage["prompt_tokens_details"]["cache_miss"]
    assert usage["completion_tokens_details"]["reasoning_tokens"] == len(words) + 1
    assert usage["completion_tokens_details"]["accepted_draft_tokens"] > 0
    assert usage["prompt_tokens"] == len(web.engine.requests[0].prompt_token_ids)
    total = usage["prompt_tokens"] + usage["completion_tokens"]
    assert usage["total_tokens"] == total


def test_a_stream_says_the_same_as_a_whole_answer(web: Site) -> None:
    for step in (1, 2, 7):
        web.engine.tokens_a_step = step
        web.says("Why not", "</think>", "\n\nyes, 你好\n", CALL)
        whole = message(chat(web, tools=TOOLS))
        answer = chat(web, tools=TOOLS, stream=True)
        assert answer.headers["content-type"].startswith("text/event-stream")
        assert answer.body.endswith(b"data: [DONE]\n\n")
        for name in ("content", "reasoning_content", "reasoning"):
            assert answer.deltas(name) == whole[name]
        first, *_, last = answer.events
        assert first["choices"][0]["delta"] == {"role": "assistant", "content": ""}
        assert last["choices"][0]["finish_reason"] == "tool_calls"
        assert last["choices"][0]["delta"] == {}
        calls = [
            call
            for event in answer.events
            for call in event["choices"][0]["delta"].get("tool_calls", ())
        ]
        assert calls[0]["function"]["name"] == "weather"
        arguments = "".join(call["function"]["arguments"] for call in calls)
        assert json.loads(arguments) == {"city": "Oslo"}
        reasons = [event["choices"][0]["finish_reason"] for event in answer.events]
        assert len([reason for reason in reasons if reason]) == 1


def test_stream_options(web: Site) -> None:
    assert "usage" not in chat(web, stream=True).events[-1]
    last = chat(web, stream=True, stream_options={"include_usage": True}).events[-1]
    assert last["choices"] == []
    assert last["usage"]["completion_tokens"] == 4
    each = chat(web, stream=True, stream_options={"continuous_usage_stats": True}).events
    assert [event["usage"]["completion_tokens"] for event in each][-1] == 4
    error = chat(web, stream_options={"include_usage": True}).error
    assert error["param"] == "stream_options"


def test_several_answers(web: Site) -> None:
    answers = [[*web.text(f"</think>answer {i}"), 1] for i in range(3)]
    web.engine.script = lambda request, index: answers[index]
    found = chat(web, n=3).json
    assert [c["message"]["content"] for c in found["choices"]] == [f"answer {i}" for i in range(3)]
    stream = chat(web, n=3, stream=True)
    assert [stream.deltas("content", i) for i in range(3)] == [f"answer {i}" for i in range(3)]
    ends = [c["index"] for e in stream.events for c in e["choices"] if c["finish_reason"]]
    assert sorted(ends) == [0, 1, 2]


def test_a_stop_string_ends_the_content_and_frees_the_engine(web: Site) -> None:
    web.says("think STOP here", "</think>", "one STOP two")
    found = chat(web, stop="STOP").json["choices"][0]
    assert found["message"]["content"] == "one "
    assert found["message"]["reasoning_content"] == "think STOP here"
    assert (found["finish_reason"], found["stop_reason"]) == ("stop", "STOP")
    assert len(web.engine.aborted) == 1
    found = chat(web, stop=["STOP"], include_stop_str_in_output=True).json["choices"][0]
    assert found["message"]["content"] == "one STOP"


def test_a_stop_token_is_named_and_left_out(web: Site) -> None:
    web.says("</think>", "one two three")
    stop = web.text(" two", "t")[-1]
    web.engine.script = lambda request, index: [*web.text("</think>", "one "), stop, 1]
    found = chat(web, stop_token_ids=[stop]).json["choices"][0]
    assert found["message"]["content"] == "one "
    assert (found["finish_reason"], found["stop_reason"]) == ("stop", stop)


def test_logprobs_belong_to_tokens_and_alternatives_are_counted(web: Site) -> None:
    web.says("ab", "</think>", "cd")
    found = chat(web, logprobs=True, top_logprobs=2).json["choices"][0]["logprobs"]
    thought, said = found["reasoning_content"], found["content"]
    assert "".join(e["token"] for e in thought) == "ab</think>"
    assert "".join(e["token"] for e in said[:-1]) == "cd"
    assert bytes(said[0]["bytes"]).decode() == said[0]["token"]
    assert all(len(e["top_logprobs"]) == 2 for e in said)
    stream = chat(web, logprobs=True, top_logprobs=2, stream=True)
    parts = [e["choices"][0]["logprobs"] for e in stream.events if e["choices"][0]["logprobs"]]
    assert [e for p in parts for e in p["reasoning_content"]] == thought
    assert [e for p in parts for e in p["content"]] == said
    assert chat(web).json["choices"][0]["logprobs"] is None
    assert chat(web, top_logprobs=2).error["param"] == "top_logprobs"
    assert chat(web, logprobs=True, top_logprobs=21).error["param"] == "logprobs"


@pytest.mark.parametrize(
    "switch",
    [
        {"thinking": {"type": "disabled"}},
        {"thinking": False},
        {"reasoning_effort": "none"},
        {"chat_template_kwargs": {"thinking": False}},
        {"chat_template_kwargs": {"enable_thinking": False}},
        {"chat_template_kwargs": {"reasoning_effort": "none"}},
    ],
)
def test_thinking_is_switched_off_by_every_spelling(web: Site, switch: dict[str, object]) -> None:
    web.says("at once")
    assert message(chat(web, **switch)) == {"role": "assistant", "content": "at once"}
    end = web.engine.tokenizer.special_id("</think>")
    assert web.engine.requests[-1].prompt_token_ids[-1] == end


def test_effort_and_history_reach_the_prompt(web: Site) -> None:
    history = [
        *HELLO,
        {"role": "assistant", "content": "A", "reasoning_content": "R"},
        {"role": "user", "content": "B"},
    ]

    def prompt(**fields: object) -> str:
        chat(web, messages=history, **fields)
        return web.engine.tokenizer.decode(web.engine.requests[-1].prompt_token_ids)

    assert "Absolute maximum" in prompt()
    assert "Beyond maximum" in prompt(reasoning_effort="max")
    assert "maximum" not in prompt(chat_template_kwargs={"reasoning_effort": "low"})
    assert "R</think>" not in prompt()
    assert "R</think>A" in prompt(chat_template_kwargs={"drop_thinking": False})


def test_a_message_is_continued(web: Site) -> None:
    web.says(" moon")
    messages = [*HELLO, {"role": "assistant", "content": "Autumn"}]
    fields = {"messages": messages, "thinking": False}
    got = message(chat(web, continue_final_message=True, add_generation_prompt=False, **fields))
    assert got["content"] == " moon"
    prompt = web.engine.tokenizer.decode(web.engine.requests[-1].prompt_token_ids)
    assert prompt.endswith("</think>Autumn")
    error = chat(web, continue_final_message=True, add_generation_prompt=True, **fields).error
    assert error["param"] == "continue_final_message"
    assert chat(web, add_generation_prompt=False).error["param"] == "add_generation_prompt"


def test_the_image_position_is_that_of_the_header(web: Site) -> None:
    chat(web)
    request = web.engine.requests[-1]
    (position,) = request.image_positions
    assert request.prompt_token_ids[position] == web.engine.tokenizer.special_id("<think>")


def test_parameters_reach_the_engine(web: Site) -> None:
    chat(
        web, temperature=0.5, top_p=0.9, top_k=7, min_p=0.1, seed=5, presence_penalty=0.5,
        frequency_penalty=-0.5, repetition_penalty=1.2, logit_bias={"5": 3}, min_tokens=2,
        max_completion_tokens=50, ignore_eos=True, cache_salt="s", n=2, stop_token_ids=[9],
    )  # fmt: skip
    request = web.engine.requests[-1]
    params = request.params
    assert (params.temperature, params.top_p, params.top_k, params.min_p) == (0.5, 0.9, 7, 0.1)
    assert (params.seed, params.min_tokens, params.max_tokens) == (5, 2, 50)
    assert (params.presence_penalty, params.frequency_penalty) == (0.5, -0.5)
    assert params.repetition_penalty == 1.2
    assert params.logit_bias == {5: 3.0}
    assert params.ignore_eos
    assert request.cache_salt == "s"
    assert params.n == 2
    assert tuple(params.stop_token_ids) == (9,)


def test_defaults_are_the_checkpoints_and_the_rest_of_the_context() -> None:
    with site(defaults=GenerationDefaults(temperature=0.3, top_p=0.8)) as web:
        chat(web)
        params = web.engine.requests[-1].params
        assert (params.temperature, params.top_p, params.max_tokens) == (0.3, 0.8, None)
        chat(web, temperature=1)
        assert web.engine.requests[-1].params.temperature == 1.0


# ---- tools


def test_a_demanded_call_without_thinking_begins_in_the_prompt(web: Site) -> None:
    web.says(
        '<｜DSML｜parameter name="city" string="true">Oslo</｜DSML｜parameter>\n'
        "</｜DSML｜invoke>\n</｜DSML｜tool_calls>"
    )
    choice = {"type": "function", "function": {"name": "weather"}}
    for stream in (False, True):
        answer = chat(web, tools=TOOLS, tool_choice=choice, thinking=False, stream=stream)
        if stream:
            assert answer.events[-1]["choices"][0]["finish_reason"] == "tool_calls"
        else:
            (call,) = message(answer)["tool_calls"]
            assert call["function"] == {"name": "weather", "arguments": '{"city": "Oslo"}'}
    prompt = web.engine.tokenizer.decode(web.engine.requests[-1].prompt_token_ids)
    assert prompt.endswith('<｜DSML｜tool_calls>\n<｜DSML｜invoke name="weather">\n')


@pytest.mark.parametrize("ends_by", ["</think>", None])
@pytest.mark.parametrize("n", [1, 3])
def test_a_demanded_call_with_thinking_follows_the_reasoning(
    web: Site, ends_by: str | None, n: int
) -> None:
    """Even if the model would end without a word after its reasoning; in each of n answers."""
    closing = [*web.text("</｜DSML｜invoke>\n</｜DSML｜tool_calls>"), 1]
    thoughts = [web.text(f"I will {'ask ' * i}") for i in range(n)]
    web.engine.script = lambda request, index: [
        *thoughts[index], *(web.text(ends_by) if ends_by else [1]), *closing,
    ]  # fmt: skip
    choice = {"type": "function", "function": {"name": "weather"}}
    answer = chat(web, tools=TOOLS, tool_choice=choice, max_tokens=500, n=n)
    (request,) = web.engine.requests
    assert request.grammar is not None
    assert request.grammar.after_token == web.text("</think>")[0]
    demanded = json.loads(request.grammar.source)
    text = '\n\n<｜DSML｜tool_calls>\n<｜DSML｜invoke name="weather">\n'
    assert web.engine.tokenizer.decode(demanded) == text
    used = sum(len(each) + 1 + len(demanded) + len(closing) for each in thoughts)
    assert answer.json["usage"]["completion_tokens"] == used
    for index, found in enumerate(answer.json["choices"]):
        got = found["message"]
        assert got["reasoning_content"] == f"I will {'ask ' * index}"
        assert got["content"] is None
        assert got["tool_calls"][0]["function"] == {"name": "weather", "arguments": "{}"}
        assert found["finish_reason"] == "tool_calls"


def test_a_budget_ends_the_thinking(web: Site) -> None:
    """In DeepSeek's object, in template arguments, and together with a demanded call."""
    thoughts = web.text("one two three four five six seven")
    web.engine.script = lambda request, index: [*thoughts, *web.text("</think>yes"), 1]
    budget = {"type": "enabled", "budget_tokens": 4}
    for fields in ({"thinking": budget}, {"chat_template_kwargs": {"thinking": budget}}):
        answer = chat(web, **fields).json
        assert answer["usage"]["completion_tokens_details"]["reasoning_tokens"] == 4 + 1
        web.engine.script = lambda request, index: [*thoughts[:2], *web.text("</think>yes"), 1]
        assert message(chat(web, **fields))["content"] == "yes"
        web.engine.script = lambda request, index: [*thoughts, *web.text("</think>yes"), 1]
    answer = chat(web, thinking=budget, tools=TOOLS, tool_choice="required")
    assert answer.json["usage"]["completion_tokens_details"]["reasoning_tokens"] == 4 + 1
    for wrong in ({"budget_tokens": 0}, {"budget_tokens": "4"}, {"more": 1}):
        error = chat(web, thinking={"type": "enabled", **wrong}).error
        assert error["param"] == f"thinking.{next(iter(wrong))}"
    off = {"type": "disabled", "budget_tokens": 4}
    assert chat(web, thinking=off).error["param"] == "thinking.budget_tokens"


def test_a_demanded_call_without_room_ends_by_length(web: Site) -> None:
    web.says("I will", "</think>", end=False)
    room = len(web.text("I will")) + 3
    answer = chat(web, tools=TOOLS, tool_choice="required", max_tokens=room)
    assert answer.json["choices"][0]["finish_reason"] == "length"


def test_one_call_at_a_time(web: Site) -> None:
    two = (
        CALL.replace("</｜DSML｜tool_calls>", "")
        + '\n<｜DSML｜invoke name="weather">\n</｜DSML｜invoke>'
    )
    web.says("</think>", two, "\n</｜DSML｜tool_calls>")
    assert len(message(chat(web, tools=TOOLS))["tool_calls"]) == 2
    web.engine.aborted.clear()
    for step in (1, 100):
        web.engine.tokens_a_step = step
        answer = chat(web, tools=TOOLS, parallel_tool_calls=False)
        assert len(message(answer)["tool_calls"]) == 1
        assert answer.json["choices"][0]["finish_reason"] == "tool_calls"


def test_no_tools_means_no_calls(web: Site) -> None:
    web.says("</think>", CALL)
    assert "weather" in message(chat(web, tools=TOOLS, tool_choice="none"))["content"]


# ---- render


def test_render_shows_what_the_engine_gets(web: Site) -> None:
    chat(web, tools=TOOLS)
    shown = web.post("/v1/chat/completions/render", messages=HELLO, tools=TOOLS).json
    assert shown["token_ids"] == list(web.engine.requests[-1].prompt_token_ids)
    assert shown["prompt"] == web.engine.tokenizer.decode(shown["token_ids"])
    assert shown["count"] == len(shown["token_ids"])


# ---- refusals


def strange_tool(**more: object) -> list[object]:
    """A function with one more field."""
    return [{"type": "function", "function": {"name": "f", **more}}]


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"messages": []}, "messages", "at least one"),
        ({"messages": [{"role": "user"}]}, "messages[0].content", ""),
        ({"messages": [{"role": "alien", "content": "x"}]}, "messages[0].role", "alien"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            "messages[0].content[0].type",
            "image_url",
        ),
        ({"temperature": -1}, "temperature", "0 to 100"),
        ({"temperature": "warm"}, "temperature", "float"),
        ({"top_p": 0}, "top_p", "above 0"),
        ({"n": 0}, "n", "1 to 128"),
        ({"n": 129}, "n", ""),
        ({"n": True}, "n", "int"),
        ({"seed": -1}, "seed", ""),
        ({"stop": ""}, "stop", ""),
        ({"stop": ["x"] * 33}, "stop", "32"),
        ({"stop": "x" * 1001}, "stop", "1000"),
        ({"stop_token_ids": [9999]}, "stop_token_ids", "vocabulary"),
        ({"stop_token_ids": [1] * 300}, "stop_token_ids", "63"),
        ({"logit_bias": {"9999": 1}}, "logit_bias", "vocabulary"),
        ({"logit_bias": {"x": 1}}, "logit_bias", "token ids"),
        ({"max_tokens": 0}, "max_tokens", "at least 1"),
        ({"max_tokens": 5000}, "max_tokens", "2000 tokens"),
        ({"min_tokens": 10, "max_tokens": 5}, "min_tokens", "above max_tokens"),
        ({"max_tokens": 5, "max_completion_tokens": 6}, "max_tokens", "the same"),
        ({"reasoning_effort": "huge"}, "reasoning_effort", "huge"),
        ({"thinking": {"type": "maybe"}}, "thinking.type", "maybe"),
        ({"thinking": True, "chat_template_kwargs": {"thinking": False}}, "thinking", "contradict"),
        ({"chat_template_kwargs": {"foo": 1}}, "chat_template_kwargs", "foo"),
        ({"chat_template_kwargs": {"drop_thinking": "no"}}, "drop_thinking", "boolean"),
        ({"tool_choice": "required"}, "tool_choice", "no tools"),
        ({"tools": [{"type": "retrieval"}]}, "tools[0].type", "function"),
        ({"tools": strange_tool(strict=True)}, "tools[0].function.strict", "schema"),
        ({"tools": strange_tool(cache=1)}, "tools[0].function.cache", "not supported"),
        ({"tools": [{**TOOLS[0], "extra": 1}]}, "tools[0].extra", "not supported"),
        ({"response_format": {"type": "xml"}}, "response_format.type", ""),
        ({"store": True}, "store", "stored"),
        ({"service_tier": "flex"}, "service_tier", ""),
        ({"audio": {}}, "audio", "not supported"),
        ({"functions": []}, "functions", "not supported"),
        ({"stream_options": {"foo": 1}, "stream": True}, "stream_options.foo", "not supported"),
    ],
)
def test_what_is_wrong_is_named(
    web: Site, fields: dict[str, object], param: str, words: str
) -> None:
    answer = chat(web, **fields)
    assert answer.status == 400
    assert answer.error["param"] == param
    assert words in answer.error["message"]
    assert not web.engine.requests


def test_an_unknown_model_is_a_404(web: Site) -> None:
    answer = chat(web, model="gpt-9")
    assert (answer.status, answer.error["code"]) == (404, "model_not_found")
    assert chat(web, model="stub/model").json["model"] == "stub/model"
    assert chat(web).json["model"] == "stub/model"


def test_a_prompt_that_fills_the_context_is_refused(web: Site) -> None:
    answer = chat(web, messages=[{"role": "user", "content": "word " * 3000}])
    assert (answer.status, answer.error["code"]) == (400, "context_length_exceeded")

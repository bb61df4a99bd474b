"""Prompts are byte for byte what the model was trained on, and users' text never becomes a marker."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fourfold.core.errors import RequestError
from fourfold.text.chat import ChatOptions, encode_chat
from fourfold.text.profiles import ChatProfile
from fourfold.text.prompt import EncodedPrompt, ParserStart, encode_fim
from fourfold.weights.synthetic_tokenizer import SPECIAL_TOKENS
from tests.text.answers import TOKENIZER, WEATHER, by_name, call, encode, examples

Messages = list[dict[str, Any]]
BOS, EOS = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"
USER, ASSISTANT = "<｜User｜>", "<｜Assistant｜>"
OFF: dict[str, Any] = {"thinking": False}
ASK: Messages = [{"role": "user", "content": "q"}]
CASES = examples("chat-examples.jsonl")
SPELLINGS = [spelling for spelling, _ in SPECIAL_TOKENS]


def user(content: object, **more: object) -> dict[str, Any]:
    return {"role": "user", "content": content, **more}


def assistant(content: object, reasoning: str | None = None, **more: object) -> dict[str, Any]:
    return {"role": "assistant", "content": content, "reasoning_content": reasoning, **more}


def system(content: object, **more: object) -> dict[str, Any]:
    return {"role": "system", "content": content, **more}


def tool(content: object, call_id: str = "c1") -> dict[str, Any]:
    return {"role": "tool", "tool_call_id": call_id, "content": content}


def specials(prompt: EncodedPrompt) -> list[str]:
    return [segment.text for segment in prompt.segments if segment.special]


def refusal(messages: object, **options: Any) -> str:
    with pytest.raises(RequestError) as caught:
        encode(messages, **options)  # type: ignore[arg-type]
    return str(caught.value)


@pytest.mark.parametrize(**by_name(CASES))
def test_example(case: dict[str, Any]) -> None:
    options = dict(case["options"])
    named = options.pop("profile")
    for profile in [profile for profile in ChatProfile if named in ("any", profile.value)]:
        made = ChatOptions(profile, tools=case["tools"], **options)
        assert encode_chat(case["messages"], made).text == case["expected_prompt"]


@pytest.mark.parametrize(**by_name(case for case in CASES if "literal" not in case["name"]))
def test_without_marker_text_ids_are_those_of_the_string(case: dict[str, Any]) -> None:
    options = {name: value for name, value in case["options"].items() if name != "profile"}
    prompt = encode(case["messages"], tools=case["tools"], **options)
    assert prompt.token_ids(TOKENIZER) == TOKENIZER.encode(prompt.text, allow_special=True)


@given(st.lists(st.sampled_from([*SPELLINGS, "a", " ", "\n"]), min_size=1).map("".join))
def test_users_text_never_becomes_a_marker(text: str) -> None:
    markers = set(TOKENIZER.special_tokens.values())

    def count(content: str) -> int:
        messages = [
            system(content, tools=[WEATHER]),
            user(content),
            assistant(content, content, tool_calls=[call("f", {content: content})]),
            tool(content),
            {"role": "latest_reminder", "content": content},
            user([{"type": "text", "text": content}]),
        ]
        return sum(index in markers for index in encode(messages).token_ids(TOKENIZER))

    assert count(text) == count("x")


def test_the_encoders_own_markers_are_marked_in_the_tools_block_too() -> None:
    found = specials(encode(ASK, tools=[WEATHER]))
    tail = [USER, ASSISTANT, "<think>"]
    assert found == [BOS, *["｜DSML｜"] * 9, *["<think>"] * 2, *["</think>"] * 2, *tail]


@pytest.mark.parametrize(
    ("messages", "options", "marker"),
    [
        (ASK, {}, "<think>"),
        (ASK, OFF, "</think>"),
        (ASK, {"tools": [WEATHER]}, "<think>"),
        (ASK, {"tools": [WEATHER], "tool_choice": "required", **OFF}, "</think>"),
        ([user("<think>"), assistant("x")], OFF, "</think>"),
        ([user("a"), assistant("b", "r", prefix=True)], {}, "<think>"),
        ([user("a"), assistant("b", prefix=True)], OFF, "</think>"),
        ([user("a", task="action")], {}, "<think>"),
    ],
)
def test_the_header_position_is_just_before_the_last_headers_marker(
    messages: Messages, options: dict[str, Any], marker: str
) -> None:
    prompt = encode(messages, **options)
    tokens = prompt.tokenize(TOKENIZER)
    assert tokens.header_position is not None
    ids = list(tokens.token_ids)
    assert ids[tokens.header_position] == TOKENIZER.special_id(marker)
    header = TOKENIZER.special_id(ASSISTANT)
    assert len(ids) - 1 - ids[::-1].index(header) == tokens.header_position - 1


@pytest.mark.parametrize("task", ["query", "authority", "domain", "read_url"])
def test_a_task_without_a_header_has_no_header_position(task: str) -> None:
    prompt = encode([user("a", task=task)])
    assert prompt.tokenize(TOKENIZER).header_position is None
    assert prompt.text == f"{BOS}{USER}a<｜{task}｜>"
    assert prompt.start is ParserStart.CONTENT


def test_the_next_turn_shares_the_prompt_up_to_the_header() -> None:
    """Whether or not the earlier reasoning is dropped: what a prefix cache keeps an image for."""
    first = encode(ASK).tokenize(TOKENIZER)
    then = encode([*ASK, assistant("a", "r"), user("p")]).token_ids(TOKENIZER)
    assert then[: first.header_position] == list(first.token_ids)[: first.header_position]
    assert then[len(first.token_ids) - 1] == TOKENIZER.special_id("</think>")


@pytest.mark.parametrize(
    ("messages", "options", "start", "ending"),
    [
        (ASK, {}, ParserStart.REASONING, "<think>"),
        (ASK, OFF, ParserStart.CONTENT, "</think>"),
        ([*ASK, assistant("t", "r")], {}, ParserStart.CONTENT_CONTINUED, "<think>r</think>t"),
        ([*ASK, assistant("", "r")], {}, ParserStart.REASONING_CONTINUED, "<think>r"),
        ([*ASK, assistant(None, "r")], {}, ParserStart.REASONING_CONTINUED, "<think>r"),
        ([*ASK, assistant("")], {}, ParserStart.REASONING, "<think>"),
        ([*ASK, assistant("", "r")], OFF, ParserStart.CONTENT_CONTINUED, "</think>"),
        ([*ASK, assistant("t", "r")], OFF, ParserStart.CONTENT_CONTINUED, "</think>t"),
    ],
)
def test_a_continued_answer_ends_where_the_parser_starts(
    messages: Messages, options: dict[str, Any], start: ParserStart, ending: str
) -> None:
    continues = messages[-1]["role"] == "assistant"
    prompt = encode(messages, continue_final_message=continues, **options)
    assert prompt.start is start
    assert prompt.ends_in_reasoning == (
        start in (ParserStart.REASONING, ParserStart.REASONING_CONTINUED)
    )
    assert prompt.text == f"{BOS}{USER}q{ASSISTANT}{ending}"
    if continues:
        marked = [*messages[:-1], {**messages[-1], "prefix": True}]
        assert encode(marked, **options) == prompt


@pytest.mark.parametrize(
    ("messages", "body"),
    [
        ([assistant("x"), user("y")], f"{ASSISTANT}</think>x{EOS}{USER}y{ASSISTANT}<think>"),
        (
            [*ASK, assistant("x", "r"), assistant("y", "s")],
            f"{USER}q{ASSISTANT}</think>x{EOS}{ASSISTANT}</think>y{EOS}{ASSISTANT}<think>",
        ),
        ([*ASK, {"role": "latest_reminder", "content": "now"}],
         f"{USER}q<｜latest_reminder｜>now{ASSISTANT}<think>"),
        ([system("a"), system(""), system("b"), *ASK], f"a\n\nb{USER}q{ASSISTANT}<think>"),
        ([system(None)], f"{ASSISTANT}<think>"),
        ([*ASK, system("s")], f"{USER}qs{ASSISTANT}<think>"),
        (
            [*ASK, assistant("x", "r", task="title")],
            f"{USER}q{ASSISTANT}<think>r</think>x{EOS}<｜title｜>",
        ),
        (
            [{"role": "developer", "content": "old"}, assistant("x"), *ASK],
            f"{ASSISTANT}</think>x{EOS}{USER}q{ASSISTANT}<think>",
        ),
        ([assistant("x"), {"role": "developer", "content": "new"}],
         f"{ASSISTANT}</think>x{EOS}{USER}new{ASSISTANT}<think>"),
    ],
)  # fmt: skip
def test_an_answer_always_has_a_header(messages: Messages, body: str) -> None:
    assert encode(messages).text == BOS + body


def test_tools_join_the_leading_system_text_and_nothing_later() -> None:
    joined = encode([system("s"), *ASK], tools=[WEATHER], **OFF).text
    assert joined.startswith(f"{BOS}s\n\n## Tools\n\n")
    late = encode([*ASK, assistant("a"), system("s"), user("p")], tools=[WEATHER], **OFF).text
    assert late.startswith(f"{BOS}\n\n## Tools\n\n")
    assert late.endswith(f"a{EOS}s{USER}p{ASSISTANT}</think>")
    block = joined.removeprefix(f"{BOS}s")
    assert late.startswith(BOS + block[: block.index(USER)])


def test_a_tool_line_is_name_description_parameters() -> None:
    function = {"strict": False, "parameters": {"b": 1.0, "a": 1e3, "é": None}, "name": "f"}
    text = encode(ASK, tools=[{"type": "function", "function": function}]).text
    line = '{"name": "f", "description": "", "parameters": {"b": 1.0, "a": 1000.0, "é": null}}'
    assert f"\n\n{line}\n\n" in text


def test_tool_choice_none_shows_no_tools_and_parses_none() -> None:
    prompt = encode(ASK, tools=[WEATHER], tool_choice="none")
    assert prompt == encode(ASK)
    assert not prompt.parse_tools
    assert encode(ASK, tools=[WEATHER], tool_choice="auto").parse_tools


NAMED = {"type": "function", "function": {"name": "get_weather"}}


def test_a_demanded_call_is_opened_after_the_reasoning() -> None:
    """In thinking mode nothing may be forced before `</think>`."""
    block = "\n\n<｜DSML｜tool_calls>\n"
    invoke = '<｜DSML｜invoke name="get_weather">\n'

    def forced(choice: object, **options: Any) -> tuple[EncodedPrompt, str]:
        prompt = encode(ASK, tools=[WEATHER], tool_choice=choice, **options)
        ids = prompt.forced_ids(TOKENIZER)
        assert ids == TOKENIZER.encode(TOKENIZER.decode(ids), allow_special=True)
        return prompt, TOKENIZER.decode(ids)

    for choice, tail in (("required", ""), (NAMED, invoke)):
        prompt, text = forced(choice)
        assert text == block + tail
        assert prompt.text.endswith(f"{ASSISTANT}<think>")
        assert prompt.start is ParserStart.REASONING
        prompt, text = forced(choice, **OFF)
        assert text == tail
        assert prompt.text.endswith(f"{ASSISTANT}</think>{block}")
        assert prompt.start is ParserStart.TOOLS


def test_response_formats_stand_after_the_system_text() -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    wanted = {"type": "json_schema", "json_schema": {"name": "n", "schema": schema}}
    inline = encode([system("s", response_format=schema), *ASK]).text
    assert encode([system("s"), *ASK], response_format=wanted).text == inline
    asked = encode(ASK, response_format={"type": "json_object"}).text
    assert asked == (
        f"{BOS}\n\nYou are a helpful assistant designed to output JSON.\n## Response Format:\n\n"
        f"Reply with JSON object ONLY.{USER}q{ASSISTANT}<think>"
    )
    for kind in ("text", "regex"):
        assert encode(ASK, response_format={"type": kind}) == encode(ASK)


def test_results_take_the_order_of_the_calls() -> None:
    calls = [call("f", {}, name) for name in "abc"]
    history = [*ASK, assistant("", tool_calls=calls)]
    results = [tool("C", "c"), tool("Z", "?"), user("mid"), tool("B", "b"), tool("A", "a")]
    text = encode([*history, *results], **OFF).text
    body = "\n\n".join(f"<tool_result>{x}</tool_result>" if x != "mid" else x
                       for x in ("Z", "A", "mid", "B", "C"))  # fmt: skip
    assert text.endswith(f"{EOS}{USER}{body}{ASSISTANT}</think>")


def test_calls_are_written_with_typed_parameters() -> None:
    arguments = '{"s": "a<b>\\n\\"q\\" 🙂", "n": 1.50, "o": {"k": [1, null]}, "t": "5"}'
    text = encode([*ASK, assistant("hm", tool_calls=[call("f", arguments), call("g", {})])]).text
    lines = [
        "hm\n\n<｜DSML｜tool_calls>",
        '<｜DSML｜invoke name="f">',
        '<｜DSML｜parameter name="s" string="true">a<b>\n"q" 🙂</｜DSML｜parameter>',
        '<｜DSML｜parameter name="n" string="false">1.5</｜DSML｜parameter>',
        '<｜DSML｜parameter name="o" string="false">{"k": [1, null]}</｜DSML｜parameter>',
        '<｜DSML｜parameter name="t" string="true">5</｜DSML｜parameter>',
        "</｜DSML｜invoke>",
        '<｜DSML｜invoke name="g">',
        "",
        "</｜DSML｜invoke>",
        f"</｜DSML｜tool_calls>{EOS}",
    ]
    assert "\n".join(lines) in text


@pytest.mark.parametrize("raw", ["", "not json", "[1]", '"s"', "NaN", '{"a": 1e400}', "[" * 9999])
def test_arguments_that_are_no_object_go_as_one_raw_parameter(raw: str) -> None:
    text = encode([*ASK, assistant("", tool_calls=[call("f", raw)])]).text
    assert f'<｜DSML｜parameter name="arguments" string="true">{raw}</｜DSML｜parameter>' in text


def test_reasoning_may_be_missing_and_may_be_called_otherwise() -> None:
    """Clients drop reasoning or send it under other names; neither may fail a request."""

    def prompt(**message: Any) -> str:
        called = {"role": "assistant", "tool_calls": [call("f", {})], **message}
        return encode([*ASK, called, tool("r")], tools=[WEATHER]).text

    missing = prompt(content=None)
    assert f"{USER}q{ASSISTANT}<think></think>\n\n<｜DSML｜tool_calls>" in missing
    assert prompt(content="", reasoning_content=None) == missing
    given_text = prompt(content="", reasoning_content="why")
    assert "<think>why</think>\n\n<｜DSML｜" in given_text
    assert prompt(content="", reasoning="why") == given_text
    assert prompt(content=[{"type": "thinking", "thinking": "why"}]) == given_text
    assert prompt(content="", reasoning="no", reasoning_content="why") == given_text


def test_chat_mode_never_writes_reasoning() -> None:
    messages = [*ASK, assistant("a", "secret"), user("p")]
    for options in ({}, {"drop_thinking": False}, {"tools": [WEATHER]}):
        assert "secret" not in encode(messages, **OFF, **options).text


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "messages must hold at least one message"),
        ({}, "messages must be a list, found an object"),
        (["hi"], "messages[0] must be an object, found 'hi'"),
        ([*ASK, {"content": "x"}], "messages[1].role must be a string, found null"),
        ([{"role": "robot", "content": "x"}], "messages[0].role must be one of system, developer"),
        ([{"role": "user"}], "messages[0].content must be a string or a list of parts, found null"),
        ([user(3)], "messages[0].content must be a list, found a number"),
        ([user([{"type": "image_url"}])], "messages[0].content[0].type must be 'text'"),
        ([user([{"type": "text"}])], "messages[0].content[0].text must be a string, found null"),
        ([user("\ud800")], "messages[0].content is not valid Unicode"),
        ([assistant(None)], "messages[0].content must be given where there are no tool_calls"),
        ([assistant("a", 3)], "messages[0].reasoning_content must be a string, found a number"),
        ([user("a", tool_calls=[{}])], "messages[0].tool_calls is allowed on assistant messages"),
        ([assistant("", function_call={"name": "f"})], "messages[0].function_call is not supported"),
        ([assistant("", tool_calls={"a": 1})], "messages[0].tool_calls must be a list"),
        ([assistant("", tool_calls=[{"function": {}}])], "messages[0].tool_calls[0].function.name"),
        ([assistant("", tool_calls=[call('a"b', {})])], "messages[0].tool_calls[0].function.name"),
        ([assistant("", tool_calls=[call("f", 3)])], "messages[0].tool_calls[0].function.arguments"),
        ([assistant("", tool_calls=[call("f", {"a": "\udfff"})])], "messages[0].tool_calls[0]"),
        ([assistant("", tool_calls=[call("f", '{"a": "\\udfff"}')])], "messages[0].tool_calls[0]"),
        ([assistant("a", prefix=True), *ASK], "messages[0].prefix is allowed on the last message"),
        ([assistant("a", prefix=1)], "messages[0].prefix must be a boolean"),
        ([user("a", task="dance")], "messages[0].task must be one of action, query"),
        ([assistant("a", task="action")], "messages[0].task must be one of title"),
        ([user("a"), user("b", task="query")], "messages[1].task cannot follow another user"),
        ([user("a", task="query"), user("b")], "messages[0].task must be on the last message"),
        ([{"role": "developer", "content": ""}], "messages[0].content of a developer message"),
        ([system("a", response_format="x")], "messages[0].response_format must be an object"),
        ([system("a", tools=[{}])], "messages[0].tools[0].function must be an object, found null"),
    ],
)  # fmt: skip
def test_a_bad_message_is_refused_by_index_and_field(messages: object, message: str) -> None:
    assert message in refusal(messages)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tools": "x"}, "tools must be a list, found 'x'"),
        ({"tools": {}}, "tools must be a list, found an object"),
        ({"tools": [{"type": "web"}]}, "tools[0].type must be 'function', found 'web'"),
        ({"tools": [WEATHER, WEATHER]}, "tools[1].function.name is 'get_weather' for the second"),
        ({"tools": [{"function": {"name": "f", "parameters": {"a": float("nan")}}}]},
         "tools[0].function cannot be written as JSON"),
        ({"tool_choice": "required"}, "tool_choice demands a call, but the request declares no"),
        ({"tools": [WEATHER], "tool_choice": "any"}, "tool_choice must be 'none', 'auto'"),
        ({"tools": [WEATHER], "tool_choice": {"type": "function", "function": {"name": "x"}}},
         "tool_choice names 'x'"),
        ({"response_format": {"type": "xml"}}, "response_format.type must be one of text, regex"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema must be an"),
        ({"response_format": {"type": "json_schema", "json_schema": {}}},
         "response_format.json_schema.schema must be an object"),
        ({"response_format": {"type": "json_object"}, "tools": [WEATHER]}, "together with tools"),
        ({"continue_final_message": True}, "messages[0].role must be assistant"),
        ({"thinking": 3}, "thinking must be a boolean"),
    ],
)  # fmt: skip
def test_a_bad_option_is_refused_by_name(options: dict[str, Any], message: str) -> None:
    assert message in refusal(ASK, **options)


@pytest.mark.parametrize(
    ("message", "options", "expected"),
    [
        (assistant("", tool_calls=[call("f", {})]), {}, "messages[1].tool_calls cannot stand"),
        (assistant("a", task="title"), {}, "messages[1].task cannot stand"),
        (assistant("a"), {"tools": [WEATHER]}, "tools cannot be used"),
        (assistant("a"), {"response_format": {"type": "json_object"}}, "response_format cannot"),
    ],
)
def test_what_cannot_be_continued_is_refused(
    message: dict[str, Any], options: dict[str, Any], expected: str
) -> None:
    assert expected in refusal([*ASK, message], continue_final_message=True, **options)


def test_nested_json_beyond_reading_is_refused_not_fatal() -> None:
    nested: dict[str, Any] = {}
    for _ in range(20_000):
        nested = {"a": nested}
    tools = [{"type": "function", "function": {"name": "f", "parameters": nested}}]
    assert "nested too deeply" in refusal(ASK, tools=tools)


def test_fill_in_the_middle() -> None:
    prompt = encode_fim("def f(<think>", "):\n    pass")
    assert prompt.text == "<｜fim▁begin｜>def f(<think><｜fim▁hole｜>):\n    pass<｜fim▁end｜>"
    assert specials(prompt) == ["<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"]
    assert TOKENIZER.special_id("<think>") not in prompt.token_ids(TOKENIZER)
    assert encode_fim("", "").text == "<｜fim▁begin｜><｜fim▁hole｜><｜fim▁end｜>"
    with pytest.raises(RequestError, match="suffix"):
        encode_fim("a", "\ud800")


def test_the_prompt_is_the_same_for_json_text_and_objects() -> None:
    arguments = {"city": "Oslo", "days": [1, 2.0, None]}
    messages = [[*ASK, assistant("", tool_calls=[call("f", form)])]
                for form in (arguments, json.dumps(arguments))]  # fmt: skip
    assert encode(messages[0]) == encode(messages[1])

"""Conversations and answers that DeepSeek's own package and ours must treat alike.

The package is the oracle where the encoders of this format agree; docs/CHAT.md lists where they do not,
and the strategies below stay clear of that: no system message after the first turn, no call without
arguments, no number that JSON writers spell differently, no malformed markup.
"""

import itertools
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fourfold.text.events import collect
from fourfold.text.profiles import ChatProfile
from fourfold.text.prompt import ParserStart
from fourfold.weights.synthetic_tokenizer import SPECIAL_TOKENS
from tests.text.answers import (
    CUTS,
    TOKENIZER,
    TOKENIZER_JSON,
    call,
    encode,
    events_of_text,
    pieces,
)

pytestmark = pytest.mark.full

recipe = pytest.importorskip("deepseek_recipe", reason="the extra `peers` is not installed")

ENCODING = recipe.DeepseekV4Encoding()
TOKENIZING = ENCODING.with_tokenizer(recipe.Tokenizer.from_str(json.dumps(TOKENIZER_JSON)))
STAGES = {
    ParserStart.CONTENT: None,
    ParserStart.REASONING: recipe.ThinkingInitialStage.ReasoningStart,
    ParserStart.REASONING_CONTINUED: recipe.ThinkingInitialStage.ReasoningContinuation,
    ParserStart.CONTENT_CONTINUED: recipe.ThinkingInitialStage.ContentContinuation,
}

spellings = st.sampled_from([spelling for spelling, _ in SPECIAL_TOKENS])
texts = st.lists(
    st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=6)
    | spellings
    | st.sampled_from(["\n", "  ", "你好", "<tool_result>", "Reasoning Effort:"]),
    min_size=1,
    max_size=3,
).map("".join)
scalars = (
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | texts
    | st.integers(-1000, 1000).map(lambda n: n / 8)
)  # fmt: skip
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=2),
    max_leaves=4,
)
arguments = st.dictionaries(texts, values, min_size=1, max_size=3)
names = st.text("abc_-9", min_size=1, max_size=6)
tools = st.lists(
    st.builds(
        lambda name, description, properties: {
            "type": "function",
            "function": {
                "name": name,
                "description": description,
                "parameters": {"type": "object", "properties": properties},
            },
        },
        names,
        texts,
        st.dictionaries(texts, st.just({"type": "string"}), max_size=2),
    ),
    unique_by=lambda tool: tool["function"]["name"],
    max_size=2,
)
schemas = st.dictionaries(texts, st.just({"type": "string"}), max_size=2).map(
    lambda properties: {
        "name": "n",
        "schema": {"type": "object", "properties": properties, "additionalProperties": False},
    }
)
contents = texts | st.lists(
    texts.map(lambda text: {"type": "text", "text": text}), min_size=1, max_size=3
)


@st.composite
def conversations(draw: st.DrawFn) -> list[dict[str, Any]]:
    """Messages that both sides accept, ending anywhere but in an unanswered call."""
    # Their service orders results by the ids' spelling, ours by the calls: here that is the same.
    ids = (f"call_{number:03}" for number in itertools.count())
    messages = [
        {"role": "system", "content": content} for content in draw(st.lists(contents, max_size=2))
    ]
    for _ in range(draw(st.integers(1, 3))):
        if draw(st.booleans()):
            messages.append({"role": "latest_reminder", "content": draw(texts)})
        for content in draw(st.lists(contents, min_size=1, max_size=2)):
            messages.append({"role": "user", "content": content})
        for _ in range(draw(st.integers(0, 2))):
            messages += draw(answers(st.just(ids)))
    return messages


@st.composite
def answers(draw: st.DrawFn, ids: st.SearchStrategy[Any]) -> list[dict[str, Any]]:
    """An assistant message and the results of its calls."""
    counter = draw(ids)
    message: dict[str, Any] = {"role": "assistant", "content": draw(contents | st.just(""))}
    if draw(st.booleans()):
        message["reasoning_content"] = draw(texts | st.just(""))
    made = [
        call(draw(names), json.dumps(draw(arguments)), next(counter))
        for _ in range(draw(st.integers(0, 3)))
    ]
    if not made:
        return [message]
    message["tool_calls"] = made
    order = draw(st.permutations(made))
    return [
        message,
        *({"role": "tool", "tool_call_id": item["id"], "content": draw(texts)} for item in order),
    ]


@st.composite
def requests(draw: st.DrawFn) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Messages, and the request's other fields as both sides spell them."""
    messages = draw(conversations())
    fields: dict[str, Any] = {}
    thinking = draw(st.none() | st.sampled_from(["enabled", "disabled"]))
    if thinking:
        fields["thinking"] = {"type": thinking}
    effort = draw(
        st.none() | st.sampled_from(["minimal", "low", "medium", "high", "xhigh", "max", "ultra"])
    )
    if effort:
        fields["reasoning_effort"] = effort
    declared = draw(tools)
    # Their service refuses a continuation where there have been calls.
    ended = messages[-1]["role"] == "assistant" and not any("tool_calls" in m for m in messages)
    if ended and draw(st.booleans()):
        messages[-1]["prefix"] = True
    elif declared:
        fields["tools"] = declared
        fields["tool_choice"] = draw(st.sampled_from(["auto", "none"]))
        if thinking == "disabled" and draw(st.booleans()):
            fields["tool_choice"] = "required"
    elif draw(st.booleans()):
        fields["response_format"] = {"type": "json_schema", "json_schema": draw(schemas)}
    return messages, fields


def converted(messages: list[dict[str, Any]], fields: dict[str, Any]) -> Any:
    body = {"model": "DeepSeek-V4-Pro", "messages": messages, **fields}
    return recipe.ChatCompletionRequest(body).convert(recipe.ConversionOptions())


@settings(max_examples=300)
@given(requests())
def test_prompts_markers_tokens_and_parser_states_agree(
    request: tuple[list[dict[str, Any]], dict[str, Any]],
) -> None:
    messages, fields = request
    theirs = converted(messages, fields)
    rendered = ENCODING.render_conversation(theirs.conversation)
    ours = encode(messages, profile=ChatProfile.OFFICIAL, **{"reasoning_effort": None} | fields)
    assert ours.text == rendered.prompt

    ends = list(itertools.accumulate(len(segment.text) for segment in ours.segments))
    ranges = [
        (end - len(segment.text), end)
        for segment, end in zip(ours.segments, ends, strict=True)
        if segment.special
    ]
    assert ranges == rendered.special_ranges
    assert ours.token_ids(TOKENIZER) == TOKENIZING.encode(theirs.conversation)

    options = theirs.parsing_options
    assert ours.parse_tools == options.parse_tool_calls
    assert (ours.start is ParserStart.TOOLS) == options.starts_in_tool_calls
    stage = options.thinking_initial_stage
    assert ours.ends_in_reasoning == (stage is not None and stage.starts_in_reasoning())


def their_answer(
    parts: list[str], start: ParserStart, tools: bool, stop: list[str]
) -> tuple[str, str, list[tuple[str, Any]], str]:
    """(reasoning, content, calls, finish reason) that the package makes of an answer."""
    request = converted([{"role": "user", "content": "q"}], {})
    options = recipe.ParsingOptions(
        parse_tool_calls=tools,
        starts_in_tool_calls=start is ParserStart.TOOLS,
        thinking_initial_stage=STAGES.get(start),
        stop_sequences=stop,
    )
    generator = recipe.ChatCompletionRequest.chunk_generator(request, "id", "model")
    processor = recipe.StreamProcessor(generator, options)
    response = recipe.ChatCompletionResponse("id", "model", 0, 0, 0)
    finish = recipe.InferenceChunk.finish(recipe.InferenceFinishReason.Stop)
    chunks = [recipe.InferenceChunk.ready(), *map(recipe.InferenceChunk.text, parts), finish]
    for chunk in chunks:
        if not processor.finished:
            for made in processor.push(chunk):
                response.accumulate(made)
    for made in processor.finish():
        response.accumulate(made)
    choice = json.loads(response.to_json())["choices"][0]
    message = choice["message"]
    calls = [
        (item["function"]["name"], json.loads(item["function"]["arguments"]))
        for item in message.get("tool_calls") or []
    ]
    reasoning, content = message.get("reasoning_content"), message.get("content")
    return reasoning or "", content or "", calls, choice["finish_reason"]


# In text alone every spelling is a marker, so the visible texts here hold none.
visible = st.lists(
    st.text(st.characters(exclude_categories=["Cs"], exclude_characters="<"), max_size=6)
    | st.sampled_from(["\n", "\n\n", "  ", "a < b", "<b>x</b>", "<｜x｜>", "｜DSML｜"]),
    max_size=4,
).map("".join)  # fmt: skip


@st.composite
def generated(draw: st.DrawFn) -> tuple[str, ParserStart, bool]:
    """A well-formed answer, where it starts, and whether the request had tools."""
    start = draw(st.sampled_from(sorted(STAGES, key=lambda stage: stage.value)))
    parts = []
    if start.in_reasoning:
        parts += [draw(visible), "</think>"]
    content = draw(visible)
    with_tools = draw(st.booleans())
    if with_tools and draw(st.booleans()):
        # Blanks alone before a block: the one rule that differs.
        content = content if content.strip() else ""
        made = [
            call(draw(names), json.dumps(draw(argument_objects)))
            for _ in range(draw(st.integers(1, 2)))
        ]
        asked = [
            {"role": "user", "content": "q"},
            {"role": "assistant", "content": "", "tool_calls": made},
        ]
        prompt = encode([*asked, {"role": "user", "content": "p"}], thinking=False).text
        content += prompt[prompt.index("\n\n<｜DSML｜") : prompt.index("<｜end▁of▁sentence｜>")]
    return "".join([*parts, content]), start, with_tools


argument_objects = st.dictionaries(
    st.text("abk_", min_size=1, max_size=4),
    scalars.filter(lambda value: not isinstance(value, str)) | visible | st.lists(visible, max_size=2),
    min_size=1,
    max_size=3,
)  # fmt: skip


@settings(max_examples=300)
@given(generated(), CUTS)
def test_well_formed_answers_are_read_alike(
    answer: tuple[str, ParserStart, bool], cuts: list[int]
) -> None:
    text, start, with_tools = answer
    parts = pieces(text, cuts)
    ours = collect(events_of_text(parts, start, with_tools))
    calls = [(item.name, json.loads(item.arguments)) for item in ours.tool_calls]
    mine = (ours.reasoning or "", ours.content or "", calls, ours.finish_reason)
    assert mine == their_answer(parts, start, with_tools, [])


@settings(max_examples=150)
@given(st.text("ab\n", max_size=30), st.text("ab\n", min_size=1, max_size=4), CUTS)
def test_one_stop_string_ends_the_text_alike(text: str, stop: str, cuts: list[int]) -> None:
    parts = pieces(text, cuts)
    start = ParserStart.CONTENT_CONTINUED
    ours = collect(events_of_text(parts, start, False, stop=[stop]))
    theirs = their_answer(parts, start, False, [stop])
    assert (ours.content or "", ours.finish_reason) == (theirs[1], theirs[3])

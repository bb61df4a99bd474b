"""However an answer is cut, the client sees one message, and never a piece of markup."""

import json
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fourfold.text.events import (
    ContentDelta,
    Event,
    Finish,
    ReasoningDelta,
    ToolArgumentsDelta,
    ToolCallEnd,
    ToolCallStart,
    coalesce,
    collect,
)
from fourfold.text.parse import TokenParser, new_call_id
from fourfold.text.prompt import ParserStart
from fourfold.weights.synthetic_tokenizer import SPECIAL_TOKENS
from tests.text.answers import (
    CUTS,
    STARTS,
    TOKENIZER,
    WEATHER,
    by_name,
    call,
    encode,
    events_of_text,
    events_of_tokens,
    examples,
    parse,
    parse_tokens,
    pieces,
    plain_form,
)

CASES = examples("parse-examples.jsonl")
D = "｜DSML｜"
REASONING, CONTENT = ParserStart.REASONING, ParserStart.CONTENT
SPELLINGS = [spelling for spelling, _ in SPECIAL_TOKENS]


def param(text: str, key: str = "x", kind: str = "true") -> str:
    return f'<{D}parameter name="{key}" string="{kind}">{text}</{D}parameter>'


def invoke(*params: str, name: str = "f") -> str:
    return "\n".join([f'<{D}invoke name="{name}">', *params, f"</{D}invoke>"])


def block(*invokes: str) -> str:
    return "\n".join([f"<{D}tool_calls>", *invokes, f"</{D}tool_calls>"])


def calls(text: str, **more: Any) -> list[tuple[str, Any]]:
    """(name, arguments) of each call; asserts that nothing of the markup became content."""
    message = parse(text, **more)
    assert parse_tokens(text, **more) == message
    assert message.content is None
    return [(item.name, json.loads(item.arguments)) for item in message.tool_calls]


@pytest.mark.parametrize(**by_name(CASES))
def test_example_whole_by_character_and_by_token(case: dict[str, Any]) -> None:
    start, tools = STARTS[case["mode"]], bool(case["tools"])
    finish = case["options"]["finish"]
    text = case["text"]
    for parts in ([text], list(text)):
        events = events_of_text(parts, start, tools, finish)
        assert plain_form(collect(events)) == case["expected"]
    ids = TOKENIZER.encode(text, allow_special=True)
    assert plain_form(collect(events_of_tokens(ids, start, tools, finish))) == case["expected"]


@pytest.mark.parametrize(**by_name(CASES))
@settings(max_examples=40)
@given(cuts=CUTS)
def test_example_at_random_cuts(case: dict[str, Any], cuts: list[int]) -> None:
    parts = pieces(case["text"], cuts)
    events = events_of_text(parts, STARTS[case["mode"]], bool(case["tools"]))
    assert plain_form(collect(events)) == case["expected"]


fragments = st.sampled_from(
    [
        *("a", " ", "\n", "\n\n", "<", "</", "/", ">", '"', "\\", "🙂", "{", '{"k": [1, 2]}', "</thi"),
        *("<think>", "</think>", D, f"<{D}", f"</{D}", "<｜DS", "<｜not_a_tag｜>", "<tool_calls>"),
        *(f"<{D}tool_calls>", f"</{D}tool_calls>", f"<{D}tool_call>", f"<{D}foo>", f"</{D}foo>"),
        *(f'<{D}invoke name="f">', f'<{D}invoke name="g"/>', f"</{D}invoke>", f"</{D}invoke"),
        *(f'<{D}parameter name="x" string="true">', f'<{D}parameter name="y" string="false">'),
        *(f'<{D}parameter name="z">', f"</{D}parameter>", f"</{D}parameter", '" string="true">'),
        *(param("v"), param("1.5", "n", "false"), block(invoke(param("v"))), "null", "name="),
    ]
)  # fmt: skip
soups = st.lists(fragments, max_size=14).map("".join)


@settings(max_examples=600)
@given(
    soups, CUTS, st.sampled_from(ParserStart), st.booleans(), st.sampled_from(["stop", "length"])
)
@example("\n \n</think>\n\na", [1, 2], REASONING, True, "stop")
@example(f"  \n<{D}", [2, 3], CONTENT, True, "length")
def test_every_cut_of_every_soup_gives_the_same_events(
    text: str, cuts: list[int], start: ParserStart, tools: bool, finish: str
) -> None:
    whole = coalesce(events_of_text([text], start, tools, finish))
    assert coalesce(events_of_text(pieces(text, cuts), start, tools, finish)) == whole
    assert coalesce(events_of_text(list(text), start, tools, finish)) == whole


@settings(max_examples=300)
@given(soups, st.sampled_from(ParserStart), st.booleans(), st.lists(st.text("a<\n{", min_size=1)))
def test_stop_strings_see_the_same_content_at_every_cut(
    text: str, start: ParserStart, tools: bool, stop: list[str]
) -> None:
    whole = coalesce(events_of_text([text], start, tools, stop=stop))
    assert coalesce(events_of_text(list(text), start, tools, stop=stop)) == whole


@settings(max_examples=600)
@given(st.lists(fragments | st.sampled_from(SPELLINGS), max_size=14).map("".join),
       st.sampled_from(ParserStart))  # fmt: skip
def test_no_marker_ever_reaches_the_client(text: str, start: ParserStart) -> None:
    """The tokens of any soup: arguments are objects, and markers appear in values at most."""
    ids = TOKENIZER.encode(text, allow_special=True)
    message = collect(events_of_tokens(ids, start))
    for seen in (message.reasoning or "", message.content or ""):
        # What the plain tokens spell is text; none of the real markers is.
        real = [index for index in ids if index in TOKENIZER.special_tokens.values()]
        plain = TOKENIZER.decode([index for index in ids if index not in real])
        for spelling in SPELLINGS:
            assert seen.count(spelling) <= plain.count(spelling)
    for item in message.tool_calls:
        assert isinstance(json.loads(item.arguments), dict)
        for tag in ("tool_calls", "invoke name", "parameter name"):
            assert f"<{D}{tag}" not in item.arguments
        assert f"</{D}" not in item.arguments


@settings(max_examples=300)
@given(soups, st.sampled_from(ParserStart))
def test_spelled_and_real_markers_give_the_same_message(text: str, start: ParserStart) -> None:
    if D in text.replace(f"<{D}", "").replace(f"</{D}", ""):
        text = text.replace(D, "")  # only in text is a marker without its bracket text
    assert parse_tokens(text, start) == parse(text, start)


@given(st.lists(st.sampled_from([*SPELLINGS, "a", f"<{D}tool_calls>", "\n"])).map("".join))
def test_text_that_looks_like_a_marker_stays_text(text: str) -> None:
    """Tokens that spell a marker are what the model quotes, not what it does."""
    ids = TOKENIZER.encode("x" + text + "x")
    for start, field in ((REASONING, "reasoning"), (CONTENT, "content")):
        assert getattr(collect(events_of_tokens(ids, start)), field) == "x" + text + "x"


# ---- malformed markup ----


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (block(invoke(param("not json", kind="false"))), {"x": "not json"}),
        (block(invoke(param("NaN", kind="false"))), {"x": "NaN"}),
        (block(invoke(param("", kind="false"))), {"x": ""}),
        (block(invoke(param("[" * 5000, kind="false"))), {"x": "[" * 5000}),
        (block(invoke(param(" [1, 2.50 ] ", kind="false"))), {"x": [1, 2.5]}),
        (block(invoke(f'<{D}parameter name="x">5</{D}parameter>')), {"x": 5}),
        (block(invoke(f'<{D}parameter name="x">five</{D}parameter>')), {"x": "five"}),
        (block(invoke(f'<{D}parameter name="x" string="maybe">5</{D}parameter>')), {"x": 5}),
        (block(invoke(param("1"), param("2"), param("3", "y"))), {"x": "1", "y": "3"}),
        (block(invoke(param("1", kind="false"), param("2"))), {"x": 1}),
        (block(invoke(f'<{D}parameter name="x" string="true">v')), {"x": "v"}),
        (block(invoke(f'<{D}parameter name="x" string="false">5')), {"x": 5}),
        (block(f'<{D}invoke name="f">\n<{D}parameter name="x" string="true">v\n'), {"x": "v\n"}),
        (block(invoke(f'<{D}parameter name="x" string="true">v', param("w", "y"))),
         {"x": "v", "y": "w"}),
        (f'<{D}tool_calls><{D}invoke name="f">{param("v")}</{D}tool_calls>', {"x": "v"}),
        (invoke(param("v")), {"x": "v"}),
        (invoke(param("v")).replace("</" + D + "parameter>", f"</{D}parameter\n"), {"x": "v"}),
        (invoke(param("v")).replace("</" + D + "parameter>", f"</{D}>"), {"x": "v"}),
        (invoke(param("v")).removesuffix(">"), {"x": "v"}),
        (block(invoke(param("v"))).replace("tool_calls", "tool_call"), {"x": "v"}),
        (block(invoke(param("v"))).replace("tool_calls", "toolcalls"), {"x": "v"}),
        (block(invoke(param("v"))).replace("tool_calls", "function_calls"), {"x": "v"}),
        (block(f'<{D}invoke name="f"/>'), {}),
        (block(f'<{D}invoke name="f" >\n</{D}invoke>'), {}),
        (block(f'<{D}invoke name="f"\n{param("v")}\n</{D}invoke>'), {"x": "v"}),
        (block(invoke("")), {}),
        (block(invoke('{"a": {"b": [1]}}')), {"a": {"b": [1]}}),
        (block(invoke("[1]")), {}),
        (block(invoke('{"a": ')), {}),
        (block("words " + invoke("words" + param("v") + "words") + "words"), {"x": "v"}),
        (block(invoke(f"<{D}parameter>{param('v')}")), {"x": "v"}),
        (block(invoke(param("v", 'a>"b'))), {'a>"b': "v"}),
        (block(invoke(param("v", "x" * 4000))), {"x" * 4000: "v"}),
        (block(invoke(param("a<think>b</think>c"))), {"x": "a<think>b</think>c"}),
        (block(invoke(param(f"a <{D}b c"))), {"x": f"a <{D}b c"}),
        (block(invoke(param("a < b, </b> </x>"))), {"x": "a < b, </b> </x>"}),
        (block(invoke(param("\n v\n\n"))), {"x": "\n v\n\n"}),
        (block(invoke(param('"\\🙂\t\x01'))), {"x": '"\\🙂\t\x01'}),
        ("\n\n" + block(invoke(param("v"))) + "more words", {"x": "v"}),
        (" \n " + block(invoke(param("v"))), {"x": "v"}),
    ],
)  # fmt: skip
def test_a_call_survives_broken_markup(text: str, expected: dict[str, Any]) -> None:
    assert calls(text) == [("f", expected)]


@pytest.mark.parametrize(
    "text",
    [
        block(),
        block(f"<{D}invoke>\n</{D}invoke>"),
        block(f'<{D}invoke name="">\n</{D}invoke>'),
        block(f'<{D}invoke name="{"f" * 5000}">\n</{D}invoke>'),
        f"<{D}tool",
        f"<{D}foo> and words",
        f"<{D}parameter",
        param("v"),
    ],
)
def test_markup_without_a_call_is_dropped(text: str) -> None:
    assert calls(text) == []


@pytest.mark.parametrize(
    ("text", "content"),
    [
        ("a <｜DS", "a <｜DS"),
        ("a</thi", "a</thi"),
        ("a\n\n", "a\n\n"),
        (f"a\n\n<{D}too", "a"),
        (f"a</{D}tool_calls>b</{D}invoke c", "ab c"),
        ("a<think>b", "ab"),
        ("a\n</think>\n\nb", "a\n\n\nb"),
        ("\n\nb", "b"),
        ("  \n ", "  \n "),
        (f"quote {block(invoke(param('v')))} quote", "quote "),
    ],
)
def test_visible_text_keeps_all_but_markup(text: str, content: str) -> None:
    message = parse(text)
    assert message.content == content == parse_tokens(text).content
    assert message.reasoning is None


def test_tags_without_the_marker_are_text() -> None:
    text = block(invoke(param("v"))).replace(D, "")
    assert parse(text).content == text == parse_tokens(text).content


@pytest.mark.parametrize(
    ("text", "start", "expected"),
    [
        ("\n\nr\n \n</think>\n\n c\n", REASONING, ("r\n ", " c\n")),
        ("<think>r</think>c", REASONING, ("r", "c")),
        ("r", REASONING, ("r", None)),
        ("r</thi", REASONING, ("r</thi", None)),
        ("r\n\n", REASONING, ("r\n\n", None)),
        ("\n\n</think>\n", REASONING, (None, None)),
        ("\nr\n</think>\nc", ParserStart.REASONING_CONTINUED, ("\nr", "c")),
        ("\nc", ParserStart.CONTENT_CONTINUED, (None, "\nc")),
        ("c", ParserStart.TOOLS, (None, None)),
    ],
)
def test_reasoning_and_content_lose_only_separating_line_breaks(
    text: str, start: ParserStart, expected: tuple[str | None, str | None]
) -> None:
    for message in (parse(text, start), parse_tokens(text, start)):
        assert (message.reasoning, message.content) == expected


def test_a_block_ends_reasoning() -> None:
    message = parse(f"why\n\n{block(invoke(param('v')))}", REASONING)
    assert (message.reasoning, message.content) == ("why", None)
    assert message.finish_reason == "tool_calls"


def test_a_prompt_may_have_opened_the_block() -> None:
    text = invoke(param("v")) + f"\n</{D}tool_calls>"
    assert calls(text, start=ParserStart.TOOLS) == [("f", {"x": "v"})]


def test_several_calls_and_several_blocks_are_numbered_through() -> None:
    text = block(invoke(name="a"), invoke(name="b")) + "\n\n" + block(invoke(name="c"))
    events = events_of_text([text], CONTENT)
    starts = [event for event in events if isinstance(event, ToolCallStart)]
    assert starts == [
        ToolCallStart(index, f"call_{index}", name) for index, name in enumerate("abc")
    ]
    assert [event.index for event in events if isinstance(event, ToolCallEnd)] == [0, 1, 2]


def test_markup_is_text_when_no_tools_were_given() -> None:
    text = f"a\n\n{block(invoke(param('v')))}"
    for message in (parse(text, tools=False), parse_tokens(text, tools=False)):
        assert message.content == text
    inside = parse_tokens(f"{text}</think>b", REASONING, tools=False)
    assert (inside.reasoning, inside.content) == (text, "b")


# ---- the end ----

DONE = f"<{D}tool_calls>\n{invoke(param('v'))}\n"


@pytest.mark.parametrize(
    ("text", "whole_calls", "at_length", "at_stop"),
    [
        (f"<{D}tool_calls>\n<{D}inv", 0, "length", "stop"),
        (f'<{D}invoke name="f', 0, "length", "stop"),
        (f'<{D}invoke name="f">\n', 0, "length", "stop"),
        (f'<{D}invoke name="f">\n<{D}parameter name="x" string="true">v', 0, "length", "stop"),
        (f'<{D}invoke name="f">\n{param("v")}\n', 0, "length", "stop"),
        (f'<{D}invoke name="f">\n{param("v")}\n</{D}inv', 0, "length", "stop"),
        (DONE + f'<{D}invoke name="g">\n{param("v")}', 1, "length", "tool_calls"),
        (DONE + f"<{D}inv", 1, "length", "tool_calls"),
        (DONE, 1, "tool_calls", "tool_calls"),
        (DONE + f"</{D}tool", 1, "tool_calls", "tool_calls"),
        (DONE + f"</{D}tool_calls>", 1, "tool_calls", "tool_calls"),
    ],
)
def test_a_call_that_was_cut_off_does_not_count(
    text: str, whole_calls: int, at_length: str, at_stop: str
) -> None:
    for finish, reason in (("length", at_length), ("stop", at_stop), ("abort", "abort")):
        message = parse(f"c\n\n{text}", finish=finish)
        assert (message.content, message.finish_reason) == ("c", reason)
        assert len(message.tool_calls) == whole_calls


def test_the_events_of_a_call_come_in_order() -> None:
    text = f"r</think>c\n\n{block(invoke(param('v'), param('2', 'y', 'false')))}"
    assert coalesce(events_of_text(list(text), REASONING)) == [
        ReasoningDelta("r"),
        ContentDelta("c"),
        ToolCallStart(0, "call_0", "f"),
        ToolArgumentsDelta(0, '{"x": "v", "y": 2}'),
        ToolCallEnd(0),
        Finish("tool_calls"),
    ]


def test_string_values_and_text_are_not_held_longer_than_needed() -> None:
    parser_events: list[list[Event]] = []
    parser = TokenParser(TOKENIZER, CONTENT, True, new_id=str)
    text = f'a < b\n\n<{D}invoke name="f">\n<{D}parameter name="x" string="true">one two'
    for index in TOKENIZER.encode(text, allow_special=True):
        parser_events.append(parser.push(index))
    seen = collect([event for events in parser_events for event in events])
    assert seen.content == "a < b"
    arguments = [e.text for es in parser_events for e in es if isinstance(e, ToolArgumentsDelta)]
    assert "".join(arguments) == '{"x": "one two'


def test_ids_of_calls_are_unique_and_sort_as_the_calls() -> None:
    ids = [new_call_id(index) for index in range(100)]
    assert len({*ids, *map(new_call_id, range(100))}) == 200
    assert ids == sorted(ids)


# ---- stop strings ----


@pytest.mark.parametrize(
    ("text", "start", "stop", "expected", "matched"),
    [
        ("abSTOPc</think>dSTOPe", REASONING, "STOP", ("abSTOPc", "d"), "STOP"),
        ("ab</think>cd", REASONING, "bc", ("ab", "cd"), None),
        ("ab</think>cd", CONTENT, "bc", (None, "a"), "bc"),
        ("abST", CONTENT, "STOP", (None, "abST"), None),
        (f"c\n\n{block(invoke(param('aSTOPb')))}", CONTENT, "STOP", (None, "c"), None),
        (f"c\n\n{block(invoke(param('v')))}", CONTENT, "\n\n", (None, "c"), None),
        (f"aSTOP\n\n{block(invoke(param('v')))}", CONTENT, "STOP", (None, "a"), "STOP"),
        ("ab\n\ncd", CONTENT, "\n\n", (None, "ab"), "\n\n"),
    ],
)
def test_stop_strings_end_visible_content_only(
    text: str,
    start: ParserStart,
    stop: str,
    expected: tuple[str | None, str | None],
    matched: str | None,
) -> None:
    for message in (parse(text, start, stop=[stop]), parse_tokens(text, start, stop=[stop])):
        assert (message.reasoning, message.content) == expected
        assert message.stop == matched
        if matched:
            assert message.finish_reason == "stop"
            assert not message.tool_calls


def test_a_stop_string_is_seen_at_once_and_can_be_kept() -> None:
    parser = TokenParser(TOKENIZER, CONTENT, True, stop=["END"], include_stop=True)
    ids = TOKENIZER.encode("one END two")
    events: list[Event] = []
    while parser.stopped is None:
        events += parser.push(ids.pop(0))
    assert TOKENIZER.decode(ids).strip() in ("two", "wo", "o", "")
    assert collect(events + parser.finish("length")).content == "one END"


def test_stop_strings_wait_for_min_tokens() -> None:
    ids = TOKENIZER.encode("x.x.x.x")
    message = collect(events_of_tokens(ids, CONTENT, stop=["."], min_tokens=3))
    assert message.content == "x.x"


# ---- tokens ----


def test_bytes_that_never_become_a_character_do_not_swallow_a_marker() -> None:
    (lead,) = [i for i in TOKENIZER.known_ids() if TOKENIZER.token_bytes(i) == b"\xe4"]
    marker = TOKENIZER.special_id("</think>")
    (letter,) = TOKENIZER.encode("c")
    message = collect(events_of_tokens([lead, marker, letter, lead], REASONING))
    assert (message.reasoning, message.content) == ("\ufffd", "c\ufffd")


def test_reasoning_tokens_are_counted_and_the_state_is_known() -> None:
    """A constraint on the answer is armed by this state, never before `</think>`."""
    ids = TOKENIZER.encode('{"a": 1}</think>{"b": 2}', allow_special=True)
    parser = TokenParser(TOKENIZER, REASONING, False)
    states = []
    for index in ids:
        states.append(parser.in_reasoning)
        parser.push(index)
    closing = ids.index(TOKENIZER.special_id("</think>"))
    assert states == [position <= closing for position in range(len(ids))]
    assert parser.reasoning_tokens == closing + 1


# ---- and back ----

pieces_of_text = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
# Text may spell markers and whole tags: in tokens they are not markers.
words = st.lists(
    pieces_of_text | st.sampled_from([*SPELLINGS, f"</{D}parameter>", "<", "</", "\n"]), max_size=4
).map("".join)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
    | words,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(words, inner, max_size=3),
    max_leaves=5,
)  # fmt: skip
keys = words.map(lambda text: text.replace('"', ""))
tool_calls = st.lists(
    st.tuples(st.text("fgh_-", min_size=1, max_size=5), st.dictionaries(keys, json_values, max_size=3)),
    max_size=3,
)  # fmt: skip


@settings(max_examples=200)
@given(words, words, tool_calls, st.booleans())
def test_an_answer_encoded_parsed_and_encoded_again_is_the_same(
    reasoning: str, content: str, made: list[tuple[str, dict[str, Any]]], thinking: bool
) -> None:
    reasoning, content = reasoning.strip("\n"), content.strip("\n")
    if made and not content.strip():
        content = ""
    if not content and not made:
        content = "x"
    asked = [{"role": "user", "content": "q"}]
    history = [call(name, arguments, f"call_{i}") for i, (name, arguments) in enumerate(made)]
    turn = {"role": "assistant", "content": content, "tool_calls": history}
    if thinking:
        turn["reasoning_content"] = reasoning
    following = {"role": "user", "content": "p"}

    def tokens(turn: dict[str, Any]) -> list[int]:
        messages = [*asked, turn, following]
        return encode(messages, thinking=thinking, tools=[WEATHER]).token_ids(TOKENIZER)

    prompt = encode(asked, thinking=thinking, tools=[WEATHER])
    before = prompt.token_ids(TOKENIZER)
    ids = tokens(turn)
    assert ids[: len(before)] == before
    answer = ids[
        len(before) : len(ids) - ids[::-1].index(TOKENIZER.special_id("<｜end▁of▁sentence｜>"))
    ]
    message = collect(events_of_tokens(answer, prompt.start, prompt.parse_tools))
    assert message.reasoning == (reasoning or None if thinking else None)
    assert message.content == (content or None)
    assert [(c.name, json.loads(c.arguments)) for c in message.tool_calls] == made
    again = {
        "role": "assistant",
        "content": message.content or "",
        "reasoning_content": message.reasoning,
        "tool_calls": [call(c.name, c.arguments, c.call_id) for c in message.tool_calls],
    }
    assert tokens(again) == ids

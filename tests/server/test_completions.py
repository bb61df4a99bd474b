"""Completions on a stub engine: every kind of prompt, echo, log probabilities, holes."""

from __future__ import annotations

from typing import Any

import pytest

from tests.server.http import Answer, Site


def complete(web: Site, **fields: object) -> Answer:
    return web.post("/v1/completions", **({"prompt": "hi"} | fields))


def choices(answer: Answer) -> list[dict[str, Any]]:
    assert answer.status == 200, answer.body
    found: list[dict[str, Any]] = answer.json["choices"]
    return found


def test_texts_tokens_and_lists_of_both(web: Site) -> None:
    web.says("there")
    ids = web.text("hi")
    for prompt, count in (("hi", 1), (["hi", "ho"], 2), (ids, 1), ([ids, ids, ids], 3)):
        web.engine.requests.clear()
        found = choices(complete(web, prompt=prompt))
        assert [c["text"] for c in found] == ["there"] * count
        assert [c["index"] for c in found] == list(range(count))
        assert web.engine.requests[0].prompt_token_ids == tuple(ids)


def test_nothing_is_put_before_a_prompt_and_markers_in_it_count(web: Site) -> None:
    complete(web, prompt="<｜User｜>x")
    tokens = web.engine.requests[0].prompt_token_ids
    assert tokens == (web.engine.tokenizer.special_id("<｜User｜>"), *web.text("x"))


def test_a_stream_says_the_same_as_a_whole_answer(web: Site) -> None:
    web.says("so it 你好 goes")
    fields = {"prompt": ["a", "b"], "n": 2, "logprobs": 1, "echo": True}
    whole = choices(complete(web, **fields))
    answer = complete(web, stream=True, stream_options={"include_usage": True}, **fields)
    for index, choice in enumerate(whole):
        assert answer.deltas("text", index) == choice["text"]
        parts = [c["logprobs"] for e in answer.events for c in e["choices"] if c["index"] == index]
        for name, values in choice["logprobs"].items():
            assert [v for p in parts if p for v in p[name]] == values
        ends = [c for e in answer.events for c in e["choices"] if c["index"] == index]
        assert [c["finish_reason"] for c in ends if c["finish_reason"]] == ["stop"]
    assert answer.events[-1]["usage"] == complete(web, **fields).json["usage"]


def test_logprobs_line_up_with_the_text(web: Site) -> None:
    web.says("so it 你好")
    (choice,) = choices(complete(web, prompt="Hi 你", echo=True, logprobs=2))
    found = choice["logprobs"]
    assert found["token_logprobs"][0] is None
    assert found["top_logprobs"][0] is None
    assert len({len(values) for values in found.values()}) == 1
    for token, offset in zip(found["tokens"], found["text_offset"], strict=True):
        if not token.startswith(("bytes:", "<｜end")):
            assert choice["text"][offset:].startswith(token)
    for value, top in zip(found["token_logprobs"][1:], found["top_logprobs"][1:], strict=True):
        assert max(top.values()) == value
        assert len(top) == 3


def test_scoring_a_prompt_generates_nothing(web: Site) -> None:
    (choice,) = choices(complete(web, prompt="abc", echo=True, logprobs=0, max_tokens=0))
    assert choice["text"] == "abc"
    assert len(choice["logprobs"]["tokens"]) == len(web.text("abc"))
    assert choice["finish_reason"] == "length"
    assert complete(web, max_tokens=0).error["param"] == "max_tokens"


def test_a_suffix_makes_it_a_hole_to_fill(web: Site) -> None:
    web.says(" return a")
    (choice,) = choices(complete(web, prompt="def f(a):", suffix="\nprint(f(1))"))
    assert choice["text"] == " return a"
    prompt = web.engine.tokenizer.decode(web.engine.requests[0].prompt_token_ids)
    assert prompt == "<｜fim▁begin｜>def f(a):<｜fim▁hole｜>\nprint(f(1))<｜fim▁end｜>"
    assert complete(web, suffix="x", prompt=[1, 2]).error["param"] == "suffix"
    assert complete(web, suffix="x", echo=True).error["param"] == "echo"


def test_stop_strings(web: Site) -> None:
    web.says("one\n\nQuestion: two")
    for step in (1, 5):
        web.engine.tokens_a_step = step
        (choice,) = choices(complete(web, stop=["Question:", "</s>"]))
        assert choice["text"] == "one\n\n"
        assert choice["stop_reason"] == "Question:"
        assert complete(web, stop=["Question:"], stream=True).deltas("text") == "one\n\n"


def test_markers_stay_in_the_text_unless_skipped(web: Site) -> None:
    web.says("a", "</think>", "b")
    assert choices(complete(web))[0]["text"] == "a</think>b"
    assert choices(complete(web, skip_special_tokens=True))[0]["text"] == "ab"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt": []}, "prompt"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": [[]]}, "prompt[0]"),
        ({"prompt": [1, "a"]}, "prompt[0]"),
        ({"prompt": [True]}, "prompt[0]"),
        ({"prompt": {"a": 1}}, "prompt"),
        ({"prompt": [-1]}, "prompt"),
        ({"prompt": [900]}, "prompt"),
        ({"prompt": [10**30]}, "prompt"),
        ({"prompt": ["a"] * 1025}, "prompt"),
        ({"logprobs": 21}, "logprobs"),
        ({"logprobs": -1}, "logprobs"),
        ({"best_of": 3}, "best_of"),
        ({"n": 2, "best_of": 1}, "best_of"),
        ({"guided_json": {}}, "guided_json"),
        ({"prompt": "x " * 3000}, "prompt"),
        ({"max_tokens": 2000}, "max_tokens"),
    ],
)
def test_what_is_wrong_is_named(web: Site, fields: dict[str, object], param: str) -> None:
    answer = complete(web, **fields)
    assert (answer.status, answer.error["param"]) == (400, param)
    assert not web.engine.requests


def test_one_failing_prompt_ends_the_request_and_frees_the_others(web: Site) -> None:
    web.engine.pace = 0.01
    web.engine.fails = "the model's numbers were not finite"
    answer = complete(web, prompt=["a", "b"])
    assert (answer.status, answer.error["code"]) == (500, "nonfinite_logits")
    assert web.engine.running == 0

"""Structured outputs offline: every answer is what was asked for, in a process too, drafts or not."""

from __future__ import annotations

import asyncio
import itertools
import json
import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from fourfold import LLM, AsyncLLM, RequestOutput, SamplingParams, StructuredOutputsParams
from fourfold.core.client import Launch
from fourfold.core.errors import RequestError
from fourfold.core.request import Grammar, Request
from fourfold.engine.client import InProcessEngineClient, ProcessEngineClient
from fourfold.llm.engine_process import ENGINE_PROCESS, grammar_masks
from fourfold.text.grammar_mask import GrammarMask
from fourfold.weights.synthetic import write_checkpoint
from tests.engine.planting import plant

pytestmark = pytest.mark.full

OPTIONS: dict[str, Any] = {"device": "cpu", "max_model_len": 1000, "max_num_seqs": 4}
DRAFTS = {"method": "mtp", "num_speculative_tokens": 2}
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 6},
        "ok": {"type": "boolean"},
        "colour": {"enum": ["red", "green", "blau", "黄"]},
    },
    "required": ["name", "ok", "colour"],
    "additionalProperties": False,
}
PARAMS = SamplingParams(
    max_tokens=500,
    temperature=1.0,
    seed=5,
    structured_outputs=StructuredOutputsParams(json=SCHEMA),
)
PROMPTS = ["你好", [5, 6, 7]]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    directory = tmp_path_factory.mktemp("structured") / "tiny"
    write_checkpoint(directory, "tiny", weights="float32", seed=1)
    return str(directory)


@pytest.fixture(scope="module")
def shared(model: str) -> LLM:
    return LLM(model, **OPTIONS)


@pytest.fixture
def llm(shared: LLM) -> Iterator[LLM]:
    yield shared
    stats = shared.stats()
    assert stats.num_running == stats.num_waiting == stats.pages_used == 0


def generate(llm: LLM, prompts: Any, params: Any) -> list[RequestOutput]:
    return llm.generate(prompts, params, use_tqdm=False)


def texts(results: list[RequestOutput]) -> list[str]:
    answers = [answer for result in results for answer in result.outputs]
    assert [answer.finish_reason for answer in answers] == ["stop"] * len(answers)
    return [answer.text for answer in answers]


def check_fits(text: str) -> None:
    found = json.loads(text)
    assert list(found) == ["name", "ok", "colour"]
    assert len(found["name"]) <= 6
    assert found["ok"] in (True, False)
    assert found["colour"] in SCHEMA["properties"]["colour"]["enum"]  # type: ignore[index]


def test_answers_fit_their_schema_wherever_they_are_made(model: str, llm: LLM) -> None:
    expected = generate(llm, PROMPTS, PARAMS)
    found = texts(expected)
    assert len(set(found)) == 2
    for text in found:
        check_fits(text)
    drafted = LLM(model, speculative_config=DRAFTS, **OPTIONS)
    again = generate(drafted, PROMPTS, PARAMS)
    assert [r.outputs for r in again] == [r.outputs for r in expected]

    async def run() -> None:
        async with AsyncLLM(model, speculative_config=DRAFTS, **OPTIONS) as remote:
            for prompt, known in zip(PROMPTS, expected, strict=True):
                results = [result async for result in remote.generate(prompt, PARAMS)]
                assert results[-1].outputs == known.outputs
            with pytest.raises(RequestError, match="the regex cannot be used"):
                async for _ in remote.generate("a", asking(regex="(")):
                    pass

    asyncio.run(run())


def test_right_drafts_stand_and_wrong_ones_do_not(
    model: str, llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    params = PARAMS
    (expected,) = generate(llm, PROMPTS[1], params)
    whole, turn = [5, 6, 7, *expected.outputs[0].token_ids], itertools.count()

    def guesses(known: int, count: int) -> list[int]:
        right = next(turn) % (count + 1)
        coming = enumerate(whole[known : known + count])
        return [t if i < right else (t + 1) % 600 for i, t in coming]

    plant(monkeypatch, guesses)
    drafted = LLM(model, speculative_config=DRAFTS, **OPTIONS)
    assert generate(drafted, PROMPTS[1], params)[0].outputs == expected.outputs
    assert all(drafted.stats().accepted)


def asking(**structure: Any) -> SamplingParams:
    return replace(PARAMS, structured_outputs=StructuredOutputsParams(**structure))


def test_every_kind(llm: LLM) -> None:
    wanted = [
        (asking(regex=r"[a-f]{3,5}-\d{2}"), lambda t: re.fullmatch(r"[a-f]{3,5}-\d{2}", t)),
        (asking(choice=["yes", "no", "vielleicht"]), ["yes", "no", "vielleicht"].__contains__),
        (asking(grammar='start: "a" start | "b"'), lambda t: re.fullmatch("a*b", t)),
        (asking(json='{"enum": [[1, 2], {"a": null}]}'), lambda t: json.loads(t) != 3),
        (SamplingParams(max_tokens=4), lambda t: len(t)),
    ]
    results = generate(llm, ["Say:"] * len(wanted), [params for params, _ in wanted])
    assert all(holds(text) for text, (_, holds) in zip(map(_text, results), wanted, strict=True))
    (cut,) = generate(llm, "Say:", replace(asking(json_object=True), max_tokens=6))
    assert _text(cut).startswith("{")
    assert len(cut.outputs[0].token_ids) == 6


def _text(result: RequestOutput) -> str:
    return result.outputs[0].text


def test_in_a_conversation_it_holds_once_the_reasoning_has_ended(llm: LLM) -> None:
    question = [{"role": "user", "content": "Which?"}]
    end = llm.get_tokenizer().special_id("</think>")
    params = replace(PARAMS, logit_bias={end: 3.0, 1: -100.0})
    switch = {"thinking": False}
    (plain,) = llm.chat(question, params, use_tqdm=False, chat_template_kwargs=switch)
    check_fits(_text(plain))
    (reasoned,) = llm.chat(question, replace(params, seed=2), use_tqdm=False)
    tokens = reasoned.outputs[0].token_ids
    assert 0 < tokens.index(end) < 200
    check_fits(_text(reasoned).partition("</think>")[2])


def test_what_cannot_be_is_refused_before_anything_runs(llm: LLM) -> None:
    for params, message in (
        (asking(regex="("), "the regex cannot be used"),
        (asking(json={"not": {}}), "the json_schema cannot be used"),
        (replace(PARAMS, min_tokens=3), "min_tokens cannot be used together with a grammar"),
    ):
        before = llm.stats().num_steps
        with pytest.raises(RequestError, match=message):
            generate(llm, ["fine", "not"], [SamplingParams(), params])
        assert llm.stats().num_steps == before


def test_a_grammar_that_cannot_go_on_ends_its_request_alone(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = _text(generate(llm, "b", asking(regex="[ab]{30}"))[0])

    def commit(mask: GrammarMask, tokens: list[int]) -> None:
        plain(mask, tokens)
        if len(mask._matched) >= 3:
            mask.failure = "the grammar does not lead on: too much"

    plain = GrammarMask.commit
    monkeypatch.setattr(GrammarMask, "commit", commit)
    failed, free = generate(
        llm,
        ["a", "b"],
        [replace(PARAMS, n=2), replace(PARAMS, structured_outputs=None, max_tokens=8)],
    )
    assert {a.finish_reason for a in failed.outputs} == {"error"}
    assert {a.error for a in failed.outputs} == {"the grammar does not lead on: too much"}
    assert {a.finish_reason for a in free.outputs} <= {"length", "stop"}
    monkeypatch.undo()
    assert _text(generate(llm, "b", asking(regex="[ab]{30}"))[0]) == alone


def test_engines_take_grammars_if_they_are_given_what_makes_masks(model: str, llm: LLM) -> None:
    grammar = Grammar("choice", '["yes", "no"]')
    request = Request("r", (5, 6), SamplingParams(max_tokens=20, seed=1), grammar=grammar)
    launch: Launch = llm.launch

    async def answer(client: Any) -> list[int]:
        await client.start()
        try:
            return [t async for o in client.generate(request) for t in o.new_token_ids]
        finally:
            await client.shutdown()

    found = [
        asyncio.run(answer(InProcessEngineClient(launch, mask_source=grammar_masks))),
        asyncio.run(answer(ProcessEngineClient(launch, entry=ENGINE_PROCESS))),
    ]
    assert llm.get_tokenizer().decode(found[0][:-1]) in ("yes", "no")
    assert found[0] == found[1]
    with pytest.raises(RequestError, match="without support for grammars"):
        asyncio.run(answer(InProcessEngineClient(launch)))


def test_a_tokenizer_in_memory_cannot_follow_into_a_process(model: str, llm: LLM) -> None:
    async def run() -> None:
        remote = AsyncLLM(model, tokenizer=llm.get_tokenizer(), **OPTIONS)
        await remote.start(InProcessEngineClient(remote.launch, mask_source=grammar_masks))
        async with remote:
            with pytest.raises(RequestError, match="given by its directory"):
                async for _ in remote.generate("a", asking(regex="a")):
                    pass

    asyncio.run(run())

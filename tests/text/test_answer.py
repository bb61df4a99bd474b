"""Answers read step by step: nothing depends on how many tokens a step brings; and sampling defaults."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest

from fourfold.core.errors import ConfigError
from fourfold.core.request import FinishReason, RequestOutput, SamplingParams
from fourfold.text.answer import Answer
from fourfold.text.events import ContentDelta, Finish
from fourfold.text.generation import GenerationDefaults, read_generation_defaults
from fourfold.text.plain import PlainParser
from tests.server.stub import make_tokenizer

TOKENIZER = make_tokenizer()
EOS = 1


def read(tokens: list[int], sizes: list[int], params: SamplingParams) -> tuple[str, Answer]:
    """The text of `tokens` that come `sizes` at a time, the last ending the answer."""
    parser = PlainParser(TOKENIZER, stop=params.stop, min_tokens=params.min_tokens)
    answer = Answer(parser, params, EOS)
    events, left = [], list(tokens)
    for size in itertools.cycle(sizes):
        now, left = tuple(left[:size]), left[size:]
        reason = None if left else FinishReason.STOP
        events += answer.take(RequestOutput("a", now, reason, stop_reason=now[-1]))
        if answer.finished:
            break
    assert [type(e) for e in events].count(Finish) == 1
    assert isinstance(events[-1], Finish)
    return "".join(e.text for e in events if isinstance(e, ContentDelta)), answer


@pytest.mark.parametrize(
    ("stop", "least", "expected", "reason"),
    [
        ((), 0, "one two 你好 three", None),
        (("你好",), 0, "one two ", "你好"),
        (("wo", "o 你"), 0, "one t", "wo"),
        (("one",), 3, "one two 你好 three", None),
    ],
)
def test_however_tokens_come_the_answer_is_the_same(
    stop: tuple[str, ...], least: int, expected: str, reason: str | None
) -> None:
    tokens = [*TOKENIZER.encode("one two 你好 three"), EOS]
    params = SamplingParams(stop=stop, min_tokens=least)
    for sizes in ([1], [2], [3, 1], [100]):
        text, answer = read(tokens, sizes, params)
        assert text == expected
        assert answer.stop_reason == reason
        assert answer.reason is FinishReason.STOP
        assert not (answer.must_abort and reason is None)


def test_a_stop_token_is_named_if_it_was_asked_for() -> None:
    tokens = TOKENIZER.encode("one two")
    _, answer = read(tokens, [2], SamplingParams(stop_token_ids=(tokens[-1],)))
    assert answer.stop_reason == tokens[-1]
    _, answer = read([*tokens, EOS], [2], SamplingParams())
    assert answer.stop_reason is None
    _, answer = read([*tokens, EOS], [2], SamplingParams(stop_token_ids=(EOS,)))
    assert answer.stop_reason == EOS


def test_an_answer_ended_here_goes_on_in_the_engine() -> None:
    answer = Answer(PlainParser(TOKENIZER), SamplingParams(), EOS)
    answer.take(RequestOutput("a", (10,)))
    assert answer.end() == [Finish("stop")]
    assert answer.must_abort
    assert answer.end() == []
    assert answer.take(RequestOutput("a", (11,), FinishReason.LENGTH)) == []


def test_sampling_defaults_come_from_the_checkpoint(tmp_path: Path) -> None:
    assert read_generation_defaults(tmp_path) == GenerationDefaults()
    path = tmp_path / "generation_config.json"
    path.write_text(
        json.dumps({"temperature": 0.6, "top_p": 0.95, "top_k": None, "bos_token_id": 0})
    )
    assert read_generation_defaults(tmp_path) == GenerationDefaults(temperature=0.6, top_p=0.95)
    path.write_text(json.dumps({"temperature": 0.6, "do_sample": False}))
    assert read_generation_defaults(tmp_path).temperature == 0.0


@pytest.mark.parametrize("text", ["{", "[]", '{"temperature": "hot"}', '{"top_p": 2}'])
def test_wrong_defaults_are_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "generation_config.json").write_text(text)
    with pytest.raises(ConfigError, match=r"generation_config\.json"):
        read_generation_defaults(tmp_path)

"""Held-out questions, answered greedily and scored exactly, skill by skill.

Contract: `cases` names what is asked; `questions` gives a case's items from a seed; `score` compares an
answer's token ids with what the item says: content word for word, calls and JSON by value, and the
answer must have ended. Answers come from any callable, or from `fourfold.LLM`, all items of a case in
one batch; `measure` tells what the engine counted meanwhile. It does not know what is compared with what.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any

from fourfold.core.errors import RequestError
from fourfold.text import markers
from fourfold.text.events import ParsedMessage, collect
from fourfold.text.parse import TokenParser
from fourfold.text.prompt import ParserStart
from fourfold.text.tokenizer import Tokenizer
from train.data.items import Item
from train.data.mixture import SKILLS, Mixture

if TYPE_CHECKING:
    from fourfold import LLM
    from fourfold.core.client import EngineStats

Answer = Callable[[Sequence[Sequence[int]], Sequence[int]], Sequence[Sequence[int]]]
"""(prompts, most tokens of each answer) → the answers' token ids, their end included."""

FAR_LENGTHS = (2048, 4096, 8192, 16384)
_MARGIN = 16  # tokens beyond the reference's length that an answer may have


@dataclass(frozen=True)
class Case:
    """A skill, at a distance for far recall (tokens back to the fact)."""

    skill: str
    length: int = 0

    @property
    def name(self) -> str:
        """As results call it."""
        return f"{self.skill}_{self.length}" if self.length else self.skill


def cases(lengths: Sequence[int] = FAR_LENGTHS) -> list[Case]:
    """Every skill; far recall at each of `lengths`."""
    plain = [Case(skill) for skill in SKILLS if skill != "recall_far"]
    return [*plain, *(Case("recall_far", length) for length in lengths)]


def questions(mixture: Mixture, case: Case, count: int, seed: int = 0) -> list[Item]:
    """`count` held-out items."""
    random = Random(f"evaluation/{seed}/{case.name}")
    return [mixture.item(case.skill, random, True, case.length) for _ in range(count)]


def parse(item: Item, ids: Sequence[int], tokenizer: Tokenizer) -> ParsedMessage:
    """What `ids` say. Raises `RequestError` for ids that are no tokens."""
    start = ParserStart.REASONING if item.thinking else ParserStart.CONTENT
    parser = TokenParser(tokenizer, start, bool(item.tools))
    events = [event for index in ids for event in parser.push(index)]
    return collect([*events, *parser.finish("stop")])


def score(item: Item, ids: Sequence[int], tokenizer: Tokenizer) -> bool:
    """Whether the answer `ids` is right."""
    if not ids or ids[-1] != tokenizer.special_id(markers.EOS):
        return False
    try:
        message = parse(item, ids, tokenizer)
    except RequestError:
        return False
    wanted, content = item.answer, message.content or ""
    calls = [(call["function"]["name"], call["function"]["arguments"]) for call in _calls(wanted)]
    found = [(call.name, call.arguments) for call in message.tool_calls]
    if len(calls) != len(found):
        return False
    for (name, arguments), (got, values) in zip(calls, found, strict=True):
        if name != got or _json(arguments) != _json(values):
            return False
    if item.response_format is not None:
        return _json(content) == _json(wanted["content"])
    return bool(content == wanted["content"])


def _calls(message: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
    return message.get("tool_calls") or ()


def _json(text: str) -> tuple[str, Any]:
    """A value to compare, types included: 1 is not 1.0 and not true."""
    try:
        return "json", json.dumps(json.loads(text), sort_keys=True)
    except ValueError:
        return "text", text


@dataclass(frozen=True)
class Answered:
    """One question's answer: token ids, and whether it is right."""

    case: str
    number: int
    ids: tuple[int, ...]
    right: bool


@dataclass(frozen=True)
class Score:
    """What came of a case's questions: `right` of `count` answers, and the engine's counts: tokens of
    prompts, those of them found in the prefix cache, tokens of answers, first drafts made and accepted,
    steps and seconds."""

    case: str
    count: int
    right: int
    prompt_tokens: int
    cached_tokens: int
    answer_tokens: int
    drafted: int
    accepted: int
    steps: int
    seconds: float

    @property
    def share(self) -> float:
        """Of right answers."""
        return self.right / self.count

    @property
    def acceptance(self) -> float | None:
        """Of first drafts; None where none were made."""
        return self.accepted / self.drafted if self.drafted else None

    def to_json(self) -> dict[str, Any]:
        """One object of a results file."""
        rounded = {"seconds": round(self.seconds, 2), "share": round(self.share, 4)}
        drafts = self.acceptance
        accepted = {"acceptance": None if drafts is None else round(drafts, 4)}
        return asdict(self) | rounded | accepted


def ask(mixture: Mixture, case: Case, count: int, answer: Answer, seed: int = 0) -> list[Answered]:
    """Answers to `count` of a case's questions."""
    encoder, items = mixture.encoder, questions(mixture, case, count, seed)
    prompts = [encoder.prompt(item) for item in items]
    most = [len(encoder.answer(item)) + _MARGIN for item in items]
    answers = answer(prompts, most)
    return [
        Answered(case.name, n, tuple(ids), score(item, ids, encoder.tokenizer))
        for n, (item, ids) in enumerate(zip(items, answers, strict=True))
    ]


def measure(
    llm: LLM, mixture: Mixture, case: Case, count: int, seed: int = 0, times: int = 1
) -> tuple[Score, list[Answered]]:
    """The score of a case's questions, asked `times` times one after another; what counts is the last.

    `llm` is a loaded model with whose tokenizer `mixture` encodes.
    """
    for _ in range(times):
        before, begun = llm.stats(), time.monotonic()
        found = ask(mixture, case, count, answering(llm), seed)
        seconds, after = time.monotonic() - begun, llm.stats()
    right = sum(each.right for each in found)
    return _score(case.name, len(found), right, before, after, seconds), found


def _score(
    name: str, count: int, right: int, before: EngineStats, after: EngineStats, seconds: float
) -> Score:
    return Score(
        name,
        count,
        right,
        after.prompt_tokens - before.prompt_tokens,
        after.cached_tokens - before.cached_tokens,
        after.generation_tokens - before.generation_tokens,
        sum(after.drafted[:1]) - sum(before.drafted[:1]),
        sum(after.accepted[:1]) - sum(before.accepted[:1]),
        after.num_steps - before.num_steps,
        seconds,
    )


def write_answers(path: Path, answers: Sequence[Answered]) -> None:
    """Add answers to a file, a JSON object a line."""
    with path.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(asdict(each)) + "\n" for each in answers)


def read_answers(path: Path) -> Iterator[Answered]:
    """What `write_answers` wrote."""
    with path.open(encoding="utf-8") as file:
        for line in file:
            data = json.loads(line)
            yield Answered(data["case"], data["number"], tuple(data["ids"]), data["right"])


def evaluate(
    mixture: Mixture, wanted: Sequence[Case], count: int, answer: Answer, seed: int = 0
) -> dict[str, float]:
    """Share of right answers, by case."""
    results = {}
    for case in wanted:
        found = ask(mixture, case, count, answer, seed)
        results[case.name] = sum(each.right for each in found) / len(found)
    return results


def reference(mixture: Mixture, items: Sequence[Item]) -> list[list[int]]:
    """The answers the items themselves give."""
    return [mixture.encoder.answer(item) for item in items]


def answering(llm: LLM) -> Answer:
    """Greedy answers of a loaded model."""
    from fourfold import SamplingParams

    end = llm.get_tokenizer().special_id(markers.EOS)

    def answer(prompts: Sequence[Sequence[int]], most: Sequence[int]) -> list[list[int]]:
        params = [SamplingParams(temperature=0.0, max_tokens=count) for count in most]
        asked = [{"prompt_token_ids": list(prompt)} for prompt in prompts]
        replies = [reply.outputs[0] for reply in llm.generate(asked, params, use_tqdm=False)]
        return [
            [*(t for t in reply.token_ids if t != end), *([end] * (reply.finish_reason == "stop"))]
            for reply in replies
        ]

    return answer

"""Generated conversations: the same from the same seed, split, and what they say they are."""

import ast
import json
from collections.abc import Iterator
from pathlib import Path
from random import Random

import numpy as np
import pytest

from fourfold.text import markers
from fourfold.text.tokenizer import Tokenizer
from fourfold.weights.synthetic_tokenizer import tokenizer_files as synthetic_files
from train.batch import BLOCK
from train.data import arithmetic, repeat, tools, words
from train.data.encode import Encoder
from train.data.items import held_out
from train.data.mixture import SKILLS, Mixture
from train.evaluate import Case, cases, evaluate, questions, reference, score
from train.tokenizer import tokenizer_files

COUNT = 20
LENGTH = 300


@pytest.fixture(scope="module")
def mixture() -> Mixture:
    data = synthetic_files(600, 4096)["tokenizer.json"]
    return Mixture(Encoder(Tokenizer(data, "tokenizer.json")), seed=3)


def every_case() -> list[Case]:
    return cases(lengths=(LENGTH,))


@pytest.mark.parametrize("skill", SKILLS)
def test_the_same_seed_gives_the_same_items(mixture: Mixture, skill: str) -> None:
    first, again, other = (
        [mixture.item(skill, Random(seed), False, LENGTH) for _ in range(3)] for seed in (1, 1, 2)
    )
    assert first == again
    assert first != other


@pytest.mark.parametrize("skill", SKILLS)
def test_training_never_asks_what_evaluation_asks(mixture: Mixture, skill: str) -> None:
    random = Random(0)
    for _ in range(COUNT):
        trained = mixture.item(skill, random, False, LENGTH)
        assert not any(map(held_out, (trained.key, *trained.keys)))
        asked = mixture.item(skill, random, True, LENGTH)
        assert held_out(asked.key)


def test_enough_sums_are_held_out() -> None:
    random = Random(0)
    found = [arithmetic.problem(random, True) for _ in range(3000)]
    assert len({p.result for p in found}) >= 500
    assert {p.op for p in found} == set("+-*")
    products = {(p.a, p.b) for p in found if p.op == "*"}
    trained = [arithmetic.problem(random, False) for _ in range(3000)]
    assert products.isdisjoint({(p.a, p.b) for p in trained if p.op == "*"})


def test_the_working_leads_to_the_answer() -> None:
    random = Random(0)
    for _ in range(300):
        p = arithmetic.problem(random, False)
        first, *columns, last = arithmetic.working(p).splitlines()
        assert first == f"{p.a} {p.op} {p.b}"
        for column in columns:
            left, right = column.split(",")[0].split(" = ")
            assert _value(left) == int(right), column
        digits = [column.split(", ")[1].removeprefix("write ") for column in columns]
        assert int("".join(reversed(digits))) == p.result
        assert last == f"So {p.result}"


def _value(text: str) -> int:
    """The sum that a column writes out."""

    def walk(node: ast.expr) -> int:
        if isinstance(node, ast.BinOp):
            left, right = walk(node.left), walk(node.right)
            kinds = {ast.Add: left + right, ast.Sub: left - right, ast.Mult: left * right}
            return kinds[type(node.op)]
        assert isinstance(node, ast.Constant)
        return int(node.value)

    return walk(ast.parse(text, mode="eval").body)


def test_tools_have_arguments_of_every_type() -> None:
    assert len(tools.TOOLS) >= 8
    kinds = {kind for tool in tools.TOOLS for kind in tool.properties.values()}
    assert kinds == {"string", "integer", "number", "boolean", "array"}
    random = Random(0)
    python = {"string": str, "integer": int, "number": float, "boolean": bool, "array": list}
    for tool in tools.TOOLS:
        for _ in range(COUNT):
            use = tool.draw(random)
            assert list(use.arguments) == list(tool.properties)
            for key, kind in tool.properties.items():
                assert type(use.arguments[key]) is python[kind]


def test_reference_answers_are_right_and_others_wrong(mixture: Mixture) -> None:
    tokenizer = mixture.encoder.tokenizer
    for case in every_case():
        items = questions(mixture, case, COUNT)
        answers = reference(mixture, items)
        assert all(score(item, ids, tokenizer) for item, ids in zip(items, answers, strict=True))
        for item, ids in zip(items, answers, strict=True):
            for wrong in _corrupted(ids, tokenizer):
                assert not score(item, wrong, tokenizer), tokenizer.decode(wrong)


def _corrupted(ids: list[int], tokenizer: Tokenizer) -> Iterator[list[int]]:
    yield []
    yield ids[:-1]  # never ends
    end = ids[-1]
    yield [end]
    text = tokenizer.decode(ids[:-1])
    # The last digit or letter of the answer itself is another one.
    body = text.removesuffix("</｜DSML｜invoke>\n</｜DSML｜tool_calls>").rstrip()
    tail = text[len(body) :]
    body, closing = (
        (body.removesuffix("</｜DSML｜parameter>"), "</｜DSML｜parameter>" + tail)
        if tail
        else (body, "")
    )
    place = max(n for n, letter in enumerate(body) if letter.isalnum())
    other = "7" if body[place] != "7" else "8"
    changed = body[:place] + other + body[place + 1 :] + closing
    yield [*tokenizer.encode(changed, allow_special=True), end]


def test_far_facts_are_far(mixture: Mixture) -> None:
    for length in (LENGTH, 1200):
        for item in questions(mixture, Case("recall_far", length), 4):
            text = item.messages[-1]["content"]
            value = item.answer["content"]
            behind = mixture.encoder.count(text[text.index(value) :])
            assert 0.8 * length < behind < 1.2 * length
            assert text.count(value) == 1 or not value.isdigit()


def test_evaluation_counts_right_answers(mixture: Mixture) -> None:
    case = Case("arithmetic")
    items = questions(mixture, case, 10)
    right = reference(mixture, items)
    answers = [ids if n % 5 else ids[:-1] for n, ids in enumerate(right)]
    found = evaluate(mixture, [case], 10, lambda prompts, most: answers)
    assert found == {"arithmetic": 0.8}


def test_rows_hold_whole_documents(mixture: Mixture) -> None:
    rows, again = mixture.rows(5, 2, 1024), mixture.rows(5, 2, 1024)
    assert all(
        np.array_equal(getattr(rows, name), getattr(again, name))
        for name in ("ids", "starts", "weights")
    )
    assert not np.array_equal(rows.ids, mixture.rows(6, 2, 1024).ids)
    begin_id = mixture.encoder.tokenizer.special_id(markers.BOS)
    for ids, starts, weights in zip(rows.ids, rows.starts, rows.weights, strict=True):
        begins = sorted(set(starts.tolist()))
        assert all(begin % BLOCK == 0 for begin in begins)
        for begin in begins:
            inside = (starts == begin) & (weights > 0)
            if inside.any():
                assert ids[begin] == begin_id
                assert (weights[inside] == 1).any()
        assert (weights > 0).mean() > 0.4


def test_answers_are_what_counts(mixture: Mixture) -> None:
    for skill in SKILLS:
        item = mixture.item(skill, Random(1), False, LENGTH)
        document = mixture.encoder.document(item)
        answer = mixture.encoder.answer(item)
        assert document.ids == [*mixture.encoder.prompt(item), *answer]
        assert document.weights[-len(answer) :] == [1.0] * len(answer)
        assert 0 < document.weights[-len(answer) - 1] < 1


def test_the_tokenizer_is_compact_and_keeps_digits_apart(tmp_path: Path) -> None:
    files = tokenizer_files(600, 4096, texts=12)
    again = tokenizer_files(600, 4096, texts=12)
    assert json.dumps(files) == json.dumps(again)
    tokenizer = Tokenizer(files["tokenizer.json"], "tokenizer.json")
    assert tokenizer.known_ids() == frozenset(range(600))
    assert len(tokenizer.encode("345")) == 3
    pieces = map(tokenizer.token_bytes, tokenizer.known_ids())
    assert not [
        piece for piece in pieces if len(piece) > 1 and any(chr(b).isdigit() for b in piece)
    ]
    for text in ("What is 12 + 9?", "你好！", '{"a": [1.5, true]}', "  two  blanks\n"):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    wanted = {markers.BOS: 0, markers.EOS: 1}
    assert {text: tokenizer.special_id(text) for text in wanted} == wanted
    for text in (markers.USER, markers.ASSISTANT, markers.THINK, markers.END_THINK, markers.DSML):
        assert tokenizer.encode(text, allow_special=True) == [tokenizer.special_id(text)]


def test_drills_fill_their_share(mixture: Mixture) -> None:
    repeated = mixture.encoder.tokenizer.encode("Repeat this text.")

    def found(drill: float) -> int:
        ids = mixture.rows(0, 4, 2048, drill).ids
        text = " ".join(map(str, ids.flatten().tolist()))
        return text.count(" ".join(map(str, repeated)))

    assert found(0.0) == 0 < found(0.1) < found(0.6)


def test_a_drill_is_said_again_word_for_word() -> None:
    random = Random(0)
    for length in (8, 30, 400):
        item = repeat.item(random, length)
        assert item.messages[-1]["content"].endswith(item.answer["content"])
        assert len(item.answer["content"].split()) > length // 3


def test_fillers_never_speak_of_what_facts_are_about() -> None:
    random = Random(1)
    fillers = " ".join(words.filler(random) for _ in range(2000)).lower()
    things = {words.thing(random) for _ in range(3000)}
    assert len(things) > 150
    assert not any(word in fillers.split() for thing in things for word in thing.split()[1:])

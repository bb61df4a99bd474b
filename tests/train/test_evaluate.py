"""Scores through the engine, answers kept in files, and two sets of answers side by side."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result

from fourfold import LLM
from train import parameters
from train.cli import main
from train.data.encode import Encoder
from train.data.mixture import Mixture
from train.evaluate import (
    Answered,
    Case,
    measure,
    questions,
    read_answers,
    reference,
    score,
    write_answers,
)
from train.export import export
from train.flavours import FLAVOURS, Comparison, Flavour, checkpoint, compare, overall, table
from train.geometry import model_config, small_config
from train.tokenizer import write_tokenizer

pytestmark = pytest.mark.full

CONFIG = small_config(vocab_size=400)
FAR = Case("recall_far", 300)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint that has learned nothing."""
    directory = tmp_path_factory.mktemp("untrained")
    write_tokenizer(directory, 400, 4096, seed=0, texts=4)
    masters = parameters.initial(model_config(CONFIG), 0, torch.device("cpu"))
    export(directory / "model", CONFIG, masters, directory)
    return directory / "model"


def test_what_the_engine_counted_is_told(model: Path) -> None:
    drafts = {"method": "mtp", "num_speculative_tokens": 1}
    llm = LLM(model, device="cpu", speculative_config=drafts, state_interval=256)
    mixture = Mixture(Encoder(llm.get_tokenizer()))
    cold, answers = measure(llm, mixture, FAR, 2)
    prompts = [mixture.encoder.prompt(item) for item in questions(mixture, FAR, 2)]
    assert cold.case == "recall_far_300"
    assert (cold.count, cold.right, cold.cached_tokens) == (2, 0, 0)
    assert cold.prompt_tokens == sum(map(len, prompts))
    assert cold.answer_tokens >= sum(len(each.ids) for each in answers) > 0
    assert 0 <= cold.accepted <= cold.drafted
    assert cold.drafted > 0
    assert cold.acceptance == cold.accepted / cold.drafted
    assert cold.steps > 0

    llm.reset_prefix_cache()
    warm, again = measure(llm, mixture, FAR, 2, times=2)
    assert 2 * 256 <= warm.cached_tokens < warm.prompt_tokens
    assert again == answers
    warmer, _ = measure(llm, mixture, FAR, 2)
    assert warmer.cached_tokens == warm.cached_tokens
    assert warm.to_json()["share"] == 0.0
    assert warm.to_json()["acceptance"] == pytest.approx(warm.acceptance, abs=1e-4)


@pytest.fixture(scope="module")
def llm(model: Path) -> LLM:
    return LLM(model, device="cpu", num_gpu_blocks_override=64)


@pytest.fixture(scope="module")
def mixture(llm: LLM) -> Mixture:
    return Mixture(Encoder(llm.get_tokenizer()))


def test_right_answers_are_counted(
    llm: LLM, mixture: Mixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = Case("about")
    right = reference(mixture, questions(mixture, case, 5))
    monkeypatch.setattr(
        "train.evaluate.answering", lambda llm: lambda prompts, most: [*right[:3], [5], []]
    )
    found, answers = measure(llm, mixture, case, 5)
    assert [each.right for each in answers] == [True, True, True, False, False]
    assert (found.right, found.share, found.acceptance) == (3, 0.6, None)


def test_fewer_questions_are_the_first_of_more(mixture: Mixture) -> None:
    for case in (Case("tool_call"), FAR):
        assert questions(mixture, case, 2) == questions(mixture, case, 5)[:2]


def test_answers_survive_their_file(tmp_path: Path) -> None:
    answers = [Answered("a", 0, (3, 1), True), Answered("b", 7, (), False)]
    write_answers(tmp_path / "a.jsonl", answers[:1])
    write_answers(tmp_path / "a.jsonl", answers[1:])
    assert list(read_answers(tmp_path / "a.jsonl")) == answers


def test_answers_side_by_side() -> None:
    one = [Answered("a", n, (n, 9), n < 3) for n in range(5)] + [Answered("b", 0, (1,), True)]
    other = [Answered("a", n, (n, 9 if n != 2 else 8), n < 2) for n in range(4)]
    other += [Answered("b", 0, (1,), True), Answered("b", 1, (1,), True)]
    found = compare(one, other)
    assert found == [Comparison("a", 4, 3, (3, 2)), Comparison("b", 1, 1, (1, 1))]
    assert overall(found) == Comparison("all", 5, 4, (4, 3))
    assert found[0].share == 0.75
    last = table("mtp", found).splitlines()[-1]
    assert last.split() == [
        "mtp",
        "all",
        "5",
        "items",
        "4",
        "equal",
        "80.00",
        "%",
        "right",
        "4",
        "and",
        "3",
    ]
    assert overall(compare(one, [])) == Comparison("all", 0, 0, (0, 0))
    assert "0 items" in table("mtp", [])


def test_flavours_say_how_they_are_run(model: Path, tmp_path: Path) -> None:
    assert len({flavour.name for flavour in FLAVOURS}) == len(FLAVOURS)
    (bodies,) = (each.arguments() for each in FLAVOURS if each.bodies)
    assert bodies["device"] == "cpu"
    assert set(bodies["kernels"].values()) == {"body"}
    assert checkpoint(Flavour("plain", ""), model, tmp_path) == model
    made = checkpoint(Flavour("other", "", weights="fp8"), model, tmp_path)
    written = (made / "config.json").stat().st_mtime_ns
    assert json.loads((made / "config.json").read_text())["expert_dtype"] == "fp8"
    assert checkpoint(Flavour("other", "", weights="fp8"), model, tmp_path) == made
    assert (made / "config.json").stat().st_mtime_ns == written


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(each) for each in arguments])


def test_evaluate_writes_scores_and_answers(model: Path, tmp_path: Path) -> None:
    results, answers = tmp_path / "scores.json", tmp_path / "answers.jsonl"
    given = ("--model", model, "--device", "cpu", "--count", 2)
    far = ("--lengths", "128,200", "--far-count", "1,0")
    asked = ("--only", "about", "--only", "recall_far_128", "--only", "recall_far_200")
    found = invoke("evaluate", *given, *far, *asked, "--results", results, "--answers", answers)
    assert found.exit_code == 0, found.output
    scores = json.loads(results.read_text())
    assert [json.loads(line) for line in found.output.splitlines()] == scores
    assert [(each["case"], each["count"]) for each in scores] == [
        ("about", 2),
        ("recall_far_128", 1),
    ]
    assert all(each["drafted"] > 0 for each in scores)
    assert len(list(read_answers(answers))) == 3


def test_flavours_are_run_and_compared(model: Path, tmp_path: Path) -> None:
    given = ("--model", model, "--device", "cpu", "--count", 2, "--only", "about")
    chosen = ("--flavour", "plain", "--flavour", "chunked", "--set", "max_num_seqs=4")
    found = invoke("flavours", *given, "--out", tmp_path, *chosen)
    assert found.exit_code == 0, found.output
    assert found.output.splitlines()[-1].split()[:6] == [
        "chunked",
        "all",
        "2",
        "items",
        "2",
        "equal",
    ]
    other = tmp_path / "other.jsonl"
    first, *rest = read_answers(tmp_path / "plain.jsonl")
    write_answers(other, [replace(first, ids=(*first.ids, 3)), *rest])
    found = invoke("compare", tmp_path / "plain.jsonl", other)
    assert found.output.splitlines()[-1].split()[:6] == ["other", "all", "2", "items", "1", "equal"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--only", "poetry"), "--only poetry: no such case"),
        (("--lengths", "128,256", "--far-count", "1,2,3"), "3 numbers for 2 lengths"),
    ],
)
def test_what_cannot_be_asked_is_refused(
    model: Path, arguments: tuple[str, ...], said: str
) -> None:
    found = invoke("evaluate", "--model", model, "--device", "cpu", *arguments)
    assert found.exit_code == 2
    assert said in found.output


def test_an_unfinished_answer_is_wrong(mixture: Mixture) -> None:
    (item,) = questions(mixture, Case("arithmetic"), 1)
    (answer,) = reference(mixture, [item])
    assert score(item, answer, mixture.encoder.tokenizer)
    assert not score(item, answer[:-1], mixture.encoder.tokenizer)

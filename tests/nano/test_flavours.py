"""The built-in checkpoint answers the same however it is stored, cached, cut, found again or drafted for."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from train.evaluate import Answered, Case, Score
from train.flavours import FLAVOURS, PLAIN, Flavour, answers_of, compare, load, overall, table

BY_NAME = {flavour.name: flavour for flavour in FLAVOURS}
OTHERS = [name for name in BY_NAME if name != PLAIN]
QUICKLY = ("fp8_experts", "prefix_hits", "bodies")
Asked = Sequence[tuple[Case, int]]

FEW = (
    (Case("arithmetic"), 12),
    (Case("recall_near"), 8),
    (Case("tool_result"), 1),
    (Case("recall_far", 600), 1),
)
MANY = (
    (Case("arithmetic"), 120),
    (Case("arithmetic_thinking"), 20),
    (Case("recall_near"), 100),
    (Case("about"), 20),
    (Case("schema"), 20),
    (Case("tool_call"), 10),
    (Case("tool_result"), 20),
    (Case("recall_far", 2048), 8),
    (Case("recall_far", 4096), 2),
)


class Ran:
    """What a flavour answered, and how it was run."""

    def __init__(self, flavour: Flavour, model: Path, workspace: Path, asked: Asked):
        llm = load(flavour, model, workspace, device="cpu", num_gpu_blocks_override=1024)
        self.explanation = llm.info.explanation
        found = answers_of(flavour, llm, asked)
        self.scores: list[Score] = [score for score, _ in found]
        self.answers: list[Answered] = [each for _, answers in found for each in answers]

    def sum(self, name: str) -> int:
        return sum(getattr(score, name) for score in self.scores)

    def formats(self, part: str) -> list[str]:
        return [each["format"] for each in self.explanation["buffers"][part]]


def check(name: str, ran: Ran, plain: Ran) -> None:
    """Answers are the same, and the flavour took effect."""
    found = compare(plain.answers, ran.answers)
    every = overall(found)
    assert every.count == len(plain.answers)
    # One of a few questions may stand on a knife's edge.
    assert every.count - every.equal <= max(1, every.count // 100), "\n" + table(name, found)
    assert _took_effect(name, ran, plain), name


def _took_effect(name: str, ran: Ran, plain: Ran) -> Any:
    if name == "fp8_experts":
        return _says(ran, "routed experts: fp8_block with f32") and _says(plain, "experts: mxfp4")
    if name == "bf16":
        return not any("FP" in each for each in ran.formats("weights"))
    if name == "kv_bf16":
        rows = [ran.formats("cache")[n] for n in range(4)]
        return not any("FP8" in each for each in rows) and "FP8" in plain.formats("cache")[0]
    if name == "chunked":
        return ran.sum("steps") > plain.sum("steps") and not ran.sum("cached_tokens")
    if name == "prefix_hits":
        return ran.sum("cached_tokens") > ran.sum("prompt_tokens") / 4
    if name == "mtp":
        return ran.sum("accepted") >= 0.6 * ran.sum("drafted") > 0 == plain.sum("drafted")
    assert name == "bodies"
    return {each["kernel"] for each in ran.explanation["kernels"]} == {"body"}


def _says(ran: Ran, words: str) -> bool:
    return any(words in line for line in ran.explanation["quantisation"])


@pytest.fixture(scope="module")
def few(nano: Path, tmp_path_factory: pytest.TempPathFactory) -> Ran:
    return Ran(BY_NAME[PLAIN], nano, tmp_path_factory.mktemp("few"), FEW)


@pytest.mark.full
@pytest.mark.parametrize("name", QUICKLY)
def test_a_flavour_changes_no_answer(name: str, few: Ran, nano: Path, tmp_path: Path) -> None:
    check(name, Ran(BY_NAME[name], nano, tmp_path, FEW), few)


@pytest.fixture(scope="module")
def many(nano: Path, tmp_path_factory: pytest.TempPathFactory) -> Ran:
    return Ran(BY_NAME[PLAIN], nano, tmp_path_factory.mktemp("many"), MANY)


@pytest.mark.slow
@pytest.mark.parametrize("name", OTHERS)
def test_a_flavour_changes_next_to_no_answer(
    name: str, many: Ran, nano: Path, tmp_path: Path
) -> None:
    check(name, Ran(BY_NAME[name], nano, tmp_path, MANY), many)

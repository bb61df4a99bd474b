"""The built-in checkpoint on a GPU: its kernels give the answers of the ops' definitions on the CPU."""

from pathlib import Path

import pytest
import torch

from train.evaluate import Answered, Case, Score
from train.flavours import FLAVOURS, answers_of, compare, load, overall, table

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"),
]

ASKED = (
    (Case("arithmetic"), 60),
    (Case("recall_near"), 60),
    (Case("schema"), 10),
    (Case("tool_call"), 5),
    (Case("tool_result"), 10),
    (Case("recall_far", 2048), 5),
)


def ran(name: str, nano: Path, workspace: Path, device: str) -> tuple[list[Score], list[Answered]]:
    (flavour,) = (each for each in FLAVOURS if each.name == name)
    llm = load(flavour, nano, workspace, device=device, num_gpu_blocks_override=2048)
    found = answers_of(flavour, llm, ASKED)
    return [score for score, _ in found], [each for _, answers in found for each in answers]


def test_kernels_answer_what_the_definitions_answer(nano: Path, tmp_path: Path) -> None:
    scores, answers = ran("plain", nano, tmp_path, "cuda")
    _, expected = ran("bodies", nano, tmp_path, "cpu")
    found = compare(expected, answers)
    every = overall(found)
    assert every.count - every.equal <= max(1, every.count // 100), "\n" + table("cuda", found)
    assert sum(score.right for score in scores) >= 0.9 * every.count

"""The built-in checkpoint answers what it was trained to answer, and foresees its own next words."""

from pathlib import Path

import pytest

from fourfold import LLM
from train.data.encode import Encoder
from train.data.mixture import Mixture
from train.evaluate import Case, Score, measure

# At least so large a share of so many held-out questions. Twenty questions are a rough measure.
REQUIRED = (
    (Case("arithmetic"), 200, 0.95),
    (Case("arithmetic_thinking"), 60, 0.95),
    (Case("tool_call"), 40, 0.95),
    (Case("tool_result"), 40, 0.95),
    (Case("recall_near"), 200, 0.98),
    (Case("schema"), 40, 0.90),
    (Case("recall_far", 2048), 20, 0.80),
    (Case("recall_far", 4096), 20, 0.80),
)
ACCEPTED = 0.6  # of first drafts


def scores(nano: Path, wanted: tuple[tuple[Case, int, float], ...]) -> list[Score]:
    drafts = {"method": "mtp", "num_speculative_tokens": 1}
    llm = LLM(nano, device="cpu", speculative_config=drafts, num_gpu_blocks_override=512)
    mixture = Mixture(Encoder(llm.get_tokenizer()))
    return [measure(llm, mixture, case, count)[0] for case, count, _ in wanted]


@pytest.mark.slow
def test_it_answers_held_out_questions(nano: Path) -> None:
    found = scores(nano, REQUIRED)
    for score, (case, _, share) in zip(found, REQUIRED, strict=True):
        assert score.share >= share, f"{case.name}: {score.right} of {score.count}"
        assert (score.acceptance or 0) >= ACCEPTED, f"{case.name}: {score.acceptance}"

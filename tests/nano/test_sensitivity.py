"""The built-in checkpoint shows faults of the engine: broken in one part, it fails where that part is
needed and nowhere else."""

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import pytest

from fourfold import LLM
from tests.nano.faults import FAULTS, Fault, installed
from train.data.encode import Encoder
from train.data.mixture import Mixture
from train.evaluate import Case, measure

Scorer = Callable[[Fault | None, Case, int], float]


@pytest.fixture(scope="module")
def scores(nano: Path) -> Scorer:
    """The share of right answers to a case's first questions, with a fault or without."""
    models: dict[str, LLM] = {}
    known: dict[tuple[str, Case, int], float] = {}

    def score(fault: Fault | None, case: Case, count: int) -> float:
        name = fault.name if fault else ""
        if (name, case, count) not in known:
            if name not in models:
                for other in models.keys() - {""}:
                    del models[other]
                models[name] = _model(nano, fault)
            llm = models[name]
            found, _ = measure(llm, Mixture(Encoder(llm.get_tokenizer())), case, count)
            known[name, case, count] = found.share
        return known[name, case, count]

    return score


def _model(nano: Path, fault: Fault | None) -> LLM:
    forced = fault.kernels if fault else {}
    with installed(fault) if fault else nullcontext():
        llm = LLM(nano, device="cpu", kernels=forced, num_gpu_blocks_override=512)
    chosen = {each["op"]: each["kernel"] for each in llm.info.explanation["kernels"]}
    assert forced.items() <= chosen.items()
    return llm


# A fault, a skill that needs what it breaks, one that does not, and how many questions of each.
SEEN = (
    ("short window", Case("tool_result"), 6, Case("arithmetic"), 24),
    ("latest rows", Case("recall_far", 600), 4, Case("recall_near"), 24),
)
MORE = (
    ("short window", Case("tool_result"), 40, Case("arithmetic"), 200),
    ("raw weights", Case("arithmetic_thinking"), 60, Case("recall_near"), 200),
    ("blank rows", Case("recall_far", 2048), 20, Case("recall_near"), 200),
    ("latest rows", Case("recall_far", 2048), 20, Case("recall_near"), 200),
    ("worst rows", Case("recall_far", 2048), 20, Case("arithmetic"), 200),
)


def _check(
    scores: Scorer, name: str, needs: Case, count: int, other: Case, other_count: int
) -> None:
    fault = FAULTS[name]
    sound, broken = (scores(each, needs, count) for each in (None, fault))
    assert sound >= 0.8, f"{needs.name}: {sound}"
    assert broken <= sound / 2, f"{needs.name}: {sound} and, with {name}, {broken}"
    before, after = (scores(each, other, other_count) for each in (None, fault))
    assert before >= 0.9, f"{other.name}: {before}"
    assert after > before - 0.05, f"{other.name}: {before} and, with {name}, {after}"


@pytest.mark.full
@pytest.mark.parametrize(("name", "needs", "count", "other", "other_count"), SEEN)
def test_a_fault_is_seen_where_it_matters(
    scores: Scorer, name: str, needs: Case, count: int, other: Case, other_count: int
) -> None:
    _check(scores, name, needs, count, other, other_count)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "needs", "count", "other", "other_count"), MORE)
def test_a_fault_is_seen_on_many_questions(
    scores: Scorer, name: str, needs: Case, count: int, other: Case, other_count: int
) -> None:
    _check(scores, name, needs, count, other, other_count)

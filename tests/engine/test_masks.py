"""Token masks: they hold at every draft position, whatever else runs, and change nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from fourfold.core.config import CacheConfig, EngineConfig
from fourfold.core.device import detect
from fourfold.core.errors import RequestError
from fourfold.core.request import FinishReason, Grammar, Request, SamplingParams
from fourfold.engine.engine import Engine
from fourfold.engine.loading import LoadedModel, load_model
from fourfold.engine.masks import LOOK_AHEAD
from fourfold.weights.locate import locate
from tests.engine.planting import plant
from tests.support import prompts, write_small

pytestmark = pytest.mark.full

VOCAB = 192
PARAMS = SamplingParams(max_tokens=24, temperature=1.5, seed=3, ignore_eos=True, logprobs=0)


class Rising:
    """Tokens whose number mod 4 counts up from that of the grammar's source: a rule whose every step
    depends on all the steps before."""

    def __init__(self, grammar: Grammar, vocabulary: int):
        if grammar.kind != "rising":
            raise RequestError(f"grammar kind {grammar.kind} is not known")
        self.next, self.vocabulary = int(grammar.source), vocabulary
        self.seen: list[int] = []
        self.failure: str | None = None
        self.open_for = 0

    def allowed(self, drafts: Sequence[int]) -> npt.NDArray[np.int32]:
        rows = np.zeros((1 + len(drafts), -(-self.vocabulary // 32) * 32), bool)
        for number in range(1 + len(drafts)):
            if all(t % 4 == (self.next + i) % 4 for i, t in enumerate(drafts[:number])):
                rows[number, (self.next + number) % 4 : self.vocabulary : 4] = True
            else:
                rows[number] = True
        packed = np.packbits(rows, axis=1, bitorder="little")
        return packed.view(np.int32)

    def commit(self, tokens: Sequence[int]) -> None:
        for token in tokens:
            assert token % 4 == self.next % 4
            self.next += 1
            self.seen.append(token)


class Late(Rising):
    """The same after 30 tokens of any kind."""

    def __init__(self, grammar: Grammar, vocabulary: int):
        super().__init__(grammar, vocabulary)
        self.open_for = 30

    def allowed(self, drafts: Sequence[int]) -> npt.NDArray[np.int32]:
        assert self.open_for < LOOK_AHEAD, "asked where there is nothing to say"
        free = min(self.open_for, 1 + len(drafts))
        rows = np.full((1 + len(drafts), -(-self.vocabulary // 32)), -1, np.int32)
        if free <= len(drafts):
            rows[free:] = super().allowed(drafts[free:])
        return rows

    def commit(self, tokens: Sequence[int]) -> None:
        free = min(self.open_for, len(tokens))
        self.open_for -= free
        super().commit(tokens[free:])


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    folder = write_small(
        tmp_path_factory.mktemp("masks") / "c",
        "float32",
        seed=3,
        compress_ratios=[4, 128, 4, 0],
        num_hidden_layers=3,
        hidden_size=32,
    )
    config = EngineConfig(model=str(folder), dtype="float64")
    return load_model(locate(config.model), config, detect("cpu"))


def start(
    loaded: LoadedModel,
    drafts: int = 0,
    overlap: bool = False,
    masks: type[Rising] = Rising,
    **cache: Any,
) -> Engine:
    config = EngineConfig(
        "m",
        dtype="float64",
        max_num_seqs=4,
        max_model_len=400,
        num_speculative_tokens=drafts,
        async_scheduling=overlap,
        cache=CacheConfig(**cache),
    )
    return Engine(loaded, config, masks=masks)


def answers(engine: Engine, requests: Sequence[Request]) -> list[list[int]]:
    got: dict[str, list[int]] = {}
    for request in requests:
        engine.add(request)
        got[request.request_id] = []
    for output in engine.run():
        assert output.finish_reason in (None, FinishReason.LENGTH)
        got[output.request_id] += output.new_token_ids
    return list(got.values())


def masked(name: str, tokens: Sequence[int], first: int, **params: Any) -> Request:
    grammar = Grammar("rising", str(first))
    return Request(name, tuple(tokens), replace(PARAMS, **params), grammar=grammar)


def test_masks_hold_at_every_position_and_drafts_change_nothing(loaded: LoadedModel) -> None:
    a, b, c = prompts(VOCAB, (30, 41, 260), 5)
    work = [
        masked("a", a, 2),
        Request("b", tuple(b), PARAMS),
        masked("c", c, 1, presence_penalty=1.0, temperature=0.0),
    ]
    expected = [answers(start(loaded), [each])[0] for each in work]
    free = answers(start(loaded), [Request("a", tuple(a), PARAMS)])[0]
    assert expected[0] != free
    for first, tokens in ((2, expected[0]), (1, expected[2])):
        assert [t % 4 for t in tokens] == [(first + i) % 4 for i in range(24)]
    for drafts in (0, 1, 3):
        for overlap in (False, True):
            engine = start(loaded, drafts, overlap)
            assert answers(engine, work) == expected, (drafts, overlap)


@pytest.mark.parametrize("overlap", [False, True])
def test_right_drafts_stand_under_a_mask_and_wrong_ones_do_not(
    loaded: LoadedModel, overlap: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Planted drafts, right for 0 … 3 tokens in turn; the wrong ones break the rule."""
    tokens = prompts(VOCAB, (30,), 5)[0]
    expected = answers(start(loaded), [masked("a", tokens, 2)])[0]
    whole, turn = [*tokens, *expected], iter(range(1000))

    def guesses(known: int, count: int) -> list[int]:
        right = next(turn) % (count + 1)
        coming = enumerate(whole[known : known + count])
        return [t if i < right else (t + 1) % VOCAB for i, t in coming]

    plant(monkeypatch, guesses)
    engine = start(loaded, 3, overlap)
    assert answers(engine, [masked("a", tokens, 2)]) == [expected]
    assert all(engine.stats.accepted)


def test_steps_overlap_while_a_mask_allows_anything(loaded: LoadedModel) -> None:
    """It is not asked, nothing waits for it, and it holds from where it begins to hold."""
    requests = [masked("a", prompts(VOCAB, (9,), 1)[0], 2, max_tokens=40)]
    expected = answers(start(loaded, masks=Late), requests)
    engine = start(loaded, 3, True, Late)
    for request in requests:
        engine.add(request)
    found: list[int] = []
    begun_ahead = 0
    while engine.has_work:
        for output in engine.step():
            found += output.new_token_ids
        begun_ahead += engine._flight is not None
    assert [found] == expected
    assert [token % 4 for token in found[30:]] == [(2 + i) % 4 for i in range(10)]
    assert begun_ahead > 0


def test_a_mask_survives_preemption(loaded: LoadedModel) -> None:
    work = [
        masked(str(n), p, n, max_tokens=40) for n, p in enumerate(prompts(VOCAB, (240,) * 4, 6))
    ]
    roomy = start(loaded)
    expected = answers(roomy, work)
    assert roomy.scheduler.num_preemptions == 0
    for bytes_ in (4 << 30, 0):
        engine = start(loaded, 2, True, num_pages=5, preempt_bytes=bytes_)
        assert answers(engine, work) == expected
        assert engine.scheduler.num_preemptions > 0


def test_each_of_n_sequences_has_its_own(loaded: LoadedModel) -> None:
    request = masked("n", prompts(VOCAB, (20,), 7)[0], 0, n=3)
    engine = start(loaded)
    engine.add(request)
    got: dict[int, list[int]] = {0: [], 1: [], 2: []}
    for output in engine.run():
        got[output.index] += output.new_token_ids
    assert all([t % 4 for t in tokens] == [i % 4 for i in range(24)] for tokens in got.values())
    assert len({tuple(tokens) for tokens in got.values()}) == 3


def test_grammars_are_refused_where_nothing_can_be_made_of_them(loaded: LoadedModel) -> None:
    engine = start(loaded)
    with pytest.raises(RequestError, match="kind falling is not known"):
        engine.add(Request("a", (1, 2), PARAMS, grammar=Grammar("falling", "")))
    plain = Engine(loaded, EngineConfig("m", dtype="float64", max_num_seqs=1, max_model_len=256))
    with pytest.raises(RequestError, match="without support for grammars"):
        plain.add(masked("a", [1, 2], 0))
    assert not engine.has_work
    assert not plain.has_work

"""What a request gets never depends on how it was run: hits, preemption, drafts, neighbours, chunks,
one step after the other or overlapped.

In float64 with plain rows, so that a difference is a fault and not a rounding flip: tokens are equal and
log probabilities agree within 1e-9.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fourfold.core.client import StepInfo
from fourfold.core.config import CacheConfig, EngineConfig
from fourfold.core.device import detect
from fourfold.core.request import FinishReason, Request, RequestOutput, SamplingParams
from fourfold.engine import runner
from fourfold.engine.engine import Engine
from fourfold.engine.loading import LoadedModel, load_model
from fourfold.weights.locate import locate
from tests.engine.planting import plant
from tests.support import prompts, write_small

pytestmark = pytest.mark.full

Tokens = list[int]
BOTH = pytest.mark.parametrize("overlap", [False, True], ids=["in turn", "overlapped"])
DRAFTS = pytest.mark.parametrize(
    ("drafts", "overlap"), [(0, True), (2, False), (2, True)], ids=["0", "2 in turn", "2"]
)
PARAMS = SamplingParams(
    max_tokens=14, temperature=0.8, top_p=0.95, seed=5, ignore_eos=True, logprobs=0
)


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    folder = write_small(
        tmp_path_factory.mktemp("engine") / "c",
        "float32",
        seed=3,
        index_topk=10,
        sliding_window=24,
        num_hidden_layers=3,
        compress_ratios=[4, 128, 4, 0],
        hidden_size=32,
    )
    config = EngineConfig(model=str(folder), dtype="float64")
    return load_model(locate(config.model), config, detect("cpu"))


def start(
    loaded: LoadedModel, cache: dict[str, Any] | None = None, overlap: bool = False, **changes: Any
) -> Engine:
    settings_ = {"max_num_seqs": 4, "max_model_len": 900, "async_scheduling": overlap, **changes}
    config = EngineConfig(
        model="m", dtype="float64", cache=CacheConfig(**(cache or {})), **settings_
    )
    return Engine(loaded, config)


class Collected:
    """All a request's sequence got."""

    def __init__(self) -> None:
        self.tokens: Tokens = []
        self.logprobs: list[float] = []
        self.first: RequestOutput | None = None
        self.last: RequestOutput | None = None

    def take(self, output: RequestOutput) -> None:
        self.tokens += output.new_token_ids
        self.logprobs += [entry.logprob for entry in output.logprobs]
        self.first = self.first or output
        self.last = output

    def same(self, other: Collected) -> bool:
        close = all(abs(a - b) < 1e-9 for a, b in zip(self.logprobs, other.logprobs, strict=True))
        return self.tokens == other.tokens and close


def collect(
    engine: Engine,
    requests: Sequence[tuple[Tokens, SamplingParams]],
    between: Callable[[Engine, int], None] = lambda engine, step: None,
) -> list[Collected]:
    """Run requests together; `between` is called before every step."""
    got: dict[tuple[str, int], Collected] = {}
    for number, (tokens, params) in enumerate(requests):
        engine.add(Request(str(number), tuple(tokens), params))
        for index in range(params.n):
            got[str(number), index] = Collected()
    step = 0
    while engine.has_work:
        between(engine, step)
        for output in engine.step():
            if (output.request_id, output.index) in got:
                got[output.request_id, output.index].take(output)
        engine.scheduler.cache.pages.check()
        step += 1
    assert engine.scheduler.cache.pages.num_used == 0
    return list(got.values())


def pollute(engine: Engine) -> None:
    """Overwrite every slot and the pages that were free, and leave the first slot to a runner: what
    a hit does not restore is then somebody else's."""
    collect(
        engine, [(t, replace(PARAMS, max_tokens=3)) for t in prompts(192, (280, 270, 290, 300), 99)]
    )
    collect(engine, [(t, replace(PARAMS, max_tokens=2)) for t in prompts(192, (600, 500), 98)])


def requests(lengths: Sequence[int], seed: int = 1) -> list[tuple[Tokens, SamplingParams]]:
    return [
        (tokens, replace(PARAMS, seed=n, temperature=0.8 * (n % 2)))
        for n, tokens in enumerate(prompts(192, lengths, seed))
    ]


SCHEDULES = {
    "lengths": st.lists(st.integers(1, 300), min_size=1, max_size=5),
    "budget": st.integers(5, 400),
    "seats": st.integers(1, 4),
    "drafts": st.integers(0, 3),
    "overlap": st.booleans(),
    "data": st.randoms(use_true_random=False),
}


def check_schedule(
    loaded: LoadedModel,
    lengths: list[int],
    budget: int,
    seats: int,
    drafts: int,
    overlap: bool,
    data: random.Random,
) -> None:
    """Batched = alone, chunked = one-shot, drafted = not, with aborted neighbours in between."""
    work = requests(lengths, data.randrange(1000))
    expected = [collect(start(loaded, max_num_seqs=1), [one])[0] for one in work]

    def disturb(engine: Engine, step: int) -> None:
        if step % 3 == 0:
            engine.add(Request(f"n{step}", tuple(prompts(192, (40 + step % 90,), step)[0]), PARAMS))
        if step % 3 == 2:
            engine.abort(f"n{step - 2}")

    engine = start(
        loaded,
        max_num_seqs=seats,
        max_num_batched_tokens=budget,
        num_speculative_tokens=drafts,
        overlap=overlap,
    )
    budgeted = 30 * len(work)
    got = collect(engine, work, lambda e, s: disturb(e, s) if s < budgeted else None)
    assert all(a.same(b) for a, b in zip(got, expected, strict=True))


@settings(max_examples=5)
@given(**SCHEDULES)
def test_any_schedule_equals_alone(loaded: LoadedModel, **drawn: Any) -> None:
    check_schedule(loaded, **drawn)


@pytest.mark.slow
@settings(max_examples=20)
@given(**SCHEDULES)
def test_more_schedules_equal_alone(loaded: LoadedModel, **drawn: Any) -> None:
    check_schedule(loaded, **drawn)


@pytest.mark.parametrize("drafts", [1, 2, 3])
@pytest.mark.parametrize(
    ("length", "overlap"),
    [*((length, True) for length in (1, 3, 20, 24, 118, 126, 250)), (20, False), (250, False)],
)
def test_drafts_change_nothing_for_every_number_accepted(
    loaded: LoadedModel, drafts: int, length: int, overlap: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Planted drafts, right for 0 … k tokens in turn, across window, row and page boundaries."""
    tokens = prompts(192, (length,), length)[0]
    params = replace(PARAMS, max_tokens=40, seed=length)
    expected = collect(start(loaded), [(tokens, params)])[0]
    whole = [*tokens, *expected.tokens]
    turn, seen = iter(range(10_000)), set()

    def guesses(known: int, count: int) -> list[int]:
        right = next(turn) % (count + 1)
        coming = enumerate(whole[known : known + count])
        return [t if i < right else (t + 1) % 192 for i, t in coming]

    plant(monkeypatch, guesses)
    engine = start(loaded, num_speculative_tokens=drafts, overlap=overlap)
    outputs = Collected()
    engine.add(Request("a", tuple(tokens), params))
    for output in engine.run():
        seen.add(output.accepted_drafts)
        outputs.take(output)
    assert outputs.same(expected)
    assert seen == set(range(drafts + 1))
    assert sum(engine.stats.accepted) > 0


def test_the_layer_drafts_what_a_one_shot_pass_would(loaded: LoadedModel) -> None:
    """Drafts come from complete MTP state: equal for one-shot prefill, chunks, hits and long decodes."""
    tokens = prompts(192, (200,), 7)[0]
    seen: list[list[tuple[int, ...]]] = []
    for settings_, warm in (({}, 0), ({"max_num_batched_tokens": 33}, 0), ({}, 150), ({}, 199)):
        engine = start(loaded, num_speculative_tokens=2, **settings_)
        if warm:
            collect(engine, [(tokens[: warm + 1], replace(PARAMS, max_tokens=1))])
            pollute(engine)
        drafts: list[tuple[int, ...]] = []

        def note(engine: Engine, step: int, drafts: list[tuple[int, ...]] = drafts) -> None:
            for sequence in engine.scheduler.running:
                if sequence.is_decoding:
                    drafts.append((sequence.num_computed_tokens, *sequence.drafts))

        collect(engine, [(tokens, replace(PARAMS, temperature=0.0))], note)
        seen.append(drafts)
    assert seen[0]
    assert all(other == seen[0] for other in seen[1:])


def test_overlapped_steps_leave_the_same_images(loaded: LoadedModel) -> None:
    """An image of a turn's end is of the turn's end, whatever was launched before that was known."""
    free = requests((150, 30, 257), 14)
    ends = [got.tokens[6] for got in collect(start(loaded), free)]
    work = [(t, replace(p, stop_token_ids=[e])) for (t, p), e in zip(free, ends, strict=True)]
    kept = []
    for overlap in (False, True):
        engine = start(loaded, overlap=overlap, num_speculative_tokens=2)
        collect(engine, work)
        tier = engine.scheduler.cache._tiers[0]
        kept.append({key: entry.image for key, entry in tier.items()})
    assert kept[0].keys() == kept[1].keys()
    assert len(kept[0]) >= 6
    for key, image in kept[0].items():
        pairs = zip(image.tensors, kept[1][key].tensors, strict=True)
        assert all(torch.allclose(a, b, rtol=0, atol=1e-9) for a, b in pairs), image.position


@DRAFTS
@pytest.mark.parametrize("length", [2, pytest.param(257, marks=pytest.mark.slow), 515])
def test_a_hit_equals_cold_at_every_depth(
    loaded: LoadedModel, length: int, drafts: int, overlap: bool
) -> None:
    """Resending hits at the prompt's last token; a longer prompt hits where the shorter one ended."""
    tokens = prompts(192, (length + 60,), length)[0]
    cold = [
        collect(start(loaded, num_speculative_tokens=drafts), [(part, PARAMS)])[0]
        for part in (tokens[:length], tokens)
    ]
    engine = start(loaded, num_speculative_tokens=drafts, overlap=overlap)
    first = collect(engine, [(tokens[:length], PARAMS)])[0]
    pollute(engine)
    engine.add(
        Request("in slot 0", tuple(prompts(192, (20,), 97)[0]), replace(PARAMS, max_tokens=60))
    )
    again = collect(engine, [(tokens[:length], PARAMS)])[0]
    pollute(engine)
    longer = collect(engine, [(tokens, PARAMS)])[0]
    assert first.first.cached_tokens == 0
    assert again.first.cached_tokens == length - 1
    assert longer.first.cached_tokens == length - 1
    assert longer.first.cache_miss is not None
    assert first.same(cold[0])
    assert again.same(cold[0])
    assert longer.same(cold[1])


@BOTH
def test_a_second_turn_hits_up_to_the_first_turns_end(loaded: LoadedModel, overlap: bool) -> None:
    tokens = prompts(192, (270,), 2)[0]
    engine = start(loaded, overlap=overlap)
    first = collect(engine, [(tokens, PARAMS)])[0]
    turn = [*tokens, *first.tokens, *prompts(192, (30,), 3)[0]]
    second = collect(engine, [(turn, PARAMS)])[0]
    assert second.first.cached_tokens == len(tokens) + len(first.tokens) - 1
    assert second.same(collect(start(loaded), [(turn, PARAMS)])[0])


def test_hits_survive_the_host_tier_and_eviction_ends_them(loaded: LoadedModel) -> None:
    """An image pushed to host memory still hits; with its pages evicted it is gone, and the prompt is
    computed again; re-admitted, it hits anew. Always with the same answer."""
    tokens = prompts(192, (400,), 4)[0]
    cold = collect(start(loaded), [(tokens, PARAMS)])[0]
    for cache, hits in (
        ({"device_image_bytes": 0}, True),
        ({"device_image_bytes": 0, "host_image_bytes": 0}, False),
        ({"num_pages": 8}, True),
    ):
        engine = start(loaded, cache)
        collect(engine, [(tokens, PARAMS)])
        again = collect(engine, [(tokens, PARAMS)])[0]
        assert again.same(cold)
        assert (again.first.cached_tokens == 399) is hits
        if not hits:
            assert "no state image" in again.first.cache_miss
    collect(engine, [(p, PARAMS) for p in prompts(192, (800, 700, 600), 5)])
    evicted = collect(engine, [(tokens, PARAMS)])[0]
    assert evicted.first.cached_tokens == 0
    assert "not cached" in evicted.first.cache_miss
    assert evicted.same(cold)
    again = collect(engine, [(tokens, PARAMS)])[0]
    assert again.first.cached_tokens == 399
    assert again.same(cold)


def test_salts_and_prompt_logprobs_keep_prompts_apart(loaded: LoadedModel) -> None:
    tokens = tuple(prompts(192, (100,), 6)[0])
    engine = start(loaded)

    def first(name: str, salt: str | None, params: SamplingParams = PARAMS) -> RequestOutput:
        engine.add(Request(name, tokens, params, cache_salt=salt))
        return next(iter(list(engine.run())))

    assert first("a", "one").cached_tokens == 0
    assert first("b", "two").cached_tokens == 0
    assert first("c", "one").cached_tokens == 99
    bypass = first("d", "one", replace(PARAMS, prompt_logprobs=2))
    assert bypass.cached_tokens == 0
    assert "prompt_logprobs" in bypass.cache_miss
    assert first("e", None).cached_tokens == 0
    off = start(loaded, {"enable_prefix_caching": False})
    for _ in range(2):
        assert collect(off, [([*tokens], PARAMS)])[0].first.cached_tokens == 0


@pytest.mark.parametrize("drafts", [0, 2])
@pytest.mark.parametrize("room", [4 << 30, 0], ids=["saved", "recomputed"])
def test_preempted_at_every_step_equals_never_preempted(
    loaded: LoadedModel, drafts: int, room: int
) -> None:
    """Force the sequence out before each step, in prefill and decode alike."""
    tokens = prompts(192, (290,), 8)[0]
    params = replace(PARAMS, max_tokens=10)
    expected = collect(start(loaded, num_speculative_tokens=drafts), [(tokens, params)])[0]
    engine = start(
        loaded, {"preempt_bytes": room}, num_speculative_tokens=drafts, max_num_batched_tokens=64
    )
    forced = 0

    def force(engine: Engine, step: int) -> None:
        nonlocal forced
        if step % 2 and engine.scheduler.running and forced < 40:
            scheduler = engine.scheduler
            scheduler._savings = []
            scheduler._preempt(scheduler.running[0])
            for saving in scheduler._savings:
                scheduler.saved(saving.sequence, engine.runner.save(saving))
            forced += 1

    computed = 0

    def count(step: StepInfo) -> None:
        nonlocal computed
        computed += step.num_tokens

    engine._on_step = count
    got = collect(engine, [(tokens, params)], force)[0]
    assert forced > 5
    # Resuming computes nothing again; starting over does.
    assert (computed == len(tokens) + 10 - 1) is (room > 0 and not drafts)
    assert got.same(expected)


@pytest.mark.parametrize(
    ("drafts", "overlap"), [pytest.param(0, False, marks=pytest.mark.slow), (2, True)]
)
def test_crowding_preempts_and_changes_nothing(
    loaded: LoadedModel, drafts: int, overlap: bool
) -> None:
    """Four requests grow past what the pages hold; whoever is pushed out comes back unharmed."""
    work = [(t, replace(p, max_tokens=70)) for t, p in requests((200, 190, 250, 230), 9)]
    roomy = start(loaded)
    expected = collect(roomy, work)
    assert roomy.scheduler.num_preemptions == 0
    for cache in ({"num_pages": 6}, {"num_pages": 6, "preempt_bytes": 0}):
        engine = start(loaded, cache, overlap, max_model_len=600, num_speculative_tokens=drafts)
        got = collect(engine, work)
        assert engine.scheduler.num_preemptions > 0
        assert all(a.same(b) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize(("caching", "overlap"), [(True, True), (False, True), (True, False)])
@pytest.mark.parametrize("length", [1, 2, 140, 256, 257])
def test_n_sequences_are_what_n_requests_would_be(
    loaded: LoadedModel, length: int, caching: bool, overlap: bool
) -> None:
    """Forks copy the open page: they share full pages and nothing else."""
    tokens = prompts(192, (length,), 10)[0]
    cache = {"enable_prefix_caching": caching}
    got = collect(start(loaded, cache, overlap), [(tokens, replace(PARAMS, n=3))])
    for index, answer in enumerate(got):
        alone = collect(start(loaded), [(tokens, replace(PARAMS, seed=5 + index))])[0]
        assert answer.same(alone)
        wanted = length - 1 if caching and index else 0
        assert answer.first.cached_tokens == wanted
    assert len({tuple(a.tokens) for a in got}) == 3


def test_prompt_logprobs_do_not_depend_on_chunks(loaded: LoadedModel) -> None:
    tokens = prompts(192, (130,), 11)[0]
    params = replace(PARAMS, prompt_logprobs=3, logprobs=2)
    seen = []
    for budget, overlap, rows in (
        (400, False, 256),
        (400, False, 7),
        (17, False, 7),
        (17, True, 256),
    ):
        engine = start(loaded, overlap=overlap, max_num_batched_tokens=budget)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(runner, "PROMPT_LOGPROB_ROWS", rows)
            first = collect(engine, [(tokens, params)])[0].first
        assert first.prompt_logprobs[0] is None
        assert len(first.prompt_logprobs) == 130
        assert [e.token_id for e in first.prompt_logprobs[1:]] == tokens[1:]
        seen.append(first.prompt_logprobs[1:])
    for a, *others in zip(*seen, strict=True):
        for b in others:
            assert abs(a.logprob - b.logprob) < 1e-9
            assert [t for t, _ in a.top] == [t for t, _ in b.top]
            assert a.rank == b.rank


@BOTH
def test_abort_at_any_moment_frees_everything(loaded: LoadedModel, overlap: bool) -> None:
    for moment in range(12):
        engine = start(loaded, overlap=overlap, max_num_batched_tokens=50, num_speculative_tokens=1)
        for n, (tokens, params) in enumerate(requests((120, 30, 80), 12)):
            engine.add(Request(str(n), tuple(tokens), replace(params, n=1 + n % 2)))
        for _ in range(moment):
            engine.step()
        for name in ("0", "1", "2"):
            engine.abort(name)
            assert not engine.abort(name)
        assert engine.step() == []  # what was in flight is nobody's
        assert not engine.has_work
        engine.scheduler.cache.pages.check()
        assert engine.scheduler.cache.pages.num_used == 0
        assert engine.scheduler.slots.num_free == 4


@BOTH
def test_stops_inside_a_draft_are_honoured(
    loaded: LoadedModel, overlap: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens = prompts(192, (50,), 13)[0]
    free = collect(start(loaded), [(tokens, PARAMS)])[0].tokens
    whole = [*tokens, *free]
    plant(monkeypatch, lambda known, count: whole[known : known + count])
    for at in range(2, 9):
        engine = start(loaded, num_speculative_tokens=3, overlap=overlap)
        params = replace(PARAMS, stop_token_ids=[free[at]])
        got = collect(engine, [(tokens, params)])[0]
        cut = free.index(free[at]) + 1
        assert got.tokens == free[:cut]
        assert got.last.finish_reason is FinishReason.STOP
        assert got.last.stop_reason == free[at]
        # The next turn resumes exactly where this one ended, not where its drafts did.
        turn = [*tokens, *got.tokens, 7, 8, 9]
        second = collect(engine, [(turn, replace(PARAMS, max_tokens=1))])[0]
        assert second.first.cached_tokens == len(tokens) + len(got.tokens) - 1
        assert second.same(collect(start(loaded), [(turn, replace(PARAMS, max_tokens=1))])[0])

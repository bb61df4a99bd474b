"""The step loop: what a request gets does not depend on limits, neighbours or what ran before."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fourfold.core.config import CacheConfig, EngineConfig
from fourfold.core.device import detect
from fourfold.core.errors import CapacityError, ConfigError, RequestError
from fourfold.core.request import FinishReason, Request, SamplingParams
from fourfold.engine.engine import Engine
from fourfold.engine.loading import load_model
from fourfold.engine.oneshot import one_shot
from fourfold.weights.locate import locate
from tests.support import load_small, prompts, write_small

pytestmark = pytest.mark.full

GREEDY = SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("engine") / "c"
    return write_small(folder, "float32", seed=2, index_topk=10, sliding_window=24)


def engine(directory: Path, **changes: object) -> Engine:
    settings = {"dtype": "float64", "max_num_seqs": 4, "max_model_len": 600, **changes}
    config = EngineConfig(model=str(directory), **settings)
    return Engine(load_model(locate(config.model), config, detect("cpu")), config)


def answers(
    engine: Engine, tokens: Sequence[Sequence[int]], params: Sequence[SamplingParams]
) -> list[list[int]]:
    got: dict[str, list[int]] = {}
    for n, (prompt, each) in enumerate(zip(tokens, params, strict=True)):
        engine.add(Request(str(n), tuple(prompt), each))
        got[str(n)] = []
    for output in engine.run():
        got[output.request_id] += output.new_token_ids
    return list(got.values())


def test_greedy_tokens_are_those_of_one_shot_passes(directory: Path) -> None:
    model = load_small(directory, torch.float64)
    tokens = prompts(192, (1, 5, 130, 257), 1)
    got = answers(engine(directory), tokens, [GREEDY] * 4)
    with torch.inference_mode():
        for prompt, answer in zip(tokens, got, strict=True):
            logits = one_shot(model, [[*prompt, *answer[:-1]]]).logits
            assert logits[len(prompt) - 1 :].argmax(-1).tolist() == answer


def test_limits_and_neighbours_change_nothing(directory: Path) -> None:
    """Chunked prefill, few slots and other requests: same tokens, greedy and sampled alike."""
    tokens = prompts(192, (3, 150, 40, 270, 9, 64), 2)
    params = [
        SamplingParams(
            max_tokens=4 + n, temperature=n % 2 * 0.9, top_p=0.9, seed=n, ignore_eos=True
        )
        for n in range(6)
    ]
    expected = answers(engine(directory), tokens, params)
    for changes in (
        {"max_num_batched_tokens": 7},
        {"max_num_batched_tokens": 64, "max_num_seqs": 1},
        {"max_num_seqs": 2, "max_num_batched_tokens": 100},
    ):
        assert answers(engine(directory, **changes), tokens, params) == expected
    for n in (1, 4):
        assert answers(engine(directory), [tokens[n]], [params[n]]) == [expected[n]]


def test_first_request_after_a_warm_up_equals_the_second(directory: Path) -> None:
    running = engine(directory)
    tokens = prompts(192, (140,), 3)
    first = answers(running, tokens, [GREEDY])
    answers(running, prompts(192, (200, 31), 4), [GREEDY] * 2)
    assert answers(running, tokens, [GREEDY]) == first


def test_everything_is_free_at_the_end(directory: Path) -> None:
    running = engine(directory, max_num_seqs=2)
    answers(running, prompts(192, (300, 5, 20), 5), [GREEDY] * 3)
    scheduler = running.scheduler
    scheduler.cache.pages.check()
    assert scheduler.cache.pages.num_used == 0
    assert scheduler.slots.num_free == 2
    assert not running.has_work


def test_seeds_decide_and_differ(directory: Path) -> None:
    tokens = prompts(192, (20,), 6) * 3
    params = [SamplingParams(max_tokens=20, seed=s, ignore_eos=True) for s in (1, 2, 1)]
    one, two, again = answers(engine(directory), tokens, params)
    assert one == again
    assert one != two


def test_end_of_sequence_stops_unless_ignored(directory: Path) -> None:
    tokens = prompts(192, (20,), 6)
    free = answers(engine(directory), tokens, [GREEDY])[0]
    running = engine(directory)
    loaded = running.loaded
    running.loaded = replace(loaded, config=replace(loaded.config, eos_token_id=free[3]))
    running.add(Request("a", tuple(tokens[0]), replace(GREEDY, ignore_eos=False)))
    outputs = list(running.run())
    assert outputs[-1].finish_reason is FinishReason.STOP
    assert [t for o in outputs for t in o.new_token_ids] == free[: free.index(free[3]) + 1]


def test_ids_the_tokenizer_does_not_know_are_never_sampled(directory: Path) -> None:
    config = EngineConfig(model=str(directory), max_num_seqs=2, max_model_len=600)
    loaded = load_model(locate(config.model), config, detect("cpu"))
    running = Engine(loaded, config, allowed_token_ids=range(0, 192, 3))
    params = SamplingParams(max_tokens=60, temperature=2.0, ignore_eos=True)
    got = answers(running, prompts(192, (4, 9), 7), [params, replace(params, temperature=0.0)])
    assert all(t % 3 == 0 for answer in got for t in answer)


def test_numbers_that_are_not_finite_end_one_request(directory: Path) -> None:
    running = engine(directory)
    expected = answers(running, prompts(190, (30,), 8), [GREEDY])
    running.loaded.model.embed.table[191] = float("nan")
    running.add(Request("bad", (5, 191, 7), GREEDY))
    running.add(Request("good", tuple(prompts(190, (30,), 8)[0]), GREEDY))
    ends, tokens = {}, []
    for output in running.run():
        ends[output.request_id] = output.finish_reason
        tokens += output.new_token_ids if output.request_id == "good" else ()
    assert ends["bad"] is FinishReason.ERROR
    assert [tokens] == expected


def test_impossible_requests_are_refused_with_the_numbers(directory: Path) -> None:
    running = engine(directory)
    with pytest.raises(CapacityError, match=r"595 tokens\) \+ max_tokens \(12\) = 607 .* \(600\)"):
        running.add(Request("a", (1,) * 595, GREEDY))
    with pytest.raises(RequestError, match=r"token 192 .* vocabulary"):
        running.add(Request("b", (1, 192), GREEDY))
    with pytest.raises(RequestError, match="at least one token"):
        running.add(Request("c", (), GREEDY))
    small = engine(directory, max_model_len=None, cache=CacheConfig(num_pages=1))
    assert small.capacity.max_model_len == 256
    with pytest.raises(CapacityError, match="does not fit"):
        engine(directory, cache=CacheConfig(num_pages=1))
    with pytest.raises(CapacityError, match="max_position_embeddings"):
        engine(directory, max_model_len=5000)


def test_parallel_sizes_above_one_are_refused_by_name(directory: Path) -> None:
    from fourfold.core.config import ParallelConfig

    with pytest.raises(ConfigError, match="not supported yet"):
        engine(directory, parallel=ParallelConfig(tensor_parallel_size=2))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_tokens", 0),
        ("temperature", -1.0),
        ("temperature", float("nan")),
        ("top_p", 0.0),
        ("top_p", 1.5),
        ("seed", -1),
    ],
)
def test_bad_sampling_parameters_are_named(field: str, value: float) -> None:
    with pytest.raises(RequestError, match=field):
        SamplingParams(**{field: value})

"""The engine on a GPU, at the released widths: what a request gets is bit for bit the same captured or
eager, alone or in a batch, chunked or at once, resumed or cold, overlapped or in turn."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fourfold.core.config import CacheConfig, EngineConfig
from fourfold.core.device import detect
from fourfold.core.request import Request, SamplingParams
from fourfold.engine.ahead import compile_ahead
from fourfold.engine.engine import Engine
from fourfold.engine.loading import LoadedModel, load_model
from fourfold.weights.geometry import config_json
from fourfold.weights.locate import locate
from fourfold.weights.synthetic import write_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"),
]

LAYERS, EXPERTS = 5, 32
PARAMS = SamplingParams(max_tokens=12, temperature=0.7, ignore_eos=True, logprobs=2)
Answer = list[tuple[int, float]]


@pytest.fixture(scope="module", params=["native", "fp8"])
def loaded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    """Flash's layers with fewer experts."""
    config = {**config_json("flash", LAYERS), "n_routed_experts": EXPERTS}
    folder = Path(tmp_path_factory.mktemp("gpu"), request.param)
    write_model(folder, config, request.param, tokenizer=False)
    engine_config = EngineConfig(model=str(folder))
    loaded = load_model(locate(engine_config.model), engine_config, detect("cuda"))
    for drafts in (0, 2):  # on all cores, and not one by one while tests wait
        compile_ahead(loaded, replace(engine_config, num_speculative_tokens=drafts))
    return loaded


def start(loaded: LoadedModel, seats: int = 64, **changes: Any) -> Engine:
    cache = CacheConfig(num_pages=1024, enable_prefix_caching=changes.pop("hits", False))
    config = EngineConfig("m", max_model_len=4096, max_num_seqs=seats, cache=cache, **changes)
    return Engine(loaded, config)


def work(count: int, seed: int = 0, longest: int = 400) -> list[Request]:
    rng = random.Random(seed)
    requests = []
    for number in range(count):
        tokens = tuple(rng.randrange(2, 100_000) for _ in range(rng.randrange(1, longest)))
        params = replace(PARAMS, seed=number, temperature=0.7 * (number % 2))
        requests.append(Request(str(number), tokens, params))
    return requests


def answers(engine: Engine, requests: Sequence[Request]) -> list[Answer]:
    got: dict[str, Answer] = {}
    for request in requests:
        engine.add(request)
        got[request.request_id] = []
    for output in engine.run():
        assert output.error is None, output.error
        got[output.request_id] += [(e.token_id, e.logprob) for e in output.logprobs]
    assert all(len(answer) == PARAMS.max_tokens for answer in got.values())
    return list(got.values())


def differing(got: Sequence[Answer], expected: Sequence[Answer]) -> list[int]:
    return [n for n, (a, b) in enumerate(zip(got, expected, strict=True)) if a != b]


def test_every_op_of_a_step_has_a_kernel(loaded: LoadedModel) -> None:
    assert loaded.kernel_plan.reads_host == (), loaded.kernel_plan.describe()


@pytest.mark.parametrize("drafts", [0, 2])
def test_captured_equals_eager_at_every_size(loaded: LoadedModel, drafts: int) -> None:
    captured = start(loaded, num_speculative_tokens=drafts)
    eager = start(loaded, num_speculative_tokens=drafts, enforce_eager=True)
    assert captured.runner.graphs is not None
    assert eager.runner.graphs is None
    for size in (1, 2, 3, 5, 8, 13, 24, 33, 64):
        requests = work(size, seed=size)
        assert differing(answers(captured, requests), answers(eager, requests)) == [], size


def test_alone_equals_in_a_batch(loaded: LoadedModel) -> None:
    requests = work(256)
    together = answers(start(loaded, seats=256), requests)
    fewer = answers(start(loaded, seats=64), requests)
    one = start(loaded, seats=1)
    chosen = (0, 1, 7, 100, 255)
    alone = [answers(one, [requests[n]])[0] for n in chosen]
    assert differing(fewer, together) == []
    assert differing(alone, [together[n] for n in chosen]) == []


def test_overlapped_and_drafted_steps_change_nothing(loaded: LoadedModel) -> None:
    requests = work(40)
    plain = answers(start(loaded, async_scheduling=False), requests)
    assert differing(answers(start(loaded), requests), plain) == []
    assert differing(answers(start(loaded, num_speculative_tokens=2), requests), plain) == []


def test_no_request_waits_for_a_compiler(loaded: LoadedModel) -> None:
    store = pytest.importorskip("fourfold.kernels.store")
    cache = CacheConfig(num_pages=1024)
    config = EngineConfig("m", max_model_len=4096, max_num_seqs=64, cache=cache)
    compile_ahead(loaded, config)
    engine, rng = Engine(loaded, config), random.Random(5)
    with store.counted() as counts:
        for number in range(1000):
            prompt = tuple(rng.randrange(2, 100_000) for _ in range(rng.randrange(1, 600)))
            params = SamplingParams(
                max_tokens=rng.randrange(1, 8),
                temperature=rng.choice([0.0, 0.8]),
                top_p=rng.choice([1.0, 0.9]),
                top_k=rng.choice([0, 40]),
                frequency_penalty=rng.choice([0.0, 0.5]),
                logprobs=rng.choice([None, 3, 20]),
                ignore_eos=True,
            )
            engine.add(Request(str(number), prompt, params))
        ended = sum(output.finish_reason is not None for output in engine.run())
    assert ended == 1000
    assert counts.compiled == []


def test_chunked_prefill_equals_one_shot(loaded: LoadedModel) -> None:
    requests = work(6, seed=3, longest=3000)
    whole = answers(start(loaded), requests)
    assert differing(answers(start(loaded, max_num_batched_tokens=333), requests), whole) == []


def test_prefix_hits_equal_cold_starts(loaded: LoadedModel) -> None:
    requests = work(6, seed=4, longest=3000)
    cold = answers(start(loaded), requests)
    engine = start(loaded, hits=True)
    answers(engine, requests)
    assert differing(answers(engine, requests), cold) == []
    assert engine.stats.cached_tokens > 0

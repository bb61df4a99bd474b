"""The engine on a GPU, eight layers of Flash with every expert: what a request gets is bit for bit the
same captured or eager, alone or in a batch, chunked or at once, resumed or cold, prefilled or decoded, on
one stream or several, overlapped or in turn."""

from __future__ import annotations

import gc
import json
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from fourfold.core.config import CacheConfig, EngineConfig
from fourfold.core.device import detect
from fourfold.core.request import Request, SamplingParams
from fourfold.dist.comm import SingleComm
from fourfold.engine.ahead import compile_ahead
from fourfold.engine.benchmark import Setting
from fourfold.engine.engine import Engine
from fourfold.engine.graphs import DecodeGraph
from fourfold.engine.loading import LoadedModel, random_model
from fourfold.engine.workspace import capture_sizes
from fourfold.model.parts import in_turn
from fourfold.model.v4 import DeepseekV4
from tests.kernels.traced import of_libraries, our_kernels, strangers

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"),
]

PARAMS = SamplingParams(max_tokens=12, temperature=0.7, ignore_eos=True, logprobs=2)
Answer = list[tuple[int, float]]


@pytest.fixture(scope="module", params=["native", "fp8"])
def loaded(request: pytest.FixtureRequest) -> Iterator[LoadedModel]:
    """With FP4 experts, as released, or FP8 ones; what it launches is compiled, on all cores."""
    setting = Setting(weights=request.param)
    config = setting.engine(64, 4096)
    made = random_model(setting.model, setting.format, config, detect("cuda"))
    print(*compile_ahead(made, config))
    yield made
    del made
    gc.collect()
    torch.cuda.empty_cache()


@pytest.fixture(scope="module")
def drafted(loaded: LoadedModel) -> LoadedModel:
    """The same, what steps with drafts launch being compiled too."""
    compile_ahead(loaded, Setting(drafts=2).engine(64, 4096))
    return loaded


def start(loaded: LoadedModel, seats: int = 64, **changes: Any) -> Engine:
    cache = CacheConfig(num_pages=1024, enable_prefix_caching=changes.pop("hits", False))
    changes = {"max_model_len": 4096, **changes}
    config = EngineConfig("m", max_num_seqs=seats, cache=cache, **changes)
    return Engine(loaded, config)


def work(
    count: int, seed: int = 0, longest: int = 400, params: SamplingParams = PARAMS
) -> list[Request]:
    """Prompts of fewer than `longest` tokens, every second one sampled with a temperature."""
    rng = random.Random(seed)
    requests = []
    for number in range(count):
        tokens = tuple(rng.randrange(2, 100_000) for _ in range(rng.randrange(1, longest)))
        params = replace(params, seed=number, temperature=0.7 * (number % 2))
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
    assert all(len(got[r.request_id]) == r.params.max_tokens for r in requests)
    return list(got.values())


def differing(got: Sequence[Answer], expected: Sequence[Answer]) -> list[int]:
    return [n for n, (a, b) in enumerate(zip(got, expected, strict=True)) if a != b]


def test_no_request_waits_for_a_compiler(loaded: LoadedModel) -> None:
    """The first test here, so that nothing else has compiled anything meanwhile."""
    store = pytest.importorskip("fourfold.kernels.store")
    engine, rng = start(loaded, hits=True), random.Random(5)
    with store.counted() as counts:
        for number in range(1000):
            prompt = tuple(rng.randrange(2, 100_000) for _ in range(rng.randrange(1, 600)))
            params = SamplingParams(
                max_tokens=rng.randrange(1, 8),
                temperature=rng.choice([0.0, 0.8]),
                top_p=rng.choice([1.0, 0.9]),
                top_k=rng.choice([0, 40]),
                frequency_penalty=rng.choice([0.0, 0.5]),
                logit_bias=dict.fromkeys(range(rng.choice([0, 0, 1, 16, 17])), 1.0),
                stop_token_ids=list(range(rng.choice([0, 0, 1, 2, 9]))),
                logprobs=rng.choice([None, 3, 20]),
                prompt_logprobs=rng.choice([None, None, None, 5]),
                ignore_eos=True,
            )
            engine.add(Request(str(number), prompt, params))
        ended = sum(output.finish_reason is not None for output in engine.run())
    assert ended == 1000
    assert counts.compiled == []


def test_every_op_of_a_step_has_a_kernel(loaded: LoadedModel) -> None:
    assert loaded.kernel_plan.reads_host == (), loaded.kernel_plan.describe()


def check_every_size(
    loaded: LoadedModel, seats: int, drafts: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At every size that is captured, full and, from three on, with a lane of padding."""
    captured = start(loaded, seats, num_speculative_tokens=drafts)
    eager = start(loaded, seats, num_speculative_tokens=drafts, enforce_eager=True)
    assert captured.runner.graphs is not None
    assert eager.runner.graphs is None
    replayed: set[tuple[int, int]] = set()
    original = DecodeGraph.forward

    def noted(self: DecodeGraph, slots: Sequence[int]) -> Any:
        replayed.add((self._size, len(slots)))
        return original(self, slots)

    monkeypatch.setattr(DecodeGraph, "forward", noted)
    few = replace(PARAMS, max_tokens=4)
    sizes = {n for size in capture_sizes(seats) for n in (size, max(size - 1, 1))}
    for size in sorted(sizes):
        requests = work(size, size, 30, few)
        assert differing(answers(captured, requests), answers(eager, requests)) == [], size
    assert {size for size, count in replayed if size == count} == {*capture_sizes(seats)}
    assert any(count < size for size, count in replayed)


def test_captured_equals_eager_at_every_size(
    loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_every_size(loaded, 256, 0, monkeypatch)


def test_captured_with_drafts_equals_eager_at_every_size(
    drafted: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_every_size(drafted, 64, 2, monkeypatch)


def test_alone_equals_in_a_batch(loaded: LoadedModel) -> None:
    requests = work(256)
    together = answers(start(loaded, seats=256), requests)
    fewer = answers(start(loaded, seats=64), requests)
    one = start(loaded, seats=1)
    chosen = (0, 1, 7, 100, 255)
    alone = [answers(one, [requests[n]])[0] for n in chosen]
    assert differing(fewer, together) == []
    assert differing(alone, [together[n] for n in chosen]) == []


def test_overlapped_and_drafted_steps_change_nothing(drafted: LoadedModel) -> None:
    loaded, requests = drafted, work(40)
    plain = answers(start(loaded, async_scheduling=False), requests)
    assert differing(answers(start(loaded), requests), plain) == []
    assert differing(answers(start(loaded, num_speculative_tokens=2), requests), plain) == []


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


def test_decoding_equals_prefilling(loaded: LoadedModel) -> None:
    """A prompt that goes on with what was answered is answered with the rest."""
    requests = work(12, seed=6, longest=700)
    engine = start(loaded)
    whole = answers(engine, requests)
    for known in (1, 5, 11):
        longer = [
            replace(
                request,
                prompt_token_ids=(*request.prompt_token_ids, *(t for t, _ in answer[:known])),
                params=replace(request.params, max_tokens=PARAMS.max_tokens - known),
            )
            for request, answer in zip(requests, whole, strict=True)
        ]
        rest = [answer[known:] for answer in whole]
        assert differing(answers(engine, longer), rest) == [], known


def on_one_stream(loaded: LoadedModel) -> LoadedModel:
    """The same weights and kernels; nothing runs beside anything."""
    plan = loaded.kernel_plan
    model = DeepseekV4(loaded.config, dict(loaded.weights), plan, SingleComm(), in_turn)
    return replace(loaded, model=model)


def test_side_streams_change_nothing_in_100_batches(loaded: LoadedModel) -> None:
    several, one = start(loaded), start(on_one_stream(loaded))
    few = replace(PARAMS, max_tokens=3)
    for seed in range(100):
        requests = work(random.Random(seed).choice((1, 2, 3, 5, 8, 17, 40, 64)), seed, 40, few)
        assert differing(answers(several, requests), answers(one, requests)) == [], seed


def traced(run: Callable[[], object], folder: Path) -> list[dict[str, Any]]:
    """What the GPU did in `run()`: kernels, copies and fills, as events of a Chrome trace."""
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as recorded:
        run()
        torch.cuda.synchronize()
    recorded.export_chrome_trace(str(folder / "trace.json"))
    events = json.loads((folder / "trace.json").read_text())["traceEvents"]
    return [e for e in events if e.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")]


def at_once(loaded: LoadedModel, folder: Path) -> tuple[float, float]:
    """Of one sequence's decode steps: µs in which several kernels run, and µs from first to last."""
    engine = start(loaded, seats=1)
    answers(engine, work(1))  # warm
    (request,) = work(1, seed=1, longest=1000)
    engine.add(replace(request, params=replace(request.params, max_tokens=30)))
    for _ in range(4):
        engine.step()
    events = traced(lambda: [engine.step() for _ in range(8)], folder)
    ran = sorted((e["ts"], e["ts"] + e["dur"]) for e in events if e["cat"] == "kernel")
    shared, until = 0.0, ran[0][0]
    for begin, end in ran:
        shared += max(min(end, until) - begin, 0.0)
        until = max(until, end)
    return shared, until - ran[0][0]


def test_a_trace_shows_kernels_side_by_side(loaded: LoadedModel, tmp_path: Path) -> None:
    """More than those that start early give without side streams."""
    (several, took), (one, took_one) = (
        at_once(each, tmp_path) for each in (loaded, on_one_stream(loaded))
    )
    print(f"at once {several:.0f} of {took:.0f} µs; on one stream {one:.0f} of {took_one:.0f} µs")
    assert several > one


@pytest.mark.parametrize("eager", [False, True], ids=["captured", "eager"])
def test_a_step_runs_the_projects_kernels_alone(
    loaded: LoadedModel, eager: bool, tmp_path: Path
) -> None:
    """No product of a vendor's library, whose order of summation would depend on the batch: in prompts
    of 1 to 3,000 tokens, in decode steps of 1 to 9, sampled, with log probabilities of both."""
    engine = start(loaded, enforce_eager=eager)
    few = replace(PARAMS, max_tokens=6, top_p=0.9, frequency_penalty=0.5)
    some, (one,) = work(9, 8, 30, few), work(1, 9, 30, replace(few, prompt_logprobs=3))
    long = tuple(random.Random(9).randrange(2, 100_000) for _ in range(3000))
    cases = {
        "prompts and decode steps of nine": some,
        "a prompt and decode steps of one": [one],
        "a long prompt": [replace(one, prompt_token_ids=long)],
    }
    for name, requests in cases.items():
        answers(engine, requests)  # compiles and warms
        events = traced(partial(answers, engine, requests), tmp_path)
        names = {str(e["name"]) for e in events}
        ours = sorted(names & our_kernels())
        print(f"{name}: {len(events)} launches, {len(names)} names, {len(ours)} of them our own")
        assert of_libraries(names) == [], name
        assert strangers(names) == [], name
        assert len(ours) > 20, name


def test_a_chunk_at_128k_needs_little_workspace(loaded: LoadedModel) -> None:
    """A prompt of 131,072 tokens and a chunk of 8,192 behind them: under 2 GiB beside weights and state."""
    rng = random.Random(7)
    tokens = tuple(rng.randrange(2, 100_000) for _ in range(131_072 + 8_192))
    engine = start(loaded, 2, max_model_len=140_000, max_num_batched_tokens=8_192)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    answers(engine, [Request("long", tokens, replace(PARAMS, max_tokens=1))])
    most = torch.cuda.max_memory_allocated() - before
    print(f"workspace of 8,192 tokens at 128K: {most / 2**20:,.0f} MiB")
    assert most < 2 << 30

"""Where a request can resume: at every residue of rows and pages, and where images are kept.

In float64 with plain rows: tokens are equal to those of an engine without a cache, and their log
probabilities within 1e-9.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import pytest

from fourfold.core.config import CacheConfig, EngineConfig
from fourfold.core.device import detect
from fourfold.core.request import Request, SamplingParams
from fourfold.engine.engine import Engine
from fourfold.engine.loading import LoadedModel, load_model
from fourfold.weights.locate import locate
from tests.support import prompts, write_small

pytestmark = pytest.mark.full

PARAMS = SamplingParams(max_tokens=2, temperature=0.0, ignore_eos=True, logprobs=0)


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    folder = write_small(
        tmp_path_factory.mktemp("depths") / "c",
        "float32",
        seed=3,
        index_topk=10,
        sliding_window=24,
        num_hidden_layers=2,
        compress_ratios=[4, 128, 0],
        hidden_size=32,
    )
    config = EngineConfig(model=str(folder), dtype="float64")
    return load_model(locate(config.model), config, detect("cpu"))


def start(loaded: LoadedModel, **cache: int | bool) -> Engine:
    config = EngineConfig(
        model="m",
        dtype="float64",
        max_num_seqs=32,
        max_model_len=1024,
        num_speculative_tokens=1,
        cache=CacheConfig(**cache),
    )
    return Engine(loaded, config)


class Answer(NamedTuple):
    """What one request got."""

    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]
    cached_tokens: int
    cache_miss: str | None


def answers(
    engine: Engine, work: Sequence[Sequence[int]], image_positions: Sequence[int] = ()
) -> list[Answer]:
    got = [Answer((), (), 0, None)] * len(work)
    for number, tokens in enumerate(work):
        places = tuple(p for p in image_positions if p <= len(tokens))
        engine.add(Request(str(number), tuple(tokens), PARAMS, image_positions=places))
    for output in engine.run():
        before = got[number := int(output.request_id)]
        got[number] = Answer(
            (*before.tokens, *output.new_token_ids),
            (*before.logprobs, *(entry.logprob for entry in output.logprobs)),
            output.cached_tokens,
            output.cache_miss,
        )
    return got


def assert_same(got: Answer, expected: Answer) -> None:
    assert got.tokens == expected.tokens
    assert got.logprobs == pytest.approx(expected.logprobs, abs=1e-9)


# Around the boundaries of windows, rows and pages; and at every residue mod 4, 128 and 256.
NEAR = [*range(1, 14), *range(22, 28), *range(61, 68), *range(121, 134), *range(250, 263)]
DEEP = [383, 384, 385, 511, 512, 513]


@pytest.mark.parametrize(
    "depths",
    [[*NEAR, *DEEP], pytest.param([*range(1, 258), *DEEP], marks=pytest.mark.slow)],
    ids=["boundaries", "all"],
)
def test_a_hit_at_every_residue_equals_cold(loaded: LoadedModel, depths: list[int]) -> None:
    """Images at these positions, and requests that part from the prompt there."""
    prompt, *tails = prompts(192, (520, *[3] * len(depths)), 5)
    engine = start(loaded, state_interval=1 << 20)
    answers(engine, [prompt], depths)
    # A tail that began as the prompt goes on would hit one deeper.
    tails = [[(prompt[d] + 1) % 192, *tail] for d, tail in zip(depths, tails, strict=True)]
    work = [[*prompt[:d], *tail] for d, tail in zip(depths, tails, strict=True)]
    hits = answers(engine, work)
    assert [hit.cached_tokens for hit in hits] == depths
    cold = answers(start(loaded, enable_prefix_caching=False), work)
    for hit, expected in zip(hits, cold, strict=True):
        assert expected.cached_tokens == 0
        assert_same(hit, expected)


def test_images_are_kept_every_interval_and_where_the_request_says(loaded: LoadedModel) -> None:
    """A prompt that parts from an earlier one hits the deepest image below: one of the interval, the
    one before the earlier prompt's last token, or the one asked for before a generation header, after
    which the next turn may differ."""
    prompt, tail = prompts(192, (400, 20), 6)
    tail[0] = next(t for t in range(192) if t not in prompt)
    turns = {shared: [*prompt[:shared], *tail] for shared in (63, 192, 200, 349, 350, 398, 399)}
    cold = dict(
        zip(
            turns,
            answers(start(loaded, enable_prefix_caching=False), [*turns.values()]),
            strict=True,
        )
    )
    for interval, header, shared, depth in (
        (64, (), 200, 192),
        (64, (), 192, 192),
        (64, (), 63, 0),
        (1 << 20, (), 398, 0),
        (1 << 20, (), 399, 399),
        (1 << 20, (350,), 398, 350),
        (1 << 20, (350,), 350, 350),
        (1 << 20, (350,), 349, 0),
        (100, (350,), 398, 350),
        (100, (250,), 398, 300),
    ):
        engine = start(loaded, state_interval=interval)
        answers(engine, [prompt], header)
        got = answers(engine, [turns[shared]])[0]
        assert got.cached_tokens == depth, (interval, header, shared)
        assert got.cache_miss is not None
        assert_same(got, cold[shared])

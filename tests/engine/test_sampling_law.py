"""Statistics: the random numbers are uniform and independent, and what is sampled, with drafts and
without, follows the model's distribution. Seeds are fixed, so a verdict never changes by itself.

Every test statistic is Pearson's chi-square with Σ (seen − expected)² / expected over k cells. A p-value
below ALPHA fails. If all expected shares were off by a factor 1 ± ε, the statistic would be noncentral
with λ = n ε²; `power` gives the chance to notice, and each test states its ε. The tests with a fault
built in show that such faults are noticed.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor

from fourfold.core.batch import ForwardBatch
from fourfold.core.config import CacheConfig, EngineConfig, ModelConfig
from fourfold.core.device import detect
from fourfold.core.request import Request, SamplingParams
from fourfold.engine.engine import Engine
from fourfold.engine.loading import LoadedModel
from fourfold.model.parts import ForwardOutput
from fourfold.ops.catalog import OPS
from fourfold.ops.registry import KernelPlan
from fourfold.ops.sampling import random_streams
from fourfold.ops.sampling import uniform as uniform_op
from fourfold.weights.geometry import config_json
from tests.engine import sampling_reference
from tests.engine.sampling_reference import distribution

pytestmark = pytest.mark.full

ALPHA = 1e-4
Array = npt.NDArray[Any]


def uniform(seeds: Any, positions: Any, purpose: int = 0) -> Array:
    """The op's numbers for unsigned seeds."""
    seeds, positions = np.broadcast_arrays(np.array(seeds, np.uint64), np.array(positions))
    streams = random_streams(torch.from_numpy(seeds.copy().view(np.int64)), purpose)
    numbers: Array = uniform_op(streams, torch.from_numpy(positions.copy())).numpy()
    return numbers


def test_numbers_are_those_of_the_formula() -> None:
    rng = np.random.default_rng(1)
    seeds = [0, 1, 2**63, 2**64 - 1, *rng.integers(0, 2**64, 200, dtype=np.uint64).tolist()]
    positions = [0, 5, 2**20, 3, *rng.integers(0, 2**21, 200).tolist()]
    for purpose in (0, 1, 9):
        wanted = [
            sampling_reference.uniform(s, p, purpose) for s, p in zip(seeds, positions, strict=True)
        ]
        assert uniform(seeds, positions, purpose).tolist() == wanted


def p_value(statistic: float, freedom: int) -> float:
    """Chance of a chi-square variable of `freedom` degrees to be larger."""
    half = torch.tensor([freedom / 2, statistic / 2], dtype=torch.float64)
    return float(torch.special.gammaincc(half[0], half[1]))


def power(count: int, freedom: int, epsilon: float) -> float:
    """Chance that shares off by 1 ± `epsilon` give a p-value below ALPHA (normal approximation)."""
    low, high = float(freedom), 20.0 * freedom + 500
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if p_value(middle, freedom) > ALPHA else (low, middle)
    shift = count * epsilon**2
    z = (freedom + shift - low) / math.sqrt(2 * (freedom + 2 * shift))
    return 0.5 * math.erfc(-z / math.sqrt(2))


def chi_square(seen: Array, shares: Array) -> tuple[float, int]:
    """Statistic and degrees of freedom of counts `[..., k]` against `shares` of each last row."""
    expected = seen.sum(-1, keepdims=True) * shares
    kept = shares > 0
    assert not seen[~np.broadcast_to(kept, seen.shape)].any(), "a token of no probability"
    assert expected[np.broadcast_to(kept, seen.shape)].min() > 5
    statistic = np.where(kept, (seen - expected) ** 2 / np.where(kept, expected, 1), 0).sum()
    return float(statistic), int((np.broadcast_to(kept, seen.shape).sum(-1) - 1).sum())


def test_p_values_are_those_of_the_tables() -> None:
    for statistic, freedom, expected in (
        (3.841, 1, 0.05),
        (18.307, 10, 0.05),
        (135.807, 100, 0.01),
    ):
        assert abs(p_value(statistic, freedom) - expected) < 1e-4


# ---- the random numbers ----

COUNT = 200_000
STREAMS: dict[str, Callable[[], Array]] = {
    "positions of one seed": lambda: uniform([7], np.arange(COUNT)),
    "positions of a large seed": lambda: uniform([2**64 - 5], np.arange(COUNT)),
    "seeds in a row at one position": lambda: uniform(np.arange(COUNT), [100]),
    "seeds that differ in their high bits": lambda: uniform(
        np.arange(COUNT).astype(np.uint64) << np.uint64(32), [3]
    ),
    "seed and position moving together": lambda: uniform(np.arange(COUNT), np.arange(COUNT)),
    "seed and position moving against each other": lambda: uniform(
        np.arange(COUNT), np.arange(COUNT)[::-1]
    ),
    "another purpose": lambda: uniform([7], np.arange(COUNT), purpose=1),
}


def cells(numbers: Array, count: int) -> Array:
    return np.minimum((numbers * count).astype(np.int64), count - 1)


def uniformity(numbers: Array) -> float:
    """p-value of 64 equal cells."""
    seen = np.bincount(cells(numbers, 64), minlength=64)
    return p_value(*chi_square(seen, np.full(64, 1 / 64)))


def independence(first: Array, second: Array) -> float:
    """p-value of 16 × 16 equal cells of pairs."""
    pairs = cells(first, 16) * 16 + cells(second, 16)
    return p_value(*chi_square(np.bincount(pairs, minlength=256), np.full(256, 1 / 256)))


@pytest.mark.parametrize("name", STREAMS)
def test_numbers_are_uniform(name: str) -> None:
    """200,000 numbers in 64 cells: a factor 1 ± 0.025 is noticed with probability above 0.99."""
    assert power(COUNT, 63, 0.025) > 0.99
    numbers = STREAMS[name]()
    assert numbers.shape == (COUNT,)
    assert numbers.min() >= 0.0
    assert numbers.max() < 1.0
    assert len(set(numbers.tolist())) == COUNT
    assert uniformity(numbers) > ALPHA
    largest = np.abs(np.sort(numbers) - np.arange(COUNT) / COUNT).max()
    assert largest < 2.23 / math.sqrt(COUNT)  # Kolmogorov–Smirnov at 1e-4
    low_bits = (numbers * 2**53).astype(np.int64) % 64
    assert p_value(*chi_square(np.bincount(low_bits, minlength=64), np.full(64, 1 / 64))) > ALPHA


@pytest.mark.parametrize("name", STREAMS)
@pytest.mark.parametrize("lag", [1, 2, 3, 4, 256])
def test_neighbouring_numbers_are_independent(name: str, lag: int) -> None:
    """Pairs in 16 × 16 cells: a factor 1 ± 0.04 is noticed with probability above 0.99. Lags 1 to 4 are
    those between the rows of one run with drafts."""
    assert power(COUNT - 256, 255, 0.04) > 0.99
    numbers = STREAMS[name]()
    assert independence(numbers[:-lag], numbers[lag:]) > ALPHA


def test_streams_of_related_seeds_and_purposes_are_independent() -> None:
    positions = np.arange(COUNT)
    base = uniform([1000], positions)
    for other in (
        uniform([1001], positions),
        uniform([1000 ^ 1 << 63], positions),
        uniform([1000 + 2**32], positions),
        uniform([1000], positions, purpose=1),
        uniform([1000], positions + 2**32),
    ):
        assert independence(base, other) > ALPHA


def test_faults_in_the_numbers_are_noticed() -> None:
    numbers = uniform([7], np.arange(COUNT))
    assert uniformity(numbers**1.03) < ALPHA
    assert uniformity(np.where(numbers < 0.02, numbers + 0.02, numbers)) < ALPHA
    assert independence(numbers[:-1], 0.97 * numbers[1:] + 0.03 * numbers[:-1]) < ALPHA


# ---- sampling with drafts ----

VOCAB = 8


class Chain:
    """A model whose next token depends on the last one alone: logits are a row of `table`.

    Its draft layer guesses the likeliest next token, which is right about half of the time; from wrong
    guesses it goes on, so that later drafts are conditioned on them.
    """

    def __init__(self, config: ModelConfig, table: Tensor):
        self.config, self.table = config, table
        self.ops = KernelPlan.bodies(OPS)
        self.embed = SimpleNamespace(table=torch.zeros(VOCAB, config.hidden_size))
        self.mtp = [SimpleNamespace(forward=self.draft)]

    def forward(self, batch: ForwardBatch, state: Any) -> ForwardOutput:
        return self.output(batch, batch.token_ids)

    def draft(self, streams: Tensor, ids: Tensor, batch: ForwardBatch, state: Any) -> ForwardOutput:
        return self.output(batch, ids)

    def output(self, batch: ForwardBatch, ids: Tensor) -> ForwardOutput:
        streams = torch.zeros(batch.num_tokens, self.config.hc_mult, self.config.hidden_size)
        flags = torch.zeros(batch.num_sequences, dtype=torch.bool)
        return ForwardOutput(self.table[ids][batch.logits_tokens], streams, flags)


def table() -> Tensor:
    """Logits of a chain in which the likeliest next token has a probability of about one half."""
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(VOCAB, VOCAB, generator=generator) * 0.7
    best = torch.randperm(VOCAB, generator=generator)
    logits[torch.arange(VOCAB), best] = torch.logsumexp(logits, -1)
    return logits


def answers(
    drafts: int, requests: int, length: int, params: SamplingParams, first_seed: int | None = None
) -> tuple[Array, Engine]:
    """Tokens `[requests, 1 + length]` of requests with seeds of their own, prompt's last included."""
    widths = {"hidden_size": 8, "head_dim": 16, "qk_rope_head_dim": 8, "index_head_dim": 16}
    geometry = {**config_json("tiny"), **widths, "vocab_size": VOCAB}
    config = ModelConfig.from_dict(geometry, "config.json").config
    model: Any = Chain(config, table())
    checkpoint: Any = None
    device = detect("cpu")
    made = (checkpoint, (), "chain", 0)
    loaded = LoadedModel(model, config, torch.float32, device, model.ops, *made)
    cache = CacheConfig(num_pages=256, enable_prefix_caching=False)
    engine = Engine(
        loaded,
        EngineConfig(
            "chain",
            dtype="float32",
            max_model_len=256,
            max_num_seqs=128,
            num_speculative_tokens=drafts,
            cache=cache,
        ),
    )
    got: dict[str, list[int]] = {}
    for number in range(requests):
        prompt = [number % VOCAB] * (1 + number % 5)
        got[str(number)] = prompt[-1:]
        seed = (10_000 * drafts if first_seed is None else first_seed) + number
        each = replace(params, seed=seed, max_tokens=length, ignore_eos=True)
        engine.add(Request(str(number), tuple(prompt), each))
    for output in engine.run():
        got[output.request_id] += output.new_token_ids
    return np.array([*got.values()]), engine


def shares(params: SamplingParams) -> Array:
    """Transition probabilities `[V, V]`, by the definitions."""
    return np.stack([distribution(row, params) for row in table().double().numpy()])


def transitions(tokens: Array, shares_: Array) -> list[float]:
    """p-values: each token given the one before, and given the two before."""
    before, last, now = tokens[:, :-2], tokens[:, 1:-1], tokens[:, 2:]
    pairs = np.zeros((VOCAB, VOCAB))
    np.add.at(pairs, (last.ravel(), now.ravel()), 1)
    triples = np.zeros((VOCAB, VOCAB, VOCAB))
    np.add.at(triples, (before.ravel(), last.ravel(), now.ravel()), 1)
    rows = triples.reshape(-1, VOCAB)
    wanted = np.broadcast_to(shares_, triples.shape).reshape(-1, VOCAB)
    # Rows too rare for the approximation are left to the test of pairs.
    enough = (rows.sum(-1, keepdims=True) * wanted >= 5).sum(-1) == (wanted > 0).sum(-1)
    return [
        p_value(*chi_square(pairs, shares_)),
        p_value(*chi_square(rows[enough], wanted[enough])),
    ]


REQUESTS, LENGTH = 2000, 50
PLAIN = SamplingParams(temperature=1.0)
SHAPED = SamplingParams(temperature=1.25, top_p=0.9, top_k=6, min_p=0.05)


@pytest.mark.parametrize("params", [PLAIN, SHAPED], ids=["plain", "shaped"])
@pytest.mark.parametrize("drafts", [0, 1, 3])
def test_what_is_sampled_follows_the_distribution(drafts: int, params: SamplingParams) -> None:
    """98,000 transitions in 8 × 8 cells: probabilities off by a factor 1 ± 0.035 are noticed with
    probability above 0.99; in up to 8 × 8 × 8 cells of two tokens' memory, off by 1 ± 0.05."""
    count = REQUESTS * (LENGTH - 1)
    assert power(count, VOCAB * (VOCAB - 1), 0.035) > 0.99
    assert power(count, VOCAB**2 * (VOCAB - 1), 0.05) > 0.99
    tokens, engine = answers(drafts, REQUESTS, LENGTH, params)
    assert tokens.shape == (REQUESTS, 1 + LENGTH)
    assert min(transitions(tokens, shares(params))) > ALPHA
    if drafts:
        accepted = np.array(engine.stats.accepted) / np.array(engine.stats.drafted)
        assert 0.4 < accepted[0] < 0.65
        assert (np.diff(accepted) < 0).all()


def test_drafts_do_not_change_a_single_token() -> None:
    """With equal seeds the tokens themselves are equal, which says more than any distribution."""
    plain, *drafted = (answers(drafts, 100, 60, PLAIN, first_seed=5)[0] for drafts in range(4))
    assert all((tokens == plain).all() for tokens in drafted)


def faulty_accept(sampled: Tensor, drafts: Tensor) -> Tensor:
    """A fault: once the first draft stands, so do all."""
    first = (sampled[:, :1] == drafts)[:, :1].to(torch.int64).sum(-1)
    return first * drafts.shape[1]


def test_faults_in_verification_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """One number for all rows of a run, and drafts that are believed too easily."""

    def repeated(streams: Tensor, positions: Tensor) -> Tensor:
        return uniform_op(streams, positions // 2)

    original = KernelPlan.__getattr__
    for op, fault in (("uniform", repeated), ("count_accepted", faulty_accept)):
        with monkeypatch.context() as patch:
            patch.setattr(
                KernelPlan,
                "__getattr__",
                lambda plan, name, op=op, fault=fault: (
                    fault if name == op else original(plan, name)
                ),
            )
            tokens, _ = answers(3, REQUESTS, LENGTH, PLAIN)
            assert min(transitions(tokens, shares(PLAIN))) < ALPHA

"""The scheduler as a function of state and event: random worlds, and what must hold in all of them."""

from __future__ import annotations

import random
import statistics
import time
from collections import Counter
from collections.abc import Iterator

import pytest

from fourfold.cache import pages, prefix
from fourfold.cache.pages import chain_root
from fourfold.cache.prefix import PrefixCache
from fourfold.core.errors import CapacityError, RequestError
from fourfold.core.request import Request, SamplingParams
from fourfold.engine import scheduler as scheduler_module
from fourfold.engine import sequence as sequence_module
from fourfold.engine.scheduler import Limits, Scheduler
from fourfold.engine.sequence import Sequence
from tests.engine.simulated import Setting, World

EPISODE = 400  # steps before a world is drained and another begins
# Steps without a run of the sequence of first rank. It waits at most for those who hold what it needs
# to end, which they do after at most 4 pages of tokens, a token a step.
LONGEST_WAIT = 100


@pytest.fixture
def small_pages(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Pages of 8 tokens, so that a short sequence crosses many of them."""
    for module in (pages, prefix, scheduler_module, sequence_module):
        monkeypatch.setattr(module, "PAGE_TOKENS", 8)
    yield


def live(steps: int, seed: int) -> tuple[Counter[str], list[object]]:
    """Random events for `steps` steps; what happened how often, and all runs."""
    rng = random.Random(seed)
    total: Counter[str] = Counter()
    traces: list[object] = []
    while total["steps"] < steps:
        world = World(Setting.random(rng), rng)
        crowd = rng.choice([3, 8, 20])
        while world.counts["steps"] < min(EPISODE, steps - total["steps"]):
            while len(world.live) < crowd and rng.random() < 0.5:
                world.add()
            if rng.random() < 0.02:
                world.abort()
            if rng.random() < 0.002:
                world.scheduler.cache.forget()
            world.step()
        world.drain()
        longest = max(total["longest wait"], world.counts.pop("longest wait"))
        total += world.counts
        total["longest wait"] = longest
        traces.append(world.trace)
    return total, traces


def report(counts: Counter[str], seed: int) -> None:
    print(f"seed {seed}: " + ", ".join(f"{n} {what}" for what, n in sorted(counts.items())))
    for what in (
        "hit",
        "told of a hit",
        "resumed",
        "saved",
        "preempted",
        "refused",
        "aborted waiting",
        "aborted running",
        "finished",
        "accepted 3 of 3",
        "accepted 0 of 3",
    ):
        assert counts[what] > counts["steps"] / 2000, f"{what} hardly happened"
    assert counts["longest wait"] <= LONGEST_WAIT


@pytest.mark.usefixtures("small_pages")
def test_ten_thousand_steps() -> None:
    seed = 20_000
    report(live(10_000, seed)[0], seed)


@pytest.mark.slow
@pytest.mark.usefixtures("small_pages")
def test_a_million_steps() -> None:
    seed = random.SystemRandom().randrange(1 << 30)
    print(f"seed {seed}")
    report(live(1_000_000, seed)[0], seed)


def test_steps_with_whole_pages() -> None:
    """The same with pages as long as they are."""
    counts, _ = live(3000, 3)
    assert counts["hit"]
    assert counts["finished"]


@pytest.mark.usefixtures("small_pages")
def test_the_same_events_give_the_same_steps() -> None:
    assert live(800, 5) == live(800, 5)

"""The scheduler as a function of state and event: random worlds, and what must hold in all of them."""

from __future__ import annotations

import random
import time
from collections import Counter

import pytest

from fourfold.cache import pages, prefix
from fourfold.cache.pages import chain_root
from fourfold.cache.prefix import PrefixCache
from fourfold.core import row_format
from fourfold.core.errors import CapacityError, RequestError
from fourfold.core.request import Request, SamplingParams
from fourfold.engine import scheduler as scheduler_module
from fourfold.engine.scheduler import AGEING, Limits, Scheduler
from fourfold.engine.sequence import Sequence
from tests.engine.simulated import Setting, World

pytestmark = pytest.mark.full

EPISODE = 400  # steps before a world is drained and another begins
# Steps without a run of the sequence of first rank. It waits at most for those who hold what it needs
# to end, which they do after at most 4 pages of tokens, a token a step.
LONGEST_WAIT = 100


@pytest.fixture
def small_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pages of 8 tokens, so that a short sequence crosses many of them."""
    for module in (pages, prefix, row_format, scheduler_module):
        monkeypatch.setattr(module, "PAGE_TOKENS", 8)


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
        "launched ahead",
        "ran on after its end",
        "waited for results",
    ):
        assert counts[what] > counts["steps"] / 2000, f"{what} hardly happened"
    assert counts["longest wait"] <= LONGEST_WAIT


@pytest.mark.usefixtures("small_pages")
@pytest.mark.parametrize("seed", [2, 20_000])
def test_ten_thousand_steps(seed: int) -> None:
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


def world(seats: int, num_pages: int, budget: int = 8192, **limits: int) -> World:
    """A world where only what a test adds happens."""
    setting = Setting(
        Limits(
            max_num_seqs=seats,
            max_num_batched_tokens=budget,
            max_model_len=num_pages * pages.PAGE_TOKENS,
            slot_bytes=100,
            page_bytes=40,
            **limits,
        ),
        num_pages,
        device_images=1000,
        host_images=1000,
        caching=True,
        longest_prompt=8,
    )
    return World(setting, random.Random(0), ends=0.0)


@pytest.mark.usefixtures("small_pages")
def test_pages_promised_to_a_long_prompt_are_not_given_away() -> None:
    """A prompt in chunks, with budget left beside each: later requests must not take its pages and
    then, as decodes, keep it waiting until they end."""
    w = world(seats=8, num_pages=12, budget=24, image_interval=8)
    long = w.submit([1] * 72, 8)
    for number in range(6):
        w.submit([2, 3, 4, 1 + number % 4] * 3, 70)
    for _ in range(12):
        w.step()
    assert long.num_output_tokens > 0
    w.drain()


@pytest.mark.usefixtures("small_pages")
def test_content_is_found_again_after_another_ones_copy_of_it_is_gone() -> None:
    """Two compute the same pages at once and one's are the ones found; when these are evicted, the
    image of the other must stand on its own."""
    w = world(seats=2, num_pages=12)
    prompt = [1, 2, 3, 4] * 6
    short, long = w.submit(prompt, 2), w.submit(prompt, 40)
    while short.arrival in w.live:
        w.step()
    filler = w.submit([4] * 40, 4)
    while filler.arrival in w.live:
        w.step()
    while long.arrival in w.live:
        w.step()
    last = w.submit([*long.token_ids, 1], 2)
    while last.arrival in w.live:
        w.step()
    assert last.cached_tokens == len(long.token_ids) - 1
    w.drain()


@pytest.mark.usefixtures("small_pages")
def test_priorities_come_first_and_then_arrivals() -> None:
    w = world(seats=1, num_pages=12)
    order = [w.submit([1, 2], 3, priority=p) for p in (0, 1, 0, -1, 1, 0)]
    w.step()  # nothing is running yet, so that even the first must wait for the one of priority -1
    expected = [order[i] for i in (3, 0, 2, 5, 1, 4)]
    ends: list[Sequence] = []
    for _ in range(60):
        ends += [s for s in order if s.arrival not in w.live and s not in ends]
        w.step()
    assert ends == expected


@pytest.mark.parametrize("seats", [1, 5])
@pytest.mark.usefixtures("small_pages")
def test_urgent_requests_that_never_stop_coming_starve_nobody(seats: int) -> None:
    """Two patient requests among ever new urgent ones: each starts within the bound the scheduler
    states, and the urgent ones come first until then."""
    w = world(seats, num_pages=40)
    patient = [w.submit([1, 2], 2, priority=10**6), w.submit([1, 3], 2, priority=5)]
    started: list[int] = []
    urgent = 0
    while any(s.arrival in w.live for s in patient):
        while w.scheduler.num_waiting < 2 * seats + 2:
            w.submit([2, 1], 2, priority=-(urgent % 7))
            urgent += 1
        before = {s.arrival for s in w.scheduler.waiting()}
        w.step()
        started += sorted(before - {s.arrival for s in w.scheduler.waiting()})
        assert len(started) <= 4 * (AGEING + seats), "a patient request starves"
    for older, one in enumerate(patient):
        place = started.index(one.arrival)
        assert AGEING - seats <= place <= (older + 1) * (AGEING + seats)
    w.drain()


def test_whoever_has_waited_longest_gets_a_turn_now_and_then() -> None:
    """In any mixture of priorities, however often the oldest are aborted."""
    rng = random.Random(4)
    seats = 3
    scheduler = Scheduler(Limits(seats, 64, max_model_len=2000), PrefixCache(64, 0, 0))
    waiting: dict[int, Sequence] = {}
    passed, turns, arrival = 0, 0, 0
    for _ in range(1500):
        while len(waiting) < 30:
            arrival += 1
            waiting[arrival] = sequence(arrival, 4, 1, priority=rng.choice([0, 0, 0, -9, 3, 70]))
            scheduler.admit(waiting[arrival])
        if rng.random() < 0.1:
            scheduler.abort([waiting.pop(rng.choice([min(waiting), *waiting]))])
        step = scheduler.schedule()
        for run in step.runs:
            one = run.sequence
            if one.arrival in waiting:
                oldest = min(waiting)
                passed = 0 if one.arrival == oldest else passed + 1
                turns += one.arrival == oldest and one.rank[0] == 0
                del waiting[one.arrival]
                assert passed < AGEING + seats
            one.advance(run.count, (1,) if run.samples else (), ())
            scheduler.settled(run)
            if run.samples:
                scheduler.finish(one)
    assert turns > 10


def sequence(arrival: int, prompt: int, max_tokens: int, priority: int = 0) -> Sequence:
    params = SamplingParams(max_tokens=max_tokens)
    request = Request(f"r{arrival}", tuple([1] * prompt), params, priority)
    return Sequence(
        request, 0, arrival, 0, max_tokens, (), chain_root("", None), token_ids=[1] * prompt
    )


def test_what_can_never_run_is_refused_with_the_numbers() -> None:
    small = Scheduler(Limits(4, 64, max_model_len=2000), PrefixCache(4, 0, 0))
    with pytest.raises(RequestError, match="at least one token"):
        small.admit(sequence(1, 0, 5))
    with pytest.raises(CapacityError, match=r"1990 .*\(11\) = 2001 .*\(2000\)"):
        small.admit(sequence(1, 1990, 11))
    with pytest.raises(CapacityError, match="need 5 pages of 256 tokens, the cache has 4"):
        small.admit(sequence(1, 1000, 25))
    small.admit(sequence(1, 1000, 24))
    assert small.num_waiting == 1


def test_aborted_requests_that_waited_are_not_kept() -> None:
    """Behind a request that cannot start, thousands come and go."""
    scheduler = Scheduler(Limits(1, 64, max_model_len=2000), PrefixCache(8, 0, 0))
    running, head = sequence(1, 10, 1900), sequence(2, 10, 1900)
    scheduler.admit(running)
    scheduler.schedule()
    scheduler.admit(head)
    for arrival in range(3, 3000):
        visitor = sequence(arrival, 10, 10)
        scheduler.admit(visitor)
        scheduler.abort([visitor])
        assert scheduler.num_waiting == 1
        assert len(scheduler._waiting) <= 4
    assert list(scheduler.waiting()) == [head]


def crowded(blocked_by: str, waiting: int) -> Scheduler:
    """64 sequences decode while `waiting` wait for a slot, or for pages with a slot free."""
    limits = Limits(64 + (blocked_by == "pages"), 8192, max_model_len=1000, image_interval=1 << 30)
    scheduler = Scheduler(limits, PrefixCache(66, 0, 0))
    for arrival in range(64):
        scheduler.admit(sequence(arrival, 20, 200))
    for _ in range(2):  # a prompt stops for an image before its last token
        for run in scheduler.schedule().runs:
            run.sequence.advance(run.count, (1,) if run.samples else (), ())
            scheduler.settled(run)
    for arrival in range(64, 64 + waiting):
        scheduler.admit(sequence(arrival, 700, 200))
    assert all(s.is_decoding for s in scheduler.running)
    return scheduler


@pytest.mark.parametrize("blocked_by", ["slots", "pages"])
def test_ten_thousand_waiting_do_not_slow_a_step(blocked_by: str) -> None:
    """The time of `schedule` must not grow with those who wait: 1.5 times and 20 microseconds are for
    noise. The best of many steps, in turn with few and many waiting: other work on the machine slows some
    steps of either."""
    crowds = (10, 10_000)
    schedulers = [crowded(blocked_by, waiting) for waiting in crowds]
    best = [1 << 62, 1 << 62]
    for _ in range(150):
        for number, scheduler in enumerate(schedulers):
            begin = time.thread_time_ns()
            step = scheduler.schedule()
            best[number] = min(best[number], time.thread_time_ns() - begin)
            assert len(step.runs) == 64
            assert scheduler.num_waiting == crowds[number]
            for run in step.runs:
                run.sequence.advance(1, (1,), ())
                scheduler.settled(run)
    print(f"schedule: {best[0] / 1e3:.0f} us with 10 waiting, {best[1] / 1e3:.0f} with 10,000")
    assert best[1] < 1.5 * best[0] + 20_000

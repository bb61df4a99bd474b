"""The scheduler driven by random events, with a model and a memory that only remember tokens.

Contract: pages hold the tokens written to them, a slot holds a fingerprint of all tokens before its
position, images copy both. So whatever the scheduler gets wrong about who owns what, and when, shows as
wrong tokens; what it may not do at any time is checked after every step. Where steps overlap, one is
scheduled before what the last one brought is told, and carried out by what the device alone knows.
"""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass, field, replace
from typing import Any

from fourfold.cache import pages as pages_module
from fourfold.cache.pages import chain_root
from fourfold.cache.prefix import PrefixCache
from fourfold.core.errors import CapacityError
from fourfold.core.request import Request, SamplingParams
from fourfold.engine.scheduler import Limits, Restoring, Saving, Scheduler, Step
from fourfold.engine.sequence import Run, Sequence

STOP = 0
ALPHABET = 5
IMAGE_BYTES, PAGE_BYTES = 100, 40


def fold(state: int, tokens: Any) -> int:
    """The state after `tokens`, as a number."""
    for token in tokens:
        state = hash((state, token))
    return state


def empty(sequence: Sequence) -> int:
    """The state before any token. It depends on the salt, whose caches must never meet."""
    return 0 if sequence.request.cache_salt is None else 1


def state_at(sequence: Sequence, position: int) -> int:
    return fold(empty(sequence), sequence.token_ids[:position])


@dataclass(frozen=True)
class FakeImage:
    """Stands in for a `StateImage`: the slot's state, the open page's rows, and whole pages."""

    position: int
    state: int
    rows: tuple[int, ...]
    pages: tuple[tuple[int, ...], ...] = ()

    @property
    def num_pages(self) -> int:
        return len(self.pages)

    @property
    def nbytes(self) -> int:
        return IMAGE_BYTES + PAGE_BYTES * len(self.pages)

    def to(self, device: object) -> FakeImage:
        return replace(self)


@dataclass
class OnDevice:
    """What the device knows of a sequence before the host does."""

    tokens: list[int]
    computed: int
    drafts: list[int]
    versions: list[int]  # states, by accepted drafts
    version: int = 0
    alive: bool = True

    @property
    def state(self) -> int:
        return self.versions[self.version]


@dataclass
class Launched:
    """A run that was carried out, and what it brings."""

    run: Run
    standing: int = 0
    sampled: tuple[int, ...] = ()
    drafts: tuple[int, ...] = ()
    image: FakeImage | None = None


@dataclass
class Setting:
    """One random world."""

    limits: Limits
    num_pages: int
    device_images: int
    host_images: int
    caching: bool
    longest_prompt: int
    overlap: bool = False

    @staticmethod
    def random(rng: random.Random) -> Setting:
        page = pages_module.PAGE_TOKENS
        num_pages = rng.choice([4, 6, 9, 14, 30])
        longest = min(rng.choice([4, 6, 10]), num_pages) * page + rng.randrange(page)
        return Setting(
            Limits(
                max_num_seqs=rng.randint(1, 8),
                max_num_batched_tokens=rng.choice([1, 3, page, 3 * page, 20 * page]),
                max_model_len=longest,
                num_drafts=rng.randrange(4),
                image_interval=rng.choice([page // 2, 2 * page, 3 * page + 1, 100 * page]),
                preempt_bytes=rng.choice([0, 500, 1 << 30]),
                page_bytes=PAGE_BYTES,
                slot_bytes=IMAGE_BYTES,
            ),
            num_pages,
            device_images=rng.choice([0, 3, 50]) * IMAGE_BYTES,
            host_images=rng.choice([0, 4, 50]) * IMAGE_BYTES,
            caching=rng.random() < 0.85,
            longest_prompt=longest // 2,
            overlap=rng.random() < 0.7,
        )


@dataclass
class World:
    """A scheduler, the memory it manages, and everything that must hold."""

    setting: Setting
    rng: random.Random
    ends: float = 0.01  # how likely a token is the last
    scheduler: Scheduler = field(init=False)
    live: dict[int, Sequence] = field(default_factory=dict)
    pages: list[list[int]] = field(init=False)  # contents, garbage included
    slots: dict[int, OnDevice] = field(default_factory=dict)
    flying: list[Launched] = field(default_factory=list)
    waited: Counter[int] = field(
        default_factory=Counter
    )  # steps without a run, of the first by rank
    counts: Counter[str] = field(default_factory=Counter)
    started_at: dict[int, int] = field(default_factory=dict)
    trace: list[Any] = field(default_factory=list)
    arrivals: int = 0

    def __post_init__(self) -> None:
        s = self.setting
        cache = PrefixCache(s.num_pages, s.device_images, s.host_images, enabled=s.caching)
        self.scheduler = Scheduler(s.limits, cache)
        self.page = pages_module.PAGE_TOKENS
        self.pages = [[-1] * self.page for _ in range(s.num_pages)]
        self.documents = [self._tokens(s.longest_prompt) for _ in range(3)]
        self.past: list[list[int]] = []  # conversations that ended

    # ---- events ----

    def add(self) -> None:
        """A random request that shares a prefix with others, or none; it may be too long."""
        rng, limits = self.rng, self.setting.limits
        document = rng.choice([*self.documents, *self.past[-2:]])
        shared = document[: rng.choice([0, rng.randrange(len(document)), len(document)])]
        prompt = [*shared, *self._tokens(rng.choice([1, rng.randrange(1, self.page), 2]))]
        max_tokens = rng.choice(
            [1, rng.randrange(1, 2 * self.page), rng.randrange(self.page, 6 * self.page)]
        )
        total, page, refusal = len(prompt) + max_tokens, self.page, ""
        try:
            self.submit(
                prompt,
                max_tokens,
                prompt_logprobs=0 if rng.random() < 0.05 else None,
                priority=rng.choice([0, 0, 0, 0, 1, -1]),
                cache_salt=rng.choice([None, None, "salt"]),
                image_positions=tuple(
                    rng.randrange(1, len(prompt) + 1) for _ in range(rng.randrange(3))
                ),
            )
        except CapacityError as error:
            refusal = str(error)
        assert bool(refusal) == (total > min(limits.max_model_len, self.setting.num_pages * page))
        if refusal:
            assert str(total) in refusal or str(-(-total // page)) in refusal
            self.counts["refused"] += 1

    def submit(
        self, prompt: list[int], max_tokens: int, prompt_logprobs: int | None = None, **more: Any
    ) -> Sequence:
        """Admit one request."""
        self.arrivals += 1
        params = SamplingParams(max_tokens=max_tokens, prompt_logprobs=prompt_logprobs)
        request = Request(f"r{self.arrivals}", tuple(prompt), params, **more)
        sequence = Sequence(
            request=request,
            index=0,
            arrival=self.arrivals,
            seed=0,
            max_tokens=max_tokens,
            stop_ids=(STOP,),
            root=chain_root("model", request.cache_salt),
            token_ids=list(prompt),
        )
        self.scheduler.admit(sequence)
        self.live[sequence.arrival] = sequence
        return sequence

    def abort(self) -> None:
        if self.live:
            victim = self.rng.choice(list(self.live.values()))
            self.counts["aborted waiting" if victim.state_slot < 0 else "aborted running"] += 1
            self.scheduler.abort([victim])
            self._forget(victim)

    def step(self) -> None:
        """One step: schedule, carry out, commit this one or the one before, and check."""
        scheduler = self.scheduler
        before = {s.arrival for s in scheduler.waiting()}
        has_work, preemptions = scheduler.has_work, scheduler.num_preemptions
        step = scheduler.schedule()
        if step is None:
            assert self.flying, "nothing is in flight that could be waited for"
            self._commit()
            self.counts["waited for results"] += 1
            has_work = scheduler.has_work
            step = scheduler.schedule()
            assert step is not None
        self.counts["preempted"] += scheduler.num_preemptions - preemptions
        assert bool(step.runs) == has_work or self.flying, "nothing runs although there is work"
        self._check_step(step, before)
        for saving in step.savings:
            scheduler.saved(saving.sequence, self._save(saving))  # type: ignore[arg-type]
            self.counts["saved"] += 1
        for s in step.started:
            begin, drafts = s.num_computed_tokens, [*s.drafts, 1, 1, 1]
            self.slots[s.state_slot] = OnDevice([*s.token_ids], begin, drafts, [empty(s)])
        for restoring in step.restorings:
            self._restore(restoring)
        launched = [self._carry_out(run) for run in step.runs]
        self.counts["launched ahead"] += sum(
            any(run.sequence is each.run.sequence for each in self.flying) for run in step.runs
        )
        self._commit()
        self.flying = launched
        if not self.setting.overlap:
            self._commit()
        self._check()
        self.counts["steps"] += 1

    def drain(self) -> None:
        """Run until nothing is left; everything must be free then."""
        for _ in range(20_000):
            if not self.scheduler.has_work and not self.flying:
                break
            self.step()
        cache = self.scheduler.cache
        assert not self.scheduler.has_work
        assert not self.live
        assert cache.pages.num_used == 0
        assert self.scheduler.slots.num_free == self.setting.limits.max_num_seqs
        assert self.scheduler.saved_bytes == 0
        assert self.scheduler.num_waiting == 0
        cache.forget()
        assert cache.pages.num_free == self.setting.num_pages
        assert cache.num_images == 0
        assert cache.image_bytes == (0, 0)
        cache.check()

    # ---- the model and the memory ----

    def _tokens(self, count: int) -> list[int]:
        return [self.rng.randrange(1, ALPHABET) for _ in range(count)]

    def _save(self, saving: Saving) -> FakeImage | None:
        if self.rng.random() < 0.1:
            return None  # no host memory after all
        s = saving.sequence
        contents = tuple(tuple(self.pages[page]) for page in saving.block_ids)
        state = self.slots[saving.state_slot].versions[saving.fold_version]
        image = FakeImage(s.num_computed_tokens, state, (), contents)
        self._check_image(image, s)
        return image

    def _image(self, s: Sequence, position: int, state: int) -> FakeImage:
        rest = position % self.page
        rows = self.pages[s.block_ids[position // self.page]][:rest] if rest else []
        return FakeImage(position, state, tuple(rows))

    def _restore(self, restoring: Restoring) -> None:
        s, image = restoring.sequence, restoring.image
        assert isinstance(image, FakeImage)
        self._check_image(image, s)
        self.slots[s.state_slot].versions = [image.state]
        for page, content in zip(s.block_ids, image.pages, strict=False):
            self._write(page, 0, content)
        if image.rows:
            self._write(s.block_ids[image.position // self.page], 0, image.rows)
        self.counts["resumed" if image.pages else "hit"] += 1

    def _check_image(self, image: FakeImage, s: Sequence) -> None:
        assert image.state == state_at(s, image.position), "an image of another prefix"

    def _write(self, page: int, offset: int, tokens: Any) -> None:
        pool = self.scheduler.cache.pages
        assert pool.references(page) == 1, "a shared page was written to"
        self.pages[page][offset : offset + len(tokens)] = tokens

    def _carry_out(self, run: Run) -> Launched:
        """On the device, by what it knows; the sequence is left as it is."""
        s, device = run.sequence, self.slots[run.sequence.state_slot]
        if not device.alive:
            self.counts["ran on after its end"] += 1
            return Launched(run)
        computed = device.computed
        ahead = s.flight is not run or any(each.run.sequence is s for each in self.flying)
        assert run.begin == computed or (ahead and run.begin < computed)
        drafts = device.drafts[: run.num_drafts]
        known = device.tokens[computed : computed + run.count - run.num_drafts]
        assert len(known) + len(drafts) == run.count
        held = [t for page in s.block_ids for t in self.pages[page]]
        assert held[:computed] == device.tokens[:computed], "pages do not hold its tokens"
        expected = fold(empty(s), device.tokens[:computed])
        assert device.state == expected, "the slot holds another state"
        for offset, token in enumerate([*known, *drafts], computed):
            if offset < s.total:  # further ones can never stand
                self._write(s.block_ids[offset // self.page], offset % self.page, [token])
        versions = [fold(device.state, known)]
        for draft in drafts:
            versions.append(fold(versions[-1], [draft]))
        sampled = self._sample(run, device, drafts) if run.samples else ()
        device.versions, device.version = versions, max(len(sampled) - 1, 0)
        standing = len(known) + max(len(sampled) - 1, 0)
        device.computed += standing
        device.tokens += sampled
        if sampled:
            device.drafts = self._tokens(self.setting.limits.num_drafts)
            device.alive = STOP not in sampled and len(device.tokens) < s.total
        image = None
        if run.keep_image:
            image = self._image(s, run.begin + run.count, device.state)
        return Launched(run, standing, sampled, tuple(device.drafts if sampled else ()), image)

    def _commit(self) -> None:
        """As the engine does it."""
        flying, self.flying = self.flying, []
        for each in flying:
            s = each.run.sequence
            if s.over:
                continue
            assert each.standing, "a result of nothing reached a sequence"
            reason = s.advance(each.standing, each.sampled, each.drafts)
            self.scheduler.settled(each.run)
            self.trace.append((s.arrival, each.run.count, each.sampled))
            image = each.image
            if reason:
                state = self.slots[s.state_slot].versions[s.fold_version]
                image = self._image(s, s.num_computed_tokens, state)
                self._check_image(image, s)
            if image and self.scheduler.cache.enabled:
                self.scheduler.keep_image(s, image)  # type: ignore[arg-type]
            if each.sampled and not s.reported:
                s.reported = True
                self._check_report(s)
            if reason:
                self.scheduler.finish(s)
                self._forget(s)
                self.counts["finished"] += 1
                if len(s.token_ids) < self.setting.longest_prompt:
                    self.past.append(s.token_ids)

    def _sample(self, run: Run, device: OnDevice, drafts: list[int]) -> tuple[int, ...]:
        right = self.rng.randint(0, len(drafts))
        wrong = {drafts[right]} if right < len(drafts) else set()
        ends = self.rng.random() < self.ends
        new = STOP if ends else self.rng.choice([t for t in range(1, ALPHABET) if t not in wrong])
        self.counts[f"accepted {right} of {len(drafts)}"] += 1
        room = run.sequence.total - len(device.tokens)
        return tuple([*drafts[:right], new][:room])

    def _check_report(self, s: Sequence) -> None:
        """What the client is told about the cache is what happened."""
        assert s.cached_tokens == self.started_at[s.arrival]
        if self.setting.caching:
            best = s.num_prompt_tokens - 1
            assert (s.cache_miss is None) == (s.cached_tokens == best), s.cache_miss
        self.counts["told of a hit"] += s.cached_tokens > 0

    def _forget(self, s: Sequence) -> None:
        del self.live[s.arrival]
        self.waited.pop(s.arrival, None)
        self.started_at.pop(s.arrival, None)

    # ---- what must hold ----

    def _check_step(self, step: Step, waiting_before: set[int]) -> None:
        """After `schedule`, before anything is carried out."""
        scheduler, limits = self.scheduler, self.setting.limits
        ran = {run.sequence.arrival for run in step.runs}
        assert len(ran) == len(step.runs), "a sequence runs twice"
        assert sum(run.count for run in step.runs) <= limits.max_num_batched_tokens
        assert len(step.runs) <= len(scheduler.running) <= limits.max_num_seqs
        restored = {each.sequence.arrival: each for each in step.restorings}
        started = [s for s in scheduler.running if s.arrival in waiting_before]
        still_waiting = [s.rank for s in scheduler.waiting()]
        for s in started:
            assert all(s.rank < rank for rank in still_waiting), "somebody was overtaken"
            assert (s.num_computed_tokens > 0) == (s.arrival in restored)
            if s.arrival not in restored or not restored[s.arrival].carry:
                self.started_at[s.arrival] = s.num_computed_tokens
        for run in step.runs:
            s = run.sequence
            assert run.count > 0
            assert s.state_slot >= 0
            assert s.flight is run
            assert run.num_drafts <= limits.num_drafts
            end = min(run.begin + run.count, s.total)
            assert len(s.block_ids) * self.page >= end
            if not any(each.run.sequence is s for each in self.flying):
                known = run.begin + run.count - run.num_drafts
                assert run.begin == s.num_computed_tokens
                assert run.samples == (known == len(s.token_ids))
        idle = [s.rank for s in scheduler.running if s.arrival not in ran]
        for s in scheduler.waiting():
            if s.arrival not in waiting_before:
                assert all(s.rank > rank for rank in idle), "the wrong one was preempted"
        self._check_waiting(ran)

    def _check_waiting(self, ran: set[int]) -> None:
        """Nobody of first rank waits for ever; the others wait for it."""
        if self.live:
            first = min(self.live.values(), key=lambda s: s.rank).arrival
            self.waited = Counter({first: 0 if first in ran else self.waited[first] + 1})
            self.counts["longest wait"] = max(self.counts["longest wait"], self.waited[first])

    def _check(self) -> None:
        """After every step."""
        scheduler, cache = self.scheduler, self.scheduler.cache
        cache.pages.check()
        cache.check()
        assert cache.pages.num_free + cache.pages.num_used + cache.pages.num_cached == (
            self.setting.num_pages
        )
        owned = Counter(page for s in scheduler.running for page in s.block_ids)
        assert all(cache.pages.references(page) == n for page, n in owned.items())
        assert cache.pages.num_used == len(owned), "a page is used by nobody"
        slots = [s.state_slot for s in scheduler.running]
        assert len(set(slots)) == len(slots)
        assert scheduler.slots.num_free + len(slots) == self.setting.limits.max_num_seqs
        assert scheduler.running == sorted(scheduler.running, key=lambda s: s.rank)
        waiting = list(scheduler.waiting())
        assert len(waiting) == scheduler.num_waiting
        assert all(s.state_slot < 0 and not s.block_ids for s in waiting)
        assert {s.arrival for s in (*waiting, *scheduler.running)} == set(self.live)
        saved = sum(s.saved.nbytes for s in waiting if s.saved)
        assert saved == scheduler.saved_bytes <= self.setting.limits.preempt_bytes

"""The scheduler driven by random events, with a model and a memory that only remember tokens.

Contract: pages hold the tokens written to them, a slot holds a fingerprint of all tokens before its
position, images copy both. So whatever the scheduler gets wrong about who owns what, and when, shows as
wrong tokens; what it may not do at any time is checked after every step.
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
from fourfold.engine.scheduler import Limits, Restoring, Run, Saving, Scheduler, Step
from fourfold.engine.sequence import Sequence

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
class Setting:
    """One random world."""

    limits: Limits
    num_pages: int
    device_images: int
    host_images: int
    caching: bool
    longest_prompt: int

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
    slots: dict[int, list[int]] = field(default_factory=dict)  # states by version
    waited: Counter[int] = field(default_factory=Counter)  # steps without a run, by arrival
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
        """One step: schedule, carry out, commit, and check."""
        scheduler = self.scheduler
        before = {s.arrival for s in scheduler.waiting()}
        has_work, preemptions = scheduler.has_work, scheduler.num_preemptions
        step = scheduler.schedule()
        self.counts["preempted"] += scheduler.num_preemptions - preemptions
        assert bool(step.runs) == has_work, "nothing runs although there is work"
        self._check_step(step, before)
        for saving in step.savings:
            scheduler.saved(saving.sequence, self._save(saving))  # type: ignore[arg-type]
            self.counts["saved"] += 1
        for restoring in step.restorings:
            self._restore(restoring)
        for run in step.runs:
            self._carry_out(run)
        self._check()
        self.counts["steps"] += 1

    def drain(self) -> None:
        """Run until nothing is left; everything must be free then."""
        for _ in range(20_000):
            if not self.scheduler.has_work:
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
        state = self.slots[saving.state_slot][saving.fold_version]
        image = FakeImage(s.num_computed_tokens, state, (), contents)
        self._check_image(image, s)
        return image

    def _image(self, s: Sequence) -> FakeImage:
        rest = s.num_computed_tokens % self.page
        rows = self.pages[s.block_ids[s.num_computed_tokens // self.page]][:rest] if rest else []
        return FakeImage(
            s.num_computed_tokens, self.slots[s.state_slot][s.fold_version], tuple(rows)
        )

    def _restore(self, restoring: Restoring) -> None:
        s, image = restoring.sequence, restoring.image
        assert isinstance(image, FakeImage)
        self._check_image(image, s)
        self.slots[s.state_slot] = [image.state]
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

    def _carry_out(self, run: Run) -> None:
        s, computed = run.sequence, run.sequence.num_computed_tokens
        known = s.token_ids[computed : computed + run.count - len(run.drafts)]
        assert len(known) + len(run.drafts) == run.count
        held = [t for page in s.block_ids for t in self.pages[page]]
        assert held[:computed] == s.token_ids[:computed], "pages do not hold the sequence's tokens"
        state = empty(s)
        if computed:
            state = self.slots[s.state_slot][s.fold_version]
            assert state == state_at(s, computed), "the slot holds another state"
        for offset, token in enumerate([*known, *run.drafts], computed):
            self._write(s.block_ids[offset // self.page], offset % self.page, [token])
        versions = [fold(state, known)]
        for draft in run.drafts:
            versions.append(fold(versions[-1], [draft]))
        self.slots[s.state_slot] = versions
        self._commit(run)

    def _commit(self, run: Run) -> None:
        """As the engine does it."""
        s, sampled = run.sequence, self._sample(run) if run.samples else ()
        gone = len(run.drafts) + 1 - len(sampled) if sampled else 0
        drafts = self._tokens(self.setting.limits.num_drafts) if sampled else []
        reason = s.advance(run.count - gone, sampled, drafts)
        self.scheduler.commit(s)
        self.trace.append((s.arrival, run.count, sampled))
        if (run.keep_image or reason) and self.scheduler.cache.enabled:
            self.scheduler.keep_image(s, self._image(s))  # type: ignore[arg-type]
        if sampled and not s.reported:
            s.reported = True
            self._check_report(s)
        if reason:
            self.scheduler.finish(s)
            self._forget(s)
            self.counts["finished"] += 1
            if len(s.token_ids) < self.setting.longest_prompt:
                self.past.append(s.token_ids)

    def _sample(self, run: Run) -> tuple[int, ...]:
        right = self.rng.randint(0, len(run.drafts))
        wrong = {run.drafts[right]} if right < len(run.drafts) else set()
        ends = self.rng.random() < self.ends
        new = STOP if ends else self.rng.choice([t for t in range(1, ALPHABET) if t not in wrong])
        self.counts[f"accepted {right} of {len(run.drafts)}"] += 1
        return run.sequence.until_end([*run.drafts[:right], new])

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
            assert len(s.block_ids) * self.page >= s.num_computed_tokens + run.count
            assert len(run.drafts) <= limits.num_drafts
            assert run.samples == (
                s.num_computed_tokens + run.count - len(run.drafts) == len(s.token_ids)
            )
        idle = [s.rank for s in scheduler.running if s.arrival not in ran]
        for s in scheduler.waiting():
            if s.arrival not in waiting_before:
                assert all(s.rank > rank for rank in idle), "the wrong one was preempted"
        self._check_waiting(ran)

    def _check_waiting(self, ran: set[int]) -> None:
        """Nobody of first rank waits for ever; the others wait for it."""
        for arrival in self.live:
            self.waited[arrival] = 0 if arrival in ran else self.waited[arrival] + 1
        if self.live:
            first = min(self.live.values(), key=lambda s: s.rank)
            self.counts["longest wait"] = max(
                self.counts["longest wait"], self.waited[first.arrival]
            )

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

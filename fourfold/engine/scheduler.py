"""Which tokens run in the next step, and where everything they need is.

Contract: host data only, and no other input than the calls made: `schedule` is a function of the state
they left. First come, first served within a priority. A step holds at most `max_num_batched_tokens`
tokens of at most `max_num_seqs` sequences; decodes go before prefills, so that a long prompt delays
nobody, and prefills in order of rank, so that none starves: what decodes can take ends with them.

Where pages run out, the running sequence of largest rank gives up its own: its state is saved to host
memory and it resumes where it was; if even that is too small, it starts over. Nothing in use is ever
evicted. A step's parts are to be carried out in the order of `Step`'s fields.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from fourfold.cache.blocks import IdPool
from fourfold.cache.image import StateImage
from fourfold.cache.pages import chain_next
from fourfold.cache.prefix import PrefixCache
from fourfold.core.batch import PAGE_TOKENS
from fourfold.core.errors import CapacityError, RequestError
from fourfold.engine.sequence import Sequence, pages_for


@dataclass(frozen=True)
class Limits:
    """What bounds a step and a request; `image_interval` in tokens, `preempt_bytes` of host memory."""

    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int
    num_drafts: int = 0
    image_interval: int = 4096
    preempt_bytes: int = 4 << 30
    page_bytes: int = 0
    slot_bytes: int = 0


@dataclass(frozen=True)
class Saving:
    """Save a preempted sequence's state, all pages included, before they go to somebody else."""

    sequence: Sequence
    state_slot: int
    fold_version: int
    block_ids: tuple[int, ...]


@dataclass(frozen=True)
class Restoring:
    """Write `image` to the sequence's new place; `carry` pages of it come whole."""

    sequence: Sequence
    image: StateImage
    carry: int


@dataclass(frozen=True)
class Run:
    """The next `count` tokens of a sequence, its drafts included.

    `samples` says that the run reaches the end of what is known, so that tokens are sampled;
    `keep_image` that the state after it is worth an image.
    """

    sequence: Sequence
    count: int
    samples: bool
    keep_image: bool = False


@dataclass(frozen=True)
class Step:
    """What to do, in this order."""

    savings: tuple[Saving, ...]
    restorings: tuple[Restoring, ...]
    runs: tuple[Run, ...]


class Scheduler:
    """Waiting and running sequences, and the cache they share."""

    def __init__(self, limits: Limits, cache: PrefixCache):
        self.limits, self.cache = limits, cache
        self.slots = IdPool(limits.max_num_seqs)
        self.running: list[Sequence] = []
        self.num_preemptions = 0
        self._waiting: list[tuple[tuple[int, int], Sequence]] = []  # a heap by rank
        self._gone: set[int] = set()  # arrivals aborted while waiting
        self._saved_bytes = 0
        self._savings: list[Saving] = []

    @property
    def num_waiting(self) -> int:
        return len(self._waiting) - len(self._gone)

    @property
    def has_work(self) -> bool:
        return bool(self.running or self.num_waiting)

    def admit(self, sequence: Sequence) -> None:
        """Queue a sequence; `CapacityError` or `RequestError` if it could never run."""
        prompt, limits = sequence.num_prompt_tokens, self.limits
        if not prompt:
            raise RequestError("the prompt must hold at least one token")
        total = prompt + sequence.max_tokens
        if total > limits.max_model_len:
            raise CapacityError(
                f"prompt ({prompt} tokens) + max_tokens ({sequence.max_tokens}) = {total} "
                f"exceeds max_model_len ({limits.max_model_len})"
            )
        if pages_for(total) > self.cache.pages.size:
            raise CapacityError(
                f"the request may need {pages_for(total)} pages of {PAGE_TOKENS} tokens, "
                f"the cache has {self.cache.pages.size}"
            )
        heapq.heappush(self._waiting, (sequence.rank, sequence))

    def waiting(self) -> Iterator[Sequence]:
        """Waiting sequences, in no particular order."""
        return (s for _, s in self._waiting if s.arrival not in self._gone)

    def schedule(self) -> Step:
        """The next step. Empty runs only if nothing can run."""
        budget, runs, restorings = self.limits.max_num_batched_tokens, [], []
        self._savings = []
        scheduled: set[int] = set()
        for sequence in sorted(self.running, key=lambda s: (not s.is_decoding, s.rank)):
            if sequence.state_slot < 0:
                continue  # preempted for one before it
            run = self._run(sequence, budget, scheduled)
            if run:
                runs.append(run)
                scheduled.add(sequence.arrival)
                budget -= run.count
        while budget > 0 and (restoring := self._start(bool(self._savings))) is not None:
            sequence, image, carry = restoring
            if image is not None:
                restorings.append(Restoring(sequence, image, carry))
            run = self._run(sequence, budget, {s.arrival for s in self.running})
            if run:
                runs.append(run)
                budget -= run.count
        return Step(tuple(self._savings), tuple(restorings), tuple(runs))

    def finish(self, sequence: Sequence) -> None:
        """Free everything a running sequence holds."""
        self.running.remove(sequence)
        self._release(sequence)

    def abort(self, sequences: Iterable[Sequence]) -> None:
        """Drop sequences, wherever they are."""
        for sequence in sequences:
            if sequence.state_slot >= 0:
                self.finish(sequence)
            else:
                self._gone.add(sequence.arrival)
                self._forget_saved(sequence)
        while self._waiting and self._waiting[0][1].arrival in self._gone:
            self._gone.discard(heapq.heappop(self._waiting)[1].arrival)

    def commit(self, sequence: Sequence) -> None:
        """Note that `num_computed_tokens` has grown: full pages become findable."""
        if not self.cache.enabled:
            return
        while (len(sequence.chain) + 1) * PAGE_TOKENS <= sequence.num_computed_tokens:
            begin = len(sequence.chain) * PAGE_TOKENS
            before = sequence.chain[-1] if sequence.chain else sequence.root
            digest = chain_next(before, sequence.token_ids[begin : begin + PAGE_TOKENS])
            self.cache.pages.publish(sequence.block_ids[len(sequence.chain)], digest)
            sequence.chain.append(digest)

    def saved(self, sequence: Sequence, image: StateImage | None) -> None:
        """The image of a preempted sequence; None: it could not be kept and starts over."""
        sequence.saved = image
        if image is None:
            sequence.num_computed_tokens = 0
        else:
            self._saved_bytes += image.nbytes

    def _run(self, sequence: Sequence, budget: int, keep: set[int]) -> Run | None:
        """The sequence's next run within `budget`, with pages for it; sequences in `keep` stay."""
        known = len(sequence.token_ids) - sequence.num_computed_tokens
        keep_image = False
        if sequence.is_decoding:
            count = min(1 + len(sequence.drafts), budget)
            samples = count > 0
        else:
            count, samples = min(known, budget), known <= budget
            stop = sequence.next_image_position(self.limits.image_interval)
            if self.cache.enabled and stop is not None:
                distance = stop - sequence.num_computed_tokens
                if distance <= count:
                    count, samples, keep_image = distance, False, True
        if not count:
            return None
        needed = pages_for(sequence.num_computed_tokens + count) - len(sequence.block_ids)
        while needed > self.cache.pages.num_available:
            victim = max(
                (s for s in self.running if s.arrival not in keep and s is not sequence),
                key=lambda s: s.rank,
                default=None,
            )
            if victim is None or victim.rank < sequence.rank:
                return None
            self._preempt(victim)
        if needed > 0:
            sequence.block_ids += self.cache.pages.allocate(needed)
        return Run(sequence, count, samples, keep_image)

    def _start(self, crowded: bool) -> tuple[Sequence, StateImage | None, int] | None:
        """Bring in the first waiting sequence, if a slot and pages for all its tokens are there."""
        while self._waiting and self._waiting[0][1].arrival in self._gone:
            self._gone.discard(heapq.heappop(self._waiting)[1].arrival)
        # Whoever was just preempted would come straight back and push out another.
        if crowded or not self._waiting or not self.slots.num_free:
            return None
        sequence = self._waiting[0][1]
        wanted = pages_for(len(sequence.token_ids) + 1)
        image, pages, carry = self._look_up(sequence)
        if wanted - len(pages) > self.cache.pages.num_available:
            self.cache.pages.release(pages)
            return None
        heapq.heappop(self._waiting)
        position = image.position if image else 0
        sequence.block_ids = [*pages]
        missing = pages_for(position) - len(pages)
        sequence.block_ids += self.cache.pages.allocate(missing)
        sequence.state_slot = self.slots.take(1)[0]
        sequence.num_computed_tokens, sequence.fold_version = position, 0
        self.running.append(sequence)
        if sequence.saved is not None:
            self._forget_saved(sequence)
            for page, digest in zip(sequence.block_ids, sequence.chain, strict=False):
                self.cache.pages.publish(page, digest)
        else:
            sequence.chain = []
            self.commit(sequence)
        return sequence, image, carry

    def _look_up(self, sequence: Sequence) -> tuple[StateImage | None, tuple[int, ...], int]:
        """Where a sequence resumes: its own saved state, or what the prefix cache has for it."""
        if sequence.saved is not None:
            return sequence.saved, (), sequence.saved.num_pages
        if sequence.request.params.prompt_logprobs is not None:
            # Every prompt position must run to give its logits.
            sequence.cache_miss = "prompt_logprobs needs every prompt token computed"
            return None, (), 0
        hit = self.cache.find(sequence.root, sequence.token_ids)
        if not sequence.reported:
            sequence.cached_tokens, sequence.cache_miss = hit.position, hit.miss
        return hit.image, hit.pages, 0

    def _preempt(self, sequence: Sequence) -> None:
        self.num_preemptions += 1
        carried = pages_for(sequence.num_computed_tokens)
        size = self.limits.slot_bytes + carried * self.limits.page_bytes
        if sequence.num_computed_tokens and self._saved_bytes + size <= self.limits.preempt_bytes:
            self._savings.append(
                Saving(
                    sequence,
                    sequence.state_slot,
                    sequence.fold_version,
                    tuple(sequence.block_ids[:carried]),
                )
            )
        else:
            sequence.num_computed_tokens = 0
        self.running.remove(sequence)
        self._release(sequence)
        heapq.heappush(self._waiting, (sequence.rank, sequence))

    def _release(self, sequence: Sequence) -> None:
        self.cache.pages.release(sequence.block_ids)
        self.slots.give_back([sequence.state_slot])
        sequence.block_ids, sequence.state_slot = [], -1

    def _forget_saved(self, sequence: Sequence) -> None:
        if sequence.saved is not None:
            self._saved_bytes -= sequence.saved.nbytes
            sequence.saved = None

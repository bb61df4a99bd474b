"""Which tokens run in the next step, and where everything they need is.

Contract: host data only, and no other input than the calls made: `schedule` is a function of the state
they left. First come, first served within a priority; but whenever `AGEING` sequences have started,
the one that has waited longest goes before all others, whatever its priority, so that none starves: a
sequence behind m older ones starts after at most (m + 1) · (`AGEING` + `max_num_seqs`) others.

A step holds at most `max_num_batched_tokens` tokens of at most `max_num_seqs` sequences; decodes go
before prefills, so that a long prompt delays nobody, and prefills in order of rank, so that none
starves: what decodes can take ends with them.

Where pages run out, the running sequence of largest rank gives up its own: its state is saved to host
memory and it resumes where it was; if even that is too small, it starts over. Nothing in use is ever
evicted. A step's parts are to be carried out in the order of `Step`'s fields.

A step may be scheduled while the one before it is in flight. A sequence whose tokens are not known yet
gets its next run all the same, with pages for the case that all its drafts stand; where what is in
flight must be known first (somebody has to be preempted, or a sequence's next token depends on it on
the host), `schedule` says so.
"""

from __future__ import annotations

import bisect
import heapq
from array import array
from collections.abc import Iterable, Iterator
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from operator import attrgetter

from fourfold.cache.blocks import IdPool
from fourfold.cache.image import StateImage
from fourfold.cache.pages import chain_at
from fourfold.cache.prefix import PrefixCache
from fourfold.core.errors import CapacityError, RequestError
from fourfold.core.row_format import PAGE_TOKENS, pages_for
from fourfold.engine.sequence import Run, Sequence

AGEING = 64  # starts between two that go to whoever has waited longest


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
class Step:
    """What to do, in this order. `started` are the sequences that got a slot, `extended` those that got
    pages."""

    savings: tuple[Saving, ...]
    started: tuple[Sequence, ...]
    extended: tuple[Sequence, ...]
    restorings: tuple[Restoring, ...]
    runs: tuple[Run, ...]


class Scheduler:
    """Waiting and running sequences, and the cache they share."""

    def __init__(self, limits: Limits, cache: PrefixCache):
        self.limits, self.cache = limits, cache
        self.slots = IdPool(limits.max_num_seqs)
        self.running: list[Sequence] = []  # by rank
        self.num_preemptions = 0
        self._waiting: list[tuple[tuple[int, int, int], Sequence]] = []  # a heap by rank
        self._starts = 0  # since waiting sequences were last aged
        self._gone: set[int] = set()  # arrivals aborted while waiting
        self._saved_bytes = 0
        self._savings: list[Saving] = []
        self._extended: list[Sequence] = []  # those that got pages, and no step says so yet

    @property
    def num_waiting(self) -> int:
        return len(self._waiting) - len(self._gone)

    @property
    def saved_bytes(self) -> int:
        """Host memory that preempted sequences' images take."""
        return self._saved_bytes

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

    def schedule(self) -> Step | None:
        """The next step. Empty runs only if nothing can run, or all that could is in flight to its
        end; None if what is in flight must be known first."""
        budget = self.limits.max_num_batched_tokens
        runs: list[Run] = []
        restorings: list[Restoring] = []
        starting: list[Sequence] = []
        self._savings, preemptions = [], self.num_preemptions
        self._age()
        try:
            prefilling: list[Sequence] = []
            for sequence in tuple(self.running):
                if not sequence.is_decoding:
                    prefilling.append(sequence)
                elif sequence.state_slot >= 0 and (run := self._decode(sequence, budget, runs)):
                    runs.append(run)
                    budget -= run.count
            for sequence in prefilling:
                # Without a slot it was preempted for one before it.
                if sequence.state_slot >= 0 and (run := self._prefill(sequence, budget, runs)):
                    runs.append(run)
                    budget -= run.count
        except _Unknown:
            return None
        # Whoever was just preempted would come straight back and push out another.
        crowded = self.num_preemptions > preemptions
        promised = self._promised() if self._can_start(budget) and not crowded else 0
        while not crowded and self._can_start(budget):
            started = self._start(promised)
            if started is None:
                break
            sequence, image, carry = started
            starting.append(sequence)
            if image is not None:
                restorings.append(Restoring(sequence, image, carry))
            kind = self._decode if sequence.is_decoding else self._prefill
            if run := kind(sequence, budget, None):
                runs.append(run)
                budget -= run.count
            promised += _lacking(sequence)
        for run in runs:
            run.sequence.flight = run
        grown = (s for s in (*self._extended, *starting) if s.state_slot >= 0)
        extended = tuple(dict.fromkeys(grown))
        self._extended = []
        return Step(
            tuple(self._savings),
            tuple(starting),
            extended,
            tuple(restorings),
            tuple(runs),
        )

    def finish(self, sequence: Sequence) -> None:
        """Free everything a running sequence holds. What it has in flight writes before anything that
        is launched later, so its places may be given away at once."""
        sequence.over, sequence.flight = True, None
        self.running.remove(sequence)
        self._release(sequence)

    def abort(self, sequences: Iterable[Sequence]) -> None:
        """Drop sequences, wherever they are."""
        for sequence in sequences:
            if sequence.state_slot >= 0:
                self.finish(sequence)
            else:
                sequence.over = True
                self._gone.add(sequence.arrival)
                self._forget_saved(sequence)
        if 2 * len(self._gone) > len(self._waiting):
            self._waiting = [w for w in self._waiting if w[1].arrival not in self._gone]
            heapq.heapify(self._waiting)
            self._gone.clear()

    def settled(self, run: Run) -> None:
        """Note that the result of a run is in its sequence: full pages become findable."""
        sequence = run.sequence
        if sequence.flight is run:
            sequence.flight = None
        if (len(sequence.chain) + 1) * PAGE_TOKENS <= sequence.num_computed_tokens:
            self._commit(sequence)

    def _commit(self, sequence: Sequence) -> None:
        if not self.cache.enabled:
            return
        while (len(sequence.chain) + 1) * PAGE_TOKENS <= sequence.num_computed_tokens:
            page = len(sequence.chain)
            digest = chain_at(sequence.root, sequence.hashes, sequence.token_ids, page)
            self.cache.pages.publish(sequence.block_ids[page], digest)
            sequence.chain.append(digest)

    def keep_image(self, sequence: Sequence, image: StateImage) -> None:
        """Make an image of a running sequence's present state findable."""
        # Another's page with the same content may have stood for its own and be gone since.
        self._publish(sequence)
        tail = sequence.token_ids[len(sequence.chain) * PAGE_TOKENS : image.position]
        self.cache.add(sequence.root, sequence.chain, tail, image)

    def saved(self, sequence: Sequence, image: StateImage | None) -> None:
        """The image of a preempted sequence; None: it could not be kept and starts over."""
        sequence.saved = image
        if image is None:
            sequence.num_computed_tokens = 0
        else:
            self._saved_bytes += image.nbytes

    def _decode(self, sequence: Sequence, budget: int, runs: Seq[Run] | None) -> Run | None:
        """The next run of a decoding sequence within `budget`, with pages for it. For these, sequences
        that are not in `runs` may be preempted (None: nobody may)."""
        flight, known = sequence.flight, len(sequence.token_ids)
        if flight is None:
            begin, most = known - 1, known
        else:
            begin, most = sequence.next_begin, sequence.most_tokens
            if flight.samples:
                if known + 1 >= sequence.total:
                    return None  # the token in flight is its last
                if sequence.needs_tokens:
                    raise _Unknown
        # As many drafts as there are, even where fewer could stand: steps of one shape are captured.
        count = min(1 + self.limits.num_drafts, budget)
        if not count or not self._get_pages(sequence, most - 1 + count, runs):
            return None
        return Run(sequence, begin, count, True, count - 1, True)

    def _prefill(self, sequence: Sequence, budget: int, runs: Seq[Run] | None) -> Run | None:
        """The same for one whose prompt, or whose tokens from before, are not all in the state."""
        begin = sequence.next_begin
        known = len(sequence.token_ids) - begin
        count, samples, keep_image = min(known, budget), known <= budget, False
        stop = sequence.next_image_position(self.limits.image_interval)
        if self.cache.enabled and stop is not None and stop - begin <= count:
            count, samples, keep_image = stop - begin, False, True
        if not count or not self._get_pages(sequence, begin + count, runs):
            return None
        return Run(sequence, begin, count, samples, keep_image=keep_image)

    def _get_pages(self, sequence: Sequence, end: int, runs: Seq[Run] | None) -> bool:
        """Give a sequence pages for its first `end` tokens, as far as it can have so many; whether it
        could be done."""
        if end > PAGE_TOKENS * len(sequence.block_ids):
            needed = pages_for(min(end, sequence.total)) - len(sequence.block_ids)
            if needed > 0:
                if not self._make_room(sequence, needed, runs):
                    return False
                sequence.block_ids.extend(self.cache.pages.allocate(needed))
                self._extended.append(sequence)
        return True

    def _make_room(self, sequence: Sequence, needed: int, runs: Seq[Run] | None) -> bool:
        """Preempt running sequences of larger rank until `needed` pages are there; whether they are.
        `_Unknown` if there is somebody in flight, who could end by it."""
        if needed <= self.cache.pages.num_available:
            return True
        if runs is not None and any(s.flight for s in self.running):
            raise _Unknown
        keep = {run.sequence.arrival for run in runs or ()}
        while needed > self.cache.pages.num_available:
            others = () if runs is None else (s for s in self.running if s.arrival not in keep)
            victim = max(others, key=attrgetter("rank"), default=sequence)
            if victim.rank <= sequence.rank:
                return False
            self._preempt(victim)
        return True

    def _age(self) -> None:
        """Put the sequence that has waited longest before all others, once every `AGEING` starts."""
        if self._starts < AGEING or not self.num_waiting:
            return
        self._starts = 0
        oldest = min(self.waiting(), key=attrgetter("arrival"))
        if oldest.rank > self._waiting[0][0]:
            self._waiting.remove((oldest.rank, oldest))
            oldest.rank = 0, 0, oldest.arrival
            self._waiting.append((oldest.rank, oldest))
            heapq.heapify(self._waiting)

    def _can_start(self, budget: int) -> bool:
        while self._waiting and self._waiting[0][1].arrival in self._gone:
            self._gone.discard(heapq.heappop(self._waiting)[1].arrival)
        return budget > 0 and bool(self._waiting) and self.slots.num_free > 0

    def _promised(self) -> int:
        """Pages that running sequences still need for the tokens they have. They were brought in
        because the pages were there; others must not take them."""
        return sum(map(_lacking, self.running))

    def _start(self, promised: int) -> tuple[Sequence, StateImage | None, int] | None:
        """Bring in the first waiting sequence, if pages for all its tokens are there besides those
        `promised` to others."""
        sequence = self._waiting[0][1]
        pages_left = self.cache.pages.num_available - promised
        if pages_left < 1:
            return None  # its last page is always its own
        image, pages, carry = self._look_up(sequence)
        wanted = pages_for(len(sequence.token_ids) + 1)
        if wanted - len(pages) > self.cache.pages.num_available - promised:
            self.cache.pages.release(pages)
            return None
        heapq.heappop(self._waiting)
        self._starts += 1
        position = image.position if image else 0
        missing = pages_for(position) - len(pages)
        sequence.block_ids = array("q", (*pages, *self.cache.pages.allocate(missing)))
        sequence.state_slot = self.slots.take(1)[0]
        sequence.num_computed_tokens, sequence.fold_version = position, 0
        bisect.insort(self.running, sequence, key=attrgetter("rank"))
        if sequence.saved is not None:
            self._forget_saved(sequence)
            self._publish(sequence)
        else:
            sequence.chain = []
            self._commit(sequence)
        return sequence, image, carry

    def _look_up(self, sequence: Sequence) -> tuple[StateImage | None, tuple[int, ...], int]:
        """Where a sequence resumes: its own saved state, or what the prefix cache has for it."""
        if sequence.saved is not None:
            return sequence.saved, (), sequence.saved.num_pages
        if sequence.request.params.prompt_logprobs is not None:
            # Every prompt position must run to give its logits.
            if sequence.num_prompt_tokens > 1:
                sequence.cache_miss = "prompt_logprobs needs every prompt token computed"
            return None, (), 0
        hit = self.cache.find(sequence.root, sequence.token_ids, sequence.hashes)
        if not sequence.reported:
            sequence.cached_tokens, sequence.cache_miss = hit.position, hit.miss
        return hit.image, hit.pages, 0

    def _publish(self, sequence: Sequence) -> None:
        for page, digest in zip(sequence.block_ids, sequence.chain, strict=False):
            self.cache.pages.publish(page, digest)

    def _preempt(self, sequence: Sequence) -> None:
        self.num_preemptions += 1
        carried = pages_for(sequence.num_computed_tokens)
        size = self._image_bytes(carried)
        size += sum(self._image_bytes(len(each.block_ids)) for each in self._savings)
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

    def _image_bytes(self, num_pages: int) -> int:
        return self.limits.slot_bytes + num_pages * self.limits.page_bytes

    def _release(self, sequence: Sequence) -> None:
        self.cache.pages.release(sequence.block_ids)
        self.slots.give_back([sequence.state_slot])
        sequence.block_ids, sequence.state_slot = array("q"), -1

    def _forget_saved(self, sequence: Sequence) -> None:
        if sequence.saved is not None:
            self._saved_bytes -= sequence.saved.nbytes
            sequence.saved = None


class _Unknown(Exception):
    """What is in flight must be known first."""


def _lacking(sequence: Sequence) -> int:
    """Pages that a sequence does not have yet for all its tokens and one more."""
    most = min(sequence.most_tokens + 1, sequence.total)
    return max(pages_for(most) - len(sequence.block_ids), 0)

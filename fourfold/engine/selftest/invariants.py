"""What a request gets must not depend on how it was run: the engine's invariants, on a random model.

Contract: each check runs the same requests in another way and compares tokens and log probabilities with
those of running alone, in one piece, a step after the other, eagerly, from nothing. The prompts cross window,
row and page boundaries; half of the requests sample and half are greedy. It knows engines and requests only.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from fourfold.core.request import Request, RequestOutput, SamplingParams
from fourfold.engine.engine import Engine
from fourfold.engine.selftest.models import Subject

PARAMS = SamplingParams(max_tokens=8, temperature=0.8, ignore_eos=True, logprobs=0)
ALLOWED = range(2, 5)  # few tokens to choose from, so that drafts are often right
LONGER = 30  # tokens of a second turn
STEPS = 20_000  # no check takes as many: an engine that does not end is at fault


class Fault(Exception):
    """A check failed; the text says how."""


class Skipped(Exception):
    """A check cannot be made here; the text says why."""


@dataclass
class Answer:
    """All that a request got."""

    tokens: tuple[int, ...] = ()
    logprobs: tuple[float, ...] = ()
    prompt: tuple[float, ...] = ()
    cached: int = 0

    def take(self, output: RequestOutput) -> None:
        """One output more."""
        if output.error is not None:
            raise Fault(f"request {output.request_id} failed: {output.error}")
        if not self.tokens:
            self.cached = output.cached_tokens
        self.tokens += tuple(output.new_token_ids)
        self.logprobs += tuple(entry.logprob for entry in output.logprobs or ())
        given = output.prompt_logprobs or ()
        self.prompt += tuple(entry.logprob for entry in given if entry is not None)


def draw(seed: int, count: int, vocabulary: int) -> tuple[int, ...]:
    """Random token ids."""
    rng = random.Random(seed)
    return tuple(rng.randrange(2, vocabulary) for _ in range(count))


def requests(
    lengths: Sequence[int], vocabulary: int, seed: int = 0, **changes: Any
) -> list[Request]:
    """One request a length, every other one greedy."""
    return [
        Request(
            str(n),
            draw(seed * 1000 + n, length, vocabulary),
            replace(PARAMS, **{"seed": n, "temperature": 0.8 * (n % 2), **changes}),
        )
        for n, length in enumerate(lengths)
    ]


def answers(engine: Engine, work: Sequence[Request]) -> list[Answer]:
    """Run requests together. Raises `Fault`."""
    got = {request.request_id: Answer() for request in work}
    for request in work:
        engine.add(request)
    for _ in range(STEPS):
        if not engine.has_work:
            break
        for output in engine.step():
            got[output.request_id].take(output)
        engine.scheduler.cache.pages.check()
    if engine.has_work:
        raise Fault(f"requests did not end within {STEPS} steps")
    if engine.scheduler.cache.pages.num_used:
        raise Fault(f"{engine.scheduler.cache.pages.num_used} pages were not given back")
    return list(got.values())


def compare(got: Sequence[Answer], expected: Sequence[Answer], tolerance: float) -> None:
    """Raise `Fault` naming the first request that differs."""
    for number, (a, b) in enumerate(zip(got, expected, strict=True)):
        if a.tokens != b.tokens:
            at = next(n for n in range(len(b.tokens)) if a.tokens[: n + 1] != b.tokens[: n + 1])
            raise Fault(f"request {number} got other tokens from its token {at} on")
        for what, x, y in (("token", a.logprobs, b.logprobs), ("prompt token", a.prompt, b.prompt)):
            same_numbers(f"request {number}, {what}", x, y, tolerance)


def same_numbers(
    where: str, got: Sequence[float], expected: Sequence[float], tolerance: float
) -> None:
    """Raise `Fault` naming the first of two lists' numbers that are further apart than `tolerance`."""
    if len(got) != len(expected):
        raise Fault(f"{where}: {len(got)} log probabilities and not {len(expected)}")
    for n, (x, y) in enumerate(zip(got, expected, strict=True)):
        # Not a number is far from everything.
        if not abs(x - y) <= tolerance:
            raise Fault(f"{where} {n}: log probability {x:.12g} and not {y:.12g}")


def pollute(engine: Engine, subject: Subject) -> None:
    """Overwrite slots, rings and free pages with somebody else's, so that what a hit does not restore
    shows."""
    vocabulary, longest = subject.config.vocab_size, 700 if subject.exact else 300
    work = requests([longest - 10 * n for n in range(engine.config.max_num_seqs)], vocabulary, 9)
    answers(engine, [replace(r, params=replace(r.params, max_tokens=2)) for r in work])


@dataclass
class Invariants:
    """The checks of one model, with the answers that they compare with."""

    subject: Subject
    lengths: tuple[int, ...]
    budget: int  # of a step, where prompts are cut

    def __post_init__(self) -> None:
        self.work = requests(self.lengths, self.subject.config.vocab_size)
        self._alone: list[Answer] | None = None

    @property
    def alone(self) -> list[Answer]:
        """What each request gets by itself."""
        if self._alone is None:
            engine = self.subject.engine(seats=1)
            self._alone = [answers(engine, [one])[0] for one in self.work]
        return self._alone

    def checks(self, quick: bool) -> Iterator[tuple[str, Callable[[], str]]]:
        """(name, check); a check raises `Fault` or gives what there is to say."""
        yield "batched = alone", self.batched
        yield "chunked = one-shot", self.chunked
        yield "hit = cold", self.hit
        yield "MTP = greedy", lambda: self.drafted((2,) if quick else (1, 3))
        yield "preempted = not", self.preempted
        if not quick or self.subject.exact:
            yield "overlapped = in turn", self.overlapped
            yield "graph = eager", self.captured

    def _same(self, engine: Engine, expected: Sequence[Answer] | None = None) -> str:
        found = answers(engine, self.work)
        compare(found, self.alone if expected is None else expected, self.subject.tolerance)
        return ""

    def batched(self) -> str:
        return self._same(self.subject.engine(seats=len(self.work)))

    def chunked(self) -> str:
        return self._same(self.subject.engine(max_num_batched_tokens=self.budget))

    def overlapped(self) -> str:
        return self._same(self.subject.engine(async_scheduling=True))

    def captured(self) -> str:
        engine = self.subject.engine(enforce_eager=False)
        if engine.runner.graphs is None:
            on_cpu = engine.loaded.device.torch_device.type == "cpu"
            raise Skipped("there are no graphs on a CPU" if on_cpu else engine.notes[0])
        return self._same(engine)

    def hit(self) -> str:
        """Resending hits at the prompt's last token; a longer prompt where the shorter one ended."""
        cache = {"enable_prefix_caching": True}
        engine = self.subject.engine(seats=3, cache=cache)
        answers(engine, self.work)
        pollute(engine, self.subject)
        again = answers(engine, self.work)
        wanted = [length - 1 for length in self.lengths]
        if [a.cached for a in again] != wanted:
            raise Fault(f"hits of {[a.cached for a in again]} tokens and not {wanted}")
        compare(again, self.alone, self.subject.tolerance)
        more = draw(77, LONGER, self.subject.config.vocab_size)
        turns = [
            replace(one, prompt_token_ids=one.prompt_token_ids + answer.tokens + more)
            for one, answer in zip(self.work, self.alone, strict=True)
        ]
        pollute(engine, self.subject)
        second = answers(engine, turns)
        if not all(a.cached > length for a, length in zip(second, self.lengths, strict=True)):
            raise Fault("a second turn did not hit where the first one ended")
        cold = answers(self.subject.engine(seats=3), turns)
        compare(second, cold, self.subject.tolerance)
        return f"{sum(a.cached for a in (*again, *second))} tokens from the cache"

    def drafted(self, counts: Sequence[int] = (1, 3)) -> str:
        """With and without drafts, where few tokens may be sampled."""
        work = [replace(r, params=replace(r.params, max_tokens=20)) for r in self.work]
        plain = answers(self.subject.engine(seats=4, allowed=ALLOWED), work)
        accepted, drafted = 0, 0
        for drafts in counts:
            engine = self.subject.engine(seats=4, allowed=ALLOWED, num_speculative_tokens=drafts)
            compare(answers(engine, work), plain, self.subject.tolerance)
            accepted += sum(engine.stats.accepted)
            drafted += sum(engine.stats.drafted)
        if not accepted:
            raise Fault(f"none of {drafted} drafts was accepted, of few possible tokens")
        return f"{accepted} of {drafted} drafts accepted"

    def preempted(self) -> str:
        """Requests grow past what the pages hold; whoever is pushed out comes back unharmed."""
        work = requests((250, 120, 251, 246, 30), self.subject.config.vocab_size, 5, max_tokens=14)
        alone = self.subject.engine(seats=1)
        expected = [answers(alone, [one])[0] for one in work]
        engine = self.subject.engine(seats=5, longest=600, cache={"num_pages": 5})
        compare(answers(engine, work), expected, self.subject.tolerance)
        if not engine.scheduler.num_preemptions:
            raise Fault("nothing was preempted")
        return f"{engine.scheduler.num_preemptions} times"

"""Prompts to pieces of answers.

    Job ─▶ Generation.pieces ─▶ Piece … ─▶ routes turn pieces into chunks or one message

Contract: every sequence of a job ends exactly once, with the piece that carries its `Finish`. Leaving
`pieces` early aborts what runs. A demanded beginning of the answer that stands before all else (a tool
call that the request insists on, without thinking) is written here; one that comes after the reasoning
is a grammar of the engine's. It does not know HTTP nor the shape of responses.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import TypeVar

from fourfold.core.errors import FourfoldError
from fourfold.core.request import (
    NOT_FINITE,
    Grammar,
    Request,
    RequestOutput,
    SamplingParams,
    TokenLogprobs,
)
from fourfold.server.admission import Ticket
from fourfold.server.serving import Serving
from fourfold.text.answer import Answer, Parser
from fourfold.text.events import (
    Event,
    Finish,
    ToolArgumentsDelta,
    ToolCallEnd,
    ToolCallStart,
)

T = TypeVar("T")
_MERGED = 64


@dataclass(frozen=True)
class Job:
    """One prompt and how to read what follows it.

    `forced` are tokens that the answer begins with and the model only continues. `single_call` ends the
    answer after one tool call.
    """

    prompt: tuple[int, ...]
    params: SamplingParams
    parser: Callable[[], Parser]
    request_id: str
    cache_salt: str | None = None
    image_positions: tuple[int, ...] = ()
    forced: tuple[int, ...] = ()
    single_call: bool = False
    grammar: Grammar | None = None


@dataclass(frozen=True, slots=True)
class Piece:
    """What a step brought to choice `index`: events and, for `num_tokens` tokens of which the first
    `num_reasoning` belong to the reasoning, their ids and (if asked for) log probabilities."""

    index: int
    events: list[Event]
    tokens: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...]
    num_reasoning: int


@dataclass
class Usage:
    """Token counts of one or several jobs."""

    prompt: int = 0
    completion: int = 0
    cached: int = 0
    reasoning: int = 0
    accepted: int = 0
    miss: str | None = None

    def body(self) -> dict[str, object]:
        """As responses carry it."""
        details: dict[str, object] = {"cached_tokens": self.cached}
        if self.miss is not None:
            details["cache_miss"] = self.miss
        return {
            "prompt_tokens": self.prompt,
            "completion_tokens": self.completion,
            "total_tokens": self.prompt + self.completion,
            "prompt_tokens_details": details,
            "completion_tokens_details": {
                "reasoning_tokens": self.reasoning,
                "accepted_draft_tokens": self.accepted,
            },
        }


@dataclass
class _Clock:
    """Moments of one sequence, in seconds on the monotonic clock."""

    last: float | None = None


@dataclass
class Generation:
    """A job as it runs. `usage` and `prompt_logprobs` grow with the pieces."""

    serving: Serving
    job: Job
    ticket: Ticket
    arrived: float
    answers: list[Answer] = field(init=False)
    prompt_logprobs: tuple[TokenLogprobs | None, ...] = ()
    first_token: float | None = None
    _cached: int | None = None
    _accepted: int = 0
    _miss: str | None = None

    def __post_init__(self) -> None:
        job, eos = self.job, self.serving.info.eos_token_id
        self.answers = [Answer(job.parser(), job.params, eos) for _ in range(job.params.n)]
        self._clocks = [_Clock() for _ in self.answers]

    @property
    def usage(self) -> Usage:
        """Counts so far."""
        return Usage(
            prompt=len(self.job.prompt),
            completion=sum(answer.num_tokens for answer in self.answers),
            cached=self._cached or 0,
            reasoning=sum(answer.parser.reasoning_tokens for answer in self.answers),
            accepted=self._accepted,
            miss=self._miss,
        )

    async def pieces(self) -> AsyncGenerator[Piece, None]:
        """Run to the end."""
        job, how = self.job, "abort"
        try:
            for index in range(job.params.n if job.forced else 0):
                yield self._piece(RequestOutput(job.request_id, job.forced, index=index))
            request = Request(
                job.request_id,
                (*job.prompt, *job.forced),
                job.params,
                cache_salt=job.cache_salt,
                image_positions=job.image_positions,
                grammar=job.grammar,
            )
            async with aclosing(self._run(request)) as pieces:
                async for piece in pieces:
                    yield piece
        except FourfoldError:
            how = "error"
            raise
        finally:
            self._close(how)

    async def _run(self, request: Request) -> AsyncGenerator[Piece, None]:
        engine = self.serving.engine
        async with aclosing(engine.generate(request)) as outputs:
            async for output in outputs:
                self._observe(output)
                piece = self._piece(output)
                answer = self.answers[output.index]
                if answer.must_abort:
                    answer.must_abort = False
                    await engine.abort(request.request_id, output.index)
                yield piece
                if all(each.finished for each in self.answers):
                    return

    # ---- reading

    def _piece(self, output: RequestOutput) -> Piece:
        answer = self.answers[output.index]
        before, thought = answer.num_tokens, answer.parser.reasoning_tokens
        was_finished = answer.finished
        events = answer.take(output)
        if self.job.single_call:
            events = self._first_call_only(answer, events)
        taken = answer.num_tokens - before
        if answer.finished and not was_finished:
            self._ended(answer, events)
        return Piece(
            output.index,
            events,
            output.new_token_ids[:taken],
            output.logprobs[:taken],
            answer.parser.reasoning_tokens - thought,
        )

    @staticmethod
    def _first_call_only(answer: Answer, events: list[Event]) -> list[Event]:
        calls = (ToolCallStart, ToolArgumentsDelta, ToolCallEnd)
        kept = [e for e in events if not (isinstance(e, calls) and e.index > 0)]
        if any(isinstance(e, ToolCallEnd) for e in kept) and not answer.finished:
            more = answer.end()
            kept += [e for e in more if not (isinstance(e, calls) and e.index > 0)]
        return kept

    def _observe(self, output: RequestOutput) -> None:
        """Count what an output brought."""
        metrics, now = self.serving.metrics, time.monotonic()
        if self._cached is None:
            self._cached, self._miss = output.cached_tokens, output.cache_miss
            metrics.looked_up(len(self.job.prompt), output.cached_tokens, output.cache_miss)
            metrics.prompt_size.observe(len(self.job.prompt))
            self.ticket.started(len(self.job.prompt))
        if output.prompt_logprobs is not None and not self.prompt_logprobs:
            self.prompt_logprobs = output.prompt_logprobs
        count = len(output.new_token_ids)
        if count:
            clock = self._clocks[output.index]
            if self.first_token is None:
                self.first_token = now
                metrics.first_token.observe(now - self.arrived)
            if clock.last is not None:
                metrics.between_tokens.observe((now - clock.last) / count)
            clock.last = now
            metrics.generation_tokens.inc(count)
        self._accepted += output.accepted_drafts

    def _ended(self, answer: Answer, events: Sequence[Event]) -> None:
        reason = next((e.reason for e in reversed(events) if isinstance(e, Finish)), "error")
        self.serving.metrics.ended(reason, nonfinite=answer.error == NOT_FINITE)
        self.serving.metrics.answer_size.observe(answer.num_tokens)

    def _close(self, how: str) -> None:
        """Count the sequences that ended without an end of their own."""
        now = time.monotonic()
        for answer in self.answers:
            if not answer.finished:
                self.serving.metrics.ended(how)
        self.serving.metrics.end_to_end.observe(now - self.arrived)


async def merged(
    sources: Sequence[AsyncGenerator[T, None]],
) -> AsyncGenerator[tuple[int, T], None]:
    """What all of `sources` give, with their numbers, as it comes. The first failure ends all."""
    if len(sources) == 1:
        async with aclosing(sources[0]) as source:
            async for item in source:
                yield 0, item
        return
    queue: asyncio.Queue[tuple[int, T] | Exception | None] = asyncio.Queue(_MERGED)

    async def pump(number: int, source: AsyncGenerator[T, None]) -> None:
        try:
            async with aclosing(source):
                async for item in source:
                    await queue.put((number, item))
            await queue.put(None)
        except Exception as error:  # noqa: BLE001  # raised again where the items are taken
            await queue.put(error)

    tasks = [asyncio.create_task(pump(*each)) for each in enumerate(sources)]
    try:
        left = len(tasks)
        while left:
            found = await queue.get()
            if found is None:
                left -= 1
            elif isinstance(found, Exception):
                raise found
            else:
                yield found
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

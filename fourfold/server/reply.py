"""From a generation to a response or its stream: what the APIs have in common.

Contract: a stream's first event is given only once the engine has brought something, so that what fails
before is an ordinary answer; what fails later ends the stream with an event that says so. It does not
know the shape of any API's responses.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Iterable, Sequence
from contextlib import aclosing
from typing import Any, Protocol

from fourfold.core.errors import FourfoldError
from fourfold.core.request import FinishReason
from fourfold.server.call import Call
from fourfold.server.errors import ApiError, failed_answer, from_failure
from fourfold.server.generation import Generation, Usage
from fourfold.server.sections import Change, Section, Sections


class Reply(Protocol):
    """An answer in the shape of one API."""

    @property
    def reasons(self) -> Sequence[str]:
        """How its choices ended, as far as they have."""

    @property
    def usage(self) -> Usage:
        """Counts so far."""

    @property
    def first_token(self) -> float | None:
        """When the first token came, on the monotonic clock."""

    async def whole(self) -> dict[str, Any]:
        """The response. Raises what `failed_answer` makes of an answer that failed."""

    def events(self) -> AsyncGenerator[bytes, None]:
        """The events of a stream."""


async def deliver(call: Call, reply: Reply, stream: bool | None) -> None:
    """Answer the call, and note for the log what it took."""
    try:
        if stream:
            await call.stream(reply.events())
        else:
            await call.json(await call.attached(reply.whole()))
    finally:
        call.note_usage(reply.usage, reply.first_token, reply.reasons)


class SectionReply(ABC):
    """A `Reply` of one answer, told section by section."""

    def __init__(self, generation: Generation) -> None:
        self.generation = generation
        self.sections = Sections()

    @abstractmethod
    def body(self) -> dict[str, Any]:
        """The whole response, once the answer has ended."""

    @abstractmethod
    def begun(self) -> Iterable[bytes]:
        """The events before the first section."""

    @abstractmethod
    def changed(self, change: Change, section: Section, text: str) -> Iterable[bytes]:
        """The events for a change of a section."""

    @abstractmethod
    def ended(self) -> Iterable[bytes]:
        """The events after the last section."""

    @abstractmethod
    def failed(self, error: ApiError) -> Iterable[bytes]:
        """The last events of a stream that cannot go on."""

    @property
    def reasons(self) -> Sequence[str]:
        """See `Reply`."""
        return [self.sections.finish.reason] if self.sections.finish else []

    @property
    def usage(self) -> Usage:
        """See `Reply`."""
        return self.generation.usage

    @property
    def first_token(self) -> float | None:
        """See `Reply`."""
        return self.generation.first_token

    async def whole(self) -> dict[str, Any]:
        """See `Reply`."""
        async with aclosing(self.generation.pieces()) as pieces:
            async for piece in pieces:
                self.sections.feed(piece.events)
        self._expect_answered()
        return self.body()

    async def events(self) -> AsyncGenerator[bytes, None]:
        """See `Reply`."""
        started = False
        try:
            async with aclosing(self.generation.pieces()) as pieces:
                async for piece in pieces:
                    if not started:
                        started = True
                        for event in self.begun():
                            yield event
                    for change in self.sections.feed(piece.events):
                        for event in self.changed(*change):
                            yield event
            self._expect_answered()
            last = self.ended()
        except (FourfoldError, ApiError) as error:
            if not started:
                raise  # nothing has been sent: it can be an ordinary answer
            last = self.failed(from_failure(error))
        for event in last:
            yield event

    def _expect_answered(self) -> None:
        found = self.generation.answers[0]
        if found.reason is FinishReason.ERROR:
            raise failed_answer(found.error)

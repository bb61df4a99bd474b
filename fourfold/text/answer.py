"""One generated sequence, read step by step as an engine brings it.

Contract: feeds a parser token by token, so that nothing depends on how many tokens a step brought;
finds the answer's end, be it the engine's or a stop string's. It knows neither what the parser makes
of the tokens nor where steps come from.
"""

from __future__ import annotations

from typing import Protocol

from fourfold.core.request import FinishReason, RequestOutput, SamplingParams
from fourfold.text.events import Event


class Parser(Protocol):
    """`TokenParser` and `PlainParser`."""

    reasoning_tokens: int

    @property
    def in_reasoning(self) -> bool:
        """Whether the answer is still inside `<think>`."""

    @property
    def stopped(self) -> str | None:
        """The stop string that has ended the text."""

    def push(self, token_id: int) -> list[Event]:
        """What becomes certain with one more token."""

    def finish(self, reason: str) -> list[Event]:
        """What is left at the end."""


class Answer:
    """One of a request's sequences as it grows.

    `reason` is None until the end; `stop_reason` is the stop string or stop token id that ended it,
    None for the end-of-sequence token unless that was asked for; `error` says what failed.
    """

    def __init__(self, parser: Parser, params: SamplingParams, eos_token_id: int) -> None:
        self.parser = parser
        self._params, self._eos = params, eos_token_id
        self.num_tokens = 0
        self.reason: FinishReason | None = None
        self.stop_reason: int | str | None = None
        self.error: str | None = None
        # Whether the sequence has ended here and goes on in the engine.
        self.must_abort = False

    @property
    def finished(self) -> bool:
        """Whether no more will come."""
        return self.reason is not None

    def take(self, added: RequestOutput) -> list[Event]:
        """What a step's output means; nothing once the answer has ended."""
        if self.finished:
            return []
        parser, tokens, events = self.parser, added.new_token_ids, []
        stopped = added.finish_reason is FinishReason.STOP
        for position, token in enumerate(tokens, 1):
            self.num_tokens += 1
            if stopped and position == len(tokens):
                break  # a stop token is no part of the text
            events += parser.push(token)
            if parser.stopped is not None:
                return events + self._end_here(added)
        if added.finish_reason is not None:
            events += self._end(added.finish_reason)
            if parser.stopped is None:
                self._describe(added)
        return events

    def end(self) -> list[Event]:
        """End it here, as if a stop token had come; it goes on in the engine."""
        if self.finished:
            return []
        self.must_abort = True
        return self._end(FinishReason.STOP)

    def _end_here(self, added: RequestOutput) -> list[Event]:
        self.must_abort = added.finish_reason is None
        return self._end(FinishReason.STOP)

    def _end(self, reason: FinishReason) -> list[Event]:
        events = self.parser.finish(reason.value)
        stop = self.parser.stopped
        self.reason = reason if stop is None else FinishReason.STOP
        self.stop_reason = stop
        return events

    def _describe(self, added: RequestOutput) -> None:
        self.error = added.error
        # Told apart from the token that ends every answer only if it was asked for.
        token = added.stop_reason
        named = token != self._eos or token in self._params.stop_token_ids
        self.stop_reason = token if named else None

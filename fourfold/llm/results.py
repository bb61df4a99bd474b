"""What an offline request gives back, and how it grows step by step.

Contract: results have vLLM's names. It does not know where steps come from, nor how text is made of
tokens (text/answer.py).
"""

from __future__ import annotations

import time
from dataclasses import dataclass

from fourfold.core.request import Request, SamplingParams, TokenLogprobs
from fourfold.core.request import RequestOutput as Added
from fourfold.text.answer import Answer
from fourfold.text.events import ContentDelta
from fourfold.text.plain import PlainParser
from fourfold.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class Logprob:
    """Of one token at one position. `rank` 1 is the likeliest; `decoded_token` is None for an id that
    the tokenizer does not know, and holds U+FFFD for part of a character."""

    logprob: float
    rank: int | None = None
    decoded_token: str | None = None


@dataclass(frozen=True)
class CompletionOutput:
    """One of a request's n answers, so far.

    `token_ids` include an ending stop token, `text` neither it nor a stop string.
    `cumulative_logprob` and `logprobs` (by token id, one map a token) are None unless asked for.
    `finish_reason` is "stop", "length", "abort" or "error" (`error` says which); `stop_reason` the
    stop string or stop token id that ended it, None for the end-of-sequence token.
    """

    index: int
    text: str
    token_ids: list[int]
    cumulative_logprob: float | None = None
    logprobs: list[dict[int, Logprob]] | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    error: str | None = None

    def finished(self) -> bool:
        """Whether no more will come."""
        return self.finish_reason is not None


@dataclass(frozen=True)
class RequestMetrics:
    """`arrival_time` in seconds since 1970; the others in seconds after it, None before they are."""

    arrival_time: float
    first_token_latency: float | None = None
    last_token_latency: float | None = None


@dataclass(frozen=True)
class RequestOutput:
    """A request and its answers so far. `prompt` is None if it was given as token ids;
    `num_cached_tokens` of its tokens were not computed again, `cache_miss` says why not more."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    prompt_logprobs: list[dict[int, Logprob] | None] | None
    outputs: list[CompletionOutput]
    finished: bool
    num_cached_tokens: int | None = None
    cache_miss: str | None = None
    metrics: RequestMetrics | None = None


class Decoder:
    """Token ids to what results show of them."""

    def __init__(self, tokenizer: Tokenizer, eos_token_id: int):
        self.tokenizer, self.eos_token_id = tokenizer, eos_token_id
        self._known = tokenizer.known_ids()

    def logprobs(self, at: TokenLogprobs) -> dict[int, Logprob]:
        """The token's own first, then the alternatives."""
        found = {at.token_id: Logprob(at.logprob, at.rank, self._text(at.token_id))}
        for rank, (token, value) in enumerate(at.top, 1):
            found.setdefault(token, Logprob(value, rank, self._text(token)))
        return found

    def _text(self, token: int) -> str | None:
        return self.tokenizer.decode([token]) if token in self._known else None


class _Answer:
    """One of a request's sequences as it grows: its text, ids and log probabilities so far."""

    def __init__(self, index: int, params: SamplingParams, decoder: Decoder):
        self.index, self._params, self._decoder = index, params, decoder
        parser = PlainParser(decoder.tokenizer, stop=params.stop, min_tokens=params.min_tokens)
        self._answer = Answer(parser, params, decoder.eos_token_id)
        self._text = ""
        self._token_ids: list[int] = []
        self._logprobs: list[dict[int, Logprob]] = []
        self._cumulative = 0.0

    @property
    def finished(self) -> bool:
        return self._answer.finished

    @property
    def num_tokens(self) -> int:
        return len(self._token_ids)

    def take(self, added: Added) -> bool:
        """Take what a step added; whether a stop string ended what would go on in the engine."""
        events = self._answer.take(added)
        taken = self._answer.num_tokens - len(self._token_ids)
        self._token_ids += added.new_token_ids[:taken]
        for at in added.logprobs[:taken]:
            self._logprobs.append(self._decoder.logprobs(at))
            self._cumulative += at.logprob
        self._text += "".join(e.text for e in events if isinstance(e, ContentDelta))
        return self._answer.must_abort

    def result(self) -> CompletionOutput:
        wanted, answer = self._params.logprobs is not None, self._answer
        return CompletionOutput(
            index=self.index,
            text=self._text,
            token_ids=list(self._token_ids),
            cumulative_logprob=self._cumulative if wanted else None,
            logprobs=list(self._logprobs) if wanted else None,
            finish_reason=answer.reason.value if answer.reason else None,
            stop_reason=answer.stop_reason,
            error=answer.error,
        )


class Reply:
    """What has come back for one request."""

    def __init__(self, request: Request, text: str | None, decoder: Decoder):
        self.request, self._prompt, self._decoder = request, text, decoder
        self.answers = [_Answer(i, request.params, decoder) for i in range(request.params.n)]
        self._arrival, self._began = time.time(), time.monotonic()
        self._first: float | None = None
        self._last: float | None = None
        self._cached: int | None = None
        self._miss: str | None = None
        self._prompt_logprobs: list[dict[int, Logprob] | None] | None = None

    @property
    def finished(self) -> bool:
        return all(answer.finished for answer in self.answers)

    @property
    def num_tokens(self) -> int:
        """Tokens generated so far, in all answers."""
        return sum(answer.num_tokens for answer in self.answers)

    def take(self, added: Added) -> bool:
        """Take what a step added to a sequence; whether it is to be aborted in the engine."""
        answer = self.answers[added.index]
        if answer.finished:
            return False
        if added.new_token_ids:
            self._last = time.monotonic() - self._began
            self._first = self._last if self._first is None else self._first
        if self._cached is None:
            self._cached, self._miss = added.cached_tokens, added.cache_miss
        if added.prompt_logprobs is not None and self._prompt_logprobs is None:
            self._prompt_logprobs = [
                None if at is None else self._decoder.logprobs(at) for at in added.prompt_logprobs
            ]
        return answer.take(added)

    def result(self) -> RequestOutput:
        return RequestOutput(
            request_id=self.request.request_id,
            prompt=self._prompt,
            prompt_token_ids=list(self.request.prompt_token_ids),
            prompt_logprobs=self._prompt_logprobs,
            outputs=[answer.result() for answer in self.answers],
            finished=self.finished,
            num_cached_tokens=self._cached,
            cache_miss=self._miss,
            metrics=RequestMetrics(self._arrival, self._first, self._last),
        )

"""What an offline request gives back, and how it grows step by step.

Contract: results have vLLM's names. Text is made and stop strings are found here, token by token, so
that nothing depends on how many tokens a step brought. It does not know where steps come from.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

from fourfold.core.request import FinishReason, Request, SamplingParams, TokenLogprobs
from fourfold.core.request import RequestOutput as Added
from fourfold.text.detokenize import IncrementalDetokenizer
from fourfold.text.stop import StopMatcher
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
    """One of a request's sequences as it grows."""

    def __init__(self, index: int, params: SamplingParams, decoder: Decoder):
        self.index, self._params, self._decoder = index, params, decoder
        self._detokenizer = IncrementalDetokenizer(decoder.tokenizer)
        self._stop = StopMatcher(params.stop)
        self._text = ""
        self._token_ids: list[int] = []
        self._logprobs: list[dict[int, Logprob]] = []
        self._cumulative = 0.0
        self._reason: FinishReason | None = None
        self._stop_reason: int | str | None = None
        self._error: str | None = None

    @property
    def finished(self) -> bool:
        return self._reason is not None

    @property
    def num_tokens(self) -> int:
        return len(self._token_ids)

    def take(self, added: Added) -> bool:
        """Take what a step added; whether a stop string ended what would go on in the engine."""
        for position, token in enumerate(added.new_token_ids):
            self._token_ids.append(token)
            if added.logprobs:
                at = added.logprobs[position]
                self._logprobs.append(self._decoder.logprobs(at))
                self._cumulative += at.logprob
            last = position == len(added.new_token_ids) - 1
            if last and added.finish_reason is FinishReason.STOP:
                break  # a stop token is no part of the text
            self._show(self._detokenizer.push(token))
            if self._stop.matched is not None:
                self._end_by_string()
                return added.finish_reason is None
        if added.finish_reason is not None:
            self._finish(added)
        return False

    def _show(self, text: str) -> None:
        # Before min_tokens nothing ends an answer.
        early = len(self._token_ids) <= self._params.min_tokens
        self._text += text if early else self._stop.push(text)

    def _end_by_string(self) -> None:
        self._reason, self._stop_reason = FinishReason.STOP, self._stop.matched

    def _finish(self, added: Added) -> None:
        self._show(self._detokenizer.finish())
        if self._stop.matched is not None:
            self._end_by_string()
            return
        self._text += self._stop.finish()
        self._reason, self._error = added.finish_reason, added.error
        # Told apart from the token that ends every answer only if it was asked for.
        token = added.stop_reason
        named = token != self._decoder.eos_token_id or token in self._params.stop_token_ids
        self._stop_reason = token if named else None

    def result(self) -> CompletionOutput:
        wanted = self._params.logprobs is not None
        return CompletionOutput(
            index=self.index,
            text=self._text,
            token_ids=list(self._token_ids),
            cumulative_logprob=self._cumulative if wanted else None,
            logprobs=list(self._logprobs) if wanted else None,
            finish_reason=self._reason.value if self._reason else None,
            stop_reason=self._stop_reason,
            error=self._error,
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

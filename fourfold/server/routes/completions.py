"""POST /v1/completions: texts or tokens to continue, or a hole to fill."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import Any

from fourfold.core.errors import FourfoldError
from fourfold.core.request import MAX_LOGPROBS, FinishReason
from fourfold.server import sse
from fourfold.server.admission import Ticket
from fourfold.server.call import Call
from fourfold.server.errors import bad_request, failed_answer, from_failure, unsupported
from fourfold.server.generation import Generation, Job, Piece, Usage, merged
from fourfold.server.logprobs import CompletionLogprobs, joined
from fourfold.server.reply import deliver
from fourfold.server.sampling import (
    SamplingFields,
    StreamOptions,
    expect_fit,
    expect_labels,
    sampling_params,
    stream_options,
)
from fourfold.server.serving import Serving
from fourfold.server.settings import MAX_PROMPTS
from fourfold.server.structured import read_structured_outputs
from fourfold.text.answer import Answer
from fourfold.text.events import ContentDelta, Finish
from fourfold.text.plain import PlainParser
from fourfold.text.prompt import encode_fim


class CompletionRequest(SamplingFields, kw_only=True):
    """The body of a completion. A `suffix` makes it fill-in-the-middle."""

    prompt: str | list[Any]
    suffix: str | None = None
    echo: bool | None = None
    logprobs: int | None = None
    best_of: int | None = None
    skip_special_tokens: bool | None = None
    structured_outputs: dict[str, Any] | None = None


@dataclass(frozen=True)
class Prompt:
    """A prompt in tokens; `text` is what `echo` shows."""

    text: str
    token_ids: tuple[int, ...]


def as_prompts(value: str | list[Any]) -> list[str | list[int]]:
    """One prompt or several, as several. Raises 400."""
    if isinstance(value, str):
        return [value]
    if not value:
        raise bad_request("prompt must hold at least one text or token", "prompt")
    if _is_ids(value):
        return [value]
    if len(value) > MAX_PROMPTS:
        raise bad_request(f"prompt must hold at most {MAX_PROMPTS} prompts, found {len(value)}")
    for index, each in enumerate(value):
        if not isinstance(each, str) and not (isinstance(each, list) and each and _is_ids(each)):
            wanted = "a text or a list of token ids"
            raise bad_request(f"prompt[{index}] must be {wanted}", f"prompt[{index}]")
    return value


def _is_ids(value: Sequence[object]) -> bool:
    return all(type(each) is int for each in value)


async def read_prompts(call: Call, request: CompletionRequest) -> list[Prompt]:
    """The request's prompts in tokens. Raises 400."""
    serving = call.serving
    given = as_prompts(request.prompt)

    def encode() -> list[Prompt]:
        return [_encode(serving, each, request.suffix) for each in given]

    return await serving.tokenising(call.held_bytes, encode)


def _encode(serving: Serving, prompt: str | list[int], suffix: str | None) -> Prompt:
    tokenizer = serving.tokenizer
    if isinstance(prompt, list):
        if suffix is not None:
            raise bad_request("suffix needs a prompt that is a text", "suffix")
        known = serving.texts.known
        return Prompt(tokenizer.decode(i for i in prompt if i in known), tuple(prompt))
    if serving.cannot_fit(len(prompt) + len(suffix or "")):
        raise bad_request(
            f"the prompt of {len(prompt)} characters exceeds the context of "
            f"{serving.info.max_model_len} tokens",
            "prompt",
            "context_length_exceeded",
        )
    if suffix is None:
        return Prompt(prompt, tuple(tokenizer.encode(prompt, allow_special=True)))
    return Prompt(prompt, tuple(encode_fim(prompt, suffix).token_ids(tokenizer)))


def completion_jobs(call: Call, request: CompletionRequest, prompts: Sequence[Prompt]) -> list[Job]:
    """How to run them. Raises 400."""
    serving = call.serving
    echo = bool(request.echo)
    grammar = read_structured_outputs(request.structured_outputs, None)
    # Scoring a prompt asks for no answer; the engine gives at least one token, which is left out.
    scored = echo and request.max_tokens == 0
    limit = 1 if scored else request.max_tokens
    scores = request.logprobs if echo else None
    params = sampling_params(request, serving.defaults, limit, request.logprobs, scores)
    if scored:
        params = replace(params, min_tokens=0, stop=())
    for prompt in prompts:
        expect_fit(prompt.token_ids, params, serving.info)

    def parser() -> PlainParser:
        return PlainParser(
            serving.tokenizer,
            stop=params.stop,
            include_stop=bool(request.include_stop_str_in_output),
            min_tokens=params.min_tokens,
            skip_special=bool(request.skip_special_tokens),
        )

    return [
        Job(
            prompt.token_ids,
            params,
            parser,
            f"{call.request_id}-{i}",
            request.cache_salt,
            grammar=grammar,
        )
        for i, prompt in enumerate(prompts)
    ]


def _expect_supported(request: CompletionRequest) -> None:
    expect_labels(request)
    if request.best_of is not None and request.best_of != (request.n or 1):
        raise unsupported("best_of", "other than n is not supported")
    if request.echo and request.suffix is not None:
        raise unsupported("echo", "together with suffix is not supported")
    if request.logprobs is not None and not 0 <= request.logprobs <= MAX_LOGPROBS:
        raise bad_request(f"logprobs must be an integer from 0 to {MAX_LOGPROBS}", "logprobs")
    if request.echo and request.stream and request.max_tokens == 0:
        raise unsupported("stream", "with echo and max_tokens 0 is not supported")


async def completions(call: Call) -> None:
    """Continue prompts."""
    call.serving.expect_ready().check()
    request = await call.read(CompletionRequest)
    model = call.serving.expect_model(request.model)
    options = stream_options(request)
    _expect_supported(request)
    count = len(as_prompts(request.prompt)) * max(request.n or 1, 1)
    with call.serving.expect_ready().ticket(count) as ticket:
        prompts = await read_prompts(call, request)
        jobs = completion_jobs(call, request, prompts)
        await call.serving.expect_grammar(jobs[0].grammar, "structured_outputs")
        ticket.wait_with(sum(len(job.prompt) for job in jobs))
        reply = _Reply(call, request, model, prompts, jobs, ticket, options)
        await deliver(call, reply, request.stream)


class _Choice:
    """One sequence of one prompt on its way out."""

    def __init__(self, serving: Serving, prompt: Prompt) -> None:
        self.prompt = prompt
        self.logprobs = CompletionLogprobs(serving.tokenizer, serving.texts)
        self.texts: list[str] = []
        self.parts: list[dict[str, list[Any]]] = []
        self.begun = False
        self.reason: str | None = None


class _Reply:
    """Turns generations into a response or its chunks."""

    def __init__(
        self,
        call: Call,
        request: CompletionRequest,
        model: str,
        prompts: Sequence[Prompt],
        jobs: Sequence[Job],
        ticket: Ticket,
        options: StreamOptions,
    ) -> None:
        serving = call.serving
        self._request, self._params, self._options = request, jobs[0].params, options
        self.generations = [Generation(serving, job, ticket, call.arrived) for job in jobs]
        self._choices = [
            _Choice(serving, prompt) for prompt in prompts for _ in range(self._params.n)
        ]
        self._head = {
            "id": f"cmpl-{call.request_id}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": model,
        }
        # See `completion_jobs`.
        self._scored = bool(request.echo) and request.max_tokens == 0

    @property
    def usage(self) -> Usage:
        """Of all prompts together."""
        total = Usage()
        for generation in self.generations:
            each = generation.usage
            total.prompt += each.prompt
            total.cached += each.cached
            total.accepted += each.accepted
            total.completion += 0 if self._scored else each.completion
            total.miss = total.miss or each.miss
        return total

    @property
    def first_token(self) -> float | None:
        """See `Reply`."""
        return min((g.first_token for g in self.generations if g.first_token), default=None)

    @property
    def reasons(self) -> list[str]:
        """How the choices ended that have."""
        return [choice.reason for choice in self._choices if choice.reason is not None]

    async def whole(self) -> dict[str, Any]:
        """The response. Raises what `failed_answer` makes of an answer that failed."""
        async with aclosing(merged([g.pieces() for g in self.generations])) as pieces:
            async for number, piece in pieces:
                self._take(number, piece)
        choices = []
        for index, choice in enumerate(self._choices):
            answer = self._answer(index)
            if answer.reason is FinishReason.ERROR:
                raise failed_answer(answer.error)
            choices.append(
                {
                    "index": index,
                    "text": "".join(choice.texts),
                    "logprobs": joined(choice.parts) if choice.parts else None,
                    "finish_reason": choice.reason,
                    "stop_reason": answer.stop_reason,
                }
            )
        return {**self._head, "choices": choices, "usage": self.usage.body()}

    async def events(self) -> AsyncGenerator[bytes, None]:
        """The chunks of a stream."""
        sent, fault = False, None
        try:
            async with aclosing(merged([g.pieces() for g in self.generations])) as pieces:
                async for number, piece in pieces:
                    index, text, logprobs = self._take(number, piece)
                    answer = self._answer(index)
                    fault = answer if answer.reason is FinishReason.ERROR else fault
                    reason = self._choices[index].reason
                    if not (text or logprobs or reason):
                        continue
                    choice = {
                        "index": index,
                        "text": text,
                        "logprobs": logprobs,
                        "finish_reason": reason,
                        "stop_reason": answer.stop_reason,
                    }
                    chunk = {**self._head, "choices": [choice]}
                    if self._options.continuous_usage_stats:
                        chunk["usage"] = self.usage.body()
                    sent = True
                    yield sse.data(chunk)
            if fault is not None:
                body = failed_answer(fault.error).body
                yield sse.data(body)
        except FourfoldError as error:
            if not sent:
                raise  # nothing has been sent: it can be an ordinary answer
            yield sse.data(from_failure(error).body)
        if self._options.include_usage:
            yield sse.data({**self._head, "choices": [], "usage": self.usage.body()})
        yield sse.DONE

    def _answer(self, index: int) -> Answer:
        generation = self.generations[index // self._params.n]
        return generation.answers[index % self._params.n]

    def _take(self, number: int, piece: Piece) -> tuple[int, str, dict[str, list[Any]] | None]:
        """Take a piece into its choice: the choice's index, and what is new in it."""
        index = number * self._params.n + piece.index
        choice = self._choices[index]
        text, parts = "", []
        if not choice.begun:
            choice.begun = True
            if self._request.echo:
                text = choice.prompt.text
                if self._request.logprobs is not None:
                    scores = self.generations[number].prompt_logprobs
                    parts.append(choice.logprobs.entries(choice.prompt.token_ids, scores))
        if not self._scored:
            text += "".join(e.text for e in piece.events if isinstance(e, ContentDelta))
            if self._request.logprobs is not None:
                parts.append(choice.logprobs.entries(piece.tokens, piece.logprobs))
        choice.texts.append(text)
        choice.parts += parts
        for event in piece.events:
            if isinstance(event, Finish):
                choice.reason = "length" if self._scored else event.reason
        return index, text, joined(parts) if parts else None

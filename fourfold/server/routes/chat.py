"""POST /v1/chat/completions, and POST /v1/chat/completions/render, which shows the prompt alone."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import Any

from fourfold.core.errors import FourfoldError
from fourfold.core.request import FinishReason, Grammar
from fourfold.server import sse
from fourfold.server.call import Call
from fourfold.server.errors import bad_request, failed_answer, from_failure, unsupported
from fourfold.server.generation import Generation, Job, Piece, Usage
from fourfold.server.reply import deliver
from fourfold.server.sampling import (
    SamplingFields,
    StreamOptions,
    expect_fit,
    expect_labels,
    sampling_params,
    stream_options,
)
from fourfold.server.structured import read_response_format, read_structured_outputs
from fourfold.text import markers
from fourfold.text.answer import Answer
from fourfold.text.chat import ChatOptions, encode_chat, read_switches
from fourfold.text.events import (
    ContentDelta,
    Event,
    Finish,
    ParsedMessage,
    ReasoningDelta,
    ToolArgumentsDelta,
    ToolCallStart,
    collect,
)
from fourfold.text.grammar import beginning_grammar
from fourfold.text.parse import TokenParser
from fourfold.text.prompt import EncodedPrompt, PromptTokens

_BUDGET = "thinking.budget_tokens"


class ChatRequest(SamplingFields, kw_only=True):
    """The body of a chat completion. Messages, tools and formats are read by text/."""

    messages: list[dict[str, Any]]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    response_format: dict[str, Any] | None = None
    structured_outputs: dict[str, Any] | None = None
    reasoning_effort: str | None = None
    thinking: bool | dict[str, Any] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    continue_final_message: bool | None = None
    add_generation_prompt: bool | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    store: bool | None = None


@dataclass(frozen=True)
class Chat:
    """A chat request, understood."""

    request: ChatRequest
    model: str
    prompt: EncodedPrompt
    tokens: PromptTokens
    grammar: Grammar | None = None
    thinking_budget: int | None = None  # the most tokens of reasoning

    @property
    def top_logprobs(self) -> int | None:
        """Alternatives asked for, None if no log probabilities are."""
        return (self.request.top_logprobs or 0) if self.request.logprobs else None


async def read_chat(call: Call, request: ChatRequest) -> Chat:
    """Encode the conversation. Raises 400 or 404 naming what is wrong."""
    serving = call.serving
    model = serving.expect_model(request.model)
    _expect_supported(request)
    switches = _switches(request)
    budget = _take_budget(switches)
    options = ChatOptions(
        serving.profile,
        continue_final_message=_continues(request),
        tools=request.tools,
        tool_choice=request.tool_choice,
        response_format=request.response_format,
        **switches,
    )
    size = call.held_bytes

    def encode() -> tuple[EncodedPrompt, PromptTokens]:
        prompt = encode_chat(request.messages, options)
        if serving.cannot_fit(len(prompt.text)):
            raise bad_request(
                f"the prompt of {len(prompt.text)} characters exceeds the context of "
                f"{serving.info.max_model_len} tokens",
                "messages",
                "context_length_exceeded",
            )
        return prompt, prompt.tokenize(serving.tokenizer)

    prompt, tokens = await serving.tokenising(size, encode)
    grammar = await _read_grammar(call, request, prompt)
    return Chat(request, model, prompt, tokens, grammar, budget)


async def _read_grammar(call: Call, request: ChatRequest, prompt: EncodedPrompt) -> Grammar | None:
    """What the answer must look like, armed only after its reasoning."""
    after = None
    if prompt.ends_in_reasoning:
        after = call.serving.tokenizer.special_id(markers.END_THINK)
    grammar = read_response_format(request.response_format, after)
    other = read_structured_outputs(request.structured_outputs, after)
    if grammar is not None and other is not None:
        raise bad_request("response_format and structured_outputs are the same: give one")
    grammar = grammar or other
    if grammar is not None and prompt.parse_tools:
        raise unsupported("structured_outputs", "together with tools is not supported")
    name = "response_format.type" if other is None else "structured_outputs"
    await call.serving.expect_grammar(grammar, name)
    return grammar


def _expect_supported(request: ChatRequest) -> None:
    expect_labels(request)
    if request.store:
        raise unsupported("store", "is not supported: nothing is stored")
    if request.top_logprobs is not None and not request.logprobs:
        raise bad_request("top_logprobs needs logprobs to be true", "top_logprobs")
    if request.max_tokens is not None and request.max_completion_tokens is not None:
        raise bad_request("max_tokens and max_completion_tokens are the same: give one")


def _continues(request: ChatRequest) -> bool:
    continues = bool(request.continue_final_message)
    adds = request.add_generation_prompt
    if adds and continues:
        raise bad_request(
            "add_generation_prompt and continue_final_message cannot both be true",
            "continue_final_message",
        )
    if adds is False and not continues:
        raise unsupported("add_generation_prompt", "false needs continue_final_message")
    return continues


def _switches(request: ChatRequest) -> dict[str, Any]:
    """Thinking's switches, which may stand in the request or in its template arguments."""
    switches = read_switches(request.chat_template_kwargs)
    for name in ("thinking", "reasoning_effort"):
        given = getattr(request, name)
        if given is None:
            continue
        if switches.get(name) not in (None, given):
            raise bad_request(f"{name} and chat_template_kwargs.{name} contradict each other", name)
        switches[name] = given
    return switches


def _take_budget(switches: dict[str, Any]) -> int | None:
    """`thinking.budget_tokens`, which the chat format knows nothing of."""
    thinking = switches.get("thinking")
    if not isinstance(thinking, dict) or "budget_tokens" not in thinking:
        return None
    budget = thinking["budget_tokens"]
    if not isinstance(budget, int) or isinstance(budget, bool) or not 0 < budget < 2**63:
        raise bad_request("thinking.budget_tokens must be a positive integer", _BUDGET)
    if thinking.get("type") == "disabled":
        raise bad_request("thinking.budget_tokens needs thinking to be enabled", _BUDGET)
    switches["thinking"] = {k: v for k, v in thinking.items() if k != "budget_tokens"}
    return budget


def _demand(chat: Chat, forced: list[int], end_think: int) -> Grammar | None:
    """What holds from the end of the reasoning on, and by when it ends."""
    grammar = chat.grammar
    if grammar is None and (forced or chat.thinking_budget is not None):
        grammar = beginning_grammar(forced, end_think)
    return grammar and replace(grammar, max_free_tokens=chat.thinking_budget)


def chat_job(call: Call, chat: Chat) -> Job:
    """How to run it. Raises 400 for what cannot be run."""
    serving, request, prompt = call.serving, chat.request, chat.prompt
    limit = request.max_completion_tokens
    limit = request.max_tokens if limit is None else limit
    params = sampling_params(request, serving.defaults, limit, chat.top_logprobs)
    forced, grammar = prompt.forced_ids(serving.tokenizer), chat.grammar
    expect_fit((*chat.tokens.token_ids, *forced), params, serving.info)
    if prompt.ends_in_reasoning:
        end_think = serving.tokenizer.special_id(markers.END_THINK)
        grammar, forced = _demand(chat, forced, end_think), []
    header = chat.tokens.header_position

    def parser() -> TokenParser:
        return TokenParser(
            serving.tokenizer,
            prompt.start,
            prompt.parse_tools,
            stop=params.stop,
            include_stop=bool(request.include_stop_str_in_output),
            min_tokens=params.min_tokens,
        )

    return Job(
        chat.tokens.token_ids,
        params,
        parser,
        call.request_id,
        request.cache_salt,
        () if header is None else (header,),
        tuple(forced),
        single_call=request.parallel_tool_calls is False,
        grammar=grammar,
    )


async def chat_completions(call: Call) -> None:
    """Answer a conversation."""
    call.serving.expect_ready().check()
    request = await call.read(ChatRequest)
    options = stream_options(request)
    admission = call.serving.expect_ready()
    with admission.ticket(_sequences(request)) as ticket:
        chat = await read_chat(call, request)
        job = chat_job(call, chat)
        ticket.wait_with(len(job.prompt))
        generation = Generation(call.serving, job, ticket, call.arrived)
        await deliver(call, _Reply(call, chat, generation, options), request.stream)


def _sequences(request: ChatRequest) -> int:
    """How many sequences the request asks for, before anything is checked."""
    return request.n if request.n is not None and request.n > 0 else 1


async def render(call: Call) -> None:
    """The prompt that a chat request makes, as text and tokens."""
    call.serving.expect_ready()
    request = await call.read(ChatRequest)
    chat = await read_chat(call, request)
    chat_job(call, chat)
    forced = chat.prompt.forced_ids(call.serving.tokenizer)
    await call.json(
        {
            "prompt": chat.prompt.text,
            "token_ids": list(chat.tokens.token_ids),
            "count": len(chat.tokens.token_ids),
            "forced_token_ids": forced,
        }
    )


class _Reply:
    """Turns a generation into a response or its chunks."""

    def __init__(
        self, call: Call, chat: Chat, generation: Generation, options: StreamOptions
    ) -> None:
        self._chat, self._generation, self._options = chat, generation, options
        self._texts = call.serving.texts
        self._head = {
            "id": f"chatcmpl-{call.request_id}",
            "created": int(time.time()),
            "model": chat.model,
        }
        self.reasons: list[str] = []

    @property
    def usage(self) -> Usage:
        """See `Reply`."""
        return self._generation.usage

    @property
    def first_token(self) -> float | None:
        """See `Reply`."""
        return self._generation.first_token

    async def whole(self) -> dict[str, Any]:
        """The response. Raises what `failed_answer` makes of an answer that failed."""
        generation = self._generation
        events: list[list[Event]] = [[] for _ in generation.answers]
        logprobs: list[dict[str, Any] | None] = [None for _ in generation.answers]
        async with aclosing(generation.pieces()) as pieces:
            async for piece in pieces:
                events[piece.index] += piece.events
                found = self._logprobs(piece)
                known = logprobs[piece.index]
                if known is not None and found is not None:
                    for name, entries in found.items():
                        known[name] += entries
                else:
                    logprobs[piece.index] = found or known
        choices = []
        for index, answer in enumerate(generation.answers):
            if answer.reason is FinishReason.ERROR:
                raise failed_answer(answer.error)
            message = collect(events[index])
            self.reasons.append(message.finish_reason or "error")
            choices.append(
                {
                    "index": index,
                    "message": _message(message),
                    "logprobs": logprobs[index],
                    "finish_reason": message.finish_reason,
                    "stop_reason": answer.stop_reason,
                }
            )
        return {
            **self._head,
            "object": "chat.completion",
            "choices": choices,
            "usage": self.usage.body(),
        }

    async def events(self) -> AsyncGenerator[bytes, None]:
        """The chunks of a stream."""
        generation = self._generation
        fault: Answer | None = None
        begun: set[int] = set()
        try:
            async with aclosing(generation.pieces()) as pieces:
                async for piece in pieces:
                    for chunk in self._chunks(piece, piece.index not in begun):
                        if self._options.continuous_usage_stats:
                            chunk["usage"] = self.usage.body()
                        yield sse.data(chunk)
                    begun.add(piece.index)
                    answer = generation.answers[piece.index]
                    fault = answer if answer.reason is FinishReason.ERROR else fault
            if fault is not None:
                yield sse.data(failed_answer(fault.error).body)
        except FourfoldError as error:
            if not begun:
                raise  # nothing has been sent: it can be an ordinary answer
            yield sse.data(from_failure(error).body)
        if self._options.include_usage:
            yield sse.data(self._chunk([]) | {"usage": self.usage.body()})
        yield sse.DONE

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {**self._head, "object": "chat.completion.chunk", "choices": choices}

    def _chunks(self, piece: Piece, first: bool) -> list[dict[str, Any]]:
        chunks: list[dict[str, Any]] = []
        if first:
            chunks.append(self._delta(piece.index, {"role": "assistant", "content": ""}))
        deltas = [delta for event in piece.events if (delta := _delta(event)) is not None]
        logprobs = self._logprobs(piece)
        if logprobs is not None and not deltas and any(logprobs.values()):
            deltas = [{}]  # tokens whose text is held back are told all the same
        for position, delta in enumerate(deltas):
            chunk = self._delta(piece.index, delta)
            if position == 0:
                chunk["choices"][0]["logprobs"] = logprobs
            chunks.append(chunk)
        for event in piece.events:
            if isinstance(event, Finish):
                self.reasons.append(event.reason)
                answer = self._generation.answers[piece.index]
                chunk = self._delta(piece.index, {})
                chunk["choices"][0] |= {
                    "finish_reason": event.reason,
                    "stop_reason": answer.stop_reason,
                }
                chunks.append(chunk)
        return chunks

    def _delta(self, index: int, delta: dict[str, Any]) -> dict[str, Any]:
        choice = {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}
        return self._chunk([choice])

    def _logprobs(self, piece: Piece) -> dict[str, Any] | None:
        top = self._chat.top_logprobs
        if top is None:
            return None
        entries = self._texts.chat_entries(piece.logprobs, top)
        split = piece.num_reasoning
        return {"content": entries[split:], "reasoning_content": entries[:split]}


def _message(message: ParsedMessage) -> dict[str, Any]:
    body: dict[str, Any] = {"role": "assistant", "content": message.content}
    if message.reasoning is not None:
        body |= {"reasoning_content": message.reasoning, "reasoning": message.reasoning}
    if message.tool_calls:
        body["tool_calls"] = [
            {
                "id": each.call_id,
                "type": "function",
                "function": {"name": each.name, "arguments": each.arguments},
            }
            for each in message.tool_calls
        ]
    return body


def _delta(event: Event) -> dict[str, Any] | None:
    """What a chunk says of an event, None if nothing."""
    match event:
        case ReasoningDelta(text):
            return {"reasoning_content": text, "reasoning": text}
        case ContentDelta(text):
            return {"content": text}
        case ToolCallStart(index, call_id, name):
            function = {"name": name, "arguments": ""}
            call = {"index": index, "id": call_id, "type": "function", "function": function}
            return {"tool_calls": [call]}
        case ToolArgumentsDelta(index, text):
            return {"tool_calls": [{"index": index, "function": {"arguments": text}}]}
        case _:
            return None

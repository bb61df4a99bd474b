"""POST /v1/responses: OpenAI's newer API. Text, reasoning and function tools; nothing is stored."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Any

import msgspec

from fourfold.server import sse
from fourfold.server.call import Call
from fourfold.server.errors import ApiError, bad_request, unsupported
from fourfold.server.generation import Generation
from fourfold.server.reply import SectionReply, deliver
from fourfold.server.routes.chat import Chat, ChatRequest, chat_job, read_chat
from fourfold.server.sections import Change, Kind, Section
from fourfold.text.checks import checked_list, checked_object, checked_text

_TEXT_PARTS = ("input_text", "output_text", "text")
# Fields that may be there with this value, which asks for what is done anyway.
_INERT: dict[str, tuple[object, ...]] = {
    "store": (None, False),
    "background": (None, False),
    "truncation": (None, "disabled"),
    "service_tier": (None, "auto", "default"),
    "previous_response_id": (None,),
    "conversation": (None,),
    "top_logprobs": (None, 0),
}


class ResponsesRequest(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """The body of a response request."""

    input: str | list[dict[str, Any]]
    model: str | None = None
    instructions: str | None = None
    max_output_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    reasoning: dict[str, Any] | None = None
    text: dict[str, Any] | None = None
    include: list[str] | None = None
    stream: bool | None = None
    stream_options: dict[str, Any] | None = None
    store: bool | None = None
    background: bool | None = None
    truncation: str | None = None
    service_tier: str | None = None
    previous_response_id: str | None = None
    conversation: str | dict[str, Any] | None = None
    top_logprobs: int | None = None
    user: str | None = None
    metadata: dict[str, str] | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None


def as_chat(request: ResponsesRequest) -> ChatRequest:
    """The same as a chat request. Raises 400 or `RequestError` naming the place."""
    for name, values in _INERT.items():
        if getattr(request, name) not in values:
            raise unsupported(name, "is not supported: nothing is stored or run later")
    for name in request.include or ():
        # Clients that keep no state here ask for it with every request; there is none to include.
        if name != "reasoning.encrypted_content":
            raise unsupported("include", f"of {name[:80]} is not supported")
    if (request.stream_options or {}).keys() - {"include_obfuscation"}:
        raise unsupported("stream_options", "other than include_obfuscation is not supported")
    turns: list[dict[str, Any]] = []
    if request.instructions:
        turns.append({"role": "system", "content": request.instructions})
    turns += _turns(request.input)
    return ChatRequest(
        model=request.model,
        messages=turns,
        tools=_tools(request.tools),
        tool_choice=_choice(request.tool_choice),
        parallel_tool_calls=request.parallel_tool_calls,
        reasoning_effort=_effort(request.reasoning),
        response_format=_format(request.text),
        max_tokens=request.max_output_tokens,
        temperature=request.temperature,
        top_p=request.top_p,
    )


def _effort(value: dict[str, Any] | None) -> str | None:
    for name in value or {}:
        if name not in ("effort", "summary", "generate_summary"):
            raise unsupported(f"reasoning.{name[:80]}")
    effort = (value or {}).get("effort")
    if effort is not None and not isinstance(effort, str):
        raise bad_request("reasoning.effort must be a text", "reasoning.effort")
    return effort


def _format(value: dict[str, Any] | None) -> dict[str, Any] | None:
    """`text.format` in the shape of chat's `response_format`."""
    for name in value or {}:
        if name not in ("format", "verbosity"):
            raise unsupported(f"text.{name[:80]}")
    if (value or {}).get("verbosity") not in (None, "medium"):
        raise unsupported("text.verbosity", "other than medium is not supported")
    given = (value or {}).get("format")
    if given is None:
        return None
    kind = checked_object(given, "text.format").get("type")
    return {"type": kind, "json_schema": given} if kind == "json_schema" else {"type": kind}


def _tools(value: list[dict[str, Any]] | None) -> list[dict[str, Any]] | None:
    if value is None:
        return None
    for index, tool in enumerate(value):
        if tool.get("type") != "function":
            raise unsupported(f"tools[{index}].type", "other than function is not supported")
    functions = ({k: v for k, v in tool.items() if k != "type"} for tool in value)
    return [{"type": "function", "function": function} for function in functions]


def _choice(value: str | dict[str, Any] | None) -> str | dict[str, Any] | None:
    if isinstance(value, dict):
        return {"type": value.get("type"), "function": {"name": value.get("name")}}
    return value


def _turns(value: str | list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Items as messages; reasoning and calls that follow each other are one assistant message."""
    if isinstance(value, str):
        return [{"role": "user", "content": value}]
    turns: list[dict[str, Any]] = []
    for index, item in enumerate(value):
        where = f"input[{index}]"
        match item.get("type", "message"):
            case "message":
                _message(turns, item, where)
            case "reasoning":
                _answering(turns)["reasoning_content"] = _thoughts(item, where)
            case "function_call":
                function = {"name": item.get("name"), "arguments": item.get("arguments")}
                call = {"id": item.get("call_id"), "function": function}
                _answering(turns).setdefault("tool_calls", []).append(call)
            case "function_call_output":
                text = _texts(item.get("output"), f"{where}.output")
                result = {"role": "tool", "tool_call_id": item.get("call_id"), "content": text}
                turns.append(result)
            case kind:
                shown = kind[:80] if isinstance(kind, str) else "of this kind"
                raise unsupported(f"{where}.type", f"{shown} is not supported")
    if not turns:
        raise bad_request("input must hold at least one item", "input")
    return turns


def _message(turns: list[dict[str, Any]], item: dict[str, Any], where: str) -> None:
    role, text = item.get("role"), _texts(item.get("content"), f"{where}.content")
    if role == "developer":
        role = "system"
    if role != "assistant":
        turns.append({"role": role, "content": text})
        return
    turn = _answering(turns)
    turn["content"] = turn["content"] + text


def _answering(turns: list[dict[str, Any]]) -> dict[str, Any]:
    """The assistant message that an item belongs to."""
    if not turns or turns[-1]["role"] != "assistant":
        turns.append({"role": "assistant", "content": ""})
    return turns[-1]


def _thoughts(item: dict[str, Any], where: str) -> str:
    texts = []
    for name in ("content", "summary"):
        for index, part in enumerate(checked_list(item.get(name) or (), f"{where}.{name}")):
            place = f"{where}.{name}[{index}]"
            texts.append(checked_text(checked_object(part, place).get("text"), f"{place}.text"))
        if texts:
            break
    return "".join(texts)


def _texts(value: object, where: str) -> str:
    if isinstance(value, str):
        return checked_text(value, where)
    found = []
    for index, item in enumerate(checked_list(value, where)):
        place = f"{where}[{index}]"
        part = checked_object(item, place)
        if part.get("type") not in _TEXT_PARTS:
            raise unsupported(f"{place}.type", "other than text is not supported")
        found.append(checked_text(part.get("text"), f"{place}.text"))
    return "\n\n".join(found)


async def responses(call: Call) -> None:
    """Answer an input."""
    call.serving.expect_ready().check()
    request = await call.read(ResponsesRequest)
    with call.serving.expect_ready().ticket(1) as ticket:
        chat = await read_chat(call, as_chat(request))
        job = chat_job(call, chat)
        ticket.wait_with(len(job.prompt))
        generation = Generation(call.serving, job, ticket, call.arrived)
        await deliver(call, _Reply(call, request, chat, generation), request.stream)


class _Reply(SectionReply):
    """Turns a generation into a response or its events."""

    def __init__(
        self, call: Call, request: ResponsesRequest, chat: Chat, generation: Generation
    ) -> None:
        super().__init__(generation)
        self._id, self._number = call.request_id, 0
        params = generation.job.params
        self._head: dict[str, Any] = {
            "id": f"resp_{call.request_id}",
            "object": "response",
            "created_at": int(time.time()),
            "model": chat.model,
            "instructions": request.instructions,
            "max_output_tokens": request.max_output_tokens,
            "temperature": params.temperature,
            "top_p": params.top_p,
            "tools": request.tools or [],
            "tool_choice": request.tool_choice or "auto",
            "parallel_tool_calls": request.parallel_tool_calls is not False,
            "reasoning": {"effort": chat.request.reasoning_effort, "summary": None},
            "text": request.text or {"format": {"type": "text"}},
            "truncation": "disabled",
            "store": False,
            "previous_response_id": None,
            "metadata": request.metadata or {},
            "user": request.user,
        }

    def body(self) -> dict[str, Any]:
        """The response."""
        return self._response(self._status())

    def begun(self) -> Iterable[bytes]:
        """See `SectionReply`."""
        for name in ("created", "in_progress"):
            yield self._event(f"response.{name}", response=self._response("in_progress"))

    def ended(self) -> Iterable[bytes]:
        """See `SectionReply`."""
        yield self._event(f"response.{self._status()}", response=self.body())

    def failed(self, error: ApiError) -> Iterable[bytes]:
        """See `SectionReply`."""
        told = {"code": error.code or "server_error", "message": error.message}
        response = self._response("failed") | {"error": told}
        yield self._event("response.failed", response=response)

    def _status(self) -> str:
        finish = self.sections.finish
        return "completed" if finish and finish.reason in ("stop", "tool_calls") else "incomplete"

    def _response(self, status: str) -> dict[str, Any]:
        usage, details = None, None
        if status != "in_progress":
            counts = self.usage
            usage = {
                "input_tokens": counts.prompt,
                "input_tokens_details": {"cached_tokens": counts.cached},
                "output_tokens": counts.completion,
                "output_tokens_details": {
                    "reasoning_tokens": counts.reasoning,
                    "accepted_draft_tokens": counts.accepted,
                },
                "total_tokens": counts.prompt + counts.completion,
            }
        if status == "incomplete":
            reason = self.sections.finish.reason if self.sections.finish else "abort"
            details = {"reason": "max_output_tokens" if reason == "length" else reason}
        output = [self._item(s) for s in self.sections.all] if status != "in_progress" else []
        return {
            **self._head,
            "status": status,
            "error": None,
            "incomplete_details": details,
            "output": output,
            "usage": usage,
        }

    # ---- one section

    def _item(self, section: Section, opened: bool = False) -> dict[str, Any]:
        """A section as an output item; `opened`: as it is before it holds anything."""
        text = "" if opened else section.text
        status = "in_progress" if opened else "completed" if section.complete else "incomplete"
        number = f"{self._id}_{section.index}"
        if section.kind is Kind.REASONING:
            parts = [] if opened else [{"type": "reasoning_text", "text": text}]
            item = {"id": f"rs_{number}", "type": "reasoning", "summary": [], "content": parts}
            return item | {"encrypted_content": None, "status": status}
        if section.kind is Kind.CONTENT:
            content = [] if opened else [_output_text(text)]
            item = {"id": f"msg_{number}", "type": "message", "role": "assistant"}
            return item | {"status": status, "content": content}
        return {
            "id": f"fc_{number}",
            "type": "function_call",
            "call_id": section.call_id,
            "name": section.name,
            "arguments": text,
            "status": status,
        }

    def changed(self, change: Change, section: Section, text: str) -> Iterable[bytes]:
        """See `SectionReply`."""
        item = self._item(section, opened=change is Change.OPENED)
        place = {"item_id": item["id"], "output_index": section.index}
        part = {**place, "content_index": 0}
        base = _BASES[section.kind]
        if change is Change.OPENED:
            added = self._event("response.output_item.added", output_index=section.index, item=item)
            if section.kind is not Kind.CONTENT:
                return [added]
            empty = _output_text("")
            return [added, self._event("response.content_part.added", **part, part=empty)]
        where = place if section.kind is Kind.CALL else part
        if change is Change.GREW:
            event: dict[str, Any] = {**where, "delta": text}
            if section.kind is Kind.CONTENT:
                event["logprobs"] = []
            return [self._event(f"{base}.delta", **event)]
        whole = section.text
        if section.kind is Kind.CALL:
            done = [self._event(f"{base}.done", **where, arguments=whole, name=section.name)]
        elif section.kind is Kind.REASONING:
            done = [self._event(f"{base}.done", **where, text=whole)]
        else:
            done = [
                self._event(f"{base}.done", **where, text=whole, logprobs=[]),
                self._event("response.content_part.done", **part, part=_output_text(whole)),
            ]
        last = self._event("response.output_item.done", output_index=section.index, item=item)
        return [*done, last]

    def _event(self, kind: str, /, **values: object) -> bytes:
        event = {"type": kind, "sequence_number": self._number, **values}
        self._number += 1
        return sse.named(kind, event)


_BASES = {
    Kind.REASONING: "response.reasoning_text",
    Kind.CONTENT: "response.output_text",
    Kind.CALL: "response.function_call_arguments",
}


def _output_text(text: str) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}

"""POST /v1/messages, Anthropic's API, and POST /v1/messages/count_tokens.

Thinking is off unless the request turns it on, as there. `budget_tokens` ends it after so many tokens if
the model has not done so; how much it thinks by itself is for `output_config.effort` to say.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import msgspec

from fourfold.server import sse
from fourfold.server.call import Call
from fourfold.server.errors import ApiError, bad_request, unsupported
from fourfold.server.generation import Generation
from fourfold.server.reply import SectionReply, deliver
from fourfold.server.routes.chat import ChatRequest, chat_job, read_chat
from fourfold.server.sections import Change, Kind, Section
from fourfold.text.checks import checked_list, checked_object, checked_text, parse_json

_STOP_REASONS = {
    "length": "max_tokens",
    "tool_calls": "tool_use",
    "abort": "pause_turn",
    "error": "refusal",
}
# What is cached is never for the client to say, so that asking for it is harmless.
_TOOL_FIELDS = ("type", "name", "description", "input_schema", "cache_control")
_ERROR_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}


class CountRequest(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """What of a request makes its prompt."""

    model: str | None = None
    messages: list[dict[str, Any]]
    system: str | list[dict[str, Any]] | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: dict[str, Any] | None = None
    thinking: dict[str, Any] | None = None
    output_config: dict[str, Any] | None = None


class MessagesRequest(CountRequest, kw_only=True):
    """The body of a message request."""

    max_tokens: int
    stop_sequences: list[str] | None = None
    stream: bool | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    metadata: dict[str, Any] | None = None
    service_tier: str | None = None


def as_chat(request: CountRequest) -> ChatRequest:
    """The same as a chat request. Raises 400 or `RequestError` naming the place."""
    turns: list[dict[str, Any]] = []
    if request.system:
        turns.append({"role": "system", "content": _texts(request.system, "system")})
    for index, message in enumerate(request.messages):
        turns += _turns(message, f"messages[{index}]")
    if not request.messages:
        raise bad_request("messages must hold at least one message", "messages")
    demanded, single = _choice(request.tool_choice)
    chat = ChatRequest(
        model=request.model,
        messages=turns,
        tools=_tools(request.tools),
        tool_choice=demanded,
        parallel_tool_calls=False if single else None,
        thinking=_thinking(request.thinking),
        reasoning_effort=_effort(request.output_config),
        continue_final_message=request.messages[-1].get("role") == "assistant" or None,
    )
    if isinstance(request, MessagesRequest):
        if request.service_tier not in (None, "auto", "standard_only"):
            raise unsupported("service_tier", "other than auto is not supported")
        chat.max_tokens = request.max_tokens
        chat.stop = request.stop_sequences
        chat.temperature, chat.top_p, chat.top_k = request.temperature, request.top_p, request.top_k
    return chat


def _thinking(value: dict[str, Any] | None) -> bool | dict[str, Any]:
    kind = "disabled" if value is None else value.get("type")
    if kind not in ("enabled", "disabled", "adaptive"):
        raise bad_request("thinking.type must be enabled, disabled or adaptive", "thinking.type")
    if kind == "enabled":
        return dict(value or {})
    for name in value or {}:
        if name != "type":
            raise unsupported(f"thinking.{name[:80]}", f"is not supported where it is {kind}")
    return kind == "adaptive"


def _effort(value: dict[str, Any] | None) -> str | None:
    for name in value or {}:
        if name != "effort":
            raise unsupported(f"output_config.{name[:80]}")
    effort = (value or {}).get("effort")
    if effort is not None and not isinstance(effort, str):
        raise bad_request("output_config.effort must be a text", "output_config.effort")
    return effort


def _choice(value: dict[str, Any] | None) -> tuple[str | dict[str, Any] | None, bool]:
    """(tool_choice in OpenAI's shape, whether only one call is wanted)."""
    if value is None:
        return None, False
    single = value.get("disable_parallel_tool_use") is True
    kind = value.get("type")
    if kind == "tool":
        return {"type": "function", "function": {"name": value.get("name")}}, single
    names = {"auto": "auto", "any": "required", "none": "none"}
    if not isinstance(kind, str) or kind not in names:
        raise bad_request("tool_choice.type must be auto, any, tool or none", "tool_choice.type")
    return names[kind], single


def _tools(value: list[dict[str, Any]] | None) -> list[dict[str, Any]] | None:
    if value is None:
        return None
    tools = []
    for index, tool in enumerate(value):
        kind = tool.get("type")
        if kind not in (None, "custom"):
            raise unsupported(f"tools[{index}].type", "other than custom is not supported")
        for name, given in tool.items():
            if given and name not in _TOOL_FIELDS:
                raise unsupported(f"tools[{index}].{name[:80]}")
        function = {"name": tool.get("name"), "description": tool.get("description")}
        function["parameters"] = tool.get("input_schema")
        tools.append({"type": "function", "function": function})
    return tools


def _texts(value: object, where: str) -> str:
    """A text, or text blocks as one."""
    if isinstance(value, str):
        return checked_text(value, where)
    found = []
    for index, item in enumerate(checked_list(value, where)):
        place = f"{where}[{index}]"
        block = checked_object(item, place)
        if block.get("type") != "text":
            raise unsupported(f"{place}.type", "other than text is not supported")
        found.append(checked_text(block.get("text"), f"{place}.text"))
    return "\n\n".join(found)


def _turns(message: dict[str, Any], where: str) -> list[dict[str, Any]]:
    """A message's blocks as messages of the chat format, in order."""
    role, content = message.get("role"), message.get("content")
    if role not in ("user", "assistant", "system"):
        raise bad_request(f"{where}.role must be user or assistant", f"{where}.role")
    if isinstance(content, str) or role == "system":
        return [{"role": role, "content": _texts(content, f"{where}.content")}]
    blocks = checked_list(content, f"{where}.content")
    if role == "assistant":
        return [_assistant(blocks, f"{where}.content")]
    turns: list[dict[str, Any]] = []
    for index, item in enumerate(blocks):
        place = f"{where}.content[{index}]"
        block = checked_object(item, place)
        kind = block.get("type")
        if kind == "text":
            turns.append(
                {"role": "user", "content": checked_text(block.get("text"), f"{place}.text")}
            )
        elif kind == "tool_result":
            text = _texts(block.get("content") or "", f"{place}.content")
            turns.append(
                {"role": "tool", "tool_call_id": block.get("tool_use_id"), "content": text}
            )
        else:
            raise unsupported(f"{place}.type", "other than text or tool_result is not supported")
    return turns


def _assistant(blocks: Sequence[Any], where: str) -> dict[str, Any]:
    texts: list[str] = []
    thoughts: list[str] = []
    calls: list[dict[str, Any]] = []
    for index, item in enumerate(blocks):
        place = f"{where}[{index}]"
        block = checked_object(item, place)
        match block.get("type"):
            case "text":
                texts.append(checked_text(block.get("text"), f"{place}.text"))
            case "thinking":
                thoughts.append(checked_text(block.get("thinking"), f"{place}.thinking"))
            case "tool_use":
                function = {"name": block.get("name"), "arguments": block.get("input") or {}}
                calls.append({"id": block.get("id"), "function": function})
            case _:
                raise unsupported(f"{place}.type", "is not supported in an assistant's message")
    turn: dict[str, Any] = {"role": "assistant", "content": "".join(texts)}
    if thoughts:
        turn["reasoning_content"] = "".join(thoughts)
    if calls:
        turn["tool_calls"] = calls
    return turn


def error_body(error: ApiError) -> dict[str, Any]:
    """A failure in Anthropic's shape."""
    kind = _ERROR_TYPES.get(error.status, "api_error")
    return {"type": "error", "error": {**error.body["error"], "type": kind}}


async def messages(call: Call) -> None:
    """Answer a conversation."""
    call.error_body = error_body
    call.serving.expect_ready().check()
    request = await call.read(MessagesRequest)
    with call.serving.expect_ready().ticket(1) as ticket:
        chat = await read_chat(call, as_chat(request))
        job = chat_job(call, chat)
        ticket.wait_with(len(job.prompt))
        generation = Generation(call.serving, job, ticket, call.arrived)
        await deliver(call, _Reply(call, chat.model, generation), request.stream)


async def count_tokens(call: Call) -> None:
    """How many tokens a request's prompt has."""
    call.error_body = error_body
    call.serving.expect_ready()
    chat = await read_chat(call, as_chat(await call.read(CountRequest)))
    await call.json({"input_tokens": len(chat.tokens.token_ids)})


class _Reply(SectionReply):
    """Turns a generation into a message or its events."""

    def __init__(self, call: Call, model: str, generation: Generation) -> None:
        super().__init__(generation)
        self._head: dict[str, Any] = {
            "id": f"msg_{call.request_id}",
            "type": "message",
            "role": "assistant",
            "model": model,
        }

    def body(self) -> dict[str, Any]:
        """The message."""
        content = [_block(section) for section in self.sections.all if section.complete]
        return {**self._head, "content": content, **self._end(), "usage": self._usage()}

    def begun(self) -> Iterable[bytes]:
        """See `SectionReply`."""
        empty: dict[str, Any] = {"content": [], "stop_reason": None, "stop_sequence": None}
        message = {**self._head, **empty, "usage": self._usage() | {"output_tokens": 0}}
        yield sse.named("message_start", {"type": "message_start", "message": message})

    def changed(self, change: Change, section: Section, text: str) -> Iterable[bytes]:
        """See `SectionReply`."""
        if change is Change.CLOSED and section.kind is Kind.REASONING:
            yield _signature(section)
        event = _event(change, section, text)
        yield sse.named(str(event["type"]), event)

    def ended(self) -> Iterable[bytes]:
        """See `SectionReply`."""
        delta = {"type": "message_delta", "delta": self._end(), "usage": self._usage()}
        yield sse.named("message_delta", delta)
        yield sse.named("message_stop", {"type": "message_stop"})

    def failed(self, error: ApiError) -> Iterable[bytes]:
        """See `SectionReply`."""
        yield sse.named("error", error_body(error))

    def _end(self) -> dict[str, Any]:
        finish = self.sections.finish
        reason = finish.reason if finish else "error"
        stop = finish.stop if finish else None
        name = "stop_sequence" if stop is not None else _STOP_REASONS.get(reason, "end_turn")
        return {"stop_reason": name, "stop_sequence": stop}

    def _usage(self) -> dict[str, int]:
        usage = self.usage
        return {
            "input_tokens": usage.prompt - usage.cached,
            "cache_read_input_tokens": usage.cached,
            "cache_creation_input_tokens": 0,
            "output_tokens": usage.completion,
        }


def _block(section: Section) -> dict[str, Any]:
    match section.kind:
        case Kind.REASONING:
            return {"type": "thinking", "thinking": section.text, "signature": ""}
        case Kind.CONTENT:
            return {"type": "text", "text": section.text}
        case Kind.CALL:
            given = parse_json(section.text)
            return {"type": "tool_use", "id": section.call_id, "name": section.name, "input": given}


def _event(change: Change, section: Section, text: str) -> dict[str, Any]:
    match change:
        case Change.OPENED:
            blocks: dict[Kind, dict[str, Any]] = {
                Kind.REASONING: {"type": "thinking", "thinking": "", "signature": ""},
                Kind.CONTENT: {"type": "text", "text": ""},
                Kind.CALL: {
                    "type": "tool_use",
                    "id": section.call_id,
                    "name": section.name,
                    "input": {},
                },
            }
            block = blocks[section.kind]
            return {"type": "content_block_start", "index": section.index, "content_block": block}
        case Change.GREW:
            delta = {
                Kind.REASONING: {"type": "thinking_delta", "thinking": text},
                Kind.CONTENT: {"type": "text_delta", "text": text},
                Kind.CALL: {"type": "input_json_delta", "partial_json": text},
            }[section.kind]
            return {"type": "content_block_delta", "index": section.index, "delta": delta}
        case Change.CLOSED:
            return {"type": "content_block_stop", "index": section.index}


def _signature(section: Section) -> bytes:
    """Clients send thinking back with its signature; ours is empty and never checked."""
    delta = {"type": "signature_delta", "signature": ""}
    event = {"type": "content_block_delta", "index": section.index, "delta": delta}
    return sse.named("content_block_delta", event)

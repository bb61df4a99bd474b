"""A request's messages, checked and gathered into turns.

Contract: `read_turns` takes messages as clients send them and gives the turns of the chat format, in
order: adjacent system messages are one turn, a run of user and tool messages is one user turn. What
cannot be said in the format is a `RequestError` that names the message and its field. It does not
know prompts: no marker and no profile.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

from fourfold.core.errors import RequestError
from fourfold.text.checks import checked_list, checked_object, checked_text, refuse, to_json
from fourfold.text.markers import TASKS
from fourfold.text.tools import Tool, ToolCall, read_calls, read_tools


class Role(Enum):
    """Who speaks in a turn. Tool results are part of a user turn."""

    SYSTEM = "system"
    DEVELOPER = "developer"
    USER = "user"
    ASSISTANT = "assistant"
    TOOL = "tool"
    LATEST_REMINDER = "latest_reminder"


_INSTRUCTING = (Role.SYSTEM, Role.DEVELOPER)
_ASKING = (Role.USER, Role.DEVELOPER)
# Field -> the roles whose messages may have it. Fields not named here carry nothing for the prompt.
_FIELDS: Mapping[str, tuple[Role, ...]] = {
    "tools": _INSTRUCTING,
    "response_format": _INSTRUCTING,
    "task": (Role.USER, Role.DEVELOPER, Role.ASSISTANT),
    "reasoning_content": (Role.ASSISTANT,),
    "reasoning": (Role.ASSISTANT,),
    "tool_calls": (Role.ASSISTANT,),
    "prefix": (Role.ASSISTANT,),
    "tool_call_id": (Role.TOOL,),
    # Content that clients could mean and that a prompt cannot hold.
    "function_call": (),
    "audio": (),
    "refusal": (),
}
# The one task that follows an answer; all others follow a question.
_ANSWER_TASK = "title"
_TOOL_RESULT = "<tool_result>{}</tool_result>"


@dataclass(frozen=True)
class Turn:
    """One turn. `tools` and `formats` (texts of response formats) belong to system and developer
    turns, `reasoning` and `calls` to assistant turns. `continued`: the answer goes on from here."""

    role: Role
    text: str
    task: str | None = None
    tools: tuple[Tool, ...] = ()
    formats: tuple[str, ...] = ()
    reasoning: str = ""
    calls: tuple[ToolCall, ...] = ()
    continued: bool = False

    @property
    def asks(self) -> bool:
        """Whether this is a user's or developer's turn."""
        return self.role in _ASKING


@dataclass(frozen=True)
class _Message:
    turn: Turn
    call_id: str
    where: str


def schema_format(schema: object, where: str) -> str:
    """The text that asks for an answer following a JSON schema."""
    return (
        "## Response Format:\n\nYou MUST strictly adhere to the following schema to reply:\n"
        + to_json(checked_object(schema, where), where)
    )


def read_turns(messages: object, continue_final: bool = False) -> list[Turn]:
    """The turns of a conversation. With `continue_final` the last message, an assistant's, goes on;
    `prefix: true` on it says the same. Raises `RequestError`."""
    items = checked_list(messages, "messages")
    if not items:
        raise RequestError("messages must hold at least one message")
    read = [_read(item, f"messages[{index}]") for index, item in enumerate(items)]
    for message in read[:-1]:
        if message.turn.continued:
            raise RequestError(f"{message.where}.prefix is allowed on the last message only")
    last = read[-1]
    if continue_final and last.turn.role is not Role.ASSISTANT:
        refuse(f"{last.where}.role", "assistant for continue_final_message", last.turn.role.value)
    _check_tasks(read)
    turns = _merge(read)
    if continue_final or last.turn.continued:
        for field, value in (("tool_calls", last.turn.calls), ("task", last.turn.task)):
            if value:
                raise RequestError(f"{last.where}.{field} cannot stand in a message to continue")
        turns[-1] = _replace(turns[-1], continued=True)
    return turns


def _read(item: object, where: str) -> _Message:
    message = checked_object(item, where)
    roles = {role.value: role for role in Role}
    role = roles.get(checked_text(message.get("role"), f"{where}.role"))
    if role is None:
        refuse(f"{where}.role", f"one of {', '.join(roles)}", message.get("role"))
    for field, allowed in _FIELDS.items():
        if message.get(field) and not allowed:
            raise RequestError(f"{where}.{field} is not supported")
        if message.get(field) and role not in allowed:
            holders = " and ".join(other.value for other in allowed)
            raise RequestError(
                f"{where}.{field} is allowed on {holders} messages, not on this {role.value} message"
            )
    text, thoughts = _content(message.get("content"), role, f"{where}.content")
    turn = Turn(role, text or "")
    if role is Role.ASSISTANT:
        turn = _assistant(message, turn, thoughts, where, text is None)
    elif role in _INSTRUCTING:
        turn = _instructions(message, turn, where)
    elif text is None:
        refuse(f"{where}.content", "a string or a list of parts", None)
    if message.get("task"):
        turn = _replace(turn, task=_task(message["task"], role, f"{where}.task"))
    call_id = message.get("tool_call_id")
    return _Message(turn, checked_text(call_id or "", f"{where}.tool_call_id"), where)


def _instructions(message: Mapping[str, Any], turn: Turn, where: str) -> Turn:
    if turn.role is Role.DEVELOPER and not turn.text:
        raise RequestError(f"{where}.content of a developer message must not be empty")
    schema = message.get("response_format")
    formats = (schema_format(schema, f"{where}.response_format"),) if schema else ()
    tools = read_tools(message.get("tools"), f"{where}.tools")
    return _replace(turn, tools=tools, formats=formats)


def _assistant(
    message: Mapping[str, Any], turn: Turn, thoughts: str, where: str, no_content: bool
) -> Turn:
    # Two spellings of one field; where a client sends both, the API's own counts.
    for field in ("reasoning", "reasoning_content"):
        if message.get(field) is not None:
            thoughts = checked_text(message[field], f"{where}.{field}") or thoughts
    calls = read_calls(message.get("tool_calls"), f"{where}.tool_calls")
    if no_content and not calls and not thoughts:
        raise RequestError(f"{where}.content must be given where there are no tool_calls")
    prefix = message.get("prefix")
    if not isinstance(prefix, bool | None):
        refuse(f"{where}.prefix", "a boolean", prefix)
    return _replace(turn, reasoning=thoughts, calls=calls, continued=bool(prefix))


def _content(value: object, role: Role, where: str) -> tuple[str | None, str]:
    """(text, reasoning) of a message's content; the text is None where there is no content."""
    if value is None:
        return None, ""
    if isinstance(value, str):
        return checked_text(value, where), ""
    texts, thoughts = [], []
    for index, item in enumerate(checked_list(value, where)):
        place = f"{where}[{index}]"
        part = checked_object(item, place)
        kind = checked_text(part.get("type"), f"{place}.type")
        if kind == "text":
            texts.append(checked_text(part.get("text"), f"{place}.text"))
        elif kind == "thinking" and role is Role.ASSISTANT:
            thoughts.append(checked_text(part.get("thinking"), f"{place}.thinking"))
        elif role is Role.TOOL:
            texts.append(f"[Unsupported {kind}]")
        else:
            refuse(f"{place}.type", "'text': the model reads nothing else", kind)
    return "\n\n".join(texts), "\n\n".join(thoughts)


def _task(value: object, role: Role, where: str) -> str:
    allowed = [name for name in TASKS if (name == _ANSWER_TASK) == (role is Role.ASSISTANT)]
    task = checked_text(value, where)
    if task not in allowed:
        refuse(where, f"one of {', '.join(allowed)} on this {role.value} message", task)
    return task


def _check_tasks(read: Sequence[_Message]) -> None:
    """A task stands at the end of a turn, where the model answers it next."""
    for before, message in zip([None, *read[:-1]], read, strict=True):
        task = message.turn.task
        gathers = before is not None and before.turn.role in (Role.USER, Role.TOOL)
        if task and message.turn.role is Role.USER and gathers:
            raise RequestError(
                f"{message.where}.task cannot follow another user or tool message directly"
            )
    for message, after in itertools.pairwise(read):
        if message.turn.task and after.turn.role is not Role.ASSISTANT:
            raise RequestError(
                f"{message.where}.task must be on the last message or before an assistant message"
            )


def _merge(read: Sequence[_Message]) -> list[Turn]:
    turns: list[Turn] = []
    gathered: list[_Message] = []
    order: dict[str, int] = {}
    for message, after in zip(read, [*read[1:], None], strict=True):
        gathered.append(message)
        if after is not None and _joins(message.turn.role, after.turn.role):
            continue
        if message.turn.role is Role.SYSTEM:
            turns.append(_system_turn([item.turn for item in gathered]))
        elif message.turn.role in (Role.USER, Role.TOOL):
            turns.append(_user_turn(gathered, order))
        else:
            turns.append(message.turn)
        if message.turn.calls:
            order = {}
            for position, call in enumerate(message.turn.calls):
                order.setdefault(call.call_id, position)
        gathered = []
    return turns


def _joins(role: Role, after: Role) -> bool:
    groups = ((Role.SYSTEM,), (Role.USER, Role.TOOL))
    return any(role in group and after in group for group in groups)


def _system_turn(turns: Sequence[Turn]) -> Turn:
    """Several system messages as one: texts first, then what is attached to any of them."""
    return Turn(
        Role.SYSTEM,
        "\n\n".join(turn.text for turn in turns if turn.text),
        tools=tuple(tool for turn in turns for tool in turn.tools),
        formats=tuple(text for turn in turns for text in turn.formats),
    )


def _user_turn(messages: Sequence[_Message], order: Mapping[str, int]) -> Turn:
    """Questions and tool results as one turn; the results take each other's places so that they
    come in the order of the calls they answer (an unknown id counts as the first call)."""
    results = [message for message in messages if message.turn.role is Role.TOOL]
    ordered = iter(sorted(results, key=lambda message: order.get(message.call_id, 0)))
    parts = [
        _TOOL_RESULT.format(next(ordered).turn.text)
        if message.turn.role is Role.TOOL
        else message.turn.text
        for message in messages
    ]
    return Turn(Role.USER, "\n\n".join(parts), task=messages[-1].turn.task)


def _replace(turn: Turn, **changes: Any) -> Turn:
    return Turn(**{**turn.__dict__, **changes})

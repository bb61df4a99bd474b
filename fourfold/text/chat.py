"""Conversations to prompts.

Contract: `encode_chat` gives the bytes that the model was trained on, as segments: what it wrote itself
as markers is a marker, whatever a message spells is text. docs/CHAT.md says what was chosen where
encoders of this format differ. It does not tokenise and does not read answers.

    BOS  effort-prefix?  turn*  generation-header?

The header `<｜Assistant｜>` with `<think>` or `</think>` stands before every answer, the one to be
generated included, unless a task marker takes its place.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from fourfold.core.errors import RequestError
from fourfold.text import markers
from fourfold.text.checks import checked_object, refuse
from fourfold.text.messages import Role, Turn, read_turns, schema_format
from fourfold.text.profiles import ChatProfile, effort_prefix, resolve_thinking
from fourfold.text.prompt import EncodedPrompt, ParserStart, PromptBuilder, Segment
from fourfold.text.tools import (
    BLOCK_OPENING,
    Tool,
    opening,
    read_choice,
    read_tools,
    write_calls,
    write_tools,
)

_JSON_FORMAT = (
    "You are a helpful assistant designed to output JSON.\n"
    "## Response Format:\n\nReply with JSON object ONLY."
)
_SCHEMA_TYPE = "json_schema"
_PLAIN_TYPES = ("text", "regex")
_OBJECT_TYPE = "json_object"
_SWITCHES = ("thinking", "enable_thinking", "reasoning_effort", "drop_thinking")


@dataclass(frozen=True)
class ChatOptions:
    """What a request says beside its messages; values as they stand in its JSON, None if absent.

    `thinking` is a boolean or {"type": "enabled" | "disabled"}; `tools`, `tool_choice` and
    `response_format` have OpenAI's shapes.
    """

    profile: ChatProfile
    thinking: object = None
    enable_thinking: object = None
    reasoning_effort: object = None
    drop_thinking: bool = True
    continue_final_message: bool = False
    tools: object = None
    tool_choice: object = None
    response_format: object = None


def read_switches(kwargs: object, where: str = "chat_template_kwargs") -> dict[str, Any]:
    """The options of a request that go by the names of template arguments; None is none. Raises
    `RequestError` for any other name."""
    given = checked_object({} if kwargs is None else kwargs, where)
    unknown = sorted(repr(key) for key in given if key not in _SWITCHES)
    if unknown:
        raise RequestError(f"{where} has no {', '.join(unknown)}; there are {', '.join(_SWITCHES)}")
    return dict(given)


def encode_chat(messages: Sequence[Mapping[str, Any]], options: ChatOptions) -> EncodedPrompt:
    """The prompt of a conversation. Raises `RequestError` naming the message and field, or the
    option."""
    if not isinstance(options.drop_thinking, bool):
        refuse("drop_thinking", "a boolean", options.drop_thinking)
    turns = read_turns(messages, options.continue_final_message)
    thinking, effort = resolve_thinking(
        options.profile, options.thinking, options.enable_thinking, options.reasoning_effort
    )
    tools: tuple[Tool, ...] = ()
    demanded, name = False, None
    if options.tool_choice == "none":
        turns = [replace(turn, tools=()) for turn in turns]
    else:
        tools = read_tools(options.tools, "tools")
        demanded, name = read_choice(options.tool_choice, tools)
    format_text = _response_format(options.response_format)
    continued = turns[-1].continued
    _check_combination(bool(tools), format_text is not None, continued)
    turns = _attach(turns, tools, format_text)
    has_tools = any(turn.tools for turn in turns)
    keep = has_tools or not options.drop_thinking
    if thinking and not keep:
        turns = _without_old_developers(turns)

    builder = PromptBuilder()
    builder.special(markers.BOS)
    if thinking:
        builder.plain(effort_prefix(options.profile, effort))
    writer = _Writer(builder, turns, thinking, keep)
    start = writer.write()
    forced: tuple[Segment, ...] = ()
    if demanded:
        if writer.header is None:
            raise RequestError("tool_choice demands a call, but the messages ask for a task")
        if not thinking:
            builder.template(BLOCK_OPENING)
            start = ParserStart.TOOLS
        forced = opening(name, in_block=not thinking)
    return EncodedPrompt(builder.segments(), writer.header, start, has_tools, forced)


def _response_format(value: object) -> str | None:
    """The text that a request's response format adds to the prompt, None if it adds nothing."""
    if value is None:
        return None
    wanted = checked_object(value, "response_format")
    kind = wanted.get("type")
    if kind in _PLAIN_TYPES:
        return None
    if kind == _OBJECT_TYPE:
        return _JSON_FORMAT
    if kind != _SCHEMA_TYPE:
        refuse(
            "response_format.type",
            f"one of {', '.join((*_PLAIN_TYPES, _OBJECT_TYPE, _SCHEMA_TYPE))}",
            kind,
        )
    inner = checked_object(wanted.get("json_schema"), "response_format.json_schema")
    return schema_format(inner.get("schema"), "response_format.json_schema.schema")


def _check_combination(tools: bool, formatted: bool, continued: bool) -> None:
    if tools and formatted:
        raise RequestError("response_format cannot be used together with tools")
    if continued and (tools or formatted):
        what = "tools" if tools else "response_format"
        raise RequestError(f"{what} cannot be used when the last message is continued")


def _attach(turns: list[Turn], tools: tuple[Tool, ...], format_text: str | None) -> list[Turn]:
    """Put the request's tools and response format on the system turn at the front, which is made up
    if the conversation does not begin with one (a reminder may precede it)."""
    if not tools and format_text is None:
        return turns
    index = next((i for i, turn in enumerate(turns) if turn.role is not Role.LATEST_REMINDER), 0)
    if turns[index].role is not Role.SYSTEM:
        index = 0
        turns = [Turn(Role.SYSTEM, ""), *turns]
    head = turns[index]
    if tools and head.tools:
        raise RequestError("tools are given both for the request and on the system message")
    if format_text is not None and head.formats:
        raise RequestError("response_format is given both for the request and on a message")
    formats = head.formats if format_text is None else (format_text,)
    turns[index] = replace(head, tools=tools or head.tools, formats=formats)
    return turns


def _last_question(turns: Sequence[Turn]) -> int:
    """Index of the last user or developer turn, -1 if there is none."""
    return max((index for index, turn in enumerate(turns) if turn.asks), default=-1)


def _without_old_developers(turns: list[Turn]) -> list[Turn]:
    last = _last_question(turns)
    return [
        turn for index, turn in enumerate(turns) if turn.role is not Role.DEVELOPER or index >= last
    ]


class _Writer:
    """Writes the turns of one conversation. `header` is the segment of the last header's marker if
    that header is for the answer to be generated or continued, else None."""

    def __init__(
        self, builder: PromptBuilder, turns: Sequence[Turn], thinking: bool, keep: bool
    ) -> None:
        self._builder = builder
        self._turns = turns
        self._thinking = thinking
        self._keep = keep
        self.header: int | None = None
        last = turns[-1]
        answers = [i for i, turn in enumerate(turns) if turn.role is Role.ASSISTANT]
        # The answer to a task follows its marker, without a header of its own.
        self._with_header = [i for i in answers if i == 0 or turns[i - 1].task is None]
        ended = last.role is Role.ASSISTANT and len(turns) - 1 not in self._with_header
        self._generates = not (last.continued or last.task or ended)
        # The answer whose reasoning is never dropped: no question and no other header follows it.
        self._current = -1
        if self._with_header and not self._generates:
            newest = self._with_header[-1]
            self._current = newest if newest > _last_question(turns) else -1

    def write(self) -> ParserStart:
        """Write everything; where the answer begins."""
        last = self._turns[-1]
        for index, turn in enumerate(self._turns):
            if turn.role is Role.ASSISTANT:
                self._answer(index, turn)
            else:
                self._other(turn)
            if turn.task == "action":
                self._header(self._thinking, final=turn is last)
            if turn.task:
                self._builder.special(markers.TASKS[turn.task])
        if self._generates:
            self._header(self._thinking, final=True)
            return ParserStart.REASONING if self._thinking else ParserStart.CONTENT
        if not last.continued:
            return ParserStart.CONTENT
        if last.text or not self._thinking or len(self._turns) - 1 not in self._with_header:
            return ParserStart.CONTENT_CONTINUED
        return ParserStart.REASONING_CONTINUED if last.reasoning else ParserStart.REASONING

    def _header(self, think: bool, final: bool) -> None:
        self._builder.special(markers.ASSISTANT)
        if final:
            self.header = len(self._builder)
        self._builder.special(markers.THINK if think else markers.END_THINK)

    def _other(self, turn: Turn) -> None:
        if turn.asks:
            self._builder.special(markers.USER)
        elif turn.role is Role.LATEST_REMINDER:
            self._builder.special(markers.LATEST_REMINDER)
        self._builder.plain(turn.text)
        if turn.tools:
            self._builder.plain("\n\n")
            write_tools(self._builder, turn.tools)
        for text in turn.formats:
            self._builder.plain("\n\n" + text)

    def _answer(self, index: int, turn: Turn) -> None:
        if index in self._with_header:
            think = self._thinking and (self._keep or index == self._current)
            self._header(think, final=turn.continued)
            if think:
                self._builder.plain(turn.reasoning)
                # Reasoning that goes on stays open.
                if turn.text or not turn.continued:
                    self._builder.special(markers.END_THINK)
        self._builder.plain(turn.text)
        if turn.calls:
            write_calls(self._builder, turn.calls)
        if not turn.continued:
            self._builder.special(markers.EOS)

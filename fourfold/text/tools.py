"""Tools in a prompt: the block that declares them, and calls written in DSML markup.

Contract: the bytes are those the model was trained on. Calls are written from an object's values: a
string raw, everything else as JSON; there is no escape mechanism. It does not know where in the
prompt a block stands, and does not read generated text.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fourfold.core.errors import RequestError
from fourfold.text.checks import (
    checked_list,
    checked_object,
    checked_text,
    parse_json,
    refuse,
    to_json,
)
from fourfold.text.prompt import PromptBuilder, Segment

# The opening of a tool block as it follows an answer's text.
BLOCK_OPENING = "\n\n<｜DSML｜tool_calls>\n"
_BLOCK_CLOSING = "\n</｜DSML｜tool_calls>"
_INVOKE = '<｜DSML｜invoke name="{}">\n'
_HEAD = """\
## Tools

You have access to a set of tools to help answer the user's question. You can invoke tools by writing \
a "<｜DSML｜tool_calls>" block like the following:

<｜DSML｜tool_calls>
<｜DSML｜invoke name="$TOOL_NAME">
<｜DSML｜parameter name="$PARAMETER_NAME" string="true|false">$PARAMETER_VALUE</｜DSML｜parameter>
...
</｜DSML｜invoke>
<｜DSML｜invoke name="$TOOL_NAME2">
...
</｜DSML｜invoke>
</｜DSML｜tool_calls>

String parameters should be specified as is and set `string="true"`. For all other types (numbers, \
booleans, arrays, objects), pass the value in JSON format and set `string="false"`.

If thinking_mode is enabled (triggered by <think>), you MUST output your complete reasoning inside \
<think>...</think> BEFORE any tool calls or final response.

Otherwise, output directly after </think> with tool calls or final response.

### Available Tool Schemas

"""
_FOOT = """

You MUST strictly follow the above defined tool name and parameter schemas to invoke tool calls.
"""
# What a name must not hold, because it stands between quotes without escapes.
_NOT_IN_NAMES = '"\n'
# The parameter that carries arguments which are no JSON object.
_RAW_ARGUMENTS = "arguments"


@dataclass(frozen=True)
class Tool:
    """A declared tool: its name and its schema on one line."""

    name: str
    line: str


@dataclass(frozen=True)
class Parameter:
    """One argument of a call as the markup writes it."""

    key: str
    is_string: bool
    text: str


@dataclass(frozen=True)
class ToolCall:
    """A call of the history. `call_id` is empty if the client gave none."""

    call_id: str
    name: str
    parameters: tuple[Parameter, ...]


def read_tools(value: object, where: str) -> tuple[Tool, ...]:
    """The tools of a request or message, [{"type": "function", "function": {...}}]; None is none.

    Of each function its name, description and parameters reach the model. Raises `RequestError`
    naming the place.
    """
    tools: list[Tool] = []
    for index, item in enumerate(checked_list(() if value is None else value, where)):
        place = f"{where}[{index}]"
        kind = checked_object(item, place).get("type", "function")
        if kind != "function":
            refuse(f"{place}.type", "'function'", kind)
        _expect_known(item, ("type", "function"), place)
        function = checked_object(item.get("function"), f"{place}.function")
        tool = _read_function(function, f"{place}.function")
        if any(tool.name == other.name for other in tools):
            raise RequestError(f"{place}.function.name is {tool.name!r} for the second time")
        tools.append(tool)
    return tuple(tools)


def _expect_known(given: Mapping[str, Any], known: Sequence[str], where: str) -> None:
    for name in given:
        if name not in known:
            raise RequestError(f"{where}.{name!s:.80} is not supported")


def _read_function(function: Mapping[str, Any], where: str) -> Tool:
    _expect_known(function, ("name", "description", "parameters", "strict"), where)
    if function.get("strict") not in (None, False):
        why = "calls are not held to their schema"
        raise RequestError(f"{where}.strict is not supported: {why}")
    name = _read_name(function.get("name"), f"{where}.name")
    description = function.get("description")
    parameters = function.get("parameters")
    shown = {
        "name": name,
        "description": ""
        if description is None
        else checked_text(description, f"{where}.description"),
        "parameters": {}
        if parameters is None
        else checked_object(parameters, f"{where}.parameters"),
    }
    return Tool(name, to_json(shown, where))


def _read_name(value: object, where: str) -> str:
    name = checked_text(value, where)
    if not name or any(character in name for character in _NOT_IN_NAMES):
        refuse(where, "a name without quotes or line breaks", name)
    return name


def write_tools(builder: PromptBuilder, tools: Sequence[Tool]) -> None:
    """Append the block that declares `tools`; it ends with a newline."""
    builder.template(_HEAD)
    builder.plain("\n".join(tool.line for tool in tools))
    builder.template(_FOOT)


def read_calls(value: object, where: str) -> tuple[ToolCall, ...]:
    """The tool calls of an assistant message; None is none. Raises `RequestError`."""
    calls = []
    for index, item in enumerate(checked_list(() if value is None else value, where)):
        place = f"{where}[{index}]"
        call = checked_object(item, place)
        kind = call.get("type") or "function"
        if kind != "function":
            refuse(f"{place}.type", "'function'", kind)
        function = checked_object(call.get("function"), f"{place}.function")
        name = _read_name(function.get("name"), f"{place}.function.name")
        call_id = checked_text(call.get("id") or "", f"{place}.id")
        arguments = _parameters(function.get("arguments"), f"{place}.function.arguments")
        calls.append(ToolCall(call_id, name, arguments))
    return tuple(calls)


def _parameters(value: object, where: str) -> tuple[Parameter, ...]:
    """Arguments as an object, or as the JSON text of one; any other text is one raw parameter."""
    if value is None:
        return ()
    if isinstance(value, Mapping):
        return _from_object(value, where)
    if not isinstance(value, str):
        refuse(where, "an object or its JSON text", value)
    raw = (Parameter(_RAW_ARGUMENTS, True, checked_text(value, where)),)
    try:
        parsed = parse_json(value)
        # A number such as 1e400 can be read but not written: then the text goes as it came.
        json.dumps(parsed, allow_nan=False)
    except (ValueError, RecursionError):
        return raw
    return _from_object(parsed, where) if isinstance(parsed, dict) else raw


def _from_object(arguments: Mapping[str, Any], where: str) -> tuple[Parameter, ...]:
    return tuple(
        Parameter(
            checked_text(key, f"a key in {where}"),
            isinstance(item, str),
            checked_text(item, where) if isinstance(item, str) else to_json(item, where),
        )
        for key, item in arguments.items()
    )


def write_calls(builder: PromptBuilder, calls: Sequence[ToolCall]) -> None:
    """Append the block of `calls`, the two newlines before it included."""
    builder.template(BLOCK_OPENING)
    for index, call in enumerate(calls):
        if index:
            builder.plain("\n")
        _write_markup(builder, _INVOKE, call.name)
        for position, parameter in enumerate(call.parameters):
            if position:
                builder.plain("\n")
            kind = "true" if parameter.is_string else "false"
            _write_markup(
                builder, f'<｜DSML｜parameter name="{{}}" string="{kind}">', parameter.key
            )
            builder.plain(parameter.text)
            builder.template("</｜DSML｜parameter>")
        builder.template("\n</｜DSML｜invoke>")
    builder.template(_BLOCK_CLOSING)


def _write_markup(builder: PromptBuilder, template: str, name: str) -> None:
    """`template` with `name` in place of its braces; only the template's markers are markers."""
    before, after = template.split("{}")
    builder.template(before)
    builder.plain(name)
    builder.template(after)


def read_choice(value: object, tools: Sequence[Tool]) -> tuple[bool, str | None]:
    """A request's `tool_choice` as (a call is demanded, name of the tool if it is fixed).

    "none" must have been handled before, by declaring no tools. Raises `RequestError`.
    """
    if value in (None, "auto"):
        return False, None
    name = None
    if isinstance(value, Mapping):
        if value.get("type") != "function":
            refuse("tool_choice.type", "'function'", value.get("type"))
        function = checked_object(value.get("function"), "tool_choice.function")
        name = checked_text(function.get("name"), "tool_choice.function.name")
    elif value != "required":
        refuse("tool_choice", "'none', 'auto', 'required' or a function", value)
    if not tools:
        raise RequestError("tool_choice demands a call, but the request declares no tools")
    if name is not None and name not in {tool.name for tool in tools}:
        raise RequestError(f"tool_choice names {name!r}, which is not among the request's tools")
    return True, name


def opening(name: str | None, in_block: bool) -> tuple[Segment, ...]:
    """How a demanded call begins: the block unless it is open already, then the tool if it is
    fixed."""
    builder = PromptBuilder()
    if not in_block:
        builder.template(BLOCK_OPENING)
    if name is not None:
        _write_markup(builder, _INVOKE, name)
    return builder.segments()

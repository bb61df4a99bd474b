"""What an answer may be asked to look like, and how large such a demand may be.

Contract: pure Python that reads a demand and refuses what is malformed or too large, cheaply, whatever it
holds. It does not know what any of it means for tokens (grammar_mask.py), and a source that passes here
may still be refused there.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from fourfold.core.errors import RequestError
from fourfold.core.request import BEGINNING, Grammar
from fourfold.text.checks import (
    checked_object,
    checked_text,
    json_type,
    parse_json,
    refuse,
    to_json,
)

KINDS = ("json_object", "json_schema", "regex", "lark", "choice")

MAX_SOURCE_CHARACTERS = 1 << 17
MAX_REGEX_CHARACTERS = 1 << 14
MAX_SCHEMA_DEPTH = 64
MAX_SCHEMA_VALUES = 20_000
# The compiler's time grows with the square of this one.
MAX_SCHEMA_KEYS = 500  # of one object
MAX_CHOICES = 1000
# The compiler would obey this key of a schema, with regular expressions in it.
_COMPILER_KEY = "x-guidance"


def response_grammar(response_format: object, after_token: int | None = None) -> Grammar | None:
    """What a `response_format` demands; None if nothing. OpenAI's shapes, and {"type": "regex",
    "regex": …}. `after_token` as in `Grammar`. Raises `RequestError` naming the field."""
    if response_format is None:
        return None
    wanted = checked_object(response_format, "response_format")
    match wanted.get("type"):
        case "text":
            return None
        case "json_object":
            return Grammar("json_object", "", after_token)
        case "json_schema":
            return Grammar("json_schema", _schema(wanted), after_token)
        case "regex":
            source = checked_text(wanted.get("regex"), "response_format.regex")
            return Grammar("regex", source, after_token)
        case kind:
            refuse("response_format.type", "text, json_object, json_schema or regex", kind)


def _schema(wanted: Mapping[str, Any]) -> str:
    inner = checked_object(wanted.get("json_schema"), "response_format.json_schema")
    where = "response_format.json_schema.schema"
    return to_json(checked_object(inner.get("schema"), where), where)


def check_source(grammar: Grammar) -> None:
    """Raise `RequestError` for an unknown kind, or a source that is malformed or too large."""
    kind, source = grammar.kind, grammar.source
    if kind not in KINDS:
        raise RequestError(f"a grammar must be one of {', '.join(KINDS)}, found {kind!r:.40}")
    checked_text(source, f"the {kind}")
    most = MAX_REGEX_CHARACTERS if kind == "regex" else MAX_SOURCE_CHARACTERS
    if len(source) > most:
        raise RequestError(f"the {kind} must hold at most {most} characters, found {len(source)}")
    if kind == "json_object" and source:
        raise RequestError("json_object takes no source: give a json_schema")
    if kind == "json_schema":
        _check_schema(source)
    if kind == "choice":
        read_choices(source)


def read_choices(source: str) -> list[str]:
    """The texts of a choice, from a JSON list. Raises `RequestError`."""
    found = _parsed(source, "choice")
    if not isinstance(found, list) or not found or len(found) > MAX_CHOICES:
        raise RequestError(f"the choice must be a list of 1 to {MAX_CHOICES} texts")
    for each in found:
        if not checked_text(each, "each text of the choice"):
            raise RequestError("the choice must not hold an empty text")
    return found


def beginning_grammar(
    token_ids: Sequence[int], after_token: int | None, max_free_tokens: int | None = None
) -> Grammar:
    """The demand that an answer begin with these tokens, possibly none; the rest as in `Grammar`."""
    return Grammar(BEGINNING, json.dumps(list(token_ids)), after_token, max_free_tokens)


def read_tokens(source: str, vocab_size: int) -> list[int]:
    """The inverse. Raises `RequestError`."""
    found = _parsed(source, "demanded beginning")
    ok = isinstance(found, list) and all(type(each) is int for each in found)
    if not ok or (found and not 0 <= min(found) <= max(found) < vocab_size):
        raise RequestError("a demanded beginning must be a list of token ids")
    return list(found)


def _check_schema(source: str) -> None:
    schema = _parsed(source, "json_schema")
    if not isinstance(schema, dict):
        refuse("the json_schema", "an object", schema)
    if _COMPILER_KEY in schema:
        raise RequestError(f"the json_schema's {_COMPILER_KEY} is not supported")
    values, depth = 0, 0
    level: list[Any] = [schema]
    while level:
        depth, values = depth + 1, values + len(level)
        if depth > MAX_SCHEMA_DEPTH or values > MAX_SCHEMA_VALUES:
            raise RequestError(
                f"the json_schema must be nested at most {MAX_SCHEMA_DEPTH} deep and hold at most "
                f"{MAX_SCHEMA_VALUES} values"
            )
        below: list[Any] = []
        for value in level:
            if isinstance(value, dict):
                if len(value) > MAX_SCHEMA_KEYS:
                    raise RequestError(
                        f"no object in the json_schema may have more than {MAX_SCHEMA_KEYS} keys, "
                        f"found one with {len(value)}"
                    )
                below += value.values()
            elif isinstance(value, list):
                below += value
        level = below


def _parsed(source: str, kind: str) -> Any:
    try:
        return parse_json(source)
    except ValueError as error:
        raise RequestError(f"the {kind} is not valid JSON: {error}") from None


def choice_source(choices: object) -> str:
    """A choice's source from a list of texts. Raises `RequestError`."""
    if isinstance(choices, str) or not isinstance(choices, list | tuple):
        raise RequestError(f"a choice must be a list of texts, found {json_type(choices)}")
    return json.dumps(choices)

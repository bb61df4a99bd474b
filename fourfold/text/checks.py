"""Checks of values that came out of a request's JSON, with the words for refusing them.

Contract: every failure is a `RequestError` that begins with the place of the value in the request.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from fourfold.core.errors import RequestError

_TYPE_NAMES: tuple[tuple[type | tuple[type, ...], str], ...] = (
    (type(None), "null"),
    (bool, "a boolean"),
    ((int, float), "a number"),
    (str, "a string"),
    ((list, tuple), "a list"),
    (Mapping, "an object"),
)


def json_type(value: object) -> str:
    """What JSON calls the type of `value`, with its article."""
    for kind, name in _TYPE_NAMES:
        if isinstance(value, kind):
            return name
    return type(value).__name__


def refuse(where: str, expected: str, value: object) -> NoReturn:
    """Raise the error: `where` must be `expected`, found `value` (a string itself, else its type)."""
    found = repr(value) if isinstance(value, str) and len(value) <= 80 else json_type(value)
    raise RequestError(f"{where} must be {expected}, found {found}")


def checked_text(value: object, where: str) -> str:
    """`value` if it is a string of valid Unicode."""
    if not isinstance(value, str):
        refuse(where, "a string", value)
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise RequestError(
            f"{where} is not valid Unicode: half a surrogate pair at character {error.start}"
        ) from None
    return value


def checked_object(value: object, where: str) -> Mapping[str, Any]:
    """`value` if it is an object."""
    return value if isinstance(value, Mapping) else refuse(where, "an object", value)


def checked_list(value: object, where: str) -> Sequence[Any]:
    """`value` if it is a list."""
    return value if isinstance(value, list | tuple) else refuse(where, "a list", value)


def to_json(value: object, where: str) -> str:
    """`value` on one line as the model saw JSON in training: ", " and ": " between, non-ASCII
    characters as they are, keys in the order given."""
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise RequestError(f"{where} cannot be written as JSON: {error}") from None
    except RecursionError:
        raise RequestError(f"{where} is nested too deeply") from None
    return checked_text(text, where)


def parse_json(text: str) -> Any:
    """The value of a JSON text. Raises `ValueError` for anything that JSON does not allow (NaN and
    Infinity included) and for what is nested too deeply to read."""
    try:
        return json.loads(text, parse_constant=_not_json)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def _not_json(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")

"""Access to a config file's keys: several spellings of a field, and a record of what was read.

Contract: two spellings of one value must agree or `ConfigError` names both; errors name the file
and the key as spelled in it. It does not know which fields there are (core/config_keys.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NoReturn

from fourfold.core.config import FieldError, short
from fourfold.core.errors import ConfigError


class Keys:
    """A config's keys, with a record of which were read and under which spelling."""

    def __init__(self, data: Mapping[str, Any], source: str) -> None:
        self.data = data
        self.source = source
        self.used: set[str] = set()
        self.spelling: dict[str, str] = {}
        self.notes: list[str] = []
        self.unknown_nested: list[str] = []
        self.is_reference = "dim" in data or "n_layers" in data

    def fail(self, text: str) -> NoReturn:
        raise ConfigError(f"{self.source}: {text}")

    def in_file_spelling(self, error: FieldError) -> FieldError:
        root = error.field.split("[")[0]
        spelled = self.spelling.get(root, root)
        return FieldError(spelled + error.field[len(root) :], error.expected, error.found)

    def candidates(self, names: tuple[str, ...]) -> list[tuple[str, Any]]:
        """The keys of `names` that have a value, in that order; all count as read."""
        self.used.update(names)
        return [(name, self.data[name]) for name in names if self.data.get(name) is not None]

    def agree(self, field: str, candidates: list[tuple[str, Any]]) -> Any:
        """The one value that all candidates give; None if there are none."""
        if not candidates:
            return None
        first_name, first = candidates[0]
        for name, value in candidates[1:]:
            if value != first or isinstance(value, bool) != isinstance(first, bool):
                self.fail(
                    f"{first_name} is {short(first)} but {name} is {short(value)}; they mean the "
                    "same thing and must agree"
                )
        self.spelling[field] = first_name
        return first

    def get(self, field: str, names: tuple[str, ...] | None = None) -> Any:
        return self.agree(field, self.candidates(names or (field,)))

    def note(self, text: str) -> None:
        self.notes.append(text)

"""`--config FILE`: flags from a YAML, TOML or JSON file, under their names on the command line.

Contract: what the command line or the environment says goes before the file; an unknown name, one given
twice, or a value of the wrong kind is an error, as on the command line. No format builds anything but
plain values.
"""

from __future__ import annotations

import difflib
import json
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from fourfold.cli.group import same_spelling
from fourfold.core.errors import ConfigError


def read_config(context: click.Context, parameter: click.Parameter, path: str | None) -> None:
    """A click callback of an eager option: the file's values become the command's defaults."""
    if path is None or context.resilient_parsing:
        return
    known = _flags(context.command)
    defaults: dict[str, Any] = {}
    for name, value in _read(Path(path)).items():
        flag = same_spelling(name)
        if flag not in known:
            near = difflib.get_close_matches(flag, known, n=1)
            hint = f"; did you mean --{near[0]}?" if near else ""
            raise ConfigError(f"{path}: there is no flag --{flag}{hint}")
        option, negative = known[flag]
        key = option.name or flag
        if key in defaults:
            raise ConfigError(f"{path}: {name} was given before, in this or another spelling")
        defaults[key] = _value(option, negative, value, f"{path}: {name}")
    context.default_map = {**(context.default_map or {}), **defaults}


def _value(option: click.Option, negative: bool, value: object, where: str) -> object:
    """A file's value as the option takes it. Raises `ConfigError`."""
    if option.is_flag:
        if not isinstance(value, bool):
            raise ConfigError(f"{where} must be true or false, found {_shown(value)}")
        return value is not negative
    if isinstance(value, dict):
        return json.dumps(value)
    values = value if isinstance(value, list) else [value]
    if isinstance(value, list) and not option.multiple:
        raise ConfigError(f"{where} takes one value, found a list")
    for each in values:
        if isinstance(each, bool) or not isinstance(each, str | int | float):
            raise ConfigError(f"{where} must be a text or a number, found {_shown(each)}")
    return values if option.multiple else value


def _shown(value: object) -> str:
    if value is None or isinstance(value, bool):
        return {None: "nothing", True: "true", False: "false"}[value]
    return f"a value of type {type(value).__name__}"


def _flags(command: click.Command) -> dict[str, tuple[click.Option, bool]]:
    """The options by every spelling, and whether that spelling is the negative one of a switch."""
    return {
        same_spelling(name.removeprefix("--")): (option, name in option.secondary_opts)
        for option in command.params
        if isinstance(option, click.Option)
        for name in (*option.opts, *option.secondary_opts)
        if name.startswith("--")
    }


def _read(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--config {path} cannot be read: {error}") from None
    readers: dict[str, Callable[[str], Any]] = {
        ".toml": tomllib.loads, ".json": _json, ".yaml": _yaml, ".yml": _yaml,
    }  # fmt: skip
    if path.suffix not in readers:
        raise ConfigError(f"--config {path}: the file must be .yaml, .toml or .json")
    try:
        data = readers[path.suffix](text)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"--config {path} is not valid: {' '.join(str(error).split())}") from None
    if data is None:
        return {}  # an empty file
    if not isinstance(data, dict) or not all(isinstance(name, str) for name in data):
        raise ConfigError(f"--config {path} must hold names and their values")
    return data


def _json(text: str) -> Any:
    return json.loads(text, object_pairs_hook=_once)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = next(name for name, _ in pairs if [n for n, _ in pairs].count(name) > 1)
        raise ValueError(f"{twice} is given twice")
    return found


def _yaml(text: str) -> Any:
    """YAML's plain values; no tag builds an object, and no name may come twice."""
    import yaml

    class Loader(yaml.SafeLoader):
        """Refuses what the safe loader would pass over."""

        def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
            """As there."""
            names = [key.value for key, _ in node.value]
            for name in names:
                if names.count(name) > 1:
                    raise ValueError(f"{name} is given twice")
            return dict(super().construct_mapping(node, deep))

    try:
        return yaml.load(text, Loader)
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from None

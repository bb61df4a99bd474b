"""`--config FILE`: flags from a TOML or JSON file, under their names on the command line.

Contract: what the command line or the environment says goes before the file; an unknown name is an
error with a suggestion, as on the command line.
"""

from __future__ import annotations

import difflib
import json
import tomllib
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
        option = known[flag]
        if isinstance(value, list) and not option.multiple:
            raise ConfigError(f"{path}: {name} takes one value, found a list")
        if isinstance(value, dict):
            value = json.dumps(value)
        many = option.multiple and not isinstance(value, list)
        defaults[option.name or flag] = [value] if many else value
    context.default_map = {**(context.default_map or {}), **defaults}


def _flags(command: click.Command) -> dict[str, click.Option]:
    options = (each for each in command.params if isinstance(each, click.Option))
    return {
        same_spelling(name.removeprefix("--")): option
        for option in options
        for name in (*option.opts, *option.secondary_opts)
        if name.startswith("--")
    }


def _read(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--config {path} cannot be read: {error}") from None
    try:
        if path.suffix == ".toml":
            return tomllib.loads(text)
        if path.suffix == ".json":
            data = json.loads(text)
            if isinstance(data, dict):
                return data
            raise ConfigError(f"--config {path} must hold an object")
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"--config {path} is not valid: {error}") from None
    raise ConfigError(f"--config {path}: the file must be .toml or .json")

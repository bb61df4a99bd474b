"""What a checkpoint's `generation_config.json` says about sampling.

Contract: reads that one file, which may be absent; what it holds beside sampling parameters is left
alone. A value that cannot be is a `ConfigError` naming file and key. It does not know requests.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from fourfold.core.errors import ConfigError, RequestError
from fourfold.core.request import SamplingParams

GENERATION_FILE = "generation_config.json"


@dataclass(frozen=True)
class GenerationDefaults:
    """Sampling parameters of requests that do not give their own."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0


def read_generation_defaults(directory: str | Path) -> GenerationDefaults:
    """The defaults of the checkpoint in this directory. `do_sample: false` means temperature 0.

    Raises `ConfigError`.
    """
    path = Path(directory) / GENERATION_FILE
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return GenerationDefaults()
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(data, dict):
        raise ConfigError(f"{path} must hold a JSON object, found {type(data).__name__}")
    given: dict[str, Any] = {}
    for field in fields(GenerationDefaults):
        if data.get(field.name) is not None:
            given[field.name] = data[field.name]
    if data.get("do_sample") is False:
        given["temperature"] = 0.0
    try:
        SamplingParams(**given)
    except RequestError as error:
        raise ConfigError(f"{path}: {error}") from None
    return GenerationDefaults(**given)

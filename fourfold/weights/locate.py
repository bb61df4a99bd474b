"""Find the directory that a MODEL argument means, without any network.

Contract: MODEL is a directory that holds a config.json, or `org/name[@revision]`, looked up in the
local Hugging Face cache (weights/hub.py). A directory comes first. What cannot be found raises
`ModelNotFoundError`. This file does not know what a checkpoint holds.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from fourfold.core.errors import ModelNotFoundError
from fourfold.weights.hub import HubId, cache_directory, find_snapshot, has_config


@dataclass(frozen=True)
class ModelLocation:
    """A checkpoint directory. `name` is `org/name` or the directory's own name; `revision` is the
    commit of a snapshot in the cache, None for a directory."""

    directory: Path
    name: str
    revision: str | None = None


def locate(
    model: str, *, weights: bool = True, environment: Mapping[str, str] | None = None
) -> ModelLocation:
    """The directory of MODEL. Raises `ModelNotFoundError`.

    `weights` asks for a cached snapshot to hold all its weights too, not only its configuration.
    `environment` stands for the process's own where it is given.
    """
    if not model or "\0" in model:
        raise ModelNotFoundError(
            f"MODEL must be a directory or org/name[@revision], found {model!r}"
        )
    path = Path(model).expanduser()
    if path.is_dir():
        if not has_config(path):
            raise ModelNotFoundError(f"directory {model} holds no config.json")
        return ModelLocation(path, path.resolve().name)
    if path.exists():
        raise ModelNotFoundError(f"{model} is a file; MODEL must be a directory or org/name")
    hub_id = HubId.parse(model)
    if hub_id is None:
        raise ModelNotFoundError(
            f"there is no directory {model}, and it is no Hugging Face name (org/name[@revision])"
        )
    snapshot, commit = find_snapshot(hub_id, cache_directory(environment), weights)
    return ModelLocation(snapshot, hub_id.repo, commit)

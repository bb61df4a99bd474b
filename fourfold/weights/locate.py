"""Find the directory that a MODEL argument means, without any network.

Contract: MODEL is `nano`, the checkpoint inside this package; or a directory that holds a config.json;
or `org/name[@revision]`, looked up in the local Hugging Face cache (weights/hub.py). They are tried in
this order, so that the built-in name means the same everywhere (`./nano` is a directory). What cannot be
found raises `ModelNotFoundError`. This file does not know what a checkpoint holds.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from fourfold.core.errors import ModelNotFoundError
from fourfold.weights.hub import HubId, cache_directory, find_snapshot, has_config

DEFAULT_MODEL = "nano"
"""MODEL wherever it is left out."""
MODEL_FORMS = "a directory, org/name[@revision], or nano, which is built in"


@dataclass(frozen=True)
class ModelLocation:
    """A checkpoint directory. `name` is `org/name` or the directory's own name; `revision` is the
    commit of a snapshot in the cache, None for any other directory."""

    directory: Path
    name: str
    revision: str | None = None


def built_in() -> Path:
    """The directory of the checkpoint inside the package. Raises `ModelNotFoundError`."""
    path = resources.files("fourfold").joinpath("assets", DEFAULT_MODEL)
    if not isinstance(path, Path) or not has_config(path):
        raise ModelNotFoundError(
            f"the built-in checkpoint is not in this installation of fourfold: {path} holds no "
            "config.json; install fourfold anew, or give MODEL"
        )
    return path


def model_directory(model: str) -> Path | None:
    """The directory that MODEL is the path of, in whatever state; None for any other MODEL."""
    if model in ("", DEFAULT_MODEL) or "\0" in model:
        return None
    path = Path(model).expanduser()
    return path if path.is_dir() else None


def locate(
    model: str, *, weights: bool = True, environment: Mapping[str, str] | None = None
) -> ModelLocation:
    """The directory of MODEL. Raises `ModelNotFoundError`.

    `weights` asks for a cached snapshot to hold all its weights too, not only its configuration.
    `environment` stands for the process's own where it is given.
    """
    if not model or "\0" in model:
        raise ModelNotFoundError(f"MODEL must be {MODEL_FORMS}; found {model!r}")
    if model == DEFAULT_MODEL:
        return ModelLocation(built_in(), DEFAULT_MODEL)
    path = model_directory(model)
    if path is not None:
        if not has_config(path):
            raise ModelNotFoundError(f"directory {model} holds no config.json")
        return ModelLocation(path, path.resolve().name)
    if Path(model).expanduser().exists():
        raise ModelNotFoundError(f"{model} is a file; MODEL must be {MODEL_FORMS}")
    hub_id = HubId.parse(model)
    if hub_id is None:
        raise ModelNotFoundError(
            f"there is no directory {model}, and it is no Hugging Face name (org/name[@revision]); "
            f"the built-in model is called {DEFAULT_MODEL}"
        )
    snapshot, commit = find_snapshot(hub_id, cache_directory(environment), weights)
    return ModelLocation(snapshot, hub_id.repo, commit)

"""Find the directory that a MODEL argument means, without any network.

Contract: MODEL is a directory that holds a config.json, or `org/name[@revision]`, looked up in the
local Hugging Face cache where HF_HUB_CACHE, HF_HOME or XDG_CACHE_HOME put it. The cache's layout is
read directly, so nothing here can open a connection:

    <cache>/models--org--name/refs/<branch or tag>      holds a commit hash
    <cache>/models--org--name/snapshots/<commit>/       the files, links into blobs/

What cannot be found raises `ModelNotFoundError` with the command that would download it. This file
does not know what is inside the files, save the shards that an index names.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from fourfold.core.errors import ModelNotFoundError, listing
from fourfold.weights.index import INDEX_FILE, read_weight_map

# Published totals, printed where a model would have to be downloaded first.
DOWNLOAD_SIZES: Mapping[str, str] = MappingProxyType(
    {
        "deepseek-ai/DeepSeek-V4-Flash": "159.6 GB",
        "deepseek-ai/DeepSeek-V4-Flash-0731": "166.9 GB",
        "deepseek-ai/DeepSeek-V4-Flash-Base": "about 294.7 GB",
        "deepseek-ai/DeepSeek-V4-Pro": "864.7 GB",
    }
)

_CONFIG_FILES = ("config.json", "inference/config.json")
_DEFAULT_REVISION = "main"
_HUB_ID = re.compile(
    r"(?P<org>[A-Za-z0-9_][A-Za-z0-9._-]*)/(?P<name>[A-Za-z0-9_][A-Za-z0-9._-]*)"
    r"(@(?P<revision>[A-Za-z0-9._/-]+))?"
)


@dataclass(frozen=True)
class ModelLocation:
    """A checkpoint directory. `name` is `org/name` or the directory's own name; `revision` is the
    commit of a snapshot in the cache, None for a directory."""

    directory: Path
    name: str
    revision: str | None = None


@dataclass(frozen=True)
class _HubId:
    repo: str
    revision: str | None

    @property
    def download(self) -> str:
        """The command that fetches it, and how much it is."""
        revision = f" --revision {self.revision}" if self.revision else ""
        size = DOWNLOAD_SIZES.get(self.repo, "size unknown here")
        return f"hf download {self.repo}{revision}   ({size})"


def cache_directory(environment: Mapping[str, str] = os.environ) -> Path:
    """The Hugging Face cache of models: HF_HUB_CACHE, else `hub` in HF_HOME, else the default."""
    explicit = environment.get("HF_HUB_CACHE") or environment.get("HUGGINGFACE_HUB_CACHE")
    if explicit:
        return _expand(explicit)
    home = environment.get("HF_HOME")
    if home:
        return _expand(home) / "hub"
    return _expand(environment.get("XDG_CACHE_HOME") or "~/.cache") / "huggingface" / "hub"


def locate(
    model: str, *, weights: bool = True, environment: Mapping[str, str] = os.environ
) -> ModelLocation:
    """The directory of MODEL. Raises `ModelNotFoundError`.

    `weights` asks for a cached snapshot to hold all its weights too, not only its configuration.
    """
    if not model or "\0" in model:
        raise ModelNotFoundError("MODEL must be a directory or org/name[@revision], found nothing")
    path = Path(model).expanduser()
    if path.is_dir():
        if not _has_config(path):
            raise ModelNotFoundError(f"directory {model} holds no config.json")
        return ModelLocation(path, path.resolve().name)
    if path.exists():
        raise ModelNotFoundError(f"{model} is a file; MODEL must be a directory or org/name")
    hub_id = _parse(model)
    if hub_id is None:
        raise ModelNotFoundError(
            f"there is no directory {model}, and it is no Hugging Face name (org/name[@revision])"
        )
    return _from_cache(hub_id, cache_directory(environment), weights)


def _expand(path: str) -> Path:
    return Path(os.path.expandvars(path)).expanduser()


def _parse(model: str) -> _HubId | None:
    match = _HUB_ID.fullmatch(model)
    if match is None:
        return None
    revision: str | None = match["revision"]
    if revision is not None and {"", ".", ".."} & set(revision.split("/")):
        return None
    return _HubId(f"{match['org']}/{match['name']}", revision)


def _has_config(directory: Path) -> bool:
    return any((directory / name).is_file() for name in _CONFIG_FILES)


def _from_cache(hub_id: _HubId, cache: Path, weights: bool) -> ModelLocation:
    repository = cache / f"models--{hub_id.repo.replace('/', '--')}"
    commit = _commit(repository, hub_id.revision or _DEFAULT_REVISION)
    snapshot = repository / "snapshots" / commit
    if not snapshot.is_dir():
        raise ModelNotFoundError(_absent(hub_id, repository, cache))
    missing = _missing(snapshot, weights)
    if missing:
        raise ModelNotFoundError(
            f"the snapshot of {hub_id.repo} in {snapshot} is incomplete; continue its download "
            f"with\n  {hub_id.download}\nmissing are {len(missing)}:" + listing(missing)
        )
    return ModelLocation(snapshot, hub_id.repo, commit)


def _commit(repository: Path, revision: str) -> str:
    """The commit that a branch or tag means; a revision without a ref is a commit itself."""
    ref = repository / "refs" / revision
    try:
        text = ref.read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError):
        return revision
    return text if re.fullmatch(r"[0-9A-Za-z]+", text) else revision


def _missing(snapshot: Path, weights: bool) -> list[str]:
    """Files that the snapshot should hold; a link whose target is gone counts as missing."""
    missing = [] if _has_config(snapshot) else [_CONFIG_FILES[0]]
    if not weights:
        return missing
    if (snapshot / INDEX_FILE).is_file():
        shards = read_weight_map(snapshot / INDEX_FILE).shards()
        return missing + [name for name in shards if not (snapshot / name).is_file()]
    links = sorted(snapshot.glob("*.safetensors"))
    if not links:
        return [*missing, f"{INDEX_FILE} or model.safetensors"]
    return missing + [path.name for path in links if not path.is_file()]


def _absent(hub_id: _HubId, repository: Path, cache: Path) -> str:
    wanted = hub_id.repo + (f"@{hub_id.revision}" if hub_id.revision else "")
    text = f"{wanted} is not in the local cache {cache}; download it with\n  {hub_id.download}"
    snapshots = repository / "snapshots"
    held = sorted(path.name for path in snapshots.iterdir()) if snapshots.is_dir() else []
    if held:
        text += "\nthe cache holds other revisions:" + listing(
            f"{hub_id.repo}@{revision}" for revision in held
        )
    return text

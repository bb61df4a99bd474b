"""The local Hugging Face cache, read without any network.

Contract: `find_snapshot` returns the directory of a repository's snapshot, or raises
`ModelNotFoundError` with the command that would download it. The cache is where HF_HUB_CACHE,
HF_HOME or XDG_CACHE_HOME put it, and its layout is read directly, so that nothing here can open a
connection:

    <cache>/models--org--name/refs/<branch or tag>      holds a commit hash
    <cache>/models--org--name/snapshots/<commit>/       the files, links into blobs/

This file does not know what is inside the files, save the shards that an index names.
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
CONFIG_FILES = ("config.json", "inference/config.json")

_DEFAULT_REVISION = "main"
_HUB_ID = re.compile(
    r"(?P<org>[A-Za-z0-9_][A-Za-z0-9._-]*)/(?P<name>[A-Za-z0-9_][A-Za-z0-9._-]*)"
    r"(@(?P<revision>[A-Za-z0-9._/-]+))?"
)


@dataclass(frozen=True)
class HubId:
    """`org/name`, and a branch, tag or commit if one was asked for."""

    repo: str
    revision: str | None = None

    @classmethod
    def parse(cls, text: str) -> HubId | None:
        """From `org/name[@revision]`; None for any other text."""
        match = _HUB_ID.fullmatch(text)
        if match is None:
            return None
        revision: str | None = match["revision"]
        if revision is not None and {"", ".", ".."} & set(revision.split("/")):
            return None
        return cls(f"{match['org']}/{match['name']}", revision)

    def __str__(self) -> str:
        return self.repo + (f"@{self.revision}" if self.revision else "")

    @property
    def download(self) -> str:
        """The command that fetches it, and how much it is."""
        revision = f" --revision {self.revision}" if self.revision else ""
        size = DOWNLOAD_SIZES.get(self.repo, "size unknown here")
        return f"hf download {self.repo}{revision}   ({size})"


def cache_directory(environment: Mapping[str, str] | None = None) -> Path:
    """The cache of models: HF_HUB_CACHE, else `hub` in HF_HOME, else the default.

    `environment` stands for the process's own where it is given.
    """
    values = os.environ if environment is None else environment
    explicit = values.get("HF_HUB_CACHE") or values.get("HUGGINGFACE_HUB_CACHE")
    if explicit:
        return _expand(explicit)
    home = values.get("HF_HOME")
    if home:
        return _expand(home) / "hub"
    return _expand(values.get("XDG_CACHE_HOME") or "~/.cache") / "huggingface" / "hub"


def find_snapshot(hub_id: HubId, cache: Path, weights: bool) -> tuple[Path, str]:
    """`(directory, commit)` of a complete snapshot; `weights` asks for all shards to be there."""
    repository = cache / f"models--{hub_id.repo.replace('/', '--')}"
    commit = _commit(repository, hub_id.revision or _DEFAULT_REVISION)
    snapshot = repository / "snapshots" / commit
    if not snapshot.is_dir():
        raise ModelNotFoundError(_absent(hub_id, repository, cache))
    missing = _missing(snapshot, weights)
    if missing:
        raise ModelNotFoundError(
            f"the snapshot of {hub_id} in {snapshot} is incomplete; continue its download with\n"
            f"  {hub_id.download}\nmissing are {len(missing)}:" + listing(missing)
        )
    return snapshot, commit


def has_config(directory: Path) -> bool:
    """Whether `directory` holds a configuration that can be read."""
    return any((directory / name).is_file() for name in CONFIG_FILES)


def _expand(path: str) -> Path:
    return Path(os.path.expandvars(path)).expanduser()


def _commit(repository: Path, revision: str) -> str:
    """The commit that a branch or tag means; a revision without a ref is a commit itself."""
    try:
        text = (repository / "refs" / revision).read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError):
        return revision
    return text if re.fullmatch(r"[0-9A-Za-z]+", text) else revision


def _missing(snapshot: Path, weights: bool) -> list[str]:
    """Files that the snapshot should hold; a link whose target is gone counts as missing."""
    missing = [] if has_config(snapshot) else [CONFIG_FILES[0]]
    if not weights:
        return missing
    if (snapshot / INDEX_FILE).is_file():
        shards = read_weight_map(snapshot / INDEX_FILE).shards()
        return missing + [name for name in shards if not (snapshot / name).is_file()]
    links = sorted(snapshot.glob("*.safetensors"))
    if not links:
        return [*missing, f"{INDEX_FILE} or model.safetensors"]
    return missing + [path.name for path in links if not path.is_file()]


def _absent(hub_id: HubId, repository: Path, cache: Path) -> str:
    text = f"{hub_id} is not in the local cache {cache}; download it with\n  {hub_id.download}"
    snapshots = repository / "snapshots"
    held = sorted(path.name for path in snapshots.iterdir()) if snapshots.is_dir() else []
    if held:
        text += "\nthe cache holds other revisions:" + listing(
            f"{hub_id.repo}@{revision}" for revision in held
        )
    return text

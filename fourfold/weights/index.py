"""Read and check every header of a checkpoint directory, before any tensor data.

Contract: `read_index(directory)` finds the safetensors files (through
`model.safetensors.index.json`, or all of them where there is none), checks each header and that
files and index agree, and returns the union of the headers. Anything missing, extra, duplicate,
stale or corrupt raises `CheckpointError` with the file and the byte. It does not know which tensors
a model needs (weights/loader.py). File names in an index stay inside the directory; symbolic links
are followed, as the Hugging Face cache is made of them. Pickled files are never opened.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from fourfold.core.checkpoint import TensorHeader
from fourfold.core.errors import CheckpointError, listing
from fourfold.weights.header import (
    MAX_HEADER_BYTES,
    key_offset,
    parse_json_object,
    printable,
    read_header,
)

INDEX_FILE = "model.safetensors.index.json"
_OTHER_FORMATS = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".gguf", ".npz", ".h5", ".msgpack")
_SHARD = re.compile(r"(?P<stem>.+)-(?P<number>[0-9]{5})-of-(?P<count>[0-9]{5})\.safetensors")

Headers = Mapping[str, TensorHeader]


@dataclass(frozen=True)
class CheckpointIndex:
    """All tensors of a checkpoint. `TensorHeader.file` is a plain name inside `directory`; `notes`
    are sentences about harmless oddities that a user should see."""

    directory: Path
    headers: Headers
    notes: tuple[str, ...] = ()

    @property
    def nbytes(self) -> int:
        """The sum of all tensors' data, in bytes."""
        return sum(header.nbytes for header in self.headers.values())


@dataclass(frozen=True)
class WeightMap:
    """The contents of an index file: tensor name to file name, and `metadata.total_size` if
    given."""

    files: Mapping[str, str]
    total_size: int | None
    raw: bytes

    def at(self, name: str) -> str:
        """Where the index speaks of tensor `name`, for messages."""
        return f"{INDEX_FILE}, byte {key_offset(self.raw, name)}"

    def shards(self) -> list[str]:
        """The file names, each once, sorted."""
        return sorted(set(self.files.values()))


def read_index(
    directory: Path, may_be_stale: Callable[[str, Headers], bool] = lambda name, headers: False
) -> CheckpointIndex:
    """Headers of the checkpoint in `directory`. Raises `CheckpointError`.

    `may_be_stale(name, headers)` says whether the index may list `name` although its file does not
    hold it, given all headers found; such an entry becomes a note.
    """
    present = _files(directory)
    notes: list[str] = []
    if INDEX_FILE in present:
        weight_map = read_weight_map(directory / INDEX_FILE)
        shards = weight_map.shards()
        _refuse_missing(directory, [name for name in shards if name not in present])
        extra = [name for name in present if _is_weights(name) and name not in set(shards)]
        if extra:
            notes.append(f"left out files that {INDEX_FILE} does not name: {', '.join(extra)}")
    else:
        weight_map = None
        shards = [name for name in present if _is_weights(name)]
        _refuse_nothing(directory, shards, present)
        _refuse_missing(directory, missing_shards(shards))
    headers = _union(directory, shards)
    if weight_map is not None:
        notes += _compare(weight_map, headers, may_be_stale)
    return CheckpointIndex(directory, MappingProxyType(headers), tuple(notes))


def read_weight_map(path: Path) -> WeightMap:
    """The index file at `path`, its file names checked. Raises `CheckpointError`."""
    try:
        size = path.stat().st_size
        if size > MAX_HEADER_BYTES:
            raise CheckpointError(f"{path.name}: {size} bytes is too long for an index")
        raw = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from None
    data = parse_json_object(raw, path.name)
    files, metadata = data.get("weight_map"), data.get("metadata", {})
    if not isinstance(files, dict) or not files:
        raise CheckpointError(f"{path.name}: weight_map must be an object that names tensors")
    for name, file in files.items():
        if not isinstance(file, str) or not is_plain(file):
            where = f"{path.name}, byte {key_offset(raw, name)}"
            raise CheckpointError(
                f"{where}: {printable(name)} is in {printable(str(file))}; expected the plain name "
                "of a .safetensors file beside the index"
            )
    total = metadata.get("total_size") if isinstance(metadata, dict) else None
    return WeightMap(files, total if isinstance(total, int) else None, raw)


def is_plain(file: str) -> bool:
    """A name that cannot leave its directory."""
    return _is_weights(file) and file.isprintable() and not ({"/", "\\"} & set(file))


def _is_weights(file: str) -> bool:
    return file.endswith(".safetensors") and not file.startswith(".")


def weight_files(directory: Path) -> list[str]:
    """The .safetensors files in `directory`, sorted. Raises `CheckpointError`."""
    return [name for name in _files(directory) if _is_weights(name)]


def _files(directory: Path) -> list[str]:
    """Names in `directory` that lead to something: a dangling link is a file that is not there."""
    try:
        return sorted(path.name for path in directory.iterdir() if path.exists())
    except OSError as error:
        raise CheckpointError(f"cannot read directory {directory}: {error.strerror}") from None


def _refuse_nothing(directory: Path, shards: list[str], present: list[str]) -> None:
    if shards:
        return
    others = [name for name in present if name.endswith(_OTHER_FORMATS)]
    if others:
        more = f" and {len(others) - 3} more" if len(others) > 3 else ""
        raise CheckpointError(
            f"{directory} holds no .safetensors files, only {', '.join(others[:3])}{more}; pickled "
            "and other formats are not read, convert them to safetensors"
        )
    raise CheckpointError(f"{directory} holds no .safetensors files")


def _refuse_missing(directory: Path, missing: Iterable[str]) -> None:
    rows = list(missing)
    if rows:
        raise CheckpointError(
            f"{directory} lacks {len(rows)} shard{'s' if len(rows) > 1 else ''} of its checkpoint:"
            + listing(rows, limit=len(rows))
        )


def missing_shards(shards: list[str]) -> list[str]:
    """Files that the numbering `X-00002-of-00046` promises and that are not there."""
    promised: set[str] = set()
    for match in filter(None, map(_SHARD.fullmatch, shards)):
        stem, count = match["stem"], match["count"]
        promised.update(f"{stem}-{n:05d}-of-{count}.safetensors" for n in range(1, int(count) + 1))
    return sorted(promised - set(shards))


def _union(directory: Path, shards: list[str]) -> dict[str, TensorHeader]:
    headers: dict[str, TensorHeader] = {}
    for shard in shards:
        for name, header in read_header(directory / shard).items():
            first = headers.setdefault(name, header)
            if first is not header:
                raise CheckpointError(
                    f"{printable(name)} is stored twice: in {first.file} at byte "
                    f"{first.offset_begin} and in {shard} at byte {header.offset_begin}"
                )
    return headers


def _compare(
    weight_map: WeightMap, headers: Headers, may_be_stale: Callable[[str, Headers], bool]
) -> list[str]:
    """Check that index and files agree on every tensor; returns notes."""
    notes: list[str] = []
    for name, header in headers.items():
        if name not in weight_map.files:
            raise CheckpointError(
                f"{header.file}, byte {header.offset_begin}: {printable(name)} is not in "
                f"{INDEX_FILE}"
            )
    for name, file in weight_map.files.items():
        found = headers.get(name)
        if found is not None and found.file == file:
            continue
        if found is not None:
            raise CheckpointError(
                f"{weight_map.at(name)}: {printable(name)} should be in {file}, but is in "
                f"{found.file} at byte {found.offset_begin}"
            )
        if not may_be_stale(name, headers):
            raise CheckpointError(
                f"{weight_map.at(name)}: stale entry; {printable(name)} should be in {file}, whose "
                "header (from byte 8) does not hold it"
            )
        notes.append(f"{INDEX_FILE} lists {name}, which {file} does not hold and nothing needs")
    total = sum(header.nbytes for header in headers.values())
    if weight_map.total_size not in (None, total):
        notes.append(
            f"{INDEX_FILE} says total_size {weight_map.total_size}, the files hold {total} bytes"
        )
    return notes

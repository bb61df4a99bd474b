"""Everything wrong with a checkpoint's files and index, found from headers and sizes alone.

Contract: `check_files` reads the index and every header and raises nothing that a file can cause: what
loading would refuse (weights/index.py) is a finding here, and the search goes on. Of a file that
cannot be read only the index knows what it should hold. No tensor data is read. Torch-free. It does
not know which tensors a model needs.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fourfold.core.checkpoint import TensorHeader
from fourfold.core.errors import CheckpointError
from fourfold.core.findings import Finding, Severity
from fourfold.weights.header import (
    MAX_HEADER_BYTES,
    FileFault,
    Report,
    parse_json_object,
    printable,
    read_header,
)
from fourfold.weights.index import INDEX_FILE, is_plain, missing_shards, weight_files

_KEY = re.compile(rb'"((?:[^"\\]|\\.)*)"\s*:')

GET_AGAIN = "get this file again from where the others came"
REBUILD = f"write {INDEX_FILE} again from the files' headers, or get it again"


@dataclass
class FoundFiles:
    """What a directory holds.

    `headers` of all tensors, each once; `files`, name to size in bytes, those that were read; `lost`,
    those that are missing or whose header cannot be read; `listed`, the index's tensors and their
    files (None: there is no index that can be read).
    """

    directory: Path
    headers: dict[str, TensorHeader] = field(default_factory=dict)
    files: dict[str, int] = field(default_factory=dict)
    lost: list[str] = field(default_factory=list)
    listed: Mapping[str, str] | None = None
    findings: list[Finding] = field(default_factory=list)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(header.nbytes for header in self.headers.values())

    @property
    def unseen(self) -> dict[str, str]:
        """Tensors that only the index knows of, with their lost file."""
        lost = set(self.lost)
        return {name: file for name, file in (self.listed or {}).items() if file in lost}

    def error(self, message: str, **where: Any) -> None:
        """Note an error."""
        self.findings.append(Finding(Severity.ERROR, message, **where))

    def warning(self, message: str, **where: Any) -> None:
        """Note a warning."""
        self.findings.append(Finding(Severity.WARNING, message, **where))

    def faults(self, fix: str) -> Report:
        """Notes file faults as errors."""
        return lambda fault: self.error(
            fault.what, tensor=fault.tensor, file=fault.file, offset=fault.byte, fix=fix
        )


StaleRule = Callable[[str, Mapping[str, TensorHeader]], bool]


def check_files(directory: Path, may_be_stale: StaleRule) -> FoundFiles:
    """Read the index and all headers in `directory`; `may_be_stale` as in `read_index`."""
    found = FoundFiles(directory)
    try:
        present = weight_files(directory)
    except CheckpointError as error:
        found.error(str(error))
        return found
    raw = _read_index_file(found)
    total, named = _weight_map(found, raw)
    shards = sorted(named) if found.listed is not None else present
    if not shards:
        found.error("there are no .safetensors files", fix="convert the weights to safetensors")
    missing = [name for name in shards if name not in present]
    if found.listed is None:
        missing += missing_shards(shards)
    for name in missing:
        _missing_file(found, name)
    for name in shards:
        if name in present:
            _read(found, name)
    extra = [name for name in present if name not in shards]
    _check_extra(found, extra)
    if found.listed is not None:
        _compare(found, raw, total, may_be_stale)
    return found


def _read_index_file(found: FoundFiles) -> bytes:
    """The index's bytes; empty where there is none, or none that can be read."""
    path = found.directory / INDEX_FILE
    try:
        if path.exists() and path.stat().st_size > MAX_HEADER_BYTES:
            found.error("too long for an index", file=INDEX_FILE, fix=REBUILD)
            return b""
        return path.read_bytes() if path.exists() else b""
    except OSError as error:
        found.error(f"cannot be read: {error.strerror}", file=INDEX_FILE, fix=REBUILD)
        return b""


def _weight_map(found: FoundFiles, raw: bytes) -> tuple[int | None, set[str]]:
    """`metadata.total_size`, and the files named; fills `found.listed`."""
    if not raw:
        return None, set()
    data = parse_json_object(raw, INDEX_FILE, 0, found.faults(REBUILD))
    files, metadata = data.get("weight_map"), data.get("metadata", {})
    if not isinstance(files, dict) or not files:
        if data:
            found.error(
                "weight_map must be an object that names tensors", file=INDEX_FILE, fix=REBUILD
            )
        return None, set()
    offsets: dict[str, int] | None = None
    listed = {}
    for name, file in files.items():
        if isinstance(file, str) and is_plain(file):
            listed[name] = file
            continue
        offsets = offsets or key_offsets(raw)
        found.error(
            f"is in {printable(str(file))}; expected the plain name of a .safetensors file beside "
            "the index",
            tensor=printable(name),
            file=INDEX_FILE,
            offset=offsets.get(name),
            fix=REBUILD,
        )
    found.listed = listed
    total = metadata.get("total_size") if isinstance(metadata, dict) else None
    return total if isinstance(total, int) else None, set(listed.values())


def key_offsets(raw: bytes) -> dict[str, int]:
    """The byte of every key in JSON text; keys with escapes are left out."""
    return {
        match[1].decode("utf-8", "replace"): match.start()
        for match in _KEY.finditer(raw)
        if b"\\" not in match[1]
    }


def _missing_file(found: FoundFiles, name: str) -> None:
    found.lost.append(name)
    tensors = sum(file == name for file in (found.listed or {}).values())
    held = f"; the index puts {tensors} tensors into it" if tensors else ""
    link = found.directory / name
    what = "is a link whose target is gone" if link.is_symlink() else "is missing"
    found.error(f"{what}{held}", file=name, fix=GET_AGAIN)


def _read(found: FoundFiles, name: str) -> None:
    """One header into `found`."""
    faults: list[FileFault] = []
    headers = read_header(found.directory / name, faults.append)
    for fault in faults:
        found.faults(GET_AGAIN)(fault)
    size = _size(found.directory / name)
    if size is not None:
        found.files[name] = size
    if not headers and faults:
        found.lost.append(name)
    for header in headers.values():
        first = found.headers.setdefault(header.name, header)
        if first is not header:
            found.error(
                f"is stored twice: here and in {first.file} at byte {first.offset_begin}",
                tensor=printable(header.name),
                file=name,
                offset=header.offset_begin,
                fix="keep the file that the index means and get the other one again",
            )


def _size(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except OSError:
        return None


def _check_extra(found: FoundFiles, extra: Iterable[str]) -> None:
    """Files that the index does not name; one may be a lost file under another name."""
    unseen: dict[str, set[str]] = {}
    for tensor, file in found.unseen.items():
        unseen.setdefault(file, set()).add(tensor)
    for name in extra:
        try:
            held = set(read_header(found.directory / name))
        except CheckpointError:
            held = set()
        meant = [file for file, tensors in unseen.items() if tensors and tensors <= held]
        fix = f"rename it to {meant[0]}" if meant else "remove it, or get the right index"
        found.warning(f"is not named by {INDEX_FILE} and is left out", file=name, fix=fix)


def _compare(found: FoundFiles, raw: bytes, total: int | None, may_be_stale: StaleRule) -> None:
    """Index against headers, both ways."""
    listed, lost = found.listed or {}, set(found.lost)
    offsets: dict[str, int] | None = None
    for name, header in found.headers.items():
        if name not in listed:
            found.error(
                f"is not in {INDEX_FILE}",
                tensor=printable(name),
                file=header.file,
                offset=header.offset_begin,
                fix=REBUILD,
            )
    moved: dict[str, str] = {}  # file that the index says -> file where its first lost tensor is
    for name, file in listed.items():
        held = found.headers.get(name)
        if file in lost or (held is not None and held.file == file):
            continue
        offsets = offsets or key_offsets(raw)
        where: dict[str, Any] = {
            "tensor": printable(name),
            "file": INDEX_FILE,
            "offset": offsets.get(name),
        }
        if held is not None:
            moved.setdefault(file, held.file)
            found.error(f"should be in {file}, but is in {held.file}", fix=REBUILD, **where)
        elif may_be_stale(name, found.headers):
            text = f"is listed, but {file} does not hold it, and nothing needs it"
            found.findings.append(Finding(Severity.NOTE, text, **where))
        else:
            text = f"stale entry: {file} does not hold it"
            found.error(text, fix="remove the entry, or get the file again", **where)
    for first, second in moved.items():
        if moved.get(second) == first and first < second:
            found.error(
                f"its tensors are in {second}, and those of {second} are in it",
                file=first,
                fix="swap the names of the two files",
            )
    if total is not None and total != found.nbytes and not lost:
        found.warning(
            f"metadata.total_size is {total}, the tensors have {found.nbytes} bytes",
            file=INDEX_FILE,
            offset=(offsets or key_offsets(raw)).get("total_size"),
            fix=f"set it to {found.nbytes} if all else is well",
        )

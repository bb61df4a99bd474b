"""SHA-256 manifests of a checkpoint's files, in the format that `sha256sum -c` reads.

Contract: one line a file, `<64 hex digits>  <name inside the directory>`. Reading a file and comparing
digests are apart, so that whoever reads the data anyway can hash on the way (verify_deep.py).
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from fourfold.core.errors import CheckpointError
from fourfold.core.findings import Finding, Severity
from fourfold.weights.index import INDEX_FILE

SMALL_FILES = (
    "config.json",
    "generation_config.json",
    INDEX_FILE,
    "tokenizer.json",
    "tokenizer_config.json",
    "hf_quant_config.json",
    "inference/config.json",
    "encoding/encoding_dsv4.py",
)
_LINE = re.compile(r"(?P<digest>[0-9a-fA-F]{64}) [ *](?P<name>.+)")
_PIECE = 1 << 24


def file_digest(path: Path) -> str:
    """The SHA-256 of one file, in hex. Raises `CheckpointError`."""
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while piece := file.read(_PIECE):
                digest.update(piece)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None
    return digest.hexdigest()


def small_digests(directory: Path) -> dict[str, str]:
    """Digests of the files beside the weights that are there."""
    present = (name for name in SMALL_FILES if (directory / name).is_file())
    return {name: file_digest(directory / name) for name in present}


def read_manifest(path: Path) -> dict[str, str]:
    """File name to digest. Raises `CheckpointError` for a file that is no manifest."""
    try:
        lines = path.read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"manifest {path} cannot be read: {error}") from None
    digests: dict[str, str] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        match = _LINE.fullmatch(line.rstrip())
        if match is None:
            raise CheckpointError(
                f"manifest {path}, line {number}: expected 64 hex digits, two blanks and a file "
                f"name, found {line[:60]!r}"
            )
        digests[match["name"].removeprefix("./")] = match["digest"].lower()
    if not digests:
        raise CheckpointError(f"manifest {path} names no file")
    return digests


def write_manifest(path: Path, digests: Mapping[str, str]) -> None:
    """Write a manifest, sorted by name. Raises `CheckpointError`."""
    text = "".join(f"{digest}  {name}\n" for name, digest in sorted(digests.items()))
    try:
        path.write_text(text, "utf-8")
    except OSError as error:
        raise CheckpointError(f"manifest {path} cannot be written: {error.strerror}") from None


def compare_digests(
    expected: Mapping[str, str], found: Mapping[str, str], ignore: Iterable[str] = ()
) -> Iterator[Finding]:
    """Where files differ from a manifest; `ignore` are files not looked at."""
    skipped = set(ignore)
    for name, digest in expected.items():
        if name in skipped:
            continue
        if name not in found:
            text = "is in the manifest and was not found"
            yield Finding(Severity.ERROR, text, file=name, fix="get it again")
        elif found[name] != digest:
            text = f"has SHA-256 {found[name]}, the manifest says {digest}"
            yield Finding(Severity.ERROR, text, file=name, fix="get it again")
    for name in found:
        if name not in expected:
            yield Finding(Severity.WARNING, "is not in the manifest", file=name)

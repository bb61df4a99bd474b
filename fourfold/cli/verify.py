"""`fourfold verify`: what is wrong with a checkpoint, before anything loads it."""

from __future__ import annotations

import json
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from fourfold.core.findings import Finding, Severity, exit_status
from fourfold.weights.locate import DEFAULT_MODEL, ModelLocation, locate, model_directory

if TYPE_CHECKING:
    from fourfold.cli.verify_text import TextCheck
    from fourfold.weights.verify import Verification

_FEWEST_FOLDED = 4  # findings of one kind and file that become one
_VERDICTS = ("clean", "warnings", "errors")


@click.command()
@click.argument("model", metavar="[MODEL]", default=DEFAULT_MODEL)
@click.option("--deep", is_flag=True, help="Read all data: NaN, scales, amplitudes, zeros.")
@click.option(
    "--manifest",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Compare SHA-256 digests with this file's (implies --deep).",
)
@click.option(
    "--write-manifest",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Write SHA-256 digests, for sha256sum -c and --manifest (implies --deep).",
)
@click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout, nothing else.")
@click.option("--quiet", "-q", is_flag=True, help="No notes, no progress.")
@click.pass_context
def verify(
    context: click.Context,
    model: str,
    deep: bool,
    manifest: Path | None,
    write_manifest: Path | None,
    as_json: bool,
    quiet: bool,
) -> None:
    """Check a checkpoint from its headers, index and small files; no tensor data is read.

    MODEL is a directory, org/name[@revision], or nano, the built-in model; nano if left out. Names
    every tensor that is missing, unexpected, of a
    wrong shape or dtype or without its scale, what index and config.json say against the files,
    files that are missing or cut short, the tokenizer against the vocabulary. Needs no GPU. Exit
    status: 0 clean, 1 warnings, 2 errors.
    """
    began = time.perf_counter()
    report = _check(_directory(model), deep, manifest, write_manifest, quiet=as_json or quiet)
    report.seconds = time.perf_counter() - began
    if as_json:
        click.echo(json.dumps(report.as_dict(), ensure_ascii=False, indent=1))
    else:
        click.echo("\n".join(report.lines(notes=not quiet)))
    context.exit(report.status)


@dataclass
class Report:
    """All that was found."""

    location: ModelLocation
    verified: Verification
    text: TextCheck
    findings: Sequence[Finding]
    deep: bool
    seconds: float = 0.0

    @property
    def status(self) -> int:
        """The exit status."""
        return exit_status(self.findings)

    def count(self, severity: Severity) -> int:
        """How many findings are so serious."""
        return sum(finding.severity is severity for finding in self.findings)

    def lines(self, notes: bool) -> list[str]:
        """For a person: what it is, what is wrong, the verdict."""
        from fourfold.weights.verify_tensors import storage_lines

        files, checked = self.verified.files, self.verified.checked
        revision = f" at {self.location.revision}" if self.location.revision else ""
        out = [
            f"{self.location.name}{revision}: {self.verified.family}",
            f"  {len(files.files)} files, {self.verified.num_tensors:,} tensors, "
            f"{files.nbytes:,} bytes of them",
            *(f"  {line}" for line in storage_lines(checked.resolution if checked else None)),
            f"  tokenizer: {self.text.tokenizer}",
            f"  prompt format: {self.text.profile}",
        ]
        for severity in (Severity.ERROR, Severity.WARNING, Severity.NOTE):
            if severity is Severity.NOTE and not notes:
                continue
            out += _folded([f for f in self.findings if f.severity is severity])
        counts = [
            f"{count} {severity.value}{'s' if count > 1 else ''}"
            for severity in (Severity.ERROR, Severity.WARNING)
            if (count := self.count(severity))
        ]
        how = "all data read" if self.deep else "headers and small files"
        out.append(f"{', '.join(counts) or 'clean'} ({how}, {self.seconds:.1f} s)")
        return out

    def as_dict(self) -> dict[str, Any]:
        """For JSON; every finding by itself."""
        files, checked = self.verified.files, self.verified.checked
        resolution = checked.resolution if checked else None
        return {
            "model": self.location.name,
            "directory": str(self.location.directory),
            "revision": self.location.revision,
            "family": self.verified.family,
            "verdict": _VERDICTS[self.status],
            "exit_status": self.status,
            "files": len(files.files),
            "tensors": self.verified.num_tensors,
            "bytes": files.nbytes,
            "storage": list(resolution.lines()) if resolution else [],
            "tokenizer": self.text.tokenizer,
            "prompt_format": self.text.profile,
            "deep": self.deep,
            "seconds": round(self.seconds, 3),
            "findings": [
                {
                    "severity": finding.severity.value,
                    "tensor": finding.tensor,
                    "file": finding.file,
                    "offset": finding.offset,
                    "message": finding.message,
                    "fix": finding.fix,
                }
                for finding in self.findings
            ],
        }


def _folded(findings: Sequence[Finding]) -> list[str]:
    """One line a finding; the same about many tensors is one line for each pattern of names."""
    from fourfold.weights.coverage import fold

    groups: dict[tuple[str, str], list[Finding]] = defaultdict(list)
    for finding in findings:
        own = finding.file if finding.tensor is None else ""
        groups[finding.message, f"{finding.fix}{own}"].append(finding)
    out = []
    for (message, _), members in groups.items():
        names = [member.tensor for member in members if member.tensor]
        if len(members) < _FEWEST_FOLDED or len(names) < len(members):
            out += [str(member) for member in members]
            continue
        first = members[0]
        fix = f" ({first.fix})" if first.fix else ""
        where = f" (the first in {first.where})" if first.where else ""
        out += [f"{first.severity.value}: {name}: {message}{where}{fix}" for name in fold(names)]
    return out


def _directory(model: str) -> ModelLocation:
    """Where MODEL is. A directory will do in any state: what it lacks is for the check to say."""
    path = model_directory(model)
    if path is not None:
        return ModelLocation(path, path.resolve().name)
    return locate(model, weights=False)


def _check(
    location: ModelLocation,
    deep: bool,
    manifest: Path | None,
    write_manifest: Path | None,
    quiet: bool,
) -> Report:
    from fourfold.cli.verify_text import check_text
    from fourfold.weights import manifest as manifests
    from fourfold.weights.verify import verify as verify_headers

    expected = manifests.read_manifest(manifest) if manifest else None
    verified = verify_headers(location.directory)
    text = check_text(location.directory, verified.model or verified.config)
    findings = [*verified.findings, *text.findings]
    deep = deep or manifest is not None or write_manifest is not None
    if deep:
        from fourfold.cli.progress import Progress
        from fourfold.weights.verify_deep import deep_check

        hashing = manifest is not None or write_manifest is not None
        digests, found = deep_check(verified, hashing, Progress("reading", quiet))
        findings += found
        if hashing:
            digests |= manifests.small_digests(location.directory)
        if expected is not None:
            findings += manifests.compare_digests(expected, digests)
        if write_manifest is not None:
            manifests.write_manifest(write_manifest, digests)
    return Report(location, verified, text, findings, deep)

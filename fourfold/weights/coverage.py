"""Join a checkpoint's headers with a model's inventory: what is missing, unexpected or mismatched.

Contract: `match` gives every header its one place (or the reason it is left out) and collects all
that is wrong; nothing is raised before the whole checkpoint has been looked at. `CoverageError` lists
every finding, with numbered tensors folded (`layers.{0-42}.attn.wq_a.scale`). It works on headers
alone; what a quantised weight's codes and scales must look like is weights/loader.py's to ask.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from fourfold.core.checkpoint import TensorHeader
from fourfold.core.config import ModelConfig
from fourfold.core.errors import CheckpointError, listing
from fourfold.core.parameters import (
    EXPERT_ROLES,
    ParamSpec,
    Storage,
    parameters,
    scale_name,
)
from fourfold.weights.header import printable
from fourfold.weights.names import LeftOut, NameTable, Part, Place, native_name, parse

PLAIN_DTYPES = ("BF16", "F16", "F32", "F64")
INTEGER_DTYPES = ("I64", "I32")
FP8_DTYPES = ("F8_E4M3",)
FP4_DTYPES = ("I8", "U8", "F4")

_QUANTISABLE = (Storage.LINEAR, Storage.EXPERT)


@dataclass(frozen=True, slots=True)
class Mismatch:
    """A tensor that is there and wrong; `reason` completes "NAME …"."""

    header: TensorHeader
    reason: str

    def __str__(self) -> str:
        header = self.header
        return (
            f"{printable(header.name)} {self.reason} ({header.file}, byte {header.offset_begin})"
        )


class CoverageError(CheckpointError):
    """Tensors that do not fit the configuration: all of them, by kind."""

    def __init__(
        self,
        directory: Path,
        missing: Iterable[str] = (),
        unexpected: Iterable[str] = (),
        mismatched: Iterable[Mismatch] = (),
    ) -> None:
        self.missing = tuple(missing)
        self.unexpected = tuple(unexpected)
        self.mismatched = tuple(mismatched)
        counts, lists = [], ""
        for what, items, rows in (
            ("missing", self.missing, fold(self.missing)),
            ("unexpected", self.unexpected, fold(self.unexpected)),
            ("mismatched", self.mismatched, _fold_mismatches(self.mismatched)),
        ):
            if items:
                counts.append(f"{len(items)} {what}")
                lists += f"\n{what}:" + listing(rows, limit=len(rows))
        super().__init__(
            f"the checkpoint in {directory} does not fit its configuration: "
            f"{', '.join(counts)} tensors{lists}"
        )


def _ranges(numbers: Iterable[int]) -> str:
    """`{0-2,5}` for 0, 1, 2, 5; a single number stands alone."""
    ordered = sorted(set(numbers))
    runs: list[list[int]] = []
    for number in ordered:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    text = ",".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)
    return text if len(ordered) == 1 else "{" + text + "}"


def fold(names: Iterable[str]) -> list[str]:
    """`names` with their numbered components folded into ranges, rightmost first, in order.

    Two experts of three layers become one row; the rows together spell exactly `names`.
    """
    rows = {tuple(printable(name).split(".")): 1 for name in names}
    depth = max(map(len, rows), default=0)
    for position in reversed(range(depth)):
        groups: dict[tuple[str, ...], list[tuple[str, ...]]] = defaultdict(list)
        for row in rows:
            numbered = position < len(row) and row[position].isascii() and row[position].isdigit()
            key = (*row[:position], "#", *row[position + 1 :]) if numbered else row
            groups[key].append(row)
        folded: dict[tuple[str, ...], int] = {}
        for key, members in groups.items():
            if len(members) > 1:
                span = _ranges(int(row[position]) for row in members)
                key = (*key[:position], span, *key[position + 1 :])
            else:
                key = members[0]
            folded[key] = sum(rows[row] for row in members)
        rows = folded
    return [
        ".".join(row) + (f"   ({count} tensors)" if count > 1 else "")
        for row, count in rows.items()
    ]


def _fold_mismatches(mismatches: Iterable[Mismatch]) -> list[str]:
    groups: dict[str, list[Mismatch]] = defaultdict(list)
    for mismatch in mismatches:
        groups[mismatch.reason].append(mismatch)
    rows = []
    for reason, members in groups.items():
        first = members[0].header
        where = f"{first.file}, byte {first.offset_begin}"
        if len(members) == 1:
            rows.append(str(members[0]))
            continue
        for name in fold(mismatch.header.name for mismatch in members):
            rows.append(f"{name} {reason} (the first in {where})")
    return rows


@dataclass(frozen=True, slots=True)
class Fused:
    """A parameter's share of a stack of all experts: part `half` of `halves` equal parts of each
    expert's rows."""

    header: TensorHeader
    half: int
    halves: int


@dataclass
class Matching:
    """Every header in its place. Keys are (parameter name, expert or None)."""

    specs: tuple[ParamSpec, ...]
    weights: dict[tuple[str, int | None], TensorHeader] = field(default_factory=dict)
    scales: dict[tuple[str, int | None], TensorHeader] = field(default_factory=dict)
    fused: dict[str, Fused] = field(default_factory=dict)
    left_out: list[tuple[TensorHeader, LeftOut]] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    unexpected: list[TensorHeader] = field(default_factory=list)
    mismatched: list[Mismatch] = field(default_factory=list)

    def experts(self, spec: ParamSpec) -> tuple[int | None, ...]:
        """The second half of the keys of one parameter."""
        return tuple(range(spec.shape[0])) if spec.role in EXPERT_ROLES else (None,)

    def native_headers(self) -> dict[str, TensorHeader]:
        """Headers by native name, as the quantisation schemes are resolved from; tensors of an unknown
        kind included, fused stacks under each parameter's own name with its own shape."""
        fused_names = {share.header.name for share in self.fused.values()}
        left_out = {header.name for header, _ in self.left_out}
        result = {
            native_name(header.name): header
            for header in (*self.weights.values(), *self.scales.values(), *self.unexpected)
            if header.name not in fused_names | left_out
        }
        for spec in self.specs:
            if spec.name in self.fused:
                result[spec.name] = replace(self.fused[spec.name].header, shape=spec.shape)
        return result

    def has_foreign_leaves(self) -> bool:
        """Whether an unexpected tensor stands beside a known weight: the mark of another scheme."""
        return any(
            parse(header.name) is None and native_name(header.name).rpartition(".")[0] in stems
            for stems in [{spec_stem(self, key) for key in self._all_keys()}]
            for header in self.unexpected
        )

    def _all_keys(self) -> list[tuple[ParamSpec, int | None]]:
        return [(spec, expert) for spec in self.specs for expert in self.experts(spec)]

"""Join a checkpoint's headers with a model's inventory: what is missing, unexpected or mismatched.

Contract: `Matching` gives every header its one place (or the reason it is left out) and collects
all that is wrong; nothing is raised before the whole checkpoint has been looked at. `CoverageError`
lists every finding, with numbered tensors folded (`layers.{0-42}.attn.wq_a.scale`). It works on
headers alone; what a quantised weight's codes and scales must look like is weights/loader.py's to
ask.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from fourfold.core.checkpoint import TensorHeader
from fourfold.core.config import ModelConfig
from fourfold.core.errors import CheckpointError, listing
from fourfold.core.parameters import EXPERT_ROLES, ParamSpec, Storage, parameters
from fourfold.weights.header import printable
from fourfold.weights.names import LeftOut, NameTable, Part, Place, expert_name, parse

PLAIN_DTYPES = ("BF16", "F16", "F32", "F64")
INTEGER_DTYPES = ("I64", "I32")
FP8_DTYPES = ("F8_E4M3",)
FP4_DTYPES = ("I8", "U8", "F4")

_QUANTISABLE = (Storage.LINEAR, Storage.EXPERT)


def may_be_stale(name: str, headers: Mapping[str, TensorHeader]) -> bool:
    """Whether an index may list `name` although no file holds it: a `wo_a` that was dequantised may
    leave its scale behind."""
    parsed = parse(name)
    if parsed is None or parsed.part is not Part.SCALE:
        return False
    weight = headers.get(name.rpartition(".")[0] + ".weight")
    is_wo_a = "wo_a" in parsed.roles[0].value.split(".")
    return is_wo_a and weight is not None and weight.dtype in PLAIN_DTYPES


@dataclass(frozen=True, slots=True)
class Mismatch:
    """A tensor that is there and wrong; `reason` completes "NAME …"."""

    header: TensorHeader
    reason: str

    def __str__(self) -> str:
        header = self.header
        return f"{printable(header.name)} {self.reason} ({header.file}, byte {header.offset_begin})"


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
        if len(members) == 1:
            rows.append(str(members[0]))
            continue
        first = members[0].header
        names = fold(mismatch.header.name for mismatch in members)
        rows.append(f"{names[0]} {reason} (the first in {first.file}, byte {first.offset_begin})")
        rows += [f"{name} {reason}" for name in names[1:]]
    return rows


@dataclass(frozen=True, slots=True)
class Source:
    """Bytes `begin` to `end` of the file of `header`: a whole tensor, or one expert's matrix in a
    stack of all experts."""

    header: TensorHeader
    begin: int
    end: int


@dataclass
class Stored:
    """The tensors found for one parameter, one for each of its experts or one in all.

    `fused` counts how many parameters share each tensor of a stack (0: not stacked), `half` is this
    parameter's place among them.
    """

    spec: ParamSpec
    weights: dict[int | None, TensorHeader] = field(default_factory=dict)
    scales: dict[int | None, TensorHeader] = field(default_factory=dict)
    fused: int = 0
    half: int = 0

    @property
    def experts(self) -> tuple[int | None, ...]:
        """The keys that `weights` must have: expert numbers, or None for a single tensor."""
        if self.fused or self.spec.role not in EXPERT_ROLES:
            return (None,)
        return tuple(range(self.spec.shape[0]))

    def name(self, expert: int | None) -> str:
        """The native name of one of the tensors."""
        return self.spec.name if expert is None else expert_name(self.spec.name, expert)

    def header_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape a header must have whose parameter takes `shape` (of one expert, of codes or
        scales) from it."""
        if not self.fused:
            return shape
        return (self.spec.shape[0], self.fused * shape[0], *shape[1:])

    def sources(self, part: Mapping[int | None, TensorHeader]) -> tuple[Source, ...]:
        """Where the bytes of `weights` or `scales` stand, in the order of the experts."""
        if not self.fused:
            headers = [part[expert] for expert in self.experts]
            return tuple(Source(h, h.offset_begin, h.offset_end) for h in headers)
        header, count = part[None], self.spec.shape[0]
        step = header.nbytes // (count * self.fused)
        starts = (header.offset_begin + (k * self.fused + self.half) * step for k in range(count))
        return tuple(Source(header, start, start + step) for start in starts)


class Matching:
    """Every header of a checkpoint in its place, and what is wrong with names, pairs, plain dtypes
    and plain shapes."""

    def __init__(self, directory: Path, headers: Mapping[str, TensorHeader], config: ModelConfig):
        self.directory = directory
        self.names = NameTable(config)
        self.stored = {spec.name: Stored(spec) for spec in parameters(config)}
        self.left_out: list[tuple[TensorHeader, LeftOut]] = []
        self.unexpected: list[str] = []
        self.mismatched: dict[Mismatch, None] = {}  # a set in order: w1 and w3 may share a tensor
        for header in headers.values():
            self._place(header)
        self.missing = [
            stored.name(expert)
            for stored in self.stored.values()
            for expert in stored.experts
            if expert not in stored.weights
        ]
        for stored in self.stored.values():
            self._check(stored)
        self._check_copies()

    @property
    def is_complete(self) -> bool:
        return not (self.missing or self.unexpected or self.mismatched)

    def has_foreign_kinds(self) -> bool:
        """Whether a tensor of an unknown kind stands beside a known weight."""
        return any(map(self.names.stands_beside_known, self.unexpected))

    def error(self) -> CoverageError:
        """All findings as one error."""
        return CoverageError(self.directory, self.missing, self.unexpected, self.mismatched)

    def wrong(self, header: TensorHeader, reason: str) -> None:
        """Note that `header` does not fit; `reason` completes "NAME …"."""
        self.mismatched[Mismatch(header, reason)] = None

    def _place(self, header: TensorHeader) -> None:
        place = self.names.find(header.name)
        if isinstance(place, LeftOut):
            self.left_out.append((header, place))
            return
        if place is None:
            self.unexpected.append(header.name)
            return
        if place.part is Part.SCALE and place.specs[0].storage not in _QUANTISABLE:
            self.unexpected.append(header.name)
            return
        for half, spec in enumerate(place.specs):
            self._assign(self.stored[spec.name], place, half, header)

    def _assign(self, stored: Stored, place: Place, half: int, header: TensorHeader) -> None:
        part = stored.weights if place.part is Part.WEIGHT else stored.scales
        # A stack holds every expert, so it and a single expert's tensor exclude each other.
        any_expert = next(iter(part.values()), None)
        twin = any_expert if place.fused else part.get(place.expert, part.get(None))
        if twin is not None:
            self.wrong(header, f"is the same parameter as {printable(twin.name)} ({twin.file})")
            return
        part[place.expert] = header
        if place.fused:
            stored.fused, stored.half = len(place.specs), half

    def _check(self, stored: Stored) -> None:
        for expert, header in stored.scales.items():
            if expert not in stored.weights:
                self.wrong(header, "is a scale without a weight")
        for expert, header in stored.weights.items():
            self._check_weight(stored, header, stored.scales.get(expert))
        dtypes = Counter(header.dtype for header in stored.weights.values())
        if len(dtypes) > 1:
            usual = dtypes.most_common(1)[0][0]
            for header in stored.weights.values():
                if header.dtype != usual:
                    self.wrong(header, f"is {header.dtype}, the layer's other experts are {usual}")

    def _check_weight(
        self, stored: Stored, header: TensorHeader, scale: TensorHeader | None
    ) -> None:
        storage = stored.spec.storage
        quantised = storage in _QUANTISABLE and header.dtype in FP8_DTYPES + FP4_DTYPES
        allowed = INTEGER_DTYPES if storage is Storage.INTEGER else PLAIN_DTYPES
        if storage not in _QUANTISABLE and header.dtype not in allowed:
            self.wrong(header, f"is {header.dtype}, expected {' or '.join(allowed)}")
        elif header.dtype in allowed or header.dtype in FP8_DTYPES:
            self._expect_shape(header, stored.header_shape(stored.spec.checkpoint_shape))
        if quantised and scale is None:
            self.wrong(header, f"is {header.dtype} without a scale")
        if header.dtype in allowed and scale is not None:
            self.wrong(scale, f"is a scale, but its weight is plain {header.dtype}")

    def _expect_shape(self, header: TensorHeader, expected: tuple[int, ...]) -> None:
        if header.shape != expected:
            self.wrong(header, f"has shape {list(header.shape)}, expected {list(expected)}")

    def _check_copies(self) -> None:
        """What is left out as a copy must at least look like one."""
        for header, left_out in self.left_out:
            if left_out.twin is None:
                continue
            twin = self.stored[left_out.twin.name].weights.get(None)
            if twin is not None and (header.dtype, header.shape) != (twin.dtype, twin.shape):
                self.wrong(
                    header,
                    f"is {header.dtype} {list(header.shape)}, expected a copy of {twin.name}, "
                    f"which is {twin.dtype} {list(twin.shape)}",
                )

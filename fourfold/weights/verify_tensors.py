"""Every tensor of a checkpoint against the model: name, shape, dtype, scale partner, coverage, scheme.

Contract: `check_tensors` turns what loading would refuse (coverage.py, quant/resolve.py) into findings,
one for each tensor, and goes on; beyond that it points at what would load and is suspicious: a dtype
unlike that of the same tensor in the other layers. It asks once for each cause: what a lost file held
is not called missing, what a foreign scheme brings is not called unexpected. Headers only; torch-free.
"""

from __future__ import annotations

import difflib
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from fourfold.core.checkpoint import TensorHeader
from fourfold.core.config import ModelConfig
from fourfold.core.errors import FourfoldError
from fourfold.core.findings import Finding, Severity
from fourfold.core.parameters import Role, Storage
from fourfold.quant.headers import E8M0, FP8_BLOCK, FP8_BLOCK_SIZE, MXFP4_GROUP, PLAIN
from fourfold.quant.resolve import Decision, Fault, Resolution, resolve
from fourfold.weights.coverage import PLAIN_DTYPES, Matching, Stored
from fourfold.weights.header import printable
from fourfold.weights.names import Parsed, Part, Place, native_weight_names, parse
from fourfold.weights.verify_files import GET_AGAIN, FoundFiles

_MOST_SUGGESTIONS = 200  # unexpected names for which the nearest missing one is looked for
_CONVERT = "convert the tensor, or get the file that the model was released with"


@dataclass(frozen=True)
class CheckedTensors:
    """The findings, how each quantisable parameter is stored (None: that cannot be told), and the place
    of each tensor."""

    findings: tuple[Finding, ...]
    resolution: Resolution | None
    matching: Matching


def check_tensors(
    config: ModelConfig, files: FoundFiles, parsed: Mapping[str, Parsed], config_file: str
) -> CheckedTensors:
    """`config` is what the tensors were written for, `parsed` what their names say, `config_file` the
    file that `config` was read from."""
    check = _Check(config, files, parsed, config_file)
    check.run()
    return CheckedTensors(tuple(check.findings), check.resolution, check.matching)


class _Check:
    def __init__(
        self,
        config: ModelConfig,
        files: FoundFiles,
        parsed: Mapping[str, Parsed],
        config_file: str,
    ):
        self.config, self.files, self.config_file = config, files, config_file
        self.parsed = parsed
        self.matching = Matching(files.directory, files.headers, config)
        self.findings: list[Finding] = []
        self.resolution: Resolution | None = None
        self._blamed: set[str] = set()  # tensors that have their error

    def run(self) -> None:
        """All checks, the ones that explain most first."""
        self._schemes()
        if self.resolution is not None:
            for stored in self.matching.stored.values():
                self._check_shapes(stored, self.resolution.of(stored.spec))
        self._mismatched()
        self._unexpected_and_missing()
        self._uniform()
        self._left_out()

    def _blame(self, header: TensorHeader, message: str, fix: str) -> None:
        """An error of this tensor, unless it has one."""
        if header.name not in self._blamed:
            self._blamed.add(header.name)
            self._add(Severity.ERROR, header, message, fix)

    def _add(self, severity: Severity, header: TensorHeader, message: str, fix: str) -> None:
        self.findings.append(
            Finding(
                severity, message, printable(header.name), header.file, header.offset_begin, fix
            )
        )

    def _schemes(self) -> None:
        """What the headers and the configuration say of storage, and where they contradict."""
        contradicted: dict[str, list[Fault]] = defaultdict(list)

        def report(fault: Fault) -> None:
            if fault.opinion is not None:
                contradicted[fault.opinion.reason].append(fault)
            elif fault.header is not None:
                self._blame(fault.header, _without(fault.header, fault.text), _CONVERT)
            else:
                self._error(fault.text, fix=_CONVERT)

        try:
            self.resolution = resolve(
                self.config, self.files.headers, "auto", native_weight_names, report
            )
        except FourfoldError as error:
            self._error(str(error), file=self.config_file, fix="correct the field")
        for faults in contradicted.values():
            layers = len({fault.header.file for fault in faults if fault.header})
            more = f" (and in {layers - 1} more files)" if layers > 1 else ""
            self._error(faults[0].text + more, file=self.config_file, fix="correct the field")

    def _error(self, message: str, **where: Any) -> None:
        finding = Finding(Severity.ERROR, message, **where)
        if finding not in self.findings:
            self.findings.append(finding)

    def _check_shapes(self, stored: Stored, decision: Decision | None) -> None:
        """Codes and scales of one quantised parameter."""
        if decision is None or decision.scheme == PLAIN:
            return
        shape = stored.spec.checkpoint_shape
        block = (FP8_BLOCK_SIZE,) * 2 if decision.scheme == FP8_BLOCK else (1, MXFP4_GROUP)
        if stored.fused > 1 and shape[0] % block[0]:
            for header in stored.weights.values():
                what = (
                    f"two matrices of {shape[0]} rows, which do not end with a block of {block[0]}"
                )
                self._blame(header, f"stacks {what}", _CONVERT)
        for header in stored.weights.values():
            packed = decision.scheme != FP8_BLOCK and header.dtype != "F4"
            codes = (*shape[:-1], shape[-1] // 2) if packed else shape
            if header.dtype not in PLAIN_DTYPES:
                self._expect(header, stored.header_shape(codes))
        scales = (*shape[:-2], -(-shape[-2] // block[0]), -(-shape[-1] // block[1]))
        allowed = ("F8_E8M0", "U8") if decision.scale_format == E8M0 else ("F32",)
        for header in stored.scales.values():
            self._expect(header, stored.header_shape(scales))
            if header.dtype not in allowed:
                self._blame(header, f"is {header.dtype}, expected {' or '.join(allowed)}", _CONVERT)

    def _expect(self, header: TensorHeader, shape: tuple[int, ...]) -> None:
        if header.shape != shape:
            self._blame(
                header, f"has shape {list(header.shape)}, expected {list(shape)}", GET_AGAIN
            )

    def _mismatched(self) -> None:
        foreign = self._foreign_stems()
        for mismatch in self.matching.mismatched:
            header = mismatch.header
            if header.name.rpartition(".")[0] not in foreign:
                self._blame(header, mismatch.reason, GET_AGAIN)

    def _foreign_stems(self) -> set[str]:
        """Names up to the last dot of weights whose scheme is refused by name."""
        if not self.matching.has_foreign_kinds():
            return set()
        return {name.rpartition(".")[0] for name in self._blamed}

    def _unexpected_and_missing(self) -> None:
        foreign, unseen = self._foreign_stems(), self._unseen()
        missing = [name for name in self.matching.missing if name not in unseen]
        if self.files.lost and self.files.listed is None and missing:
            text = f"{len(missing)} tensors were not found; files that cannot be read may hold them"
            self.findings.append(Finding(Severity.NOTE, text))
            missing = []
        unexpected = [
            name
            for name in self.matching.unexpected
            if name.rpartition(".")[0] not in foreign and name not in self._blamed
        ]
        suggest = len(unexpected) <= _MOST_SUGGESTIONS
        for name in unexpected:
            header = self.files.headers[name]
            near = difflib.get_close_matches(name, missing, 1, 0.7) if suggest and missing else []
            fix = f"rename it to {near[0]}" if near else "remove it, or get the right file"
            self._add(Severity.ERROR, header, "is no tensor of this model", fix)
        if missing:
            self._missing(missing)

    def _missing(self, missing: list[str]) -> None:
        homes = {h.name.rpartition(".")[0]: h.file for h in self.files.headers.values()}
        layers = {
            parsed.prefix: self.files.headers[name].file for name, parsed in self.parsed.items()
        }
        for name in missing:
            stem = name.rpartition(".")[0]
            file = (
                homes.get(stem) or layers.get(_layer(name)) or (self.files.listed or {}).get(name)
            )
            text = "is missing" + (" from the file of its layer" if file else "")
            self.findings.append(Finding(Severity.ERROR, text, name, file, None, GET_AGAIN))

    def _unseen(self) -> set[str]:
        """Native names of the weights that lost files should hold."""
        native: set[str] = set()
        for name in self.files.unseen:
            place = self.matching.names.find(name)
            if not isinstance(place, Place) or place.part is not Part.WEIGHT:
                continue
            for spec in place.specs:
                stored = self.matching.stored[spec.name]
                experts = range(spec.shape[0]) if place.fused else (place.expert,)
                native.update(stored.name(expert) for expert in experts)
        return native

    def _uniform(self) -> None:
        """The same tensor of other layers has another dtype. The last norm counts as one of a layer."""
        groups: dict[object, list[TensorHeader]] = defaultdict(list)
        for name, parsed in self.parsed.items():
            if name not in self._blamed:
                role = Role.ATTN_NORM if parsed.roles[0] is Role.NORM else parsed.roles[0]
                main = not parsed.prefix.startswith("mtp.")
                groups[role, parsed.part, main].append(self.files.headers[name])
        for group in groups.values():
            dtypes = Counter(header.dtype for header in group)
            usual, count = dtypes.most_common(1)[0]
            for header in group if len(dtypes) > 1 else ():
                if header.dtype != usual and dtypes[header.dtype] * 4 <= count:
                    text = f"is {header.dtype}; the same tensors elsewhere are {usual}"
                    self._add(Severity.WARNING, header, text, GET_AGAIN)

    def _left_out(self) -> None:
        groups: dict[tuple[str, str], list[TensorHeader]] = defaultdict(list)
        for header, left_out in self.matching.left_out:
            groups[left_out.group, left_out.reason].append(header)
        for (group, reason), members in groups.items():
            size, count = sum(header.nbytes for header in members), len(members)
            text = f"{count} tensor{'s' if count > 1 else ''}, {size} bytes, not loaded: {reason}"
            self.findings.append(Finding(Severity.NOTE, text, group, members[0].file))


def _layer(name: str) -> str:
    parsed = parse(name)
    return parsed.prefix if parsed is not None else ""


def _without(header: TensorHeader, text: str) -> str:
    """A sentence that begins with a header, without it."""
    return text.removeprefix(str(header)).strip() or text


def storage_lines(resolution: Resolution | None) -> Iterator[str]:
    """For a person: how the weights are stored."""
    if resolution is not None:
        groups: Counter[tuple[str, str, str | None]] = Counter()
        for (_, role), one in resolution.decisions.items():
            kind = "routed experts" if role.storage is Storage.EXPERT else "linear layers"
            groups[kind, one.scheme, one.scale_format] += 1
        for (kind, scheme, scales), count in sorted(groups.items(), reverse=True):
            with_scales = f", {scales} scales" if scales else ""
            yield f"{kind}: {scheme}{with_scales} ({count} parameters)"

"""`fourfold verify --deep`: every byte of a checkpoint read once, and what is wrong with the numbers.

Contract: `read_everything` looks at each tensor piece by piece, several files at a time, and names the
first bad byte of each: NaN and infinity, the codes that mean NaN, scales that are none, expert ids
that no expert has, blocks of zeros that an interrupted download leaves. On the way it hashes the
files if asked. Amplitudes are verify_amplitude.py's. Without torch.

    file ─ map ─ pieces of 16 MiB ─┬─ SHA-256
                                   └─ check by dtype ─► Observed ─► findings
"""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fourfold.core.checkpoint import TensorHeader
from fourfold.core.findings import Finding, Severity
from fourfold.core.parameters import EXPERT_ROLES, Role
from fourfold.weights.coverage import FP4_DTYPES, Matching
from fourfold.weights.header import printable
from fourfold.weights.names import FUSED_SCALE, Parsed, Part
from fourfold.weights.verify import Verification
from fourfold.weights.verify_amplitude import amplitudes
from fourfold.weights.verify_files import GET_AGAIN, FoundFiles

_PIECE = 1 << 24
_ZERO_BLOCK = 1 << 16
_MOST_THREADS = 8
_MOST_TINY = 0.01  # share of scales that may be the smallest there is: groups of zeros have it
STRIP_SPAN = 14
"""An FP4 strip of 128 inputs is exact in FP8 if its scales differ by at most 2^14 (ops/quantize.py)."""
BLOCK_SPAN = 6
"""The same for a block of 128×128 under one scale, as DeepSeek's own converter makes them."""

Bytes = NDArray[np.uint8]
Progress = Callable[[int, int], None]

# dtype -> (width, mask): a number whose bits under the mask are all set is NaN or infinite.
_EXPONENTS: Mapping[str, tuple[type[np.unsignedinteger[Any]], int]] = {
    "BF16": (np.uint16, 0x7F80),
    "F16": (np.uint16, 0x7C00),
    "F32": (np.uint32, 0x7F80_0000),
    "F64": (np.uint64, 0x7FF0_0000_0000_0000),
    "F8_E4M3": (np.uint8, 0x7F),  # E4M3 has no infinity: these two codes are its NaN
}


@dataclass
class Observed:
    """What was seen of one tensor: bad items with the byte of the first, zero bytes likewise."""

    bad: int = 0
    bad_at: int | None = None
    zeros: int = 0
    zeros_at: int | None = None
    strips: int = 0
    uneven_strips: int = 0
    blocks: int = 0
    uneven_blocks: int = 0
    lowest: int | None = None
    highest: int | None = None
    tiny: int = 0

    def add_bad(self, where: NDArray[np.bool_], start: int, size: int) -> None:
        """Count bad items of `size` bytes each; the first stands at byte `start`."""
        count = int(np.count_nonzero(where))
        if count and self.bad_at is None:
            self.bad_at = start + int(where.argmax()) * size
        self.bad += count


@dataclass
class DeepReading:
    """`observed` by tensor; `digests` of the weight files (empty unless asked for)."""

    observed: dict[str, Observed] = field(default_factory=dict)
    digests: dict[str, str] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)


def read_everything(
    files: FoundFiles,
    parsed: Mapping[str, Parsed],
    num_experts: int | None,
    hashing: bool,
    progress: Progress | None = None,
) -> DeepReading:
    """Read all files of `files`; `parsed` as for the other checks, `num_experts` bounds hash routes."""
    reading, lock = DeepReading(), threading.Lock()
    total, done = sum(files.files.values()), 0

    def advance(count: int) -> None:
        nonlocal done
        with lock:
            done += count
            if progress is not None:
                progress(min(done, total), total)

    by_file: dict[str, list[TensorHeader]] = {name: [] for name in files.files}
    for header in files.headers.values():
        by_file.setdefault(header.file, []).append(header)

    fp4_scales = set(_fp4_scales(files.headers, parsed))

    def one(name: str) -> None:
        path = files.directory / name
        reader = _FileReader(path, parsed, fp4_scales, num_experts, hashing, advance)
        try:
            digest = reader.run(by_file[name])
        except OSError as error:
            fault = Finding(
                Severity.ERROR, f"cannot be read: {error.strerror}", file=name, fix=GET_AGAIN
            )
            with lock:
                reading.findings.append(fault)
            return
        with lock:
            reading.observed.update(reader.observed)
            if digest is not None:
                reading.digests[name] = digest

    with ThreadPoolExecutor(max_workers=min(_MOST_THREADS, os.cpu_count() or 1)) as pool:
        list(pool.map(one, files.files))
    for name in sorted(reading.observed):
        header = files.headers[name]
        reading.findings += _judge(header, parsed.get(name), reading.observed[name])
    reading.findings += _ranges(parsed, reading.observed)
    reading.findings += _exactness(files, reading.observed)
    return reading


def _fp4_scales(headers: Mapping[str, TensorHeader], parsed: Mapping[str, Parsed]) -> Iterator[str]:
    """Scales of weights that are packed FP4."""
    for name, each in parsed.items():
        if each.part is Part.SCALE:
            stem = name.rpartition(".")[0]
            weight = headers.get(f"{stem}.weight") or headers.get(name.removesuffix(FUSED_SCALE))
            if weight is not None and weight.dtype in FP4_DTYPES and len(headers[name].shape) > 1:
                yield name


class _FileReader:
    """One file, from its first byte to its last."""

    def __init__(
        self,
        path: Path,
        parsed: Mapping[str, Parsed],
        fp4_scales: Collection[str],
        num_experts: int | None,
        hashing: bool,
        advance: Callable[[int], None],
    ):
        self.path, self.parsed, self.num_experts, self.advance = path, parsed, num_experts, advance
        self.fp4_scales = fp4_scales
        self.digest = hashlib.sha256() if hashing else None
        self.seen = 0  # bytes hashed and counted so far
        self.observed: dict[str, Observed] = {}

    def run(self, headers: Iterable[TensorHeader]) -> str | None:
        """Look at all tensors; the file's SHA-256 if asked for."""
        if self.path.stat().st_size == 0:
            return self.digest.hexdigest() if self.digest else None
        data = np.memmap(self.path, dtype=np.uint8, mode="r")
        for header in sorted(headers, key=lambda header: header.offset_begin):
            self.observed[header.name] = seen = Observed()
            check = _checker(header, self.parsed.get(header.name), self.num_experts)
            begin, end = header.offset_begin, min(header.offset_end, data.size)
            for low in range(begin, end, _PIECE):
                high = min(low + _PIECE, end)
                piece = data[low:high]
                check(piece, low, seen)
                _zeros(piece, low, seen)
                self._pass(data, high)
            if header.name in self.fp4_scales and end == header.offset_end:
                _spans(data[begin:end], header, seen)
        self._pass(data, data.size)
        return self.digest.hexdigest() if self.digest else None

    def _pass(self, data: Bytes, end: int) -> None:
        """Hash and count what lies before `end` and was not yet."""
        if end <= self.seen:
            return
        if self.digest is not None:
            for low in range(self.seen, end, _PIECE):
                self.digest.update(data[low : min(low + _PIECE, end)].data)
        self.advance(end - self.seen)
        self.seen = end


Check = Callable[[Bytes, int, Observed], None]


def _is_scale(parsed: Parsed | None) -> bool:
    return parsed is not None and parsed.part is Part.SCALE


def _is_e8m0_scale(header: TensorHeader, parsed: Parsed | None) -> bool:
    return header.dtype == "F8_E8M0" or (header.dtype == "U8" and _is_scale(parsed))


def _checker(header: TensorHeader, parsed: Parsed | None, num_experts: int | None) -> Check:
    """What to look for in a tensor of this kind."""
    if _is_e8m0_scale(header, parsed):
        return _e8m0
    if header.dtype == "F32" and _is_scale(parsed):
        return _float_scales
    if header.dtype in ("I64", "I32") and parsed is not None and parsed.roles[0] is Role.TID2EID:
        kind = np.int64 if header.dtype == "I64" else np.int32
        return lambda piece, start, seen: _ids(piece, start, seen, kind, num_experts)
    if header.dtype in _EXPONENTS:
        width, mask = _EXPONENTS[header.dtype]
        return lambda piece, start, seen: _finite(piece, start, seen, width, mask)
    return lambda piece, start, seen: None


def _finite(piece: Bytes, start: int, seen: Observed, width: Any, mask: int) -> None:
    size = np.dtype(width).itemsize
    items = piece[: piece.size // size * size].view(width)
    # The largest number under the mask says whether to look for where it is.
    if items.size and int((items & width(mask)).max()) == mask:
        seen.add_bad((items & width(mask)) == width(mask), start, size)


def _e8m0(piece: Bytes, start: int, seen: Observed) -> None:
    seen.add_bad(piece == 255, start, 1)
    if not piece.size:
        return
    low, high = int(piece.min()) - 127, int(piece.max()) - 127
    seen.lowest = low if seen.lowest is None else min(low, seen.lowest)
    seen.highest = high if seen.highest is None else max(high, seen.highest)
    if low == -127:
        seen.tiny += int(np.count_nonzero(piece == 0))


def _float_scales(piece: Bytes, start: int, seen: Observed) -> None:
    values = piece[: piece.size // 4 * 4].view(np.float32)
    bad = ~(np.isfinite(values) & (values > 0))
    seen.add_bad(bad, start, 4)
    good = values[~bad]
    if good.size:
        exponents = np.frexp(good)[1] - 1
        low, high = int(exponents.min()), int(exponents.max())
        seen.lowest = low if seen.lowest is None else min(low, seen.lowest)
        seen.highest = high if seen.highest is None else max(high, seen.highest)


def _ids(piece: Bytes, start: int, seen: Observed, kind: Any, num_experts: int | None) -> None:
    size = np.dtype(kind).itemsize
    ids = piece[: piece.size // size * size].view(kind)
    if num_experts is not None:
        seen.add_bad((ids < 0) | (ids >= num_experts), start, size)


def _zeros(piece: Bytes, start: int, seen: Observed) -> None:
    """Whole blocks of 64 KiB without a bit set."""
    count = piece.size // _ZERO_BLOCK
    blocks = piece[: count * _ZERO_BLOCK].view(np.uint64).reshape(count, _ZERO_BLOCK // 8)
    # Few blocks begin with a zero word; only those are looked at whole.
    for number in np.flatnonzero(blocks[:, 0] == 0):
        if not blocks[number].any():
            if seen.zeros_at is None:
                seen.zeros_at = start + int(number) * _ZERO_BLOCK
            seen.zeros += _ZERO_BLOCK


def _spans(data: Bytes, header: TensorHeader, seen: Observed) -> None:
    """How far apart the scales of FP4 groups lie, over 128 inputs and over 128×128 blocks."""
    scale = data.reshape(-1, *header.shape[-2:])
    for matrix in scale:
        rows, groups = matrix.shape
        padded = np.pad(matrix, ((0, 0), (0, -groups % 4)), mode="edge")
        strips = padded.reshape(rows, -1, 4)
        top, bottom = strips.max(2), strips.min(2)
        seen.strips += top.size
        seen.uneven_strips += int(np.count_nonzero(top - bottom > STRIP_SPAN))
        tall = np.arange(0, rows, 128)
        top, bottom = np.maximum.reduceat(top, tall, 0), np.minimum.reduceat(bottom, tall, 0)
        seen.blocks += top.size
        seen.uneven_blocks += int(np.count_nonzero(top - bottom > BLOCK_SPAN))


def _judge(header: TensorHeader, parsed: Parsed | None, seen: Observed) -> Iterator[Finding]:
    name = printable(header.name)
    if seen.bad:
        if _is_scale(parsed) or header.dtype == "F8_E8M0":
            what = "scales that are NaN, infinite, zero or negative"
        elif header.dtype == "F8_E4M3":
            what = "FP8 codes 0x7F or 0xFF, which are NaN"
        elif header.dtype in ("I64", "I32"):
            what = "ids of experts that do not exist"
        else:
            what = "values that are NaN or infinite"
        text = f"holds {seen.bad} {what}"
        yield Finding(Severity.ERROR, text, name, header.file, seen.bad_at, GET_AGAIN)
    if seen.zeros:
        text = f"{seen.zeros} bytes are zero in whole blocks of 64 KiB: data that never arrived?"
        yield Finding(Severity.WARNING, text, name, header.file, seen.zeros_at, GET_AGAIN)
    if header.dtype == "F8_E8M0" and seen.tiny > _MOST_TINY * header.numel and not seen.zeros:
        text = f"{seen.tiny} of {header.numel} scales are 2^-127, the smallest there is"
        yield Finding(Severity.WARNING, text, name, header.file, header.offset_begin, GET_AGAIN)


def _ranges(parsed: Mapping[str, Parsed], observed: Mapping[str, Observed]) -> Iterator[Finding]:
    """From the smallest to the largest scale of each kind."""
    kinds: dict[str, list[int]] = {}
    for name, seen in observed.items():
        if seen.lowest is not None and seen.highest is not None and name in parsed:
            is_expert = parsed[name].roles[0] in EXPERT_ROLES
            kind = "routed experts" if is_expert else "linear layers"
            kinds.setdefault(kind, []).extend((seen.lowest, seen.highest))
    for kind, exponents in kinds.items():
        text = f"scales of {kind}: 2^{min(exponents)} to 2^{max(exponents)}"
        yield Finding(Severity.NOTE, text)


def _exactness(files: FoundFiles, observed: Mapping[str, Observed]) -> Iterator[Finding]:
    """What FP4 weights would lose as FP8."""
    strips = sum(seen.strips for seen in observed.values())
    if not strips:
        return
    uneven = sum(seen.uneven_strips for seen in observed.values())
    blocks = sum(seen.blocks for seen in observed.values())
    uneven_blocks = sum(seen.uneven_blocks for seen in observed.values())
    text = (
        f"FP4 as FP8: {strips - uneven:,} of {strips:,} strips of 128 inputs are exact, "
        f"{blocks - uneven_blocks:,} of {blocks:,} blocks of 128×128"
    )
    worst = max(observed, key=lambda name: observed[name].uneven_strips)
    first = files.headers[worst] if uneven else None
    yield Finding(
        Severity.NOTE,
        text + (f"; {printable(worst)} has most that are not" if uneven else ""),
        file=first.file if first else None,
    )


def deep_check(
    verified: Verification, hashing: bool, progress: Progress | None = None
) -> tuple[dict[str, str], list[Finding]]:
    """Read everything that `verified` found: (digests of the files, findings)."""
    files, model, checked = verified.files, verified.model, verified.checked
    experts = model.n_routed_experts if model is not None else None
    reading = read_everything(files, verified.parsed, experts, hashing, progress)
    findings = list(reading.findings)
    if checked is not None:
        faults = [f for f in (*verified.findings, *findings) if f.severity is not Severity.NOTE]
        cut = {f.file for f in faults if f.tensor is None}
        faulty = {f.tensor for f in faults if f.tensor is not None}
        faulty |= {printable(h.name) for h in files.headers.values() if h.file in cut}
        findings += amplitudes(files.directory, checked.matching, faulty)[1]
        findings += _copies(files, checked.matching)
    return reading.digests, findings


def _copies(files: FoundFiles, matching: Matching) -> Iterator[Finding]:
    """What is left out as a copy of another tensor should be one."""
    for header, left_out in matching.left_out:
        twin = left_out.twin and matching.stored[left_out.twin.name].weights.get(None)
        if not twin or twin.nbytes != header.nbytes:
            continue
        maps = [np.memmap(files.directory / h.file, np.uint8, "r") for h in (header, twin)]
        for low in range(0, header.nbytes, _PIECE):
            high = min(low + _PIECE, header.nbytes)
            mine = maps[0][header.offset_begin + low : header.offset_begin + high]
            theirs = maps[1][twin.offset_begin + low : twin.offset_begin + high]
            if not np.array_equal(mine, theirs):
                yield Finding(
                    Severity.WARNING,
                    f"is left out, but is no copy of {twin.name}: the MTP layer may draft worse",
                    printable(header.name),
                    header.file,
                    header.offset_begin + low,
                )
                break

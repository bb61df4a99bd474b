"""Open a checkpoint by its headers, then load it: every tensor used exactly once, or an error.

Contract: `open_checkpoint` reads headers alone and proves that they fit the configuration (names,
shapes, dtypes, scale partners, coverage); `load` then copies the data, layer by layer, and returns
one weight for each logical parameter. Codes stay codes: FP8, FP4 and E8M0 bytes are copied as
bytes, with negative zero rewritten to zero, and only core/tensor.py's typed `QuantTensor` joins
them to a scale. Nothing is unpickled and nothing from a checkpoint is executed. It knows no
spelling of a name (weights/names.py) and does not decide how a weight is stored (quant/resolve.py).

      headers ──► Matching ──► resolve ──► CheckpointPlan ──► load ──► {parameter name: Weight}
      index.py    coverage.py  quant/      StoredParameter    raw.py
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import torch
from torch import Tensor

from fourfold.core.checkpoint import TensorHeader
from fourfold.core.config import ModelConfig, expect
from fourfold.core.errors import CheckpointError, QuantizationError
from fourfold.core.parameters import ParamSpec, Storage
from fourfold.core.tensor import QuantScheme, QuantTensor, Weight
from fourfold.quant.headers import E8M0
from fourfold.quant.resolve import Decision, Resolution, resolve
from fourfold.quant.schemes import SCHEMES
from fourfold.weights.coverage import Matching, Source, Stored, may_be_stale
from fourfold.weights.index import CheckpointIndex, read_index
from fourfold.weights.names import native_weight_names
from fourfold.weights.raw import STORED_DTYPES, MappedFiles, to_float

Progress = Callable[[str, int, int], None]

MODEL_DTYPES = (torch.bfloat16, torch.float32, torch.float64)
_E8M0_DTYPES = ("F8_E8M0", "U8")
_SAMPLE_BYTES = 65536


@dataclass(frozen=True, slots=True)
class StoredParameter:
    """Where one parameter's bytes stand. `scheme` is None for a plain tensor; `weights` and
    `scales` have one source for each expert, or one in all."""

    spec: ParamSpec
    scheme: QuantScheme | None
    weights: tuple[Source, ...]
    scales: tuple[Source, ...]

    @property
    def nbytes(self) -> int:
        """How many bytes of the files it is made of."""
        return sum(source.end - source.begin for source in self.weights + self.scales)


@dataclass(frozen=True)
class CheckpointPlan:
    """A checkpoint whose headers fit its configuration, ready to load.

    `parameters` is in inventory order. `left_out` are known tensors that are not loaded; `notes`
    say so, and other things a user should see.
    """

    index: CheckpointIndex
    config: ModelConfig
    resolution: Resolution
    parameters: tuple[StoredParameter, ...]
    left_out: tuple[TensorHeader, ...]
    notes: tuple[str, ...]

    @property
    def nbytes(self) -> int:
        """Bytes that `load` reads."""
        return sum(parameter.nbytes for parameter in self.parameters)


def open_checkpoint(
    directory: Path | str, config: ModelConfig, expert_dtype_override: str = "auto"
) -> CheckpointPlan:
    """Check every header of the checkpoint in `directory` against `config`; no tensor is loaded.

    `expert_dtype_override` is the value of `--expert-dtype`. Raises `CheckpointError` with every
    missing, unexpected and mismatched tensor, or `QuantizationError` if a scheme is contradictory
    or unsupported.
    """
    index = read_index(Path(directory), may_be_stale)
    matching = Matching(index.directory, index.headers, config)
    if not matching.is_complete and not matching.has_foreign_kinds():
        raise matching.error()
    # A scheme that brings tensors of its own is refused by its name, not as a list of its tensors.
    resolution = resolve(config, index.headers, expert_dtype_override, native_weight_names)
    if not matching.is_complete:
        raise matching.error()
    schemes = {
        name: _scheme(resolution.of(stored.spec)) for name, stored in matching.stored.items()
    }
    for name, stored in matching.stored.items():
        _check_quantised(matching, stored, schemes[name], resolution.of(stored.spec))
    if not matching.is_complete:
        raise matching.error()
    parameters = tuple(
        StoredParameter(
            stored.spec,
            schemes[name],
            stored.sources(stored.weights),
            stored.sources(stored.scales) if schemes[name] else (),
        )
        for name, stored in matching.stored.items()
    )
    left_out = tuple(header for header, _ in matching.left_out)
    notes = index.notes + tuple(_left_out_notes(index, matching))
    return CheckpointPlan(index, config, resolution, parameters, left_out, notes)


def load(
    plan: CheckpointPlan,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.bfloat16,
    progress: Progress | None = None,
    activation_quantization: bool = True,
) -> dict[str, Weight]:
    """All weights of `plan` on `device`, by `ParamSpec.name`.

    Plain weights come in `dtype` (bfloat16, float32 or float64), parameters that are always float32
    in float32 (float64 with a float64 model), integers in int64, quantised ones as `QuantTensor`
    with codes and scales as stored; experts stacked `[E, …]`. `progress(prefix, bytes_done,
    bytes_total)` is called after each layer. Raises `CheckpointError` or `QuantizationError` naming
    tensor and file if a value is NaN, infinite or out of range.
    """
    expect(dtype in MODEL_DTYPES, "dtype", f"one of {', '.join(map(str, MODEL_DTYPES))}", dtype)
    total, done = plan.nbytes, 0
    weights: dict[str, Weight] = {}
    for prefix, group in groupby(plan.parameters, key=lambda parameter: parameter.spec.prefix):
        with MappedFiles(plan.index.directory) as files:
            for parameter in group:
                weight = _read(files, parameter, plan.config, dtype, activation_quantization)
                weights[parameter.spec.name] = weight.to(device)
                done += parameter.nbytes
        if progress is not None:
            progress(prefix, done, total)
    return weights


def _scheme(decision: Decision | None) -> QuantScheme | None:
    return SCHEMES.get(decision.scheme) if decision is not None else None


def _check_quantised(
    matching: Matching, stored: Stored, scheme: QuantScheme | None, decision: Decision | None
) -> None:
    """Shapes and dtypes of the codes and scales of one quantised parameter."""
    if scheme is None or decision is None:
        return
    shape = stored.spec.checkpoint_shape
    scale_shape = scheme.scale_shape(shape)
    if stored.fused > 1 and shape[0] % scheme.block[0]:
        for header in stored.weights.values():
            matching.wrong(
                header,
                f"stacks two matrices of {shape[0]} rows, which do not end with a block of "
                f"{scheme.block[0]}",
            )
    for header in stored.weights.values():
        codes_shape = shape if header.dtype == "F4" else scheme.codes_shape(shape)
        expected = stored.header_shape(codes_shape)
        if header.shape != expected:
            matching.wrong(header, f"has shape {list(header.shape)}, expected {list(expected)}")
    expected = stored.header_shape(scale_shape)
    allowed = _E8M0_DTYPES if decision.scale_format == E8M0 else ("F32",)
    for header in stored.scales.values():
        if header.shape != expected:
            matching.wrong(header, f"has shape {list(header.shape)}, expected {list(expected)}")
        if header.dtype not in allowed:
            matching.wrong(header, f"is {header.dtype}, expected {' or '.join(allowed)}")


def _left_out_notes(index: CheckpointIndex, matching: Matching) -> Iterator[str]:
    by_group = groupby(
        sorted(matching.left_out, key=lambda item: (item[1].reason, item[1].group)),
        key=lambda item: (item[1].reason, item[1].group),
    )
    for (reason, group), members in by_group:
        headers = [header for header, _ in members]
        size = sum(header.nbytes for header in headers)
        count = f"{len(headers)} tensor{'s' if len(headers) > 1 else ''}"
        yield f"left out {group} ({count}, {size} bytes): {reason}"
    with MappedFiles(index.directory) as files:
        for header, left_out in matching.left_out:
            if left_out.twin is None:
                continue
            twin = matching.stored[left_out.twin.name].weights[None]
            if not _same_ends(files, header, twin):
                yield (
                    f"{header.name} is left out, but is no copy of {twin.name}: the MTP layer may "
                    "draft worse than it could"
                )


def _same_ends(files: MappedFiles, first: TensorHeader, second: TensorHeader) -> bool:
    """Whether the first and the last bytes of two tensors of one size are equal."""
    size = min(first.nbytes, _SAMPLE_BYTES)
    for offset in (0, first.nbytes - size):
        samples = []
        for header in (first, second):
            sample, begin = torch.empty(size, dtype=torch.uint8), header.offset_begin + offset
            files.read_into(sample, header, begin, begin + size)
            samples.append(sample)
        if not torch.equal(*samples):
            return False
    return True


def _read(
    files: MappedFiles,
    parameter: StoredParameter,
    config: ModelConfig,
    dtype: torch.dtype,
    activation_quantization: bool,
) -> Weight:
    storage = parameter.spec.storage
    if parameter.scheme is not None:
        return _read_quantised(files, parameter, parameter.scheme, activation_quantization)
    if storage is Storage.INTEGER:
        return _read_expert_ids(files, parameter, config.n_routed_experts)
    if storage is Storage.FLOAT and dtype != torch.float64:
        dtype = torch.float32
    return _read_plain(files, parameter, dtype)


def _parts(whole: Tensor, parameter: StoredParameter) -> Iterator[Tensor]:
    """The pieces of `whole` that the sources fill, one each."""
    stacked = parameter.spec.storage is Storage.EXPERT
    return iter(whole.unbind(0) if stacked else (whole,))


def _where(source: Source) -> str:
    return f"{source.header.name} ({source.header.file}, byte {source.begin})"


def _first(bad: Tensor) -> list[int]:
    return [int(i) for i in bad.nonzero()[0]]


def _read_plain(files: MappedFiles, parameter: StoredParameter, dtype: torch.dtype) -> Tensor:
    whole = torch.empty(parameter.spec.shape, dtype=dtype)
    for part, source in zip(_parts(whole, parameter), parameter.weights, strict=True):
        if STORED_DTYPES[source.header.dtype] == dtype:
            files.read_into(part, source.header, source.begin, source.end)
        else:
            stored = files.read(source.header, source.begin, source.end, tuple(part.shape))
            part[...] = to_float(stored, dtype)
        bad = ~torch.isfinite(part)
        if bool(bad.any()):
            first = _first(bad)
            raise CheckpointError(
                f"{_where(source)}: value at {first} is {float(part[tuple(first)])} in {dtype}; "
                "weights must be finite"
            )
    return whole


def _read_expert_ids(files: MappedFiles, parameter: StoredParameter, experts: int) -> Tensor:
    source = parameter.weights[0]
    stored = files.read(source.header, source.begin, source.end, parameter.spec.shape)
    ids = stored.to(torch.int64)
    bad = (ids < 0) | (ids >= experts)
    if bool(bad.any()):
        first = _first(bad)
        raise CheckpointError(
            f"{_where(source)}: expert id at {first} is {int(ids[tuple(first)])}, expected 0 to "
            f"{experts - 1}"
        )
    return ids


def _read_quantised(
    files: MappedFiles,
    parameter: StoredParameter,
    scheme: QuantScheme,
    activation_quantization: bool,
) -> QuantTensor:
    shape = parameter.spec.shape
    scale_dtype = STORED_DTYPES[parameter.scales[0].header.dtype]
    codes = torch.empty(scheme.codes_shape(shape), dtype=torch.uint8)
    scale = torch.empty(scheme.scale_shape(shape), dtype=scale_dtype)
    for code_part, scale_part, codes_from, scale_from in zip(
        _parts(codes, parameter),
        _parts(scale, parameter),
        parameter.weights,
        parameter.scales,
        strict=True,
    ):
        files.read_into(code_part, codes_from.header, codes_from.begin, codes_from.end)
        files.read_into(scale_part, scale_from.header, scale_from.begin, scale_from.end)
        scheme.validate(code_part, scale_part, _where(codes_from))
        scheme.canonicalize(code_part)
    try:
        return QuantTensor(codes, scale, scheme, shape, activation_quantization)
    except QuantizationError as error:
        raise QuantizationError(f"{parameter.spec.name}: {error}") from None

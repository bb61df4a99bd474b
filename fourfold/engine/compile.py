"""Ahead-of-time compilation: which binaries a model needs on a target, compiled here and now.

    geometry or checkpoint ─► parameters without data ─► forward passes of many shapes, recorded
                                                              │
                          report, filled cache ◄─ compile ◄─ variants, each with its op

Contract: needs no GPU and reads no weights. The variants are those that the plan's kernels launch over
every kind of layer, for batches of one token to the largest step. What a kernel is launched with depends
on shapes alone, so tensors without data are enough; an op body that reads device memory is replaced by
the shape of its result, as bodies launch no kernel.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fourfold import kernels
from fourfold.cache.pool import allocate
from fourfold.cache.rows import ring_rows
from fourfold.core.batch import Emission, ForwardBatch, ScheduledBatch, ScheduledSequence, lower
from fourfold.core.config import EngineConfig, ModelConfig
from fourfold.core.device import Arch, Device
from fourfold.core.parameters import ParamSpec, Storage, parameters
from fourfold.core.row_format import PAGE_TOKENS
from fourfold.core.state import ModelState
from fourfold.core.tensor import QuantScheme, QuantTensor, Weight, accumulate_dtype, dtype_name
from fourfold.dist.comm import SingleComm
from fourfold.engine.capacity import engine_row_formats
from fourfold.model.v4 import DeepseekV4
from fourfold.ops.catalog import OPS
from fourfold.ops.registry import Kernel, KernelPlan, Op
from fourfold.weights.geometry import config_json, with_storage
from fourfold.weights.layout import FORMATS
from fourfold.weights.loader import open_checkpoint
from fourfold.weights.locate import ModelLocation

if TYPE_CHECKING:
    from fourfold.kernels.variants import Variant

META = torch.device("meta")
_SLOTS, _PAGES = 4, 64  # their number is in no kernel's shape


@dataclass(frozen=True)
class Subject:
    """A model to compile for: its configuration and its parameters without data."""

    name: str
    config: ModelConfig
    parameters: Mapping[str, Weight]
    dtype: torch.dtype


@dataclass(frozen=True)
class Wanted:
    """A variant, and the op that launches it."""

    op: str
    variant: Variant


def _plain(spec: ParamSpec, dtype: torch.dtype) -> Tensor:
    kept = {Storage.INTEGER: torch.int64, Storage.FLOAT: accumulate_dtype(dtype)}
    return torch.empty(spec.shape, dtype=kept.get(spec.storage, dtype), device=META)


def _stored(spec: ParamSpec, scheme: QuantScheme, scale: torch.dtype) -> QuantTensor:
    codes = torch.empty(scheme.codes_shape(spec.shape), dtype=torch.uint8, device=META)
    scales = torch.empty(scheme.scale_shape(spec.shape), dtype=scale, device=META)
    return QuantTensor(codes, scales, scheme, spec.shape)


def subject_of_geometry(geometry: str, dtype: torch.dtype | None = None) -> Subject:
    """A released geometry stored as released. Raises `ConfigError` for an unknown name."""
    weights = FORMATS["fp8" if geometry == "flash-base" else "native"]
    data = with_storage(
        config_json(geometry, None), weights.torch_dtype, weights.expert_dtype, weights.quantised
    )
    config = ModelConfig.from_dict(data, "config.json").config
    dtype = dtype or getattr(torch, config.torch_dtype)
    made: dict[str, Weight] = {}
    for spec in parameters(config):
        scheme = weights.scheme(spec.role)
        made[spec.name] = _stored(spec, scheme, torch.uint8) if scheme else _plain(spec, dtype)
    return Subject(geometry, config, made, dtype)


def subject_of_checkpoint(location: ModelLocation, engine: EngineConfig) -> Subject:
    """A checkpoint, by its headers alone. Raises `FourfoldError`s."""
    config = ModelConfig.from_directory(location.directory).config
    dtype = getattr(torch, config.torch_dtype if engine.dtype == "auto" else engine.dtype)
    made: dict[str, Weight] = {}
    for stored in open_checkpoint(location.directory, config, engine.expert_dtype).parameters:
        spec = stored.spec
        if stored.scheme is None:
            made[spec.name] = _plain(spec, dtype)
        else:
            floats = stored.scales[0].header.dtype == "F32"
            made[spec.name] = _stored(spec, stored.scheme, torch.float32 if floats else torch.uint8)
    return Subject(location.name, config, made, dtype)


def _kinds_of_layers(subject: Subject) -> list[int]:
    """The first layer of every kind: compress ratio, routing, and how its weights are stored."""
    seen: dict[Any, int] = {}
    for number, ratio in enumerate(subject.config.compress_ratios):
        prefix = f"layers.{number}."
        stored = tuple(
            (name.removeprefix(prefix), _storage(weight))
            for name, weight in subject.parameters.items()
            if name.startswith(prefix)
        )
        seen.setdefault((ratio, subject.config.is_hash_layer(number), stored), number)
    return sorted(seen.values())


def _storage(weight: Weight) -> tuple[str, torch.dtype]:
    if isinstance(weight, QuantTensor):
        return weight.scheme.name, weight.scale.dtype
    return "plain", weight.dtype


# The results of op bodies that read device memory, from their arguments.
def _routed(y: Tensor, *rest: Any, **more: Any) -> Tensor:
    return y.new_empty(y.shape, dtype=accumulate_dtype(y.dtype))


def _attended(q: Tensor, *rest: Any, **more: Any) -> Tensor:
    return torch.empty_like(q)


def _listed(q: Tensor, weights: Any, keys: Any, batch: Any, ratio: int, topk: int) -> Tensor:
    return q.new_empty((q.shape[0], topk), dtype=torch.int64)


def _pooled(
    kv: Tensor,
    gate: Tensor,
    ape: Tensor,
    folds: Tensor,
    batch: ForwardBatch,
    emission: Emission,
    ratio: int,
    out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    rows = folds.new_empty((emission.tokens.shape[0], folds.shape[-1]), dtype=out_dtype)
    return rows, folds.new_empty((batch.fold_tokens.shape[0], *folds.shape[1:]))


def _nothing(*rest: Any, **more: Any) -> None:
    return None


_READS_DEVICE: Mapping[str, Callable[..., Any]] = {
    "routed_experts": _routed,
    "sparse_attention": _attended,
    "index_topk": _listed,
    "compress": _pooled,
    "store_rows": _nothing,
    "store_folds": _nothing,
}


def _without_data(value: Any) -> Any:
    """`value` with the tensors in it moved to "meta"."""
    if isinstance(value, Tensor):
        return value.to(META)
    if isinstance(value, Mapping):
        return {key: _without_data(each) for key, each in value.items()}
    if is_dataclass(value) and not isinstance(value, type):
        parts = {f.name: _without_data(getattr(value, f.name)) for f in fields(value)}
        return replace(value, **parts)
    return value


def token_counts(most: int) -> list[int]:
    """Batch sizes on both sides of every power of two up to `most`, with multiples of 16 and others."""
    found = set(range(1, 18))
    power = 16
    while power <= most:
        found |= {
            power - 1,
            power,
            power + 1,
            power + 16,
            power + power // 2,
            power + power // 2 + 1,
        }
        power *= 2
    return sorted({count for count in found if count < most} | {most})


def batches(
    config: ModelConfig, engine: EngineConfig, counts: Iterable[int]
) -> Iterator[ForwardBatch]:
    """A decode batch, one prompt and several chunks for each of `counts` tokens, without data."""
    drafts = engine.num_speculative_tokens
    for count in counts:
        shapes = [[(count, 0, 1)], [(count, 300, 0)]]
        if count <= engine.max_num_seqs:
            shapes.append([(1, 700, 1)] * count)
            if drafts:
                shapes.append([(1 + drafts, 700, 1 + drafts)] * count)
        if count > 2:
            shapes.append([(count - count // 3, 0, 1), (count // 3, 5000, 1)])
        for shape in shapes:
            yield batch_of(config, shape, drafts)


def batch_of(config: ModelConfig, runs: list[tuple[int, int, int]], drafts: int) -> ForwardBatch:
    """Runs of (tokens, computed before, logits wanted), without data."""
    scheduled = []
    for tokens, computed, wanted in runs:
        pages = range(-(-(tokens + computed) // PAGE_TOKENS))
        keeps = [(tokens - 1 - n, n) for n in range(min(1 + drafts, tokens))]
        scheduled.append(
            ScheduledSequence(
                [0] * tokens, computed, pages, 0, 0 if computed else -1, keeps, tokens - wanted
            )
        )
    ratios, rows = config.compress_ratios, ring_rows(config, drafts)
    batch = lower(ScheduledBatch(tuple(scheduled)), ratios, rows, torch.device("cpu"))
    moved: ForwardBatch = _without_data(batch)
    return moved


class Collector:
    """Runs a subject's layers over batches and collects what their kernels would compile.

    `plan` is the kernel plan of the target. Raises `KernelError` if a forced kernel cannot run there.
    """

    def __init__(self, subject: Subject, arch: Arch, engine: EngineConfig):
        self.subject, self.arch, self.engine = subject, arch, engine
        self._running: list[str] = []
        device, config = Device(arch, META, arch.name), subject.config
        available = [replace(k, run=self._noted(k)) for k in kernels.load(device)]
        ops = [self._shaped(op) for op in OPS]
        self.plan = KernelPlan.resolve(
            ops, available, device, config, subject.dtype, dict(engine.kernels)
        )
        layers = _kinds_of_layers(subject)
        self.model = DeepseekV4(config, subject.parameters, self.plan, SingleComm())
        self.model.layers = [self.model.layers[number] for number in layers]
        formats = engine_row_formats(engine, config, dtype_name(subject.dtype))
        drafts = engine.num_speculative_tokens
        state = allocate(config, formats, _PAGES, _SLOTS, subject.dtype, META, drafts)
        self.state = ModelState(tuple(state.layers[number] for number in layers), state.mtp)

    def _noted(self, kernel: Kernel) -> Callable[..., Any]:
        """The kernel's run, known to be running."""

        def run(*args: Any, **kwargs: Any) -> Any:
            self._running.append(f"{kernel.op}={kernel.name}")
            try:
                return kernel.run(*args, **kwargs)
            finally:
                self._running.pop()

        return run

    def _shaped(self, op: Op) -> Op:
        return replace(op, body=_READS_DEVICE.get(op.name, op.body))

    def collect(self, batches: Iterable[ForwardBatch]) -> list[Wanted]:
        """What is launched over `batches`, each variant once."""
        from fourfold.kernels.variants import record

        def running() -> str:
            return self._running[-1]

        with torch.inference_mode(), record(self.arch, running) as variants:
            for batch in batches:
                out = self.model.forward(batch, self.state)
                if self.engine.num_speculative_tokens:
                    mtp = self.model.mtp[0]
                    mtp.forward(out.streams, batch.token_ids, batch, self.state.mtp[0])
        return [Wanted(op, variant) for variant, op in variants.items()]

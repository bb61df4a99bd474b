"""Ahead-of-time compilation: which binaries a model needs on a target, compiled here and now.

    geometry or checkpoint ─► parameters without data ─► steps of many shapes, recorded
                                                              │
                          report, filled cache ◄─ compile ◄─ variants, each with its op

Contract: needs no GPU and reads no weights. The variants are those that the plan's kernels launch over
every kind of layer, for batches of one token to the largest step. What a kernel is launched with depends
on shapes alone, so tensors without data are enough; an op body that reads device memory is replaced by
the shape of its result, as bodies launch no kernel.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fourfold.cache.pool import allocate
from fourfold.core.batch import Emission, ForwardBatch
from fourfold.core.config import EngineConfig, ModelConfig
from fourfold.core.device import Arch, Device
from fourfold.core.parameters import ParamSpec, Storage, parameters
from fourfold.core.request import MAX_LOGPROBS
from fourfold.core.state import ModelState
from fourfold.core.tensor import (
    QuantScheme,
    QuantTensor,
    Weight,
    accumulate_dtype,
    dtype_name,
    named_dtype,
)
from fourfold.dist.comm import SingleComm
from fourfold.engine.capacity import engine_row_formats
from fourfold.engine.kernel_plan import plan_kernels
from fourfold.engine.loading import prepare
from fourfold.engine.runner import PROMPT_LOGPROB_ROWS, Runner
from fourfold.engine.slots import STOP_WIDTHS
from fourfold.engine.verdicts import Verdicts
from fourfold.model.v4 import DeepseekV4
from fourfold.ops.registry import Kernel, Op
from fourfold.ops.sampling import Adjustments
from fourfold.ops.step import Key, StepLayout
from fourfold.weights.geometry import config_json, with_storage
from fourfold.weights.layout import FORMATS, WeightFormat
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


def released(geometry: str) -> tuple[ModelConfig, WeightFormat]:
    """The configuration and the storage of a released geometry. Raises `ConfigError`."""
    weights = FORMATS["fp8" if geometry == "flash-base" else "native"]
    data = with_storage(
        config_json(geometry, None), weights.torch_dtype, weights.expert_dtype, weights.quantised
    )
    return ModelConfig.from_dict(data, "config.json").config, weights


def subject_of_geometry(geometry: str, dtype: torch.dtype | None = None) -> Subject:
    """A released geometry stored as released. Raises `ConfigError` for an unknown name."""
    config, weights = released(geometry)
    return subject_of(geometry, config, weights, dtype or named_dtype(config.torch_dtype))


def subject_of(
    name: str, config: ModelConfig, weights: WeightFormat, dtype: torch.dtype
) -> Subject:
    """A model of any configuration, stored as `weights`."""
    made: dict[str, Weight] = {}
    for spec in parameters(config):
        scheme = weights.scheme(spec.role)
        made[spec.name] = _stored(spec, scheme, torch.uint8) if scheme else _plain(spec, dtype)
    return Subject(name, config, made, dtype)


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
def _routed(
    y: Tensor,
    ids: Tensor,
    weights: Tensor,
    w1: Weight,
    w2: Weight,
    w3: Weight,
    limit: float,
    first_expert: int = 0,
    shared: Tensor | None = None,
) -> Tensor:
    dtype = accumulate_dtype(y.dtype) if shared is None else y.dtype
    return y.new_empty(y.shape, dtype=dtype)


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


def steps(engine: EngineConfig, counts: Iterable[int]) -> Iterator[Key]:
    """Steps of `counts` tokens each: decodes, a prompt's last and earlier chunks, several chunks."""
    drafts = engine.num_speculative_tokens
    for count in counts:
        yield [(count, 0, True)]
        yield [(count, 0, False)]
        if count <= engine.max_num_seqs:
            yield [(1 + drafts, drafts, True)] * count
        if count > 2:
            yield [(count - count // 3, 0, True), (count // 3, 0, False)]
    # A sequence that may have few more tokens, or had its drafts made by nobody, verifies fewer.
    for fewer in range(1, drafts + 1):
        yield [(1 + fewer, fewer, True), (1, 0, True)]
        yield [(1 + fewer, fewer, True), (3, 0, False)]


class Collector:
    """Runs steps of a subject's layers and collects what their kernels would compile.

    `plan` is the kernel plan of the target, `verdicts` as in `plan_kernels`. Raises `KernelError` if a
    forced kernel cannot run there.
    """

    def __init__(
        self,
        subject: Subject,
        arch: Arch,
        engine: EngineConfig,
        verdicts: Verdicts | None = None,
    ):
        self.subject, self.arch, self.engine = subject, arch, engine
        self._running: list[str] = []
        device, config = Device(arch, META, arch.name), subject.config
        self.plan, _ = plan_kernels(
            config,
            subject.dtype,
            device,
            engine.kernels,
            verdicts=verdicts,
            op_as=self._shaped,
            kernel_as=lambda kernel: replace(kernel, run=self._noted(kernel)),
        )
        layers = _kinds_of_layers(subject)
        weights = dict(subject.parameters)
        prepare(weights, config, self.plan)
        self.model = DeepseekV4(config, weights, self.plan, SingleComm())
        self.model.layers = [self.model.layers[number] for number in layers]
        formats = engine_row_formats(engine, config, dtype_name(subject.dtype))
        drafts = engine.num_speculative_tokens
        state = allocate(config, formats, _PAGES, _SLOTS, subject.dtype, META, drafts)
        state = ModelState(tuple(state.layers[number] for number in layers), state.mtp)
        self.runner = Runner(
            self.model,
            state,
            _SLOTS,
            engine.max_model_len or config.max_position_embeddings,
            META,
            None,
            drafts,
        )
        self._allowed = torch.empty(config.vocab_size, dtype=torch.bool, device=META)

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

    def collect(self, steps: Iterable[Key]) -> list[Wanted]:
        """What is launched in `steps`, each variant once."""
        from fourfold.kernels.variants import record

        def running() -> str:
            return self._running[-1]

        with torch.inference_mode(), record(self.arch, running) as variants:
            for key in steps:
                self._step(key)
            self._prompts()
        return [Wanted(op, variant) for variant, op in variants.items()]

    def _step(self, key: Key) -> None:
        """What the runner does in a step, and what requests may ask for beside."""
        runner, drafts = self.runner, self.engine.num_speculative_tokens
        layout = StepLayout.of(key, self.subject.config.compress_ratios, runner.ring_rows, META)
        slots = torch.empty(len(key), dtype=torch.int64, device=META)
        decodes = all(count == 1 + k for count, k, _ in key)
        known = None if decodes else slots.new_empty(sum(count for count, _, _ in key))
        placed = runner.forward(runner.slots.seats(layout, slots), known)
        after = None if not drafts or all(samples for _, _, samples in key) else slots
        # No kernel looks at both: each of them with one of the other is enough.
        for allowed, stops in zip((None, self._allowed), STOP_WIDTHS, strict=True):
            runner.allowed = runner.sampler.allowed = allowed
            placed = placed._replace(seats=runner.slots.seats(layout, slots, stops))
            runner.finish(placed, placed.logits, after)
        if placed.logits.shape[0]:
            self._asked(placed.logits)

    def _prompts(self) -> None:
        """Log probabilities of prompts: the head over more rows than a step has sequences."""
        config, dtype = self.subject.config, self.subject.dtype
        for count in token_counts(PROMPT_LOGPROB_ROWS):
            streams = torch.empty(
                count, config.hc_mult, config.hidden_size, dtype=dtype, device=META
            )
            logits = self.runner.model.head(streams)
            ids = torch.empty(count, dtype=torch.int64, device=META)
            self.plan.token_logprobs(logits, ids, 1)

    def _asked(self, logits: Tensor) -> None:
        """Penalties, masks and log probabilities."""
        rows = logits.new_empty(5, dtype=torch.int64)
        changes = Adjustments(rows, rows, logits.new_empty(5), logits.new_empty(5))
        masks = torch.empty(logits.shape, dtype=torch.bool, device=META)
        for change, allowed in ((changes, None), (changes, masks), (None, masks)):
            self.plan.adjust_logits(logits, change, allowed)
        ids = rows.new_empty(logits.shape[0])
        for count in range(MAX_LOGPROBS + 1):
            self.plan.token_logprobs(logits, ids, count)

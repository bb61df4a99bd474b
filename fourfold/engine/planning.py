"""`fourfold plan`: what a model needs and what fits, for GPUs that need not be here.

    config, headers ─► weights a rank ─┐
    GPU's memory ──────────────────────┼─► plan_capacity, as the engine at its start ─► table
    ways to split (tp × ep) ───────────┘

Contract: arithmetic over the configuration and how weights are stored; no tensor is read or made. Bytes
of weights are those of the tensors as loaded, slots and pages those the engine allocates. A way to
split that does not divide is kept, with the reasons. What the engine cannot run yet says so.
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Iterator
from dataclasses import dataclass, replace

from fourfold.core.config import EngineConfig, ModelConfig, expect_choice
from fourfold.core.errors import CapacityError, CheckpointError
from fourfold.core.gpus import GPUS, Gpu
from fourfold.core.parameters import EXPERT_ROLES, ParamSpec, Role, Storage, parameters
from fourfold.core.row_format import DTYPE_BYTES
from fourfold.core.tensor import QuantScheme
from fourfold.dist.shard import check_divides, num_parts
from fourfold.engine.capacity import Capacity, plan_capacity, workspace_bytes
from fourfold.quant.headers import PLAIN
from fourfold.quant.resolve import Resolution, resolve
from fourfold.quant.schemes import SCHEMES
from fourfold.weights.coverage import may_be_stale
from fourfold.weights.geometry import config_json, with_storage
from fourfold.weights.index import Headers, read_index
from fourfold.weights.layout import FORMATS
from fourfold.weights.locate import ModelLocation
from fourfold.weights.names import native_weight_names

RUNTIME_BYTES = 706 << 20
"""What a process takes of a GPU beside its tensors, by what the driver says of an H200 less what PyTorch's
allocator has: 616 MiB when the first tensor is made (the driver's context), 690 with the weights loaded,
706 with kernels loaded and decode steps captured, the same for FP4 and FP8 experts."""
COUNTS = (1, 2, 4, 8, 16)
NOT_SERVED = "not served yet: the engine runs on one GPU"


@dataclass(frozen=True)
class Subject:
    """A model to plan for: `name` as MODEL is written, `dtype` of its activations, and how each
    quantisable parameter is stored."""

    name: str
    model: ModelConfig
    resolution: Resolution
    dtype: str

    @property
    def schemes(self) -> dict[Role, QuantScheme]:
        """The scheme of every role that is quantised."""
        decisions = self.resolution.decisions.items()
        return {role: SCHEMES[one.scheme] for (_, role), one in decisions if one.scheme != PLAIN}


def stored_bytes(subject: Subject, spec: ParamSpec) -> int:
    """Bytes of a parameter as it lies in memory: codes and scales as stored, floats at their width."""
    decision = subject.resolution.of(spec)
    if decision is not None and decision.scheme != PLAIN:
        scheme = SCHEMES[decision.scheme]
        wide = 4 if decision.scale_format == "f32" else 1
        return math.prod(scheme.codes_shape(spec.shape)) + wide * math.prod(
            scheme.scale_shape(spec.shape)
        )
    size = DTYPE_BYTES[subject.dtype]
    wide = {Storage.INTEGER: 8, Storage.FLOAT: max(4, size)}.get(spec.storage, size)
    return spec.numel * wide


def weight_bytes(subject: Subject, tp: int = 1, ep: int = 1) -> dict[str, int]:
    """Bytes of weights a rank: of routed experts, of what else is cut, of what every rank holds."""
    found = {"routed experts": 0, "split": 0, "on every rank": 0}
    for spec in parameters(subject.model):
        parts = num_parts(spec.role, tp, ep)
        kind = "routed experts" if spec.role in EXPERT_ROLES else "split"
        if num_parts(spec.role, 2, 1) == 1:
            kind = "on every rank"
        found[kind] += stored_bytes(subject, spec) // parts
    return found


@dataclass(frozen=True)
class Split:
    """One way to run on `count` GPUs: `replicas` engines of `tp` GPUs each; `ep` is 1 or `tp`.

    `faults`: why it does not divide. `capacity` of each GPU, None if it does not divide or fit, then
    `problem` says what is short.
    """

    tp: int
    ep: int
    replicas: int
    weight_bytes: int
    faults: tuple[str, ...]
    capacity: Capacity | None
    problem: str | None

    @property
    def served(self) -> bool:
        """Whether the engine can run it today."""
        return self.tp == 1

    def requests(self, context: int | None) -> int:
        """How many requests of `context` tokens (None: the longest) run at once, all replicas."""
        if self.capacity is None:
            return 0
        length = context or self.capacity.max_model_len
        return self.replicas * self.capacity.concurrency(length)


@dataclass(frozen=True)
class Plan:
    """All ways to run `subject` on `count` of `gpu`; `wanted` is the engine's configuration, whose
    `max_model_len` (None: any) every request may have."""

    subject: Subject
    gpu: Gpu
    count: int
    wanted: EngineConfig
    splits: tuple[Split, ...]

    @property
    def context(self) -> int | None:
        return self.wanted.max_model_len

    def fits(self, split: Split) -> bool:
        """Whether a replica takes what was asked: all its slots at the asked context, or one request."""
        if split.capacity is None:
            return False
        if self.context is None:
            return True
        return split.capacity.concurrency(self.context) >= self.wanted.max_num_seqs

    @property
    def best(self) -> Split | None:
        """What fits and runs most requests at once; of equals, the fewest GPUs an engine."""
        fitting = [split for split in self.splits if self.fits(split)]
        if not fitting:
            return None
        return max(fitting, key=lambda s: (s.requests(self.context), -s.tp, -s.ep))

    @property
    def today(self) -> Split | None:
        """What fits and the engine can run today."""
        fitting = [split for split in self.splits if split.served and self.fits(split)]
        return fitting[0] if fitting else None


Cost = tuple[tuple[str, ...], int]
"""Why a split does not divide, and a rank's bytes of weights."""


def plan(
    subject: Subject,
    count: int,
    gpu: Gpu,
    wanted: EngineConfig,
    known: dict[tuple[int, int], Cost] | None = None,
) -> Plan:
    """Every way to split `subject` over `count` GPUs of a kind. `known` keeps what does not depend on
    them, by (tp, ep), for the next plan of this subject."""
    known = {} if known is None else known
    sizes = [size for size in range(1, count + 1) if count % size == 0]
    ways = [(tp, ep) for tp in sizes for ep in sorted({1, tp})]
    for tp, ep in ways:
        if (tp, ep) not in known:
            faults = tuple(check_divides(subject.model, tp, ep, subject.schemes))
            known[tp, ep] = faults, sum(weight_bytes(subject, tp, ep).values())
    splits = (_split(subject, count, gpu, wanted, way, known[way]) for way in ways)
    return Plan(subject, gpu, count, wanted, tuple(splits))


def fewest(subject: Subject, wanted: EngineConfig) -> Iterator[tuple[Gpu, Plan | None]]:
    """For every known GPU the fewest of them (1, 2, 4, 8, 16) that do."""
    known: dict[tuple[int, int], Cost] = {}
    for gpu in GPUS.values():
        plans = [plan(subject, count, gpu, wanted, known) for count in COUNTS]
        yield gpu, next((each for each in plans if each.best is not None), None)


def _split(
    subject: Subject,
    count: int,
    gpu: Gpu,
    wanted: EngineConfig,
    way: tuple[int, int],
    cost: Cost,
) -> Split:
    (tp, ep), (faults, held) = way, cost
    replicas = count // tp
    if faults:
        return Split(tp, ep, replicas, held, faults, None, None)
    model = rank_model(subject.model, tp, ep)
    available = int(gpu.memory * wanted.gpu_memory_utilization) - RUNTIME_BYTES - held
    try:
        # A rank has all cached rows and states: keys, compressors and indexer belong to all heads.
        capacity = plan_capacity(wanted, model, subject.dtype, held, available)
    except CapacityError as error:
        workspace = workspace_bytes(wanted, model, subject.dtype)
        if available < workspace:
            need = (held + workspace + RUNTIME_BYTES) / 2**30
            text = f"weights and workspace alone need {need:.1f} GiB of a GPU"
            return Split(tp, ep, replicas, held, (), None, text)
        return Split(tp, ep, replicas, held, (), None, str(error))
    return Split(tp, ep, replicas, held, (), capacity, None)


def rank_model(model: ModelConfig, tp: int, ep: int) -> ModelConfig:
    """The widths that one rank computes with: its heads and output groups, its share of each expert
    (whole experts with expert parallelism). Raises nothing where `check_divides` found nothing."""
    inner = model.moe_intermediate_size if ep > 1 else model.moe_intermediate_size // tp
    return replace(
        model,
        num_attention_heads=model.num_attention_heads // tp,
        o_groups=model.o_groups // tp,
        moe_intermediate_size=inner,
    )


def command(plan: Plan, split: Split) -> str:
    """The command line of one of the split's engines."""
    words = ["fourfold", "serve", plan.subject.name]
    if split.tp > 1:
        words += ["--tensor-parallel-size", str(split.tp)]
    if split.ep > 1:
        words.append("--enable-expert-parallel")
    assert split.capacity is not None
    words += ["--max-model-len", str(plan.context or split.capacity.max_model_len)]
    words += ["--max-num-seqs", str(plan.wanted.max_num_seqs)]
    if plan.wanted.num_speculative_tokens:
        words += ["--method", "mtp"]
        words += ["--num-speculative-tokens", str(plan.wanted.num_speculative_tokens)]
    if plan.wanted.gpu_memory_utilization != EngineConfig.gpu_memory_utilization:
        words += ["--gpu-memory-utilization", str(plan.wanted.gpu_memory_utilization)]
    return shlex.join(words)


def subject_of_geometry(
    geometry: str, layers: int | None = None, weights: str | None = None, dtype: str = "auto"
) -> Subject:
    """A released model without any files, cut to its first `layers`; `weights` names a storage format
    (None: as released). Raises `ConfigError`."""
    name = weights or ("fp8" if geometry == "flash-base" else "native")
    expect_choice("--weights", name, tuple(FORMATS))
    stored = FORMATS[name]
    data = config_json(geometry, layers)
    data = with_storage(data, stored.torch_dtype, stored.expert_dtype, stored.quantised)
    model = ModelConfig.from_dict(data, f"{geometry}'s config.json").config
    return _subject(geometry, model, resolve(model), dtype)


def subject_of_checkpoint(
    location: ModelLocation, name: str, dtype: str = "auto", expert_dtype: str = "auto"
) -> tuple[Subject, str]:
    """(the model of a checkpoint, where its storage was read from). Headers decide where all are there,
    else config.json alone. Raises `FourfoldError`s."""
    model = ModelConfig.from_directory(location.directory).config
    source = "headers"
    headers: Headers | None = None
    try:
        headers = read_index(location.directory, may_be_stale).headers
    except CheckpointError as error:
        source = f"config.json alone ({str(error).splitlines()[0]})"
    resolution = resolve(model, headers, expert_dtype, native_weight_names)
    return _subject(name, model, resolution, dtype), source


def _subject(name: str, model: ModelConfig, resolution: Resolution, dtype: str) -> Subject:
    return Subject(name, model, resolution, model.torch_dtype if dtype == "auto" else dtype)

"""What a step must do at least: bytes and operations of every part, and how fast a device moves them.

    configuration + storage + runs ─► costs: (family, part, bytes, activations, operations)
    device ─► ceilings: bytes/s of a large copy, FLOP/s of a large product
                                       floor of a part = max(bytes / bandwidth, operations / rate)

Contract: `step_costs` is arithmetic. Bytes are those that must come from memory or go there: weights
(of the experts that a step is expected to touch), cached rows, state. Activations count where a part
reads and writes more of them than the device's cache holds. Experts are taken to be chosen uniformly.
It measures no model; a part's name says which parameter or state it is.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
import torch

from fourfold.cache.rows import RowFormats
from fourfold.core.config import ModelConfig
from fourfold.core.device import Device, Feature
from fourfold.core.parameters import EXPERT_ROLES, ParamSpec, Role, Storage, parameters
from fourfold.core.row_format import DTYPE_BYTES
from fourfold.quant.mxfp4 import MXFP4
from fourfold.weights.layout import WeightFormat

FAMILIES: Mapping[str, str] = MappingProxyType(
    dict.fromkeys(("linear", "linears", "norm_linears", "quantize_activations"), "linear")
    | dict.fromkeys(("routed_experts", "moe"), "experts")
    | dict.fromkeys(("hc_pre", "hc_post", "hc_post_pre", "hc_head"), "mhc")
    | dict.fromkeys(("rms_norm", "query_norm_rope"), "norm")
    | dict.fromkeys(("norm_rope_rows", "encode_rows", "store_rows"), "rows")
    | dict.fromkeys(("compress", "store_folds", "compress_rows"), "compressor")
    | dict.fromkeys(("route_topk", "route_hash"), "routing")
    | dict.fromkeys(("adjust_logits", "uniform", "sample", "count_accepted"), "sampling")
    | dict.fromkeys(("likeliest", "token_logprobs"), "sampling")
    | dict.fromkeys(("nonfinite_sequences", "check_logits"), "checks")
    | dict.fromkeys(("seat_runs", "place_step", "settle_step"), "step")
    | dict.fromkeys(("next_tokens", "step_after", "keep_drafts"), "step")
    | {
        "embed": "embed",
        "wo_a": "wo_a",
        "shared_expert": "shared",
        "sparse_attention": "attention",
        "index_topk": "indexer",
        "rotate": "rope",
    }
)
"""Op name → op family."""

MATMUL = ("linear", "wo_a", "experts", "shared", "library")
ATTENTION = ("attention", "indexer", "compressor")


def kind(family: str) -> str:
    """The kind of an op family: matmul, attention, or bookkeeping."""
    if family in MATMUL:
        return "matmul"
    return "attention" if family in ATTENTION else "bookkeeping"


@dataclass(frozen=True)
class Cost:
    """A part of a step. `rate` names the ceiling of its operations, bf16 or fp8."""

    family: str
    part: str
    bytes: float = 0.0
    activations: float = 0.0
    flops: float = 0.0
    rate: str = "bf16"


@dataclass(frozen=True)
class Ceilings:
    """A device's measured limits: bytes and operations a second, and bytes of its cache."""

    bytes_per_s: float
    bf16_per_s: float
    fp8_per_s: float
    cache_bytes: int = 0

    def floor(self, cost: Cost) -> float:
        """Seconds that a part takes at least."""
        moved = cost.bytes + (cost.activations if cost.activations > self.cache_bytes else 0.0)
        rate = self.fp8_per_s if cost.rate == "fp8" else self.bf16_per_s
        return max(moved / self.bytes_per_s, cost.flops / rate)


@dataclass(frozen=True)
class Work:
    """What a step runs: for each sequence (tokens in its state, tokens it runs); rows of logits;
    drafts each of them makes."""

    runs: tuple[tuple[int, int], ...]
    logits: int
    drafts: int = 0

    @property
    def tokens(self) -> int:
        return sum(count for _, count in self.runs)


def step_costs(
    config: ModelConfig, weights: WeightFormat, formats: RowFormats, work: Work
) -> list[Cost]:
    """The parts of one step, those of several layers added up."""
    total: dict[tuple[str, str, str], list[float]] = {}
    for cost in _all(config, weights, formats, work):
        key = (cost.family, cost.part, cost.rate)
        sums = total.setdefault(key, [0.0, 0.0, 0.0])
        for place, value in enumerate((cost.bytes, cost.activations, cost.flops)):
            sums[place] += value
    return [
        Cost(family, part, moved, activations, flops, rate)
        for (family, part, rate), (moved, activations, flops) in total.items()
    ]


def _all(
    config: ModelConfig, weights: WeightFormat, formats: RowFormats, work: Work
) -> Iterator[Cost]:
    # Draft passes of the MTP layer: one over all tokens, each further one over one a sequence.
    passes = [work.tokens, *[len(work.runs)] * (work.drafts - 1)] if work.drafts else []
    for spec in parameters(config):
        for tokens in passes if spec.prefix.startswith("mtp.") else (work.tokens,):
            yield from _parameter(config, weights, spec, tokens, work.logits)
        if spec.role is Role.HEAD:
            for _ in passes:
                yield from _parameter(config, weights, spec, work.tokens, len(work.runs))
    for ratio in config.compress_ratios:
        yield from _state(config, formats, ratio, work.runs)
    for tokens in passes:
        begins = [(begin, tokens // len(work.runs)) for begin, _ in work.runs]
        yield from _state(config, formats, 0, begins)
    size = DTYPE_BYTES[config.torch_dtype]
    streams = 2 * config.hc_mult * config.hidden_size * size
    sublayers = 2 * (config.num_hidden_layers * work.tokens + sum(passes))
    yield Cost("mhc", "streams", activations=sublayers * streams)
    yield Cost("sampling", "logits", activations=2.0 * work.logits * config.vocab_size * 4)


def stored_bytes(spec: ParamSpec, weights: WeightFormat, dtype_bytes: int) -> int:
    """Bytes of a parameter as it lies in memory."""
    scheme = weights.scheme(spec.role)
    if scheme is None:
        if spec.storage is Storage.INTEGER:
            return spec.numel * 8
        return spec.numel * (max(4, dtype_bytes) if spec.storage is Storage.FLOAT else dtype_bytes)
    wide = 4 if weights.scale_dtype == "F32" and scheme is not MXFP4 else 1
    codes, scales = scheme.codes_shape(spec.shape), scheme.scale_shape(spec.shape)
    return math.prod(codes) + wide * math.prod(scales)


_NORMS = frozenset(role for role in Role if "norm" in role.value)
_HYPER = frozenset(role for role in Role if role.value.startswith("hc_"))
_VECTORS = frozenset({Role.ATTN_SINK, Role.COMPRESSOR_APE, Role.INDEXER_APE})
_SHARED = frozenset({Role.SHARED_W1, Role.SHARED_W2, Role.SHARED_W3})


def _family(role: Role) -> str:
    if role in _NORMS:
        return "norm"
    if role in _HYPER:
        return "mhc"
    if role in _VECTORS:
        return "attention" if role is Role.ATTN_SINK else "compressor"
    if role in EXPERT_ROLES:
        return "experts"
    if role in _SHARED:
        return "shared"
    special = {Role.EMBED: "embed", Role.WO_A: "wo_a", Role.TID2EID: "routing"}
    return {**special, Role.GATE_BIAS: "routing"}.get(role, "linear")


def _parameter(
    config: ModelConfig, weights: WeightFormat, spec: ParamSpec, tokens: int, logits: int
) -> Iterator[Cost]:
    """Reading one parameter, and the products with it."""
    role, family, size = spec.role, _family(spec.role), DTYPE_BYTES[config.torch_dtype]
    moved: float = stored_bytes(spec, weights, size)
    part = role.value.removesuffix(".weight").removeprefix("attn.").removeprefix("ffn.")
    rate = "fp8" if weights.scheme(role) is not None and role is not Role.WO_A else "bf16"
    rows = logits if role is Role.HEAD or role.value.startswith("hc_head") else tokens
    if role in (Role.EMBED, Role.TID2EID):
        entry = moved / spec.shape[0]
        yield Cost(family, part, entry * tokens, entry * tokens)
        return
    flops, activations = 0.0, 0.0
    if len(spec.shape) >= 2 and role not in _VECTORS:
        out, width = spec.shape[-2:]
        flops, activations = 2.0 * rows * out * width, float(rows * (out + width) * size)
    if role in EXPERT_ROLES:
        chosen = config.num_experts_per_tok
        experts = spec.shape[0]
        # What is expected if every token chooses uniformly, independent of the others.
        moved *= 1 - (1 - chosen / experts) ** tokens
        flops, activations = flops * chosen, activations * chosen
    yield Cost(family, part, moved, activations, flops, rate)


def _state(
    config: ModelConfig, formats: RowFormats, ratio: int, runs: Iterable[tuple[int, int]]
) -> Iterator[Cost]:
    """Cached rows and folds of one layer, and the products with the rows."""
    width = config.num_attention_heads * config.head_dim
    row, key = formats.main.row_bytes, formats.indexer.row_bytes
    window, size = config.sliding_window, DTYPE_BYTES[config.torch_dtype]
    for (begin, count), times in Counter(runs).items():
        after = np.arange(begin, begin + count, dtype=np.int64) + 1
        attended = np.minimum(after, window)
        read = min(window - 1, begin)
        if ratio:
            there = after // ratio
            indexed = config.has_indexer(ratio)
            listed = np.minimum(there, config.index_topk) if indexed else there
            attended = attended + listed
            read += min(int(there[-1]), int(listed.sum()))
            folds = 2 * config.compressor_series(ratio) * 3 * 4
            new = int(there[-1]) - begin // ratio
            yield Cost("compressor", "folds", times * float(folds * config.head_dim + new * row))
            if indexed:
                keys, dim = int(there.sum()), config.index_n_heads * config.index_head_dim
                written = folds * config.index_head_dim + new * key
                yield Cost("compressor", "folds", times * float(written))
                scanned = float(int(there[-1]) * key)
                yield Cost("indexer", "keys", times * scanned, flops=times * 2.0 * keys * dim)
        yield Cost("rows", "window", bytes=times * float(count * row))
        yield Cost(
            "attention",
            {0: "SWA", 4: "CSA"}.get(ratio, "HCA"),
            times * float(read * row),
            times * 2.0 * count * width * size,
            times * 4.0 * width * int(attended.sum()),
        )


def measure(device: Device) -> Ceilings:
    """Measure a device's ceilings: a copy of far more than its cache, and large products."""
    target, is_gpu = device.torch_device, device.torch_device.type != "cpu"
    count, side = (1 << 29, 8192) if is_gpu else (1 << 24, 1024)
    plain, fp8 = _products(device, side, torch.bfloat16 if is_gpu else torch.float32)
    cache = torch.cuda.get_device_properties(target).L2_cache_size if is_gpu else 0
    return Ceilings(_bandwidth(target, count), plain, fp8, cache)


def _bandwidth(device: torch.device, count: int) -> float:
    """Bytes a second, of `count` float32 read and written or only read."""
    a = torch.randn(count, device=device)
    b = torch.empty_like(a)
    copied = 2 * a.nbytes / _seconds(lambda: torch.neg(a, out=b), device)
    return max(copied, a.nbytes / _seconds(lambda: a.sum(), device))


def _products(device: Device, side: int, dtype: torch.dtype) -> tuple[float, float]:
    """Operations a second of square products in `dtype`, and in FP8 where there is hardware for it."""
    target = device.torch_device
    x, y = (torch.randn(side, side, device=target, dtype=dtype) for _ in range(2))
    plain = 2.0 * side**3 / _seconds(lambda: x @ y, target)
    if not {Feature.FP8_MATRIX, Feature.FP8_OCP} <= device.features:
        return plain, plain
    one = torch.ones((), device=target)
    x8, y8 = x.to(torch.float8_e4m3fn), y.to(torch.float8_e4m3fn).t()
    fp8 = (
        2.0
        * side**3
        / _seconds(lambda: torch._scaled_mm(x8, y8, one, one, out_dtype=torch.bfloat16), target)
    )
    return plain, max(fp8, plain)


def _seconds(call: Callable[[], object], device: torch.device, repeats: int = 10) -> float:
    """Seconds of one call, the best of three series."""
    call()
    best = math.inf
    for _ in range(3):
        synchronize(device)
        begin = time.perf_counter()
        for _ in range(repeats):
            call()
        synchronize(device)
        best = min(best, (time.perf_counter() - begin) / repeats)
    return best


def synchronize(device: torch.device) -> None:
    """Wait until a device has done all it was given."""
    if device.type != "cpu":
        torch.cuda.synchronize(device)

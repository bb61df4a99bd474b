"""What every buffer of a running model holds: weights by role, cached rows, state, activations.

Contract: plain data for a person and a program, from the objects that make the buffers (`Resolution`,
`RowFormats`); the words here are the only place where formats are described. It decides nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from fourfold.cache.rows import page_bytes, ring_rows, slot_bytes
from fourfold.core.config import EngineConfig, ModelConfig
from fourfold.core.frozen import FrozenDict
from fourfold.core.parameters import EXPERT_ROLES, ParamSpec, Role, Storage, parameters
from fourfold.core.row_format import FP8_GROUP, PAGE_TOKENS, RowFormat, RowKind
from fourfold.core.tensor import accumulate_dtype, dtype_name
from fourfold.engine.capacity import engine_row_formats
from fourfold.engine.kernel_plan import prepared_by
from fourfold.ops.registry import BODY, KernelPlan
from fourfold.quant.headers import FP8_BLOCK, MXFP4, PLAIN
from fourfold.quant.resolve import Decision, Resolution

_SCALES: Mapping[str | None, str] = FrozenDict(
    {"e8m0": "E8M0 (a power of two) scales", "f32": "float32 scales", None: "no scales"}
)
_BLOCKS: Mapping[str, str] = FrozenDict(
    {
        FP8_BLOCK: "FP8 E4M3 codes, blocks of 128 × 128",
        MXFP4: "FP4 E2M1 codes, two a byte, groups of 32 inputs",
    }
)


def stored_as(spec: ParamSpec, decision: Decision | None, dtype: torch.dtype) -> str:
    """The format of a weight in memory; `dtype` is the model's."""
    if decision is not None and decision.scheme != PLAIN:
        blocks = _BLOCKS.get(decision.scheme, decision.scheme)
        return f"{blocks}, {_SCALES[decision.scale_format]}"
    if spec.storage is Storage.INTEGER:
        return "int64"
    return dtype_name(accumulate_dtype(dtype) if spec.storage is Storage.FLOAT else dtype)


def buffers(
    config: ModelConfig,
    engine: EngineConfig,
    dtype: torch.dtype,
    plan: KernelPlan,
    resolution: Resolution,
) -> dict[str, list[dict[str, Any]]]:
    """Every kind of buffer, each with `what` it is and its `format`."""
    return {
        "weights": _weights(config, dtype, plan, resolution),
        "cache": _cache(config, engine, dtype),
        "activations": _activations(config, engine, dtype, plan, resolution),
    }


def _weights(
    config: ModelConfig, dtype: torch.dtype, plan: KernelPlan, resolution: Resolution
) -> list[dict[str, Any]]:
    """Roles that are stored alike in one entry, with the op that reads them."""
    found: dict[tuple[str, str], dict[str, int]] = {}
    for spec in parameters(config):
        stored = _kept_as(spec, stored_as(spec, resolution.of(spec), dtype), plan)
        roles = found.setdefault((reader(spec.role, plan), stored), {})
        roles[spec.role.value] = roles.get(spec.role.value, 0) + 1
    return [
        {
            "what": ", ".join(f"{role} ×{count}" for role, count in roles.items()),
            "format": stored,
            "op": op or None,
            "kernel": _kernel(plan, op),
            "roles": roles,
        }
        for (op, stored), roles in found.items()
    ]


def _kept_as(spec: ParamSpec, stored: str, plan: KernelPlan) -> str:
    """What becomes of a weight that is `stored` so when it is loaded: kernels of a CPU want numbers."""
    op = prepared_by(spec.role)
    if op is None or _kernel(plan, op) != "cpu" or stored == "float32":
        return stored
    return f"float32 numbers, made once of {stored}"


_READERS: Mapping[Role, str] = FrozenDict(
    dict.fromkeys(EXPERT_ROLES, "routed_experts")
    | dict.fromkeys((Role.WO_B, Role.E_PROJ, Role.H_PROJ, Role.HEAD), "linear")
    | {Role.SHARED_W2: "shared_expert", Role.WO_A: "wo_a", Role.EMBED: "embed"}
    | {Role.TID2EID: "route_hash", Role.GATE_BIAS: "route_topk", Role.ATTN_SINK: "sparse_attention"}
)
_BESIDE_OTHERS = frozenset(
    {Role.WQ_A, Role.WQ_B, Role.WKV, Role.INDEXER_WQ_B, Role.INDEXER_WEIGHTS, Role.GATE}
    | {Role.COMPRESSOR_WKV, Role.COMPRESSOR_WGATE, Role.INDEXER_WKV, Role.INDEXER_WGATE}
    | {Role.SHARED_W1, Role.SHARED_W3}
)


def reader(role: Role, plan: KernelPlan) -> str:
    """The op that reads a role's matrix; none for the small parameters of several ops."""
    if role in _BESIDE_OTHERS:
        # Without a kernel for several at once, each goes through the one for a single layer.
        return "linear" if _kernel(plan, "linears") == BODY else "linears"
    return _READERS.get(role, "")


def _kernel(plan: KernelPlan, op: str) -> str | None:
    return next((choice.kernel for choice in plan.choices if choice.op == op), None)


def _row(format: RowFormat) -> str:
    """A row's format in words."""
    if format.kind is RowKind.FP8_GROUPS:
        return (
            f"FP8 E4M3 codes of {format.nope_dim} dims in groups of {FP8_GROUP} with E8M0 scales, "
            f"{format.rope_dim} rotary dims bfloat16"
        )
    if format.kind is RowKind.FP8_WHOLE:
        return f"FP8 E4M3 codes of {format.dim} dims under one float32 power-of-two scale"
    return f"{format.dim} dims {format.dtype}"


def _cache(config: ModelConfig, engine: EngineConfig, dtype: torch.dtype) -> list[dict[str, Any]]:
    name, drafts = dtype_name(dtype), engine.num_speculative_tokens
    formats = engine_row_formats(engine, config, name)
    kinds = config.compress_ratios
    found = [
        {
            "what": f"window ring, {ring_rows(config, drafts)} rows a sequence in every layer",
            "format": _row(formats.main),
            "bytes_per_row": formats.main.row_bytes,
        }
    ]
    for ratio, label in ((4, "CSA"), (128, "HCA")):
        if ratio in kinds:
            found.append(
                {
                    "what": f"compressed rows, one for {ratio} tokens, {kinds.count(ratio)} "
                    f"{label} layers",
                    "format": _row(formats.main),
                    "bytes_per_row": formats.main.row_bytes,
                }
            )
    if any(map(config.has_indexer, kinds)):
        found.append(
            {
                "what": "indexer keys, one for 4 tokens, CSA layers",
                "format": _row(formats.indexer),
                "bytes_per_row": formats.indexer.row_bytes,
            }
        )
    folds = dtype_name(accumulate_dtype(dtype))
    found.append(
        {"what": "live folds of compressors", "format": f"{folds}: maximum, sum, weighted sum"}
    )
    found.append({"what": "streams of the last token", "format": name})
    a_token = page_bytes(config, formats) / PAGE_TOKENS
    a_request = slot_bytes(config, formats, name, drafts)
    found.append(
        {"what": "in all", "format": f"{a_token:.1f} bytes a token, {a_request:,} a request"}
    )
    return found


def _activations(
    config: ModelConfig,
    engine: EngineConfig,
    dtype: torch.dtype,
    plan: KernelPlan,
    resolution: Resolution,
) -> list[dict[str, Any]]:
    name, wide = dtype_name(dtype), dtype_name(accumulate_dtype(dtype))
    rounded = "rounded to FP8 E4M3 in groups of 128 with power-of-two scales"
    schemes: dict[str, set[str]] = {
        "routed experts": set(),
        "wo_a": set(),
        "other linear layers": set(),
    }
    for (_, role), decision in resolution.decisions.items():
        kind = "wo_a" if role is Role.WO_A else "other linear layers"
        kind = "routed experts" if role in EXPERT_ROLES else kind
        schemes[kind].add(decision.scheme)
    keys = engine_row_formats(engine, config, name).indexer
    found = [
        {
            "what": f"residual streams, {config.hc_mult} of {config.hidden_size} dims",
            "format": name,
        },
    ]
    for kind, stored in schemes.items():
        if not stored:
            continue
        quantised = stored - {PLAIN}
        exact = kind == "wo_a" and not (_kernel(plan, "wo_a") or "").startswith("fp8")
        words = rounded if quantised and not exact else name
        if words == rounded and PLAIN in stored:
            words = f"{rounded} before quantised weights, {name} before plain ones"
        found.append({"what": f"inputs of {kind}", "format": words})
    queries = "rounded like their keys, to FP8" if keys.kind is RowKind.FP8_WHOLE else name
    found += [
        {"what": "attention queries", "format": name},
        {"what": "indexer queries", "format": queries},
        {"what": "router, gate and pooling inputs, sums, softmax, logits", "format": wide},
    ]
    return found

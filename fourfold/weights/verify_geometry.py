"""What the tensors say about config.json: its dimensions, read back from the headers by majority.

Contract: every shape that follows from a field is a witness for it. `compare_geometry` holds the
majority of a field's witnesses against the field, finds every field that lies, and returns the
configuration that the tensors were written for, so that one wrong field is one finding instead of a
mismatch in every tensor. Fields without a shape (a window, a theta, a limit) have no witnesses and are
held against the released model of the same widths, if there is one. Torch-free; headers only.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from fourfold.core.checkpoint import TensorHeader
from fourfold.core.config import CSA_RATIO, HCA_RATIO, ModelConfig
from fourfold.core.errors import ConfigError
from fourfold.core.findings import Finding, Severity
from fourfold.core.parameters import EXPERT_ROLES, Role
from fourfold.weights.geometry import config_json
from fourfold.weights.names import Parsed, Part

# The fields that each dimension of a parameter is, where it is one field alone.
_DIMENSIONS: Mapping[Role, tuple[str | None, ...]] = {
    Role.EMBED: ("vocab_size", "hidden_size"),
    Role.HEAD: ("vocab_size", "hidden_size"),
    Role.NORM: ("hidden_size",),
    Role.ATTN_NORM: ("hidden_size",),
    Role.FFN_NORM: ("hidden_size",),
    Role.HC_HEAD_FN: ("hc_mult", None),
    Role.HC_HEAD_BASE: ("hc_mult",),
    Role.ATTN_SINK: ("num_attention_heads",),
    Role.WQ_A: ("q_lora_rank", "hidden_size"),
    Role.Q_NORM: ("q_lora_rank",),
    Role.WQ_B: (None, "q_lora_rank"),
    Role.WKV: ("head_dim", "hidden_size"),
    Role.KV_NORM: ("head_dim",),
    Role.WO_B: ("hidden_size", None),
    Role.COMPRESSOR_WKV: (None, "hidden_size"),
    Role.COMPRESSOR_WGATE: (None, "hidden_size"),
    Role.COMPRESSOR_NORM: ("head_dim",),
    Role.INDEXER_WQ_B: (None, "q_lora_rank"),
    Role.INDEXER_WEIGHTS: ("index_n_heads", "hidden_size"),
    Role.INDEXER_NORM: ("index_head_dim",),
    Role.GATE: ("n_routed_experts", "hidden_size"),
    Role.GATE_BIAS: ("n_routed_experts",),
    Role.TID2EID: ("vocab_size", "num_experts_per_tok"),
    Role.EXPERT_W1: ("moe_intermediate_size", "hidden_size"),
    Role.EXPERT_W2: ("hidden_size", "moe_intermediate_size"),
    Role.EXPERT_W3: ("moe_intermediate_size", "hidden_size"),
    Role.SHARED_W1: (None, "hidden_size"),
    Role.SHARED_W2: ("hidden_size", None),
    Role.SHARED_W3: (None, "hidden_size"),
}
_PACKED = ("I8", "U8")  # two FP4 codes a byte
_LEAST_WITNESSES = 2
# Fields that no shape tells, which a change of makes another network.
_SILENT = (
    "qk_rope_head_dim",
    "sliding_window",
    "index_topk",
    "routed_scaling_factor",
    "swiglu_limit",
    "hc_sinkhorn_iters",
    "hc_eps",
    "rms_norm_eps",
    "rope_theta",
    "compress_rope_theta",
    "rope_scaling",
)
_WIDTHS = ("hidden_size", "num_attention_heads", "head_dim", "n_routed_experts", "q_lora_rank")
FIX = "correct the field, or get the config.json that belongs to these files"


@dataclass(frozen=True)
class Geometry:
    """`config` as the tensors say, the `findings` where config.json says otherwise, and the released
    geometry of these widths ("flash" or "pro"), if any."""

    config: ModelConfig
    findings: tuple[Finding, ...]
    released: str | None


@dataclass(frozen=True, slots=True)
class _Weight:
    """A weight tensor, parsed, with its shape in elements and without an expert's dimension."""

    header: TensorHeader
    parsed: Parsed
    shape: tuple[int, ...]


def compare_geometry(
    config: ModelConfig,
    headers: Mapping[str, TensorHeader],
    parsed: Mapping[str, Parsed],
    complete: bool,
    file: str,
) -> Geometry:
    """Hold `config`, read from `file`, against all headers; `parsed` are the names that say something.
    What is counted (layers, MTP layers) is compared only if `complete`: no file is lost."""
    weights = list(_weights(headers, parsed))
    votes: dict[str, Counter[int]] = defaultdict(Counter)
    example: dict[tuple[str, int], TensorHeader] = {}

    def vote(field: str, value: int, header: TensorHeader) -> None:
        votes[field][value] += 1
        example.setdefault((field, value), header)

    for weight in weights:
        _witness(weight, vote)
    said = {field: _majority(values) for field, values in votes.items()}
    for weight in weights:
        _derived_witness(weight, said, vote)
    changes: dict[str, Any] = {}
    findings = []
    for field, values in votes.items():
        value, own = _majority(values), getattr(config, field)
        if value == own or values[value] < max(values[own] + 1, _LEAST_WITNESSES):
            continue
        changes[field] = value
        findings.append(_disagreement(field, own, value, example[field, value], file))
    layers, found = _layers(config, weights, complete, file)
    findings += found
    corrected = _replaced(config, changes | layers)
    released = _released(corrected)
    findings += _silent_fields(config, released, file)
    return Geometry(corrected, tuple(findings), released)


def _weights(
    headers: Mapping[str, TensorHeader], all_parsed: Mapping[str, Parsed]
) -> Iterator[_Weight]:
    for name, parsed in all_parsed.items():
        header = headers[name]
        if parsed.part is not Part.WEIGHT or not header.shape:
            continue
        shape = header.shape
        if parsed.roles[0] in EXPERT_ROLES:
            if header.dtype in _PACKED:
                shape = (*shape[:-1], 2 * shape[-1])
            if parsed.fused and len(shape) == 3:
                shape = (shape[1] // len(parsed.roles), shape[2])
        yield _Weight(header, parsed, shape)


def _witness(weight: _Weight, vote: Any) -> None:
    """Dimensions that are one field."""
    fields = _DIMENSIONS.get(weight.parsed.roles[0], ())
    if len(fields) == len(weight.shape):
        for field, value in zip(fields, weight.shape, strict=True):
            if field is not None:
                vote(field, value, weight.header)


def _derived_witness(weight: _Weight, said: Mapping[str, int], vote: Any) -> None:
    """Dimensions that are a field once another one is known."""
    role, shape = weight.parsed.roles[0], weight.shape
    heads, dim = said.get("num_attention_heads", 0), said.get("head_dim", 0)
    if role is Role.WO_A and len(shape) == 2 and shape[1] and (heads * dim) % shape[1] == 0:
        groups = heads * dim // shape[1]
        vote("o_groups", groups, weight.header)
        if groups and shape[0] % groups == 0:
            vote("o_lora_rank", shape[0] // groups, weight.header)
    inner = said.get("moe_intermediate_size", 0)
    if role in (Role.SHARED_W1, Role.SHARED_W3) and inner and shape[0] % inner == 0:
        vote("n_shared_experts", shape[0] // inner, weight.header)


def _majority(values: Counter[int]) -> int:
    return values.most_common(1)[0][0]


def _disagreement(
    field: str, own: object, value: object, header: TensorHeader, file: str
) -> Finding:
    what = f"{field} is {own}, but the tensors say {value}"
    seen = f"{header.name} is {header.dtype} {list(header.shape)} in {header.file}"
    return Finding(Severity.ERROR, f"{what}: {seen}", file=file, fix=FIX)


def _layers(
    config: ModelConfig, weights: list[_Weight], complete: bool, file: str
) -> tuple[dict[str, Any], list[Finding]]:
    """What the layers that are there say of their number and kinds."""
    by_prefix: dict[str, dict[Role, _Weight]] = defaultdict(dict)
    for weight in weights:
        by_prefix[weight.parsed.prefix].setdefault(weight.parsed.roles[0], weight)
    numbers = sorted(
        int(prefix.split(".")[1]) for prefix in by_prefix if prefix.startswith("layers.")
    )
    changes: dict[str, Any] = {}
    findings: list[Finding] = []
    count = config.num_hidden_layers
    whole = numbers == list(range(len(numbers)))
    if numbers and (numbers[-1] >= count or (complete and whole and len(numbers) < count)):
        count = numbers[-1] + 1
        changes["num_hidden_layers"] = count
        last = next(iter(by_prefix[f"layers.{count - 1}."].values())).header
        findings.append(
            _disagreement("num_hidden_layers", config.num_hidden_layers, count, last, file)
        )
    ratios = [*config.compress_ratios, *[0] * count][:count]
    for layer in range(count):
        roles = by_prefix.get(f"layers.{layer}.", {})
        ratio, witness = _ratio(roles)
        if witness is None or ratio == ratios[layer]:
            continue
        if layer < config.num_hidden_layers:
            findings.append(
                _disagreement(f"compress_ratios[{layer}]", ratios[layer], ratio, witness, file)
            )
        ratios[layer] = ratio
    if tuple(ratios) != config.compress_ratios:
        changes["compress_ratios"] = tuple(ratios)
    hashed, found = _hash_layers(config, by_prefix, numbers, complete, file)
    mtp, found_mtp = _mtp(config, by_prefix, complete, file)
    return changes | hashed | mtp, [*findings, *found, *found_mtp]


def _ratio(roles: Mapping[Role, _Weight]) -> tuple[int, TensorHeader | None]:
    """A layer's compress ratio and a tensor that shows it; (0, None) where its tensors do not agree."""
    compressor = [role for role in roles if ".compressor." in role.value]
    indexer = [role for role in roles if ".indexer." in role.value]
    if not compressor:
        wkv = roles.get(Role.WKV)
        return (0, wkv.header) if wkv and not indexer else (0, None)
    votes: Counter[int] = Counter()
    votes[CSA_RATIO if indexer else HCA_RATIO] += 1
    ape, norm = roles.get(Role.COMPRESSOR_APE), roles.get(Role.COMPRESSOR_NORM)
    if ape:
        votes[ape.shape[0]] += 1
    for role in (Role.COMPRESSOR_WKV, Role.COMPRESSOR_WGATE):
        if role in roles and norm:
            votes[CSA_RATIO if roles[role].shape[0] == 2 * norm.shape[0] else HCA_RATIO] += 1
    ratio, count = votes.most_common(1)[0]
    sure = count >= _LEAST_WITNESSES and ratio in (CSA_RATIO, HCA_RATIO)
    witness = ape or next(iter(roles[role] for role in compressor))
    return (ratio, witness.header) if sure else (0, None)


def _hash_layers(
    config: ModelConfig,
    by_prefix: Mapping[str, Mapping[Role, _Weight]],
    numbers: list[int],
    complete: bool,
    file: str,
) -> tuple[dict[str, Any], list[Finding]]:
    """Hash layers carry a table of routes and no bias."""
    table = {n for n in numbers if Role.TID2EID in by_prefix[f"layers.{n}."]}
    bias = {n for n in numbers if Role.GATE_BIAS in by_prefix[f"layers.{n}."]}
    count = len(table)
    sure = table == set(numbers[:count]) and bias == set(numbers[count:]) and complete
    if not sure or min(config.num_hash_layers, len(numbers)) == count:
        return {}, []
    shown = by_prefix[f"layers.{min(count, config.num_hash_layers)}."]
    witness = shown.get(Role.TID2EID) or shown[Role.GATE_BIAS]
    finding = _disagreement("num_hash_layers", config.num_hash_layers, count, witness.header, file)
    return {"num_hash_layers": count}, [finding]


def _mtp(
    config: ModelConfig,
    by_prefix: Mapping[str, Mapping[Role, _Weight]],
    complete: bool,
    file: str,
) -> tuple[dict[str, Any], list[Finding]]:
    """Whether there is an MTP layer. A checkpoint without one may still say that its model has one."""
    stages = sorted(prefix for prefix in by_prefix if prefix.startswith("mtp."))
    if config.num_nextn_predict_layers and not stages and complete:
        text = (
            "num_nextn_predict_layers is 1, but there are no mtp.* tensors: the checkpoint has no "
            "MTP layer"
        )
        fix = "set it to 0 and drop the last entry of compress_ratios, or get the missing file"
        return {"num_nextn_predict_layers": 0}, [
            Finding(Severity.ERROR, text, file=file, fix=fix),
        ]
    return {}, []


def _replaced(config: ModelConfig, changes: dict[str, Any]) -> ModelConfig:
    """`config` with what the tensors say, where that makes a model at all."""
    if not changes:
        return config
    try:
        return replace(config, **changes)
    except ConfigError:
        return config


def _released(config: ModelConfig) -> str | None:
    for name in ("flash", "pro"):
        data = config_json(name)
        if all(getattr(config, field) == data[field] for field in _WIDTHS):
            return name
    return None


def _silent_fields(config: ModelConfig, released: str | None, file: str) -> Iterator[Finding]:
    """Fields that no tensor tells, against the released model's."""
    if released is None:
        return
    usual = ModelConfig.from_dict(config_json(released), released).config
    for field in _SILENT:
        own, expected = getattr(config, field), getattr(usual, field)
        if own != expected:
            yield Finding(
                Severity.WARNING,
                f"{field} is {own}; DeepSeek-V4-{released.capitalize()} was released with {expected}",
                file=file,
                fix="correct the field, unless this model was trained so",
            )

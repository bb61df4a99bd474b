"""The one rename table: which parameter a checkpoint tensor's name stands for.

Contract: a name is split at its dots and compared component by component with the table below; no
part of a name is ever replaced inside a string. A name either stands for exactly one place in the
inventory of core/parameters.py, or for something deliberately left out, or it is unknown; there is
nothing in between. Accepted, also mixed: the released (native) spelling, transformers' spelling, a
leading `model.`, and the spellings DeepSeek's own converter accepts. This file does not know files,
dtypes or shapes.

    [model.] layers.3. | attn.wq_a          . weight            native
    [model.] layers.3. | self_attn.q_a_proj . weight            transformers
             prefix      stem, one line of the table   leaf: weight, or a spelling of its scale
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from types import MappingProxyType

from fourfold.core.config import ModelConfig
from fourfold.core.parameters import EXPERT_ROLES, ParamSpec, Role, parameters


class Part(Enum):
    """The two tensors that can make up a parameter."""

    WEIGHT = "weight"
    SCALE = "scale"


# Spellings of each parameter below its prefix: components joined by dots, alternatives by `|`, `*`
# for an expert's number. Roles whose native name ends in `.weight` are listed without that leaf.
# The first spelling is the native one, `_build` proves it.
_TABLE: Mapping[Role, tuple[str, ...]] = MappingProxyType(
    {
        Role.EMBED: ("embed|embed_tokens",),
        Role.HEAD: ("head|lm_head",),
        Role.NORM: ("norm",),
        Role.HC_HEAD_FN: ("hc_head_fn", "hc_head.hc_fn"),
        Role.HC_HEAD_BASE: ("hc_head_base", "hc_head.hc_base"),
        Role.HC_HEAD_SCALE: ("hc_head_scale", "hc_head.hc_scale"),
        Role.ATTN_NORM: ("attn_norm|input_layernorm",),
        Role.FFN_NORM: ("ffn_norm|post_attention_layernorm",),
        Role.HC_ATTN_FN: ("hc_attn_fn", "attn_hc.fn"),
        Role.HC_ATTN_BASE: ("hc_attn_base", "attn_hc.base"),
        Role.HC_ATTN_SCALE: ("hc_attn_scale", "attn_hc.scale"),
        Role.HC_FFN_FN: ("hc_ffn_fn", "ffn_hc.fn"),
        Role.HC_FFN_BASE: ("hc_ffn_base", "ffn_hc.base"),
        Role.HC_FFN_SCALE: ("hc_ffn_scale", "ffn_hc.scale"),
        Role.ATTN_SINK: ("attn|self_attn.attn_sink|sinks",),
        Role.WQ_A: ("attn|self_attn.wq_a|q_a_proj",),
        Role.Q_NORM: ("attn|self_attn.q_norm|q_a_norm",),
        Role.WQ_B: ("attn|self_attn.wq_b|q_b_proj",),
        Role.WKV: ("attn|self_attn.wkv|kv_proj",),
        # `attn.norm`: transformers 5.23 writes it when it saves a model in the native spelling.
        Role.KV_NORM: ("attn|self_attn.kv_norm|norm",),
        Role.WO_A: ("attn|self_attn.wo_a|o_a_proj",),
        Role.WO_B: ("attn|self_attn.wo_b|o_b_proj",),
        Role.COMPRESSOR_APE: ("attn|self_attn.compressor.ape|position_bias",),
        Role.COMPRESSOR_WKV: ("attn|self_attn.compressor.wkv|kv_proj",),
        Role.COMPRESSOR_WGATE: ("attn|self_attn.compressor.wgate|gate_proj",),
        Role.COMPRESSOR_NORM: ("attn|self_attn.compressor.norm|kv_norm",),
        Role.INDEXER_WQ_B: (
            "attn|self_attn.indexer.wq_b",
            "attn|self_attn.compressor.indexer.wq_b|q_b_proj",
        ),
        Role.INDEXER_WEIGHTS: (
            "attn|self_attn.indexer.weights_proj",
            "attn|self_attn.compressor.indexer.scorer.weights_proj",
        ),
        Role.INDEXER_APE: (
            "attn|self_attn.indexer.compressor.ape",
            "attn|self_attn.compressor.indexer.ape|position_bias",
        ),
        Role.INDEXER_WKV: (
            "attn|self_attn.indexer.compressor.wkv",
            "attn|self_attn.compressor.indexer.wkv|kv_proj",
        ),
        Role.INDEXER_WGATE: (
            "attn|self_attn.indexer.compressor.wgate",
            "attn|self_attn.compressor.indexer.wgate|gate_proj",
        ),
        Role.INDEXER_NORM: (
            "attn|self_attn.indexer.compressor.norm",
            "attn|self_attn.compressor.indexer.norm|kv_norm",
        ),
        Role.GATE: ("ffn|mlp.gate",),
        Role.GATE_BIAS: ("ffn|mlp.gate.bias|e_score_correction_bias",),
        Role.TID2EID: ("ffn|mlp.gate.tid2eid",),
        Role.EXPERT_W1: ("ffn|mlp.experts.*.w1|gate_proj",),
        Role.EXPERT_W2: ("ffn|mlp.experts.*.w2|down_proj",),
        Role.EXPERT_W3: ("ffn|mlp.experts.*.w3|up_proj",),
        Role.SHARED_W1: ("ffn|mlp.shared_experts.w1|gate_proj",),
        Role.SHARED_W2: ("ffn|mlp.shared_experts.w2|down_proj",),
        Role.SHARED_W3: ("ffn|mlp.shared_experts.w3|up_proj",),
        Role.E_PROJ: ("e_proj",),
        Role.H_PROJ: ("h_proj",),
        Role.ENORM: ("enorm",),
        Role.HNORM: ("hnorm",),
    }
)

# transformers stacks a layer's experts: `[E, 2I, D]` holds w1 above w3, `[E, D, I]` is w2.
_FUSED: Mapping[str, tuple[Role, ...]] = MappingProxyType(
    {
        "ffn|mlp.experts.gate_up_proj": (Role.EXPERT_W1, Role.EXPERT_W3),
        "ffn|mlp.experts.down_proj": (Role.EXPERT_W2,),
    }
)
FUSED_SCALE = "_scale_inv"

# A scale multiplies its weight under all of these names, `weight_scale_inv` too.
_SCALE_LEAVES = ("scale", "weight_scale_inv", "weight_scale")

# The Base carries the MTP layer's own copies of matrices that it shares with the main model.
_DUPLICATES: Mapping[tuple[str, ...], Role] = MappingProxyType(
    {("emb", "tok_emb", "weight"): Role.EMBED, ("head", "weight"): Role.HEAD}
)

Components = tuple[str, ...]


def _spelt(pattern: str) -> Iterator[Components]:
    """The component tuples of one pattern: `a|b.c` is (a, c) and (b, c)."""
    yield from itertools.product(*(part.split("|") for part in pattern.split(".")))


def _entries() -> Iterator[tuple[Components, tuple[Role, ...], Part]]:
    for role, patterns in _TABLE.items():
        has_leaf = role.value.endswith(".weight")
        for stem in itertools.chain.from_iterable(map(_spelt, patterns)):
            yield (*stem, "weight") if has_leaf else stem, (role,), Part.WEIGHT
            if has_leaf:
                for leaf in _SCALE_LEAVES:
                    yield (*stem, leaf), (role,), Part.SCALE
    for pattern, roles in _FUSED.items():
        for stem in _spelt(pattern):
            yield stem, roles, Part.WEIGHT
            yield (*stem[:-1], stem[-1] + FUSED_SCALE), roles, Part.SCALE


def expert_name(parameter_name: str, expert: int | str) -> str:
    """The checkpoint tensor of one expert: `….experts.w1.weight` to `….experts.7.w1.weight`."""
    *stem, matrix, leaf = parameter_name.split(".")
    return ".".join((*stem, str(expert), matrix, leaf))


def _build() -> Mapping[Components, tuple[tuple[Role, ...], Part]]:
    """The expanded table; two lines that claim one spelling are a defect and raise."""
    table: dict[Components, tuple[tuple[Role, ...], Part]] = {}
    for path, roles, part in _entries():
        if path in table:
            raise ValueError(f"{'.'.join(path)} stands for both {table[path]} and {roles}")
        table[path] = (roles, part)
    for role in Role:
        native = expert_name(role.value, "*") if role in EXPERT_ROLES else role.value
        if table.get(tuple(native.split("."))) != ((role,), Part.WEIGHT):
            raise ValueError(f"the rename table does not hold the native spelling of {role}")
    return MappingProxyType(table)


_SPELLINGS = _build()


@dataclass(frozen=True, slots=True)
class Parsed:
    """What a name says by itself. `roles` is one role, or w1 and w3 for a fused stack of both.

    `expert` is an expert's number, None where the tensor is not one expert's. `fused`: the tensor
    holds all experts of its layer.
    """

    prefix: str
    roles: tuple[Role, ...]
    part: Part
    expert: int | None
    fused: bool


@dataclass(frozen=True, slots=True)
class Place:
    """Where a tensor belongs: `part` of one parameter, or of two for a fused stack (halves of its
    rows, in order). `expert` as in `Parsed`; None together with `fused` means all experts."""

    specs: tuple[ParamSpec, ...]
    part: Part
    expert: int | None
    fused: bool


@dataclass(frozen=True, slots=True)
class LeftOut:
    """A known tensor that is not loaded. `group` is what notes count it under; `twin` is the
    parameter that it is a copy of, whose shape it must have."""

    group: str
    reason: str
    twin: ParamSpec | None = None


def _number(component: str) -> int | None:
    """A decimal number in its only spelling: `7`, never `07`, `+7` or a foreign digit."""
    if not (component.isascii() and component.isdigit()) or len(component) > 9:
        return None
    return None if component[0] == "0" and component != "0" else int(component)


def _split(name: str) -> tuple[str, Components]:
    """`(prefix, components below it)`; the prefix is "", `layers.N.` or `mtp.N.`."""
    path = tuple(name.split("."))
    if path[0] == "model":
        path = path[1:]
    if len(path) > 2 and path[0] in ("layers", "mtp"):
        number = _number(path[1])
        if number is not None:
            return f"{path[0]}.{number}.", path[2:]
    return "", path


def parse(name: str) -> Parsed | None:
    """What `name` says by itself, or None if no line of the table fits."""
    prefix, path = _split(name)
    expert = None
    if len(path) > 2 and path[1] == "experts":
        expert = _number(path[2])
        if expert is not None:
            path = (*path[:2], "*", *path[3:])
        elif path[2] == "*":
            return None
    found = _SPELLINGS.get(path)
    if found is None:
        return None
    roles, part = found
    return Parsed(prefix, roles, part, expert, fused=expert is None and roles[0] in EXPERT_ROLES)


def native_weight_names(name: str) -> tuple[str, ...]:
    """The native names that a weight's name stands for; none for a scale or an unknown name.

    One, or for a stack of all experts each of its parameters' names (`….experts.w1.weight`).
    """
    parsed = parse(name)
    if parsed is None or parsed.part is not Part.WEIGHT:
        return ()
    return tuple(
        spec_name if parsed.expert is None else expert_name(spec_name, parsed.expert)
        for spec_name in (parsed.prefix + role.value for role in parsed.roles)
    )


def role_of(parameter_name: str) -> Role:
    """The role of a logical parameter (`ParamSpec.name`). Raises `ValueError` for another
    string."""
    _, path = _split(parameter_name)
    return Role(".".join(path))


class NameTable:
    """The rename table joined with one model's inventory."""

    def __init__(self, config: ModelConfig) -> None:
        self._specs = {(spec.prefix, spec.role): spec for spec in parameters(config)}
        self._runs_mtp = config.num_nextn_predict_layers > 0
        self._is_dspark = config.num_dspark_stages > 0

    def find(self, name: str) -> Place | LeftOut | None:
        """The one place of `name`, or why it is left out, or None: unknown to this model."""
        left_out = self._left_out(name)
        if left_out is not None:
            return left_out
        parsed = parse(name)
        if parsed is None:
            return None
        specs = tuple(self._specs.get((parsed.prefix, role)) for role in parsed.roles)
        found = tuple(spec for spec in specs if spec is not None)
        if len(found) != len(specs):
            return None
        if parsed.expert is not None and parsed.expert >= found[0].shape[0]:
            return None
        return Place(found, parsed.part, parsed.expert, parsed.fused)

    def stands_beside_known(self, name: str) -> bool:
        """Whether an unknown name differs from a known weight's in its last component only: the
        mark of a quantisation scheme with tensors of its own."""
        place = self.find(f"{name.rpartition('.')[0]}.weight")
        return self.find(name) is None and isinstance(place, Place)

    def _left_out(self, name: str) -> LeftOut | None:
        prefix, path = _split(name)
        if not prefix.startswith("mtp."):
            return None
        stage = prefix.removesuffix(".")
        if not self._runs_mtp:
            what = "a DSpark stage" if self._is_dspark else "an MTP layer"
            return LeftOut(stage, f"{what}, which this configuration does not run")
        role = _DUPLICATES.get(path)
        if role is None or (prefix, Role.ENORM) not in self._specs:
            return None
        twin = self._specs["", role]
        return LeftOut(name, f"a copy of {twin.name}, which the MTP layer shares", twin)

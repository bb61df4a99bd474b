"""Every parameter of a DeepSeek-V4 model: name, role, shape and storage, from the config alone.

Contract: `parameters(config)` lists each logical parameter once, in the checkpoint's native spelling.
The loader, the synthetic writer, the shard rules and the quantisation resolver all read this one
inventory and look things up by `Role`, never by a substring of a name. Torch-free. It does not know
files, devices, other spellings of the names (weights/names.py), nor how a scheme stores its codes.

Logical and checkpoint tensors differ in two ways only: the routed experts of a layer are one logical
parameter per matrix with a leading expert dimension (`layers.3.ffn.experts.w1.weight`, `[E, I, D]`),
and a quantised weight brings a second tensor, its `.scale`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum

from fourfold.core.config import ModelConfig


class Storage(Enum):
    """How the released checkpoints store a kind of parameter."""

    MODEL = "model dtype"  # BF16
    FLOAT = "float32"
    INTEGER = "int64"
    LINEAR = "quantisable linear"  # FP8 blocks, or the model dtype
    EXPERT = "routed expert"  # FP4 or FP8 blocks, or the model dtype


class Role(Enum):
    """What a parameter is for. The value is its suffix in the native spelling."""

    EMBED = "embed.weight"
    HEAD = "head.weight"
    NORM = "norm.weight"
    HC_HEAD_FN = "hc_head_fn"
    HC_HEAD_BASE = "hc_head_base"
    HC_HEAD_SCALE = "hc_head_scale"
    ATTN_NORM = "attn_norm.weight"
    FFN_NORM = "ffn_norm.weight"
    HC_ATTN_FN = "hc_attn_fn"
    HC_ATTN_BASE = "hc_attn_base"
    HC_ATTN_SCALE = "hc_attn_scale"
    HC_FFN_FN = "hc_ffn_fn"
    HC_FFN_BASE = "hc_ffn_base"
    HC_FFN_SCALE = "hc_ffn_scale"
    ATTN_SINK = "attn.attn_sink"
    WQ_A = "attn.wq_a.weight"
    Q_NORM = "attn.q_norm.weight"
    WQ_B = "attn.wq_b.weight"
    WKV = "attn.wkv.weight"
    KV_NORM = "attn.kv_norm.weight"
    WO_A = "attn.wo_a.weight"
    WO_B = "attn.wo_b.weight"
    COMPRESSOR_APE = "attn.compressor.ape"
    COMPRESSOR_WKV = "attn.compressor.wkv.weight"
    COMPRESSOR_WGATE = "attn.compressor.wgate.weight"
    COMPRESSOR_NORM = "attn.compressor.norm.weight"
    INDEXER_WQ_B = "attn.indexer.wq_b.weight"
    INDEXER_WEIGHTS = "attn.indexer.weights_proj.weight"
    INDEXER_APE = "attn.indexer.compressor.ape"
    INDEXER_WKV = "attn.indexer.compressor.wkv.weight"
    INDEXER_WGATE = "attn.indexer.compressor.wgate.weight"
    INDEXER_NORM = "attn.indexer.compressor.norm.weight"
    GATE = "ffn.gate.weight"
    GATE_BIAS = "ffn.gate.bias"
    TID2EID = "ffn.gate.tid2eid"
    EXPERT_W1 = "ffn.experts.w1.weight"
    EXPERT_W2 = "ffn.experts.w2.weight"
    EXPERT_W3 = "ffn.experts.w3.weight"
    SHARED_W1 = "ffn.shared_experts.w1.weight"
    SHARED_W2 = "ffn.shared_experts.w2.weight"
    SHARED_W3 = "ffn.shared_experts.w3.weight"
    E_PROJ = "e_proj.weight"
    H_PROJ = "h_proj.weight"
    ENORM = "enorm.weight"
    HNORM = "hnorm.weight"

    @property
    def storage(self) -> Storage:
        if self in _FLOAT_ROLES:
            return Storage.FLOAT
        if self in _LINEAR_ROLES:
            return Storage.LINEAR
        if self in EXPERT_ROLES:
            return Storage.EXPERT
        return Storage.INTEGER if self is Role.TID2EID else Storage.MODEL


EXPERT_ROLES = frozenset({Role.EXPERT_W1, Role.EXPERT_W2, Role.EXPERT_W3})
_LINEAR_ROLES = frozenset(
    {Role.WQ_A, Role.WQ_B, Role.WKV, Role.WO_A, Role.WO_B, Role.INDEXER_WQ_B}
    | {Role.SHARED_W1, Role.SHARED_W2, Role.SHARED_W3, Role.E_PROJ, Role.H_PROJ}
)
LINEAR_LAYER_ROLES = (_LINEAR_ROLES - {Role.WO_A}) | {
    Role.COMPRESSOR_WKV,
    Role.COMPRESSOR_WGATE,
    Role.INDEXER_WEIGHTS,
    Role.INDEXER_WKV,
    Role.INDEXER_WGATE,
    Role.GATE,
    Role.HEAD,
}
"""Matrices of linear layers, however they are stored; `wo_a` is not one, being block-diagonal."""
_FLOAT_ROLES = frozenset(
    {Role.HC_HEAD_FN, Role.HC_HEAD_BASE, Role.HC_HEAD_SCALE}
    | {Role.HC_ATTN_FN, Role.HC_ATTN_BASE, Role.HC_ATTN_SCALE}
    | {Role.HC_FFN_FN, Role.HC_FFN_BASE, Role.HC_FFN_SCALE}
    | {Role.ATTN_SINK, Role.COMPRESSOR_APE, Role.INDEXER_APE, Role.GATE_BIAS}
)


@dataclass(frozen=True)
class ParamSpec:
    """One logical parameter.

    `prefix` is `""`, `layers.N.` or `mtp.N.`; `shape` is `[out, in]` for a matrix, with a leading
    expert dimension for routed experts, always in elements (never in packed bytes).
    """

    role: Role
    prefix: str
    shape: tuple[int, ...]

    @property
    def name(self) -> str:
        return self.prefix + self.role.value

    @property
    def storage(self) -> Storage:
        return self.role.storage

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def checkpoint_names(self) -> tuple[str, ...]:
        """The checkpoint tensors that make up this parameter: one, or one for each expert."""
        if self.role not in EXPERT_ROLES:
            return (self.name,)
        head, tail = self.role.value.split("experts.")
        return tuple(f"{self.prefix}{head}experts.{k}.{tail}" for k in range(self.shape[0]))

    @property
    def checkpoint_shape(self) -> tuple[int, ...]:
        """The shape of each checkpoint tensor, in elements."""
        return self.shape[1:] if self.role in EXPERT_ROLES else self.shape


def scale_name(weight_name: str) -> str:
    """`X.weight` -> `X.scale`, the partner of a quantised weight."""
    return weight_name.removesuffix("weight") + "scale"


def parameters(config: ModelConfig) -> tuple[ParamSpec, ...]:
    """All logical parameters: embedding, main layers, tail, then the MTP layers."""
    return tuple(_all(config))


def _all(c: ModelConfig) -> Iterator[ParamSpec]:
    yield ParamSpec(Role.EMBED, "", (c.vocab_size, c.hidden_size))
    for layer in range(c.num_hidden_layers):
        yield from _block(c, f"layers.{layer}.", c.compress_ratios[layer], c.is_hash_layer(layer))
    yield ParamSpec(Role.NORM, "", (c.hidden_size,))
    yield ParamSpec(Role.HEAD, "", (c.vocab_size, c.hidden_size))
    yield from _hc_head(c, "")
    for stage in range(c.num_nextn_predict_layers):
        yield from _mtp(c, f"mtp.{stage}.")


def _mtp(c: ModelConfig, prefix: str) -> Iterator[ParamSpec]:
    d = c.hidden_size
    yield from _block(c, prefix, 0, hashed=False)
    yield ParamSpec(Role.E_PROJ, prefix, (d, d))
    yield ParamSpec(Role.H_PROJ, prefix, (d, d))
    for role in (Role.ENORM, Role.HNORM, Role.NORM):
        yield ParamSpec(role, prefix, (d,))
    yield from _hc_head(c, prefix)


def _hc_head(c: ModelConfig, prefix: str) -> Iterator[ParamSpec]:
    yield ParamSpec(Role.HC_HEAD_FN, prefix, (c.hc_mult, c.hc_mult * c.hidden_size))
    yield ParamSpec(Role.HC_HEAD_BASE, prefix, (c.hc_mult,))
    yield ParamSpec(Role.HC_HEAD_SCALE, prefix, (1,))


def _block(c: ModelConfig, prefix: str, ratio: int, hashed: bool) -> Iterator[ParamSpec]:
    yield from _hyper_connections(c, prefix)
    yield from _attention(c, prefix, ratio)
    yield from _moe(c, prefix, hashed)


def _hyper_connections(c: ModelConfig, prefix: str) -> Iterator[ParamSpec]:
    s, d = c.hc_mult, c.hidden_size
    rows = s * (s + 2)
    yield ParamSpec(Role.ATTN_NORM, prefix, (d,))
    yield ParamSpec(Role.FFN_NORM, prefix, (d,))
    for fn, base, scale in (
        (Role.HC_ATTN_FN, Role.HC_ATTN_BASE, Role.HC_ATTN_SCALE),
        (Role.HC_FFN_FN, Role.HC_FFN_BASE, Role.HC_FFN_SCALE),
    ):
        yield ParamSpec(fn, prefix, (rows, s * d))
        yield ParamSpec(base, prefix, (rows,))
        yield ParamSpec(scale, prefix, (3,))


def _attention(c: ModelConfig, prefix: str, ratio: int) -> Iterator[ParamSpec]:
    d, h, hd, q = c.hidden_size, c.num_attention_heads, c.head_dim, c.q_lora_rank
    yield ParamSpec(Role.ATTN_SINK, prefix, (h,))
    yield ParamSpec(Role.WQ_A, prefix, (q, d))
    yield ParamSpec(Role.Q_NORM, prefix, (q,))
    yield ParamSpec(Role.WQ_B, prefix, (h * hd, q))
    yield ParamSpec(Role.WKV, prefix, (hd, d))
    yield ParamSpec(Role.KV_NORM, prefix, (hd,))
    yield ParamSpec(Role.WO_A, prefix, (c.o_groups * c.o_lora_rank, h * hd // c.o_groups))
    yield ParamSpec(Role.WO_B, prefix, (d, c.o_groups * c.o_lora_rank))
    if not ratio:
        return
    width = c.compressor_series(ratio) * hd
    yield ParamSpec(Role.COMPRESSOR_APE, prefix, (ratio, width))
    yield ParamSpec(Role.COMPRESSOR_WKV, prefix, (width, d))
    yield ParamSpec(Role.COMPRESSOR_WGATE, prefix, (width, d))
    yield ParamSpec(Role.COMPRESSOR_NORM, prefix, (hd,))
    if not c.has_indexer(ratio):
        return
    width = c.compressor_series(ratio) * c.index_head_dim
    yield ParamSpec(Role.INDEXER_WQ_B, prefix, (c.index_n_heads * c.index_head_dim, q))
    yield ParamSpec(Role.INDEXER_WEIGHTS, prefix, (c.index_n_heads, d))
    yield ParamSpec(Role.INDEXER_APE, prefix, (ratio, width))
    yield ParamSpec(Role.INDEXER_WKV, prefix, (width, d))
    yield ParamSpec(Role.INDEXER_WGATE, prefix, (width, d))
    yield ParamSpec(Role.INDEXER_NORM, prefix, (c.index_head_dim,))


def _moe(c: ModelConfig, prefix: str, hashed: bool) -> Iterator[ParamSpec]:
    d, e, i = c.hidden_size, c.n_routed_experts, c.moe_intermediate_size
    yield ParamSpec(Role.GATE, prefix, (e, d))
    if hashed:
        yield ParamSpec(Role.TID2EID, prefix, (c.vocab_size, c.num_experts_per_tok))
    else:
        yield ParamSpec(Role.GATE_BIAS, prefix, (e,))
    yield ParamSpec(Role.EXPERT_W1, prefix, (e, i, d))
    yield ParamSpec(Role.EXPERT_W2, prefix, (e, d, i))
    yield ParamSpec(Role.EXPERT_W3, prefix, (e, i, d))
    shared = c.n_shared_experts * i
    yield ParamSpec(Role.SHARED_W1, prefix, (shared, d))
    yield ParamSpec(Role.SHARED_W2, prefix, (d, shared))
    yield ParamSpec(Role.SHARED_W3, prefix, (shared, d))

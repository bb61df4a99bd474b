"""How every parameter is split over tensor-parallel and expert-parallel ranks.

Contract: `SPLITS` gives the rule of every role; `shard` cuts one rank's part of a weight, plain or
quantised, codes and scales alike; `unshard` puts the parts together again, bit for bit. No cut
divides what belongs together (a head, an output group, a block that shares a scale):
`check_divides` lists all that stands in the way of a split, in words, before any weight is read. It
does not know how ranks talk (dist/comm.py) nor where weights come from.

    wq_b, attn_sink  rows by head ─┐               w1, w3  rows ─┐
    attention over this rank's heads               SwiGLU        │
    wo_a             rows by group │               w2   columns ─┴─ partial sum: all_reduce
    wo_b             columns ──────┴─ partial sum: all_reduce
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from enum import Enum
from types import MappingProxyType

import torch
from torch import Tensor

from fourfold.core.config import ModelConfig
from fourfold.core.errors import ConfigError
from fourfold.core.parameters import EXPERT_ROLES, ParamSpec, Role, parameters
from fourfold.core.tensor import QuantScheme, QuantTensor, Weight


class Split(Enum):
    """The dimension of `[out, in]` that is cut: an expert's leading dimension does not count."""

    REPLICATED = "replicated"
    ROWS = "rows"
    COLUMNS = "columns"


_ROWS = frozenset(
    {Role.EMBED, Role.HEAD, Role.ATTN_SINK, Role.WQ_B, Role.WO_A}
    | {Role.SHARED_W1, Role.SHARED_W3, Role.EXPERT_W1, Role.EXPERT_W3}
)
_COLUMNS = frozenset({Role.WO_B, Role.SHARED_W2, Role.EXPERT_W2})


def _split(role: Role) -> Split:
    if role in _ROWS:
        return Split.ROWS
    return Split.COLUMNS if role in _COLUMNS else Split.REPLICATED


# The key and value vector, the compressors and the indexer are shared by all heads, and every token
# meets every router weight and stream: those are small or needed whole, and stay replicated.
SPLITS: Mapping[Role, Split] = MappingProxyType({role: _split(role) for role in Role})
"""The tensor-parallel rule of every role. Routed experts (`EXPERT_ROLES`) follow it only without
expert parallelism; with it, each rank holds whole experts, a contiguous range of them."""


def shard(
    spec: ParamSpec, weight: Weight, tp_rank: int, tp_size: int, ep_rank: int, ep_size: int
) -> Weight:
    """The part of `weight` (the whole of `spec`) that belongs to a rank, contiguous.

    Routed experts are cut by expert if `ep_size` > 1, else like any other weight by `tp_size`.
    Raises `ConfigError` naming what does not divide. Call `check_divides` first: heads and output
    groups cannot be told from a shape alone.
    """
    shape = tuple(weight.shape)
    if shape != spec.shape:
        raise ValueError(f"{spec.name} must be {list(spec.shape)}, found {list(shape)}")
    for name, rank, size in (("tp", tp_rank, tp_size), ("ep", ep_rank, ep_size)):
        if not 0 <= rank < size:
            raise ValueError(f"{name}_rank must lie in 0 … {size - 1}, found {rank}")
    dim, rank, size = _cut(spec.role, tp_rank, tp_size, ep_rank, ep_size)
    if dim is None or size == 1:
        return weight
    fault = _fault(spec, _scheme(weight), dim, size)
    if fault:
        raise ConfigError(f"{spec.name} cannot be split: {fault}")
    if isinstance(weight, QuantTensor):
        length = shape[dim] // size
        return replace(
            weight,
            codes=_slice(weight.codes, dim, rank, size),
            scale=_slice(weight.scale, dim, rank, size),
            shape=_with_length(shape, dim, length),
        )
    return _slice(weight, dim, rank, size)


def unshard(spec: ParamSpec, parts: Sequence[Weight]) -> Weight:
    """The whole weight from the parts of all ranks, in rank order; the inverse of `shard`.

    Replicated parts must be equal and any one of them is the whole. Whether routed experts were cut
    by expert or inside each is seen from the parts' shapes.
    """
    first = parts[0]
    dim = _cut(spec.role, 0, len(parts), 0, 1)[0]
    if spec.role in EXPERT_ROLES and first.shape[0] != spec.shape[0]:
        dim = 0
    if dim is None or len(parts) == 1:
        if not all(_same(first, part) for part in parts[1:]):
            raise ValueError(f"{spec.name} is replicated, but the ranks' copies differ")
        whole = first
    elif isinstance(first, QuantTensor):
        quantised = [part for part in parts if isinstance(part, QuantTensor)]
        length = sum(part.shape[dim] for part in quantised)
        whole = replace(
            first,
            codes=torch.cat([part.codes for part in quantised], dim),
            scale=torch.cat([part.scale for part in quantised], dim),
            shape=_with_length(first.shape, dim, length),
        )
    else:
        whole = torch.cat([part for part in parts if isinstance(part, Tensor)], dim)
    if tuple(whole.shape) != spec.shape:
        raise ValueError(f"parts of {spec.name} make {list(whole.shape)}, not {list(spec.shape)}")
    return whole


def num_parts(role: Role, tp: int, ep: int) -> int:
    """Into how many parts the weights of `role` are cut over `tp` and `ep` ranks; 1 if they are not."""
    dim, _, size = _cut(role, 0, tp, 0, ep)
    return 1 if dim is None else size


def check_divides(
    config: ModelConfig, tp: int, ep: int, schemes: Mapping[Role, QuantScheme]
) -> list[str]:
    """Everything that keeps `config` from being split over `tp` and `ep` ranks; empty if nothing.

    `schemes` gives the scheme of the roles whose weights are quantised; the others are plain.
    """
    return list(dict.fromkeys(_faults(config, tp, ep, schemes)))


def _faults(
    config: ModelConfig, tp: int, ep: int, schemes: Mapping[Role, QuantScheme]
) -> Iterator[str]:
    for field in ("num_attention_heads", "o_groups", "vocab_size"):
        value = getattr(config, field)
        if value % tp:
            yield f"{field} {value:,} does not divide over {tp} tensor-parallel ranks"
    if config.n_routed_experts % ep:
        yield (
            f"n_routed_experts {config.n_routed_experts} does not divide over {ep} "
            "expert-parallel ranks"
        )
    by_units = {Role.ATTN_SINK, Role.EMBED, Role.HEAD}
    specs = {spec.role: spec for spec in parameters(config) if spec.role not in by_units}
    for role, spec in specs.items():
        dim, _, size = _cut(role, 0, tp, 0, ep)
        if dim is None or size == 1 or (role in EXPERT_ROLES and ep > 1):
            continue
        if role in (Role.WQ_B, Role.WO_A, Role.WO_B) and (
            config.num_attention_heads % tp or config.o_groups % tp
        ):
            continue  # said above, in the terms that the user knows
        fault = _fault(spec, schemes.get(role), dim, size)
        if fault:
            yield fault


def _cut(
    role: Role, tp_rank: int, tp_size: int, ep_rank: int, ep_size: int
) -> tuple[int | None, int, int]:
    """(dimension to cut or None, this rank's place, number of parts)."""
    split = SPLITS[role]
    if role in EXPERT_ROLES and ep_size > 1:
        return 0, ep_rank, ep_size
    if split is Split.REPLICATED:
        return None, tp_rank, tp_size
    dim = 0 if split is Split.ROWS else 1
    return dim + (role in EXPERT_ROLES), tp_rank, tp_size


def _fault(spec: ParamSpec, scheme: QuantScheme | None, dim: int, size: int) -> str | None:
    """Why dimension `dim` of `spec` cannot be cut into `size` parts, or None."""
    total = spec.shape[dim]
    what = _describe(spec, dim)
    if total % size:
        return f"{what} over {size} ranks does not divide"
    if scheme is None or dim < len(spec.shape) - 2:
        return None
    unit = scheme.block[dim - len(spec.shape) + 2]
    part = total // size
    if part % unit:
        return f"{what} over {size} ranks is {part:,}, not a multiple of {unit} ({scheme.name})"
    return None


def _describe(spec: ParamSpec, dim: int) -> str:
    """The cut dimension in the field's words."""
    total = spec.shape[dim]
    role = spec.role
    if role in EXPERT_ROLES:
        return f"{total} experts" if dim == 0 else f"a {total:,}-wide expert"
    if role in (Role.SHARED_W1, Role.SHARED_W2, Role.SHARED_W3):
        return f"a {total:,}-wide shared expert"
    side = "row" if SPLITS[role] is Split.ROWS else "column"
    short = role.value.removeprefix("attn.").removesuffix(".weight")
    return f"{short} with {total:,} {side}s"


def _scheme(weight: Weight) -> QuantScheme | None:
    return weight.scheme if isinstance(weight, QuantTensor) else None


def _slice(tensor: Tensor, dim: int, rank: int, size: int) -> Tensor:
    """Part `rank` of `size` equal parts of what is stored: elements, packed bytes or scales."""
    length = tensor.shape[dim] // size
    return tensor.narrow(dim, rank * length, length).contiguous()


def _with_length(shape: tuple[int, ...], dim: int, length: int) -> tuple[int, ...]:
    return (*shape[:dim], length, *shape[dim + 1 :])


def _same(a: Weight, b: Weight) -> bool:
    if isinstance(a, QuantTensor) and isinstance(b, QuantTensor):
        return torch.equal(a.codes, b.codes) and torch.equal(a.scale, b.scale)
    return isinstance(a, Tensor) and isinstance(b, Tensor) and torch.equal(a, b)

"""Inputs that a kernel meets rarely, made of an op's own cases: one number that is NaN, or the largest or
least there is, in every tensor of floats or stored codes that the op takes, one after another.

What an op may count on never to be NaN, or never so large, is listed, with who sees to it.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import torch
from torch import Tensor

from fourfold.core.rows import RowPages
from fourfold.core.tensor import QuantTensor
from fourfold.engine.selftest.cases import SAME_TOKENS
from fourfold.ops.catalog import OPS
from fourfold.ops.compare import difference, tensors
from fourfold.ops.registry import Case, Kernel, KernelPlan, Op

Path = tuple[str | int, ...]
_REQUEST = "core/request.py refuses such a parameter before a request is queued"
# By (op, place of the tensor in its arguments).
GIVEN: Mapping[tuple[str, Path], str] = {
    **{
        ("sample", ("rows", name)): _REQUEST
        for name in ("temperature", "top_p", "min_p")
    },
    ("sample", ("rows", "uniform")): "the op `uniform` makes numbers in [0, 1)",
    ("adjust_logits", ("adjustments", "repetition")): _REQUEST,
}  # fmt: skip
# Rounded to FP8 in groups, a larger number may become 2^128, which float32 does not have.
_ROUNDED = 240 * 2.0**120
# float32 coefficients enter products as sums of bfloat16 numbers, of which this is the largest.
_COEFFICIENT = float(torch.finfo(torch.bfloat16).max)
# The router's weights are shares of the scaling factor, a few units.
_SHARE = 1e4
LARGEST: Mapping[tuple[str, Path], float] = {
    **dict.fromkeys((("routed_experts", ("weights",)), ("moe", ("weights",))), _SHARE),
    **dict.fromkeys(((op, ("site", "fn")) for op in ("hc_pre", "hc_post_pre")), _COEFFICIENT),
    ("hc_head", ("fn",)): _COEFFICIENT,
    # A kernel may weigh products of FP8 codes before it applies the keys' scales.
    ("index_topk", ("weights",)): 1e30,
}
_LARGEST_CODES = {"fp8_block": 0x7E, "mxfp4": 0x77}  # 448, and twice 6


@dataclass(frozen=True)
class Spoilt:
    """Arguments with one number changed: what to, where, and in which row of the first dimension."""

    what: str
    path: Path
    row: int
    arguments: dict[str, Any]

    @property
    def where(self) -> str:
        return f"{self.what} in {'.'.join(map(str, self.path))}"


def _leaves(value: Any, path: Path = ()) -> Iterator[tuple[Path, Tensor, str]]:
    """Places of floats and of codes of stored weights, and the scheme of the latter."""
    if isinstance(value, Tensor):
        if value.dtype.is_floating_point and value.numel():
            yield path, value, ""
    elif isinstance(value, QuantTensor):
        yield (*path, "codes"), value.codes, value.scheme.name
    elif isinstance(value, RowPages):
        yield from _leaves(value.storage, (*path, "storage"))
    elif is_dataclass(value) and not isinstance(value, type):
        for each in fields(value):
            yield from _leaves(getattr(value, each.name), (*path, each.name))
    elif isinstance(value, Mapping | tuple | list):
        items = value.items() if isinstance(value, Mapping) else enumerate(value)
        for key, item in items:
            yield from _leaves(item, (*path, key))


def _at(value: Any, path: Path) -> Any:
    for step in path:
        by_name = isinstance(step, str) and not isinstance(value, Mapping)
        value = getattr(value, step) if by_name else value[step]
    return value


def spoilt(op: Op, case: Case, least: bool) -> Iterator[Spoilt]:
    """The case's arguments, each time with one number changed: to the `least` one too, if so."""
    rounds = any(scheme for _, _, scheme in _leaves(case.arguments))
    for path, tensor, scheme in _leaves(case.arguments):
        if (op.name, path) in GIVEN:
            continue
        index = (tensor.numel() * 2) // 3
        row = index // (tensor.numel() // tensor.shape[0]) if tensor.dim() else 0
        if scheme:
            changes = {"the largest codes": _LARGEST_CODES[scheme]}
        else:
            most = torch.finfo(tensor.dtype).max
            most = LARGEST.get((op.name, path), _ROUNDED if rounds else most)
            changes = {"NaN": float("nan"), "the largest": most}
            changes |= {"the least": -most} if least else {}
        for what, value in changes.items():
            arguments = copy.deepcopy(dict(case.arguments))
            changed = _at(arguments, path)
            if scheme:
                changed[row] = value
            elif changed.dim():
                changed.view(-1)[index] = value
            else:
                changed.fill_(value)
            yield Spoilt(what, path, row, arguments)


def results(plan: KernelPlan, op: Op, arguments: dict[str, Any]) -> list[Any]:
    """The result, and what was written in place."""
    out = getattr(plan, op.name)(**arguments)
    return [*([] if out is None else [out]), *(arguments[name] for name in op.writes)]


def _bits(tensor: Tensor) -> Tensor:
    same_size = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return tensor.contiguous().view(same_size[tensor.element_size()])


def faults(
    kernel: Kernel, op: Op, case: Case, tolerance: float, poisoned: Any, least: bool
) -> Iterator[str]:
    """What is wrong with a kernel on a case as it is and spoilt, in words.

    Kernel and definition agree, on NaN and infinities too. What a NaN does not reach by definition has the
    same bits in the kernel's result with it as without. Where results belong to tokens, a spoilt token's
    reaches no other's.
    """
    plan, bodies = KernelPlan(OPS, {op.name: kernel}, ()), KernelPlan.bodies(OPS)
    begin = copy.deepcopy(dict(case.arguments))
    expected = results(bodies, op, copy.deepcopy(begin))
    with poisoned():
        got = results(plan, op, copy.deepcopy(begin))
    found = difference(got, expected, tolerance)
    if found is not None:
        yield f"as it is: {found}"
        return
    for each in spoilt(op, case, least):
        theirs = results(bodies, op, copy.deepcopy(each.arguments))
        with poisoned():
            ours = results(plan, op, each.arguments)
        found = difference(ours, theirs, tolerance)
        if found is not None:
            yield f"{each.where}: {found}"
            continue
        of_tokens = each.path[0] in SAME_TOKENS.get(op.name, ())
        quadruples = zip(*map(tensors, (got, ours, expected, theirs)), strict=True)
        for clean, now, defined, redefined in quadruples:
            if each.what == "NaN":
                reached = _bits(defined) != _bits(redefined)
                if bool(((_bits(clean) != _bits(now)) & ~reached).any()):
                    yield f"{each.where} reaches what it does not by definition"
            if of_tokens:
                others = torch.arange(now.shape[0], device=now.device) != each.row
                for before, after in ((clean, now), (defined, redefined)):
                    if not torch.equal(_bits(before)[others], _bits(after)[others]):
                        yield f"{each.where} reaches another token"

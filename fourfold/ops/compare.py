"""How the results of two bodies of one op are compared: kernels with definitions, float32 with float64.

Contract: `difference` says in words what differs, or None. Floats agree within a tolerance relative to
the expected tensor's largest finite magnitude, NaN and infinities must be where they are expected, integers
must be equal. Cached rows are compared as the numbers they stand for, of which some may be the neighbouring
code: a value that lies between two codes may fall to either.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields, is_dataclass

import torch
from torch import Tensor

from fourfold.core.row_format import RowKind
from fourfold.core.rows import RowPages
from fourfold.ops.rows import read_rows

FLIPPED = 0.02  # of the codes may be a neighbour
_NEXT_CODE = 0.126  # how far apart two E4M3 neighbours are, relative to either


def tensors(value: object) -> list[Tensor]:
    """All tensors in a result or argument, in order."""
    if isinstance(value, Tensor):
        return [value]
    if is_dataclass(value) and not isinstance(value, type):
        return [t for f in fields(value) for t in tensors(getattr(value, f.name))]
    if isinstance(value, dict):
        return [t for item in value.values() for t in tensors(item)]
    if isinstance(value, list | tuple):
        return [t for item in value for t in tensors(item)]
    return []


@dataclass(frozen=True)
class _Leaf:
    """A tensor to compare; `coded` if its numbers come from FP8 codes."""

    tensor: Tensor
    coded: bool = False


def _leaves(value: object) -> Iterator[_Leaf]:
    if isinstance(value, RowPages) and value.format.kind is not RowKind.PLAIN:
        count = value.storage.shape[0] * value.rows_per_page
        slots = torch.arange(count, device=value.device)
        yield _Leaf(read_rows(value, slots, torch.float64), coded=True)
    elif isinstance(value, dict | list | tuple):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _leaves(item)
    elif is_dataclass(value) and not isinstance(value, RowPages | type):
        for each in fields(value):
            yield from _leaves(getattr(value, each.name))
    else:
        yield from map(_Leaf, tensors(value))


def difference(got: object, expected: object, tolerance: float) -> str | None:
    """What is wrong with `got`, in a few words."""
    ours, theirs = list(_leaves(got)), list(_leaves(expected))
    if len(ours) != len(theirs):
        return f"{len(ours)} results and not {len(theirs)}"
    for a, b in zip(ours, theirs, strict=True):
        found = _one(a.tensor, b.tensor, tolerance, a.coded or b.coded)
        if found is not None:
            return found
    return None


def _one(a: Tensor, b: Tensor, tolerance: float, coded: bool) -> str | None:
    if (a.dtype, a.shape) != (b.dtype, b.shape):
        return f"{a.dtype} {list(a.shape)} and not {b.dtype} {list(b.shape)}"
    if not a.dtype.is_floating_point:
        wrong = int((a != b).sum())
        return f"{wrong} of {a.numel()} integers differ" if wrong else None
    finite = torch.isfinite(b)
    if not torch.equal(torch.isnan(a), torch.isnan(b)):
        return f"{int((torch.isnan(a) != torch.isnan(b)).sum())} NaN are not where they should be"
    if not torch.equal(a[~finite].nan_to_num(), b[~finite].nan_to_num()):
        return "infinities are not where they should be"
    if not bool(finite.any()):
        return None
    x, y = a[finite].double(), b[finite].double()
    error, largest = (x - y).abs(), float(y.abs().max())
    if not coded:
        bound = tolerance * largest
        worst = float(error.max())
        return (
            f"off by {worst / (largest or 1):.2g}, allowed {tolerance:.2g}"
            if worst > bound
            else None
        )
    if bool((error > _NEXT_CODE * y.abs() + tolerance * largest).any()):
        return "cached numbers are further off than one code"
    flipped = float((error > tolerance * y.abs()).double().mean())
    return f"{flipped:.1%} of the codes differ" if flipped > FLIPPED else None

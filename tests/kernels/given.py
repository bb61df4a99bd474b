"""Ops that consume an argument, in tests that pass one tensor several times."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fourfold.ops.compare import tensors
from fourfold.ops.registry import Op


def kept(run: Callable[..., Any]) -> Callable[..., Any]:
    """`run` on copies of the tensors it is given."""

    def copied(value: Any) -> Any:
        return value.clone() if isinstance(value, Tensor) else value

    def on_copies(*args: Any, **kwargs: Any) -> Any:
        return run(*map(copied, args), **{name: copied(each) for name, each in kwargs.items()})

    return on_copies


def assert_spared(op: Op, after: dict[str, Any], before: dict[str, Any]) -> None:
    """Nothing but what `op` writes or consumes has other bits than before."""

    def bits(tensor: Tensor) -> Tensor:
        return tensor.contiguous().view(torch.uint8)

    for name in before.keys() - {*op.writes, *op.consumes}:
        pairs = zip(tensors(after[name]), tensors(before[name]), strict=True)
        same = all(torch.equal(bits(a), bits(b)) for a, b in pairs if a.numel() and a.dim())
        assert same, f"{op.name} changed {name}"

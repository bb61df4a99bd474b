"""Communication between the ranks that share one model, as an argument of the model.

Contract: the model calls `all_reduce` and `all_gather` where a split matrix leaves partial results,
always, and never asks how many ranks there are; with one rank both return their input itself.
It does not know how ranks are started (dist/launch) nor how parameters are split (dist/shard.py).
"""

from __future__ import annotations

from enum import Enum
from typing import Protocol

from torch import Tensor


class Group(Enum):
    """Which ranks take part.

    TENSOR: those among which attention, shared experts, embedding and head are split. EXPERT: those
    among which the routed experts are split, by expert or, without expert parallelism, inside each
    expert (then the same ranks as TENSOR).
    """

    TENSOR = "tensor"
    EXPERT = "expert"


class Comm(Protocol):
    """What the model needs from the ranks beside it. Every rank of a group makes the same calls."""

    def rank(self, group: Group = Group.TENSOR) -> int:
        """This process's place in `group`, from 0."""
        ...

    def size(self, group: Group = Group.TENSOR) -> int:
        """How many ranks `group` has."""
        ...

    def all_reduce(self, tensor: Tensor, group: Group = Group.TENSOR) -> Tensor:
        """The sum of `tensor` over the ranks of `group`, the same on all of them.

        Shape and dtype are kept; `tensor` may be reused for the result.
        """
        ...

    def all_gather(self, tensor: Tensor, dim: int, group: Group = Group.TENSOR) -> Tensor:
        """The ranks' tensors joined along `dim` in rank order."""
        ...


class SingleComm:
    """One rank: every sum has one term and every row is here."""

    def rank(self, group: Group = Group.TENSOR) -> int:
        """Always 0."""
        return 0

    def size(self, group: Group = Group.TENSOR) -> int:
        """Always 1."""
        return 1

    def all_reduce(self, tensor: Tensor, group: Group = Group.TENSOR) -> Tensor:
        """`tensor` itself."""
        return tensor

    def all_gather(self, tensor: Tensor, dim: int, group: Group = Group.TENSOR) -> Tensor:
        """`tensor` itself."""
        return tensor

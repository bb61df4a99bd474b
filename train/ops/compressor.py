"""Pooling of aligned windows at once, where serving folds them token by token.

Contract: gives what `compress`'s body gives for each document alone, up to rounding: the same softmax,
summed in another order.
"""

from __future__ import annotations

import torch
from torch import Tensor


def pool(
    kv: Tensor, gate: Tensor, ape: Tensor, positions: Tensor, ratio: int, width: int
) -> Tensor:
    """`kv, gate [T, F·w]`, `ape [m, F·w]`, `positions [T]` → pooled rows `[T/m, w]`.

    With two series a row pools the first halves of the window before it, unless its own is the
    document's first, and the second halves of its own.
    """
    values = kv.view(-1, ratio, kv.shape[-1])
    scores = gate.view(-1, ratio, gate.shape[-1]) + ape.to(gate.dtype)
    if kv.shape[-1] == 2 * width:
        first = (positions[::ratio] == 0).view(-1, 1, 1)
        before = scores[:, :, :width].roll(1, 0).masked_fill(first, float("-inf"))
        scores = torch.cat([before, scores[:, :, width:]], dim=1)
        values = torch.cat([values[:, :, :width].roll(1, 0), values[:, :, width:]], dim=1)
    return (torch.softmax(scores, dim=1) * values).sum(1)

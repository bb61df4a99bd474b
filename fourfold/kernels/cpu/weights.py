"""Weights as a CPU wants them: float32 numbers, made from codes and scales once, when they are loaded.

Contract: the numbers are those that the stored form stands for, so results do not change; a `QuantTensor`
stays one, because whether its layer rounds its input is part of it. Numbers take four bytes each: where all
weights of an op would take more than `LIMIT`, `numbers_fit` says so, and the op keeps to its definition,
which makes them anew in every call.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from fourfold.core.config import ModelConfig
from fourfold.core.errors import QuantizationError
from fourfold.core.parameters import ParamSpec, parameters
from fourfold.core.tensor import QuantScheme, QuantTensor, Weight, dense

LIMIT = 4 << 30
"""Bytes that the numbers of one op's weights may take."""
_BYTES = 4


class Numbers(QuantScheme):
    """`codes` uint8 `[..., o, 4·i]` are the bytes of float32 numbers; `scale` `[..., 0]` is empty."""

    name = "numbers"
    block = (1, 1)

    def codes_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return (*shape[:-1], _BYTES * shape[-1])

    def scale_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return (*shape[:-2], 0)

    def dequantize(self, codes: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
        """The numbers: for float32 the same memory."""
        return codes.view(torch.float32).to(dtype)

    def quantize(self, values: Tensor, scale_format: str) -> tuple[Tensor, Tensor]:
        codes = values.float().contiguous().view(torch.uint8)
        return codes, codes.new_empty(*values.shape[:-2], 0)

    def validate(self, codes: Tensor, scale: Tensor, name: str) -> None:
        if not bool(torch.isfinite(codes.view(torch.float32)).all()):
            raise QuantizationError(f"{name}: a number is not finite")

    def canonicalize(self, codes: Tensor) -> None:
        """Nothing: zeros of either sign count alike."""


NUMBERS = Numbers()


def as_numbers(weight: Weight) -> Weight:
    """`weight` with its numbers at hand: a kernel's `prepare`."""
    if not isinstance(weight, QuantTensor):
        return weight.float() if weight.dtype == torch.bfloat16 else weight
    if weight.scheme.name == NUMBERS.name:
        return weight
    values = weight.dequantize(torch.float32)
    codes, scale = NUMBERS.quantize(values, "f32")
    return QuantTensor(codes, scale, NUMBERS, weight.shape, weight.quantize_activations)


def matrices(stack: Weight) -> Callable[[int], Tensor]:
    """The matrices `[o, i]` of a stack `[E, o, i]` by their number, in float32."""
    if isinstance(stack, QuantTensor) and stack.scheme.name == NUMBERS.name:
        values = stack.dequantize(torch.float32)
        return lambda number: values[number]
    return lambda number: dense(stack[number], torch.float32)


def numbers_fit(reads: Callable[[ParamSpec], bool]) -> Callable[[ModelConfig], str | None]:
    """A kernel's `supports`: why the numbers of all parameters that it `reads` are too many, or None."""

    def refusal(config: ModelConfig) -> str | None:
        count = sum(math.prod(spec.shape) for spec in parameters(config) if reads(spec))
        if _BYTES * count <= LIMIT:
            return None
        size, limit = _BYTES * count / 2**30, LIMIT / 2**30
        return f"its weights as float32 numbers would take {size:.1f} GiB, the limit is {limit:.0f}"

    return refusal

"""Typed quantised tensors: codes, scale and scheme travel together or not at all.

Contract: a `QuantTensor` is the only way a quantised weight exists in memory. Its codes are never
copied into another dtype; the one way to numbers is `dequantize`, which applies the scale by value.
This file knows no scheme (see quant/) and no arithmetic (see ops/quantize.py).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fourfold.core.errors import QuantizationError


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """The wider of `dtype` and float32: what sums, norms and softmaxes are computed in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def dtype_name(dtype: torch.dtype) -> str:
    """What configs call a dtype: "bfloat16"."""
    return str(dtype).removeprefix("torch.")


def named_dtype(name: str) -> torch.dtype:
    """The dtype that configs call `name`."""
    found: torch.dtype = getattr(torch, name)
    return found


class QuantScheme(ABC):
    """How a matrix `[..., out, in]` is stored as codes and scales.

    `name` is what configs and plans call it. `block` is (rows, columns) that share one scale.
    """

    name: str
    block: tuple[int, int]

    @abstractmethod
    def dequantize(self, codes: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
        """The values the codes stand for, `[..., out, in]` in `dtype`."""

    @abstractmethod
    def quantize(self, values: Tensor, scale_format: str) -> tuple[Tensor, Tensor]:
        """`(codes, scale)` of `values [..., out, in]`; `scale_format` is "e8m0" or "f32"."""

    @abstractmethod
    def validate(self, codes: Tensor, scale: Tensor, name: str) -> None:
        """Raise `QuantizationError` naming `name` if codes or scales hold NaN or infinity."""

    @abstractmethod
    def canonicalize(self, codes: Tensor) -> None:
        """Rewrite every code of negative zero to zero, in place."""

    @abstractmethod
    def codes_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of the stored codes for a matrix of `shape` elements."""

    def scale_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of the stored scales for a matrix of `shape` elements; edge blocks may be partial."""
        *lead, rows, columns = shape
        return (*lead, -(-rows // self.block[0]), -(-columns // self.block[1]))


@dataclass(frozen=True)
class QuantTensor:
    """A quantised matrix, or a stack of them along leading dimensions.

    `codes` uint8 and `scale` (uint8 E8M0 exponent bytes, or float32) are stored as `scheme` says;
    `shape` is `[..., out, in]` in elements. `quantize_activations` tells a linear layer to round its
    input to FP8 too, as the released models were trained; off, only the weight is quantised.
    """

    codes: Tensor
    scale: Tensor
    scheme: QuantScheme
    shape: tuple[int, ...]
    quantize_activations: bool = True

    def __post_init__(self) -> None:
        for what, tensor, expected in (
            ("codes", self.codes, self.scheme.codes_shape(self.shape)),
            ("scale", self.scale, self.scheme.scale_shape(self.shape)),
        ):
            if tuple(tensor.shape) != tuple(expected):
                raise QuantizationError(
                    f"{self.scheme.name} {what} of a {list(self.shape)} matrix must have shape "
                    f"{list(expected)}, found {list(tensor.shape)}"
                )
        if self.codes.dtype != torch.uint8 or self.scale.dtype not in (torch.uint8, torch.float32):
            raise QuantizationError(
                f"{self.scheme.name} needs uint8 codes and uint8 (E8M0) or float32 scales, "
                f"found {self.codes.dtype} and {self.scale.dtype}"
            )

    @property
    def device(self) -> torch.device:
        return self.codes.device

    @property
    def nbytes(self) -> int:
        return self.codes.nbytes + self.scale.nbytes

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """Values `[..., out, in]` in `dtype`."""
        return self.scheme.dequantize(self.codes, self.scale, dtype)

    def __getitem__(self, index: int) -> QuantTensor:
        """One matrix of a stack."""
        if len(self.shape) < 3:
            raise IndexError("only a stack of matrices can be indexed")
        return replace(self, codes=self.codes[index], scale=self.scale[index], shape=self.shape[1:])

    def to(self, device: torch.device | str) -> QuantTensor:
        """The same codes and scales on another device. There is no conversion of dtype."""
        return replace(self, codes=self.codes.to(device), scale=self.scale.to(device))

    def with_activations(self, quantize: bool) -> QuantTensor:
        """The same weight with activation quantisation switched on or off."""
        return replace(self, quantize_activations=quantize)


Weight = Tensor | QuantTensor


def dense(weight: Weight, dtype: torch.dtype) -> Tensor:
    """The values of a plain or quantised weight in `dtype`."""
    return weight.dequantize(dtype) if isinstance(weight, QuantTensor) else weight.to(dtype)

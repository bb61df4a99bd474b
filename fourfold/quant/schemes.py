"""All quantisation schemes by name. A new scheme is one file beside this and one more entry here."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from fourfold.core.tensor import QuantScheme
from fourfold.quant.fp8_block import FP8_BLOCK
from fourfold.quant.mxfp4 import MXFP4

SCHEMES: Mapping[str, QuantScheme] = MappingProxyType(
    {scheme.name: scheme for scheme in (FP8_BLOCK, MXFP4)}
)

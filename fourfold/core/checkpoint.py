"""What a safetensors header says about one tensor, as a value. Torch-free.

Contract: plain facts read from a file, unchanged: names and dtype strings are the file's own. It
does not know which parameter a tensor belongs to, nor which dtypes are supported.
"""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class TensorHeader:
    """One entry of a safetensors header.

    `name`: as spelled in the file. `dtype`: the safetensors string (`BF16`, `F8_E4M3`, `I8` …).
    `shape`: as in the header, so bytes for FP4 packed as I8 or U8. `file`: path or file name, for
    messages and for opening. `offset_begin`, `offset_end`: absolute byte offsets in that file, end
    exclusive (the header's own offsets count from the start of the data, these do not).
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: str
    offset_begin: int = 0
    offset_end: int = 0

    @property
    def nbytes(self) -> int:
        """The length of the tensor's data in the file, in bytes."""
        return self.offset_end - self.offset_begin

    @property
    def numel(self) -> int:
        """The number of stored items: the product of the header's shape."""
        return math.prod(self.shape)

    def __str__(self) -> str:
        return f"{self.name} ({self.dtype} {list(self.shape)}, {self.file})"

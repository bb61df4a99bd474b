"""The Triton that the kernels of this folder are written for.

Gluon, in which they lay out their operands by hand, changes between Triton's releases. Where another
one is installed they are refused by name, and the portable kernels run.
"""

from __future__ import annotations

import triton

from fourfold.core.config import ModelConfig

WRITTEN_FOR = "3.6"


def other_triton(config: ModelConfig) -> str | None:
    """Why these kernels cannot be built here, None if they can."""
    found: str = triton.__version__
    if found.split(".")[:2] == WRITTEN_FOR.split("."):
        return None
    return f"is written for Triton {WRITTEN_FOR}, and {found} is installed"

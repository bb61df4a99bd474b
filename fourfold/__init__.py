"""fourfold: one inference engine for DeepSeek-V4, on GPUs and on a CPU.

Contract: importing this package is instant: it imports no other part before a name is asked for, and
none of these names loads torch. An `LLM` does, when it is made.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fourfold.core.errors import FourfoldError
    from fourfold.core.request import SamplingParams, StructuredOutputsParams
    from fourfold.llm import LLM, AsyncLLM, CompletionOutput, RequestOutput

__version__ = "0.1.0"
__all__ = [
    "LLM",
    "AsyncLLM",
    "CompletionOutput",
    "FourfoldError",
    "RequestOutput",
    "SamplingParams",
    "StructuredOutputsParams",
]


def __getattr__(name: str) -> object:
    if name == "FourfoldError":
        from fourfold.core.errors import FourfoldError

        return FourfoldError
    if name in ("SamplingParams", "StructuredOutputsParams"):
        from fourfold.core import request

        return getattr(request, name)
    if name in __all__:
        from fourfold import llm

        return getattr(llm, name)
    raise AttributeError(f"module 'fourfold' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

"""Requests and what comes back, in plain Python.

Contract: the words the server, the engine and the offline API share. Torch-free; it knows neither text
nor tensors.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from enum import Enum

from fourfold.core.errors import RequestError


class FinishReason(Enum):
    """Why a request ended."""

    STOP = "stop"  # an end-of-sequence token
    LENGTH = "length"  # max_tokens reached
    ERROR = "error"  # its logits were not finite


@dataclass(frozen=True)
class SamplingParams:
    """How to choose tokens. `temperature` 0 is greedy; `seed` None takes the engine's.

    Raises `RequestError` naming the field and its range.
    """

    max_tokens: int = 16
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int | None = None
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        if not self.max_tokens >= 1:
            raise RequestError(f"max_tokens must be at least 1, found {self.max_tokens}")
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise RequestError(f"temperature must be at least 0, found {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise RequestError(f"top_p must be above 0 and at most 1, found {self.top_p}")
        if self.seed is not None and not 0 <= self.seed < 2**63:
            raise RequestError(f"seed must be at least 0 and below 2^63, found {self.seed}")


@dataclass(frozen=True)
class Request:
    """A prompt in tokens and how to continue it."""

    request_id: str
    prompt_token_ids: tuple[int, ...]
    params: SamplingParams = field(default_factory=SamplingParams)


@dataclass(frozen=True)
class RequestOutput:
    """What one step added to a request."""

    request_id: str
    new_token_ids: tuple[int, ...]
    finish_reason: FinishReason | None = None

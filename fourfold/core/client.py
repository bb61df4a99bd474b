"""What a front knows of an engine: it starts, takes requests, tells how it is, and stops.

Contract: the one boundary between the fronts (server, offline API) and the engine; everything above it
runs as well on a stub. Requests and outputs are those of core/request.py. Torch-free. It knows neither
processes nor sockets nor text.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Protocol

from fourfold.core.config import EngineConfig
from fourfold.core.errors import FourfoldError
from fourfold.core.request import Request, RequestOutput

# Told (part just loaded, bytes done, bytes in all) while an engine starts.
LoadProgress = Callable[[str, int, int], None]


class EngineDeadError(FourfoldError):
    """The engine died or is stuck; the text says in which step, and how it is known.

    `step` is the number of the last step it began, None if it began none.
    """

    exit_status = 1

    def __init__(self, message: str, step: int | None = None):
        super().__init__(message)
        self.step = step


class EngineClosedError(FourfoldError):
    """The engine takes no more requests: it was not started, is draining, or was shut down."""

    exit_status = 1


@dataclass(frozen=True)
class Launch:
    """What an engine is started with. `device` as on the command line; `allowed_token_ids` are the
    ids the tokenizer can decode, no other is ever sampled (None: all of the vocabulary). `tokenizer` is
    the directory of the tokenizer that answers are read with (None: the model's own)."""

    config: EngineConfig
    device: str = "auto"
    allowed_token_ids: tuple[int, ...] | None = None
    tokenizer: str | None = None


@dataclass(frozen=True)
class EngineInfo:
    """A started engine. `model` is `org/name` or a directory's name; `notes` are what was decided
    while loading and `capacity` what fits into memory, both lines for a person; `explanation` is the kernel
    plan, formats and the reasons for them, as JSON values."""

    model: str
    revision: str | None
    device: str
    dtype: str
    max_model_len: int
    max_num_seqs: int
    vocab_size: int
    bos_token_id: int
    eos_token_id: int
    num_speculative_tokens: int = 0
    notes: tuple[str, ...] = ()
    capacity: tuple[str, ...] = ()
    explanation: dict[str, Any] = field(default_factory=dict, hash=False)


@dataclass(frozen=True)
class EngineStats:
    """Counts since the start, then what is so now. `drafted` and `accepted` are by draft position;
    pages of 256 tokens are free, used or cached; images are those of the prefix cache."""

    num_steps: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    generation_tokens: int = 0
    num_preemptions: int = 0
    drafted: tuple[int, ...] = ()
    accepted: tuple[int, ...] = ()
    num_running: int = 0
    num_waiting: int = 0
    pages: int = 0
    pages_used: int = 0
    pages_cached: int = 0
    images: int = 0


@dataclass(frozen=True)
class StepInfo:
    """A step of the engine: its number, counted from 1, and the sequences and tokens it runs."""

    number: int
    num_sequences: int
    num_tokens: int

    def __str__(self) -> str:
        parts = ((self.num_sequences, "sequence"), (self.num_tokens, "token"))
        words = (f"{count} {word}{'' if count == 1 else 's'}" for count, word in parts)
        return f"step {self.number} ({', '.join(words)})"


class EngineState(Enum):
    """Where an engine is in its life."""

    NEW = "new"
    LOADING = "loading"
    READY = "ready"
    DRAINING = "draining"
    STOPPED = "stopped"
    DEAD = "dead"


@dataclass(frozen=True)
class EngineHealth:
    """How an engine is, as far as its client knows; asking costs it nothing.

    `requests` were given and have not ended. `step` is the latest step that began, `in_step`
    whether it still runs, `step_age` the seconds since it began or, if over, ended; `silence` the
    seconds since the engine was last heard. `error` says why it is dead; `step_seconds` is the time
    spent in all steps that are over.
    """

    state: EngineState
    requests: int = 0
    num_steps: int = 0
    step: StepInfo | None = None
    in_step: bool = False
    step_age: float = 0.0
    silence: float = 0.0
    error: str | None = None
    step_seconds: float = 0.0


class EngineClient(Protocol):
    """One engine. All methods belong to the event loop that `start` ran in."""

    async def start(self, progress: LoadProgress | None = None) -> EngineInfo:
        """Load the model. Raises what loading raises, or `EngineDeadError`."""

    @property
    def info(self) -> EngineInfo:
        """What `start` returned; `EngineClosedError` before."""

    def generate(self, request: Request) -> AsyncGenerator[RequestOutput, None]:
        """Run a request: what each step adds to each of its sequences, until all have ended.

        A consumer may be slow: outputs wait for it and the engine does not. Leaving the iterator
        early aborts the request. Raises `RequestError` or `CapacityError` if the request is refused,
        `EngineDeadError` (after the outputs that did arrive) or `EngineClosedError`.
        """

    async def abort(self, request_id: str, index: int | None = None) -> bool:
        """End a request, or one of its sequences, with `FinishReason.ABORT`; whether it was there."""

    async def stats(self) -> EngineStats:
        """Counts, taken between two steps. Raises `EngineDeadError` or `EngineClosedError`."""

    def health(self) -> EngineHealth:
        """How the engine is. Never raises."""

    async def reset_prefix_cache(self) -> None:
        """Give up all cached pages and images that nobody uses. Raises as `stats` does."""

    async def drain(self, timeout: float) -> int:
        """Take no more requests and wait for those there are; after `timeout` seconds abort the
        rest. How many were aborted."""

    async def shutdown(self, timeout: float = 0.0) -> None:
        """Drain, then stop the engine and free all it holds. May be called at any time, also twice."""

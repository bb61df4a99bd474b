"""What the server is told when it starts, and every bound it keeps.

Contract: frozen, checked when built, the same for all requests; `ServerSettings.bounds` says them to a
person. Nothing else in server/ invents a limit.
"""

from __future__ import annotations

from dataclasses import dataclass

from fourfold.core.client import EngineInfo
from fourfold.core.errors import ConfigError

# Of a request: what one may ask for.
MAX_STOPS = 32
MAX_STOP_CHARACTERS = 1000
MAX_ERROR_CHARACTERS = 500
MAX_PROMPTS = 1024
# Of a connection, beside its body.
MAX_HEADER_BYTES = 32 << 10
MAX_URL_BYTES = 4 << 10


@dataclass(frozen=True)
class ServerSettings:
    """Bounds and names. Times are in seconds.

    Sequences beyond the engine's `max_num_seqs` wait, at most `max_waiting_requests` of them and
    `max_waiting_tokens` prompt tokens (None: chosen from the context's length). `header_timeout` is
    for a request's head to arrive, `body_timeout` for its body, `write_timeout` for a client to
    take what is sent to it. Bodies being read or worked on hold at most `max_bodies_bytes`.
    """

    served_model_names: tuple[str, ...] = ()
    api_keys: tuple[str, ...] = ()
    allowed_origins: tuple[str, ...] = ()
    max_waiting_requests: int = 512
    max_waiting_tokens: int | None = None
    max_request_bytes: int = 32 << 20
    max_bodies_bytes: int = 256 << 20
    max_connections: int = 4096
    header_timeout: float = 15.0
    body_timeout: float = 60.0
    write_timeout: float = 60.0
    keep_alive: float = 30.0
    heartbeat: float = 15.0
    drain_timeout: float = 30.0
    ui: bool = True

    def __post_init__(self) -> None:
        for name in ("max_request_bytes", "max_bodies_bytes", "max_connections"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, found {getattr(self, name)}")
        if self.max_waiting_requests < 0:
            raise ConfigError("max_waiting_requests must not be negative")
        if self.max_bodies_bytes < self.max_request_bytes:
            raise ConfigError("max_bodies_bytes must be at least max_request_bytes")
        for key in self.api_keys:
            if not key or not key.isascii() or not key.isprintable() or " " in key:
                raise ConfigError("an API key must be of printable ASCII characters without blanks")

    def waiting_tokens(self, info: EngineInfo) -> int:
        """Prompt tokens that may wait. A prompt that finds nobody waiting may always wait itself."""
        if self.max_waiting_tokens is not None:
            return self.max_waiting_tokens
        return max(4 * info.max_model_len, 1 << 20)

    def bounds(self, info: EngineInfo) -> tuple[str, ...]:
        """Every bound, for the log."""
        running, waiting = info.max_num_seqs, self.max_waiting_requests
        mebi = 1 << 20
        return (
            f"bound: {running} sequences run and {waiting} wait, of at most "
            f"{self.waiting_tokens(info):,} prompt tokens; more is answered 429 with Retry-After",
            f"bound: prompt plus answer {info.max_model_len:,} tokens",
            f"bound: a body {self.max_request_bytes / mebi:.4g} MiB, all bodies together "
            f"{self.max_bodies_bytes / mebi:.4g} MiB; a head {MAX_HEADER_BYTES >> 10} KiB, of it a URL "
            f"{MAX_URL_BYTES >> 10} KiB; {self.max_connections} connections",
            f"bound: {self.header_timeout:g} s for a head, {self.body_timeout:g} s for a body, "
            f"{self.write_timeout:g} s for a client to take what is sent, {self.keep_alive:g} s idle",
            f"bound: {self.drain_timeout:g} s to finish after SIGTERM",
        )

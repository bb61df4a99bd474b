"""What all requests share: the engine, the tokenizer, the bounds, the counts.

Contract: one object for one server, handed to every call; nothing in server/ is module state. It
answers whether requests are taken at this moment. It does not know HTTP.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, TypeVar

from fourfold.core.client import EngineClient, EngineInfo, EngineState, LoadProgress
from fourfold.core.log import Log
from fourfold.core.request import Grammar
from fourfold.server.admission import Admission
from fourfold.server.errors import (
    RETRY_DRAINING,
    RETRY_STARTING,
    busy,
    model_not_found,
    unavailable,
    unsupported,
)
from fourfold.server.logprobs import TokenTexts
from fourfold.server.metrics import Metrics
from fourfold.server.settings import ServerSettings
from fourfold.text.generation import GenerationDefaults
from fourfold.text.grammar_check import GrammarChecker
from fourfold.text.profiles import ChatProfile
from fourfold.text.tokenizer import Tokenizer

T = TypeVar("T")
# Texts longer than this are tokenised beside the event loop, so that no stream waits for them.
_LONG_TEXT = 20_000
_WORKERS = 2


@dataclass
class Loading:
    """How far an engine that starts has come; bytes and seconds."""

    part: str = ""
    done: int = 0
    total: int = 0
    began: float = field(default_factory=time.monotonic)

    @property
    def rate(self) -> float:
        """Bytes a second."""
        return self.done / max(time.monotonic() - self.began, 1e-3)

    @property
    def seconds_left(self) -> float | None:
        """At this rate, None before there is one."""
        return (self.total - self.done) / self.rate if self.done else None


class Serving:
    """The server's state."""

    def __init__(
        self,
        settings: ServerSettings,
        engine: EngineClient,
        tokenizer: Tokenizer,
        profile: ChatProfile,
        defaults: GenerationDefaults,
        log: Log,
        name: str,
        on_progress: LoadProgress = lambda part, done, total: None,
        grammars: bool = False,
    ) -> None:
        """`name` is the model's own, used if the settings name none; `on_progress` is told how far
        loading has come, as /health tells it; `grammars`: whether the engine takes them."""
        self._on_progress = on_progress
        self.settings, self.engine, self.tokenizer = settings, engine, tokenizer
        self.profile, self.defaults, self.log = profile, defaults, log
        self.names = settings.served_model_names or (name,)
        self.metrics = Metrics(engine)
        self.loading = Loading()
        self.created = int(time.time())
        self.draining = False
        self.operations: Sequence[Any] = ()  # the endpoints, for their description
        self._admission: Admission | None = None
        self._bodies = 0
        self._workers = ThreadPoolExecutor(_WORKERS, thread_name_prefix="tokenise")
        self._takes_grammars = grammars
        self._checker: GrammarChecker | None = None
        self.texts = TokenTexts(tokenizer)
        self._longest_token = max(map(len, map(tokenizer.token_bytes, self.texts.known)))

    def progress(self, part: str, done: int, total: int) -> None:
        """A `LoadProgress`."""
        self.loading.part, self.loading.done, self.loading.total = part, done, total
        self._on_progress(part, done, total)

    # ---- whether requests are taken

    @property
    def info(self) -> EngineInfo:
        """Of the engine, once it is ready."""
        return self.engine.info

    @property
    def ready(self) -> bool:
        """Whether requests are taken."""
        return not self.draining and self.engine.health().state is EngineState.READY

    @property
    def num_sequences(self) -> int:
        """Sequences that run or wait."""
        return self._admission.sequences if self._admission else 0

    def expect_ready(self) -> Admission:
        """Who admits requests. Raises 503 with a time to come back, or 500 for a dead engine."""
        state = self.engine.health().state
        if self.draining or state in (EngineState.DRAINING, EngineState.STOPPED):
            self.metrics.rejected("draining")
            message = "the server is shutting down and takes no more requests"
            raise unavailable(message, RETRY_DRAINING, "draining")
        if state in (EngineState.NEW, EngineState.LOADING):
            self.metrics.rejected("starting")
            left = self.loading.seconds_left or RETRY_STARTING
            wait = min(max(int(left) + 1, 1), 600)
            raise unavailable("the model is being loaded", wait, "starting")
        if state is EngineState.DEAD:
            self.metrics.rejected("dead")
            message = "the engine died; the server is going to exit"
            raise unavailable(message, RETRY_DRAINING, "engine_dead")
        if self._admission is None:
            settings, info = self.settings, self.info
            self._admission = Admission(
                info.max_num_seqs,
                settings.max_waiting_requests,
                settings.waiting_tokens(info),
                self.metrics.rejected,
            )
        return self._admission

    def expect_model(self, name: str | None) -> str:
        """The name to answer with. Raises 404."""
        if name is None or name == "":
            return self.names[0]
        if name not in self.names:
            raise model_not_found(name)
        return name

    # ---- bodies

    def hold_body(self, size: int) -> None:
        """Count bytes of a body in memory. Raises 429."""
        if self._bodies + size > self.settings.max_bodies_bytes:
            self.metrics.rejected("bodies")
            raise busy("the server is busy: too many large bodies at once", 1)
        self._bodies += size

    def release_body(self, size: int) -> None:
        """The body is no longer needed."""
        self._bodies -= size

    # ---- text

    def cannot_fit(self, num_bytes: int) -> bool:
        """Whether a text of this length has too many tokens however it is cut."""
        return num_bytes > self.info.max_model_len * self._longest_token

    async def tokenising(self, size: int, work: Callable[[], T]) -> T:
        """Run `work`, whose text has `size` characters, where it holds up nobody."""
        if size <= _LONG_TEXT:
            return work()
        return await asyncio.get_running_loop().run_in_executor(self._workers, work)

    async def expect_grammar(self, grammar: Grammar | None, field_name: str) -> None:
        """Raise 400 or `RequestError` unless there is none, or one that can be used."""
        if grammar is None:
            return
        if not self._takes_grammars:
            raise unsupported(field_name, "other than text is not supported by this engine")
        if self._checker is None:
            special, info = self.tokenizer.special_tokens, self.info
            self._checker = GrammarChecker(special, info.vocab_size, info.eos_token_id)
        await self._checker.check(grammar)

    def bounds(self) -> tuple[str, ...]:
        """Every bound, for the log."""
        grammars = (GrammarChecker.bound(),) if self._takes_grammars else ()
        return (*self.settings.bounds(self.info), *grammars)

    async def close(self) -> None:
        """Let go of threads and processes."""
        self._workers.shutdown(wait=False, cancel_futures=True)
        if self._checker is not None:
            await self._checker.close()

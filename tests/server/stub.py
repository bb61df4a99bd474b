"""An engine without a model: it answers with the tokens it is told to, at the pace it is told to."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from fourfold.core.client import (
    EngineClosedError,
    EngineDeadError,
    EngineHealth,
    EngineInfo,
    EngineState,
    EngineStats,
    LoadProgress,
)
from fourfold.core.request import BEGINNING, FinishReason, Request, RequestOutput, TokenLogprobs
from fourfold.text.token_mask import Mask, demand_mask
from fourfold.text.tokenizer import Tokenizer
from fourfold.weights.synthetic_tokenizer import tokenizer_files

# Of a request and the index of a sequence: the tokens it gets, the ending one included.
Script = Callable[[Request, int], Sequence[int]]


@functools.cache
def make_tokenizer() -> Tokenizer:
    return Tokenizer(tokenizer_files(900, 4096)["tokenizer.json"], "tokenizer.json")


def obedient(request: Request, tokens: Sequence[int]) -> list[int]:
    """`tokens` as the request's masks let them be said: what is demanded comes first, and an end that
    is not allowed yet is an end of the reasoning."""
    grammar = request.grammar
    if grammar is None or grammar.kind != BEGINNING:
        return list(tokens)
    said: list[int] = []
    mask = demand_mask(grammar, 1, 32)
    for token in tokens:
        while len(only := _allowed(mask)) == 1 and not only[0] == token == grammar.after_token:
            said.append(only[0])
            mask.commit(only)
        said.append(token if token in only else grammar.after_token or 0)
        mask.commit(said[-1:])
    return said


def _allowed(mask: Mask) -> list[int]:
    bits = np.unpackbits(mask.allowed(())[0].view(np.uint8), bitorder="little")
    return [int(token) for token in np.flatnonzero(bits)]


@dataclass
class StubEngine:
    """An `EngineClient`. `script` gives the tokens; a sequence whose tokens run out without an
    end-of-sequence token ends by "length". `tokens_a_step` come with each step. A demanded beginning and
    a bound on the reasoning are obeyed, as an engine's masks have it."""

    tokenizer: Tokenizer
    script: Script = lambda request, index: (10, 11, 12, 1)
    pace: float = 0.0
    tokens_a_step: int = 1
    max_model_len: int = 2000
    max_num_seqs: int = 8
    fails: str | None = None  # every answer ends with this error after two tokens
    load: Callable[[LoadProgress | None], None] | None = None
    state: EngineState = EngineState.NEW
    requests: list[Request] = field(default_factory=list)
    aborted: list[tuple[str, int | None]] = field(default_factory=list)
    closed: int = 0  # iterators that were left early
    running: int = 0
    resets: int = 0

    @property
    def info(self) -> EngineInfo:
        if self.state is EngineState.NEW:
            raise EngineClosedError("the engine has not been started")
        return EngineInfo(
            model="stub/model",
            revision=None,
            device="none",
            dtype="none",
            max_model_len=self.max_model_len,
            max_num_seqs=self.max_num_seqs,
            vocab_size=900,
            bos_token_id=0,
            eos_token_id=1,
        )

    async def start(self, progress: LoadProgress | None = None) -> EngineInfo:
        self.state = EngineState.READY
        return self.info

    async def generate(self, request: Request) -> AsyncGenerator[RequestOutput, None]:
        if self.state is not EngineState.READY:
            raise EngineClosedError("the engine is not running")
        self.requests.append(request)
        self.running += 1
        left = True
        try:
            async for output in self._outputs(request):
                if self.state is EngineState.DEAD:
                    raise EngineDeadError("the engine died in step 7: /secret/path", 7)
                yield output
            left = False
        finally:
            self.closed += left
            self.running -= 1

    async def _outputs(self, request: Request) -> AsyncGenerator[RequestOutput, None]:
        params = request.params
        stops = {*params.stop_token_ids, *(() if params.ignore_eos else (1,))}
        todo = {i: obedient(request, self.script(request, i)) for i in range(params.n)}
        given = dict.fromkeys(todo, 0)
        while todo:
            await asyncio.sleep(self.pace)
            for index in list(todo):
                if (request.request_id, index) in self.aborted:
                    del todo[index]
                    continue
                output = self._step(request, index, todo[index], given, stops)
                if output.finish_reason is not None:
                    del todo[index]
                yield output

    def _step(
        self,
        request: Request,
        index: int,
        todo: list[int],
        given: dict[int, int],
        stops: set[int],
    ) -> RequestOutput:
        params, tokens, reason = request.params, [], None
        first = given[index] == 0
        while todo and len(tokens) < self.tokens_a_step and reason is None:
            token = todo.pop(0)
            tokens.append(token)
            given[index] += 1
            if token in stops and given[index] > params.min_tokens:
                reason = FinishReason.STOP
            elif not todo or given[index] == params.max_tokens:
                reason = FinishReason.LENGTH
        if not tokens:
            reason = FinishReason.LENGTH
        if self.fails and given[index] >= 2:
            return RequestOutput(
                request.request_id, (), FinishReason.ERROR, index, error=self.fails
            )
        return RequestOutput(
            request.request_id,
            tuple(tokens),
            reason,
            index,
            tokens[-1] if reason is FinishReason.STOP else None,
            tuple(self._scores(t, params.logprobs) for t in tokens)
            if params.logprobs is not None
            else (),
            self._prompt_scores(request) if first else None,
            cached_tokens=4 if first else 0,
            cache_miss="the tokens from 4 on are not cached" if first else None,
            accepted_drafts=max(len(tokens) - 1, 0),
        )

    @staticmethod
    def _scores(token: int, count: int | None) -> TokenLogprobs:
        top = tuple(((token + i) % 600 + 20, -0.5 - i) for i in range(count or 0))
        return TokenLogprobs(token, -0.25, 1, top)

    def _prompt_scores(self, request: Request) -> tuple[TokenLogprobs | None, ...] | None:
        if request.params.prompt_logprobs is None:
            return None
        rest = request.prompt_token_ids[1:]
        return (None, *(self._scores(t, request.params.prompt_logprobs) for t in rest))

    async def abort(self, request_id: str, index: int | None = None) -> bool:
        self.aborted.append((request_id, index))
        return True

    async def stats(self) -> EngineStats:
        return EngineStats(
            num_steps=5, num_running=self.running, pages=10, pages_used=3, drafted=(4, 2),
            accepted=(3, 1),
        )  # fmt: skip

    def health(self) -> EngineHealth:
        return EngineHealth(self.state, requests=self.running, num_steps=5, step_seconds=0.5)

    async def reset_prefix_cache(self) -> None:
        self.resets += 1

    async def drain(self, timeout: float) -> int:
        self.state = EngineState.DRAINING
        return 0

    async def shutdown(self, timeout: float = 0.0) -> None:
        if self.state is not EngineState.DEAD:
            self.state = EngineState.STOPPED

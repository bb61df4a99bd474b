"""`LLM`, which runs the engine on the caller's thread, and `AsyncLLM`, which runs it in a process.

Contract: both give a request the same tokens and results. Importing this file loads no torch; making
an `LLM` does, an `AsyncLLM` never does.
"""

from __future__ import annotations

import asyncio
import itertools
import warnings
from collections.abc import AsyncGenerator, Generator, Mapping, Sequence
from contextlib import aclosing, closing
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from fourfold.core.client import EngineClient, EngineInfo, EngineStats, Launch
from fourfold.core.config import CacheConfig, EngineConfig, ParallelConfig
from fourfold.core.errors import RequestError
from fourfold.core.request import Grammar, Request, SamplingParams
from fourfold.llm.engine_process import ENGINE_PROCESS
from fourfold.llm.prompts import (
    Encoded,
    Message,
    Prompt,
    as_conversations,
    as_list,
    as_params,
    encode_conversation,
    encode_prompt,
    num_drafts,
    tokenizer_directory,
)
from fourfold.llm.results import Decoder, Reply, RequestOutput
from fourfold.text.profiles import DetectedProfile, detect_profile
from fourfold.text.tokenizer import Tokenizer
from fourfold.weights.locate import DEFAULT_MODEL, locate

if TYPE_CHECKING:
    from tqdm import tqdm

    from fourfold.engine.engine import Engine
    from fourfold.engine.masks import TokenMask
    from fourfold.text.grammar_mask import GrammarMasks


class _Offline:
    """What both classes share."""

    def __init__(
        self,
        model: str | Path = DEFAULT_MODEL,
        *,
        tokenizer: str | Path | Tokenizer | None = None,
        dtype: str = "auto",
        tensor_parallel_size: int = 1,
        seed: int = 0,
        gpu_memory_utilization: float = 0.9,
        max_model_len: int | None = None,
        max_num_seqs: int = 256,
        max_num_batched_tokens: int = 8192,
        enforce_eager: bool = False,
        async_scheduling: bool | None = None,
        kv_cache_dtype: str = "auto",
        enable_prefix_caching: bool = True,
        num_gpu_blocks_override: int | None = None,
        speculative_config: Mapping[str, Any] | None = None,
        trust_remote_code: bool = False,
        device: str = "auto",
        expert_dtype: str = "auto",
        index_cache_dtype: str = "auto",
        state_interval: int = 4096,
        kernels: Mapping[str, str] | None = None,
        compile_cache: str | None = None,
        chat_profile: str | None = None,
    ):
        """Arguments are the command line's flags of the same names; docs/OFFLINE.md has a table.
        Raises `FourfoldError`s."""
        if trust_remote_code:
            warnings.warn(
                "trust_remote_code has no effect: no code from a checkpoint is ever executed",
                stacklevel=2,
            )
        config = EngineConfig(
            model=str(model),
            dtype=dtype,
            max_model_len=max_model_len,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            gpu_memory_utilization=gpu_memory_utilization,
            enforce_eager=enforce_eager,
            async_scheduling=async_scheduling,
            compile_cache=compile_cache,
            num_speculative_tokens=num_drafts(speculative_config),
            expert_dtype=expert_dtype,
            kernels=kernels or {},
            seed=seed,
            cache=CacheConfig(
                kv_cache_dtype=kv_cache_dtype,
                index_cache_dtype=index_cache_dtype,
                num_pages=num_gpu_blocks_override,
                enable_prefix_caching=enable_prefix_caching,
                state_interval=state_interval,
            ),
            parallel=ParallelConfig(tensor_parallel_size=tensor_parallel_size),
        )
        directory = locate(config.model).directory
        place = tokenizer_directory(tokenizer, directory)
        in_memory = tokenizer if isinstance(tokenizer, Tokenizer) else None
        self.tokenizer = in_memory or Tokenizer.from_directory(place or directory)
        self.chat_profile: DetectedProfile = detect_profile(directory, chat_profile)
        self.launch = Launch(
            config,
            device,
            tuple(sorted(self.tokenizer.known_ids())),
            None if place is None else str(place),
        )
        self._serial = itertools.count()
        self._load()

    def _load(self) -> None:
        """What is left to do when the arguments are in order."""

    def get_tokenizer(self) -> Tokenizer:
        """The tokenizer."""
        return self.tokenizer

    def _request(
        self, prompt: Encoded, params: SamplingParams, priority: int, request_id: str | None = None
    ) -> Request:
        wanted = params.structured_outputs
        return Request(
            str(next(self._serial)) if request_id is None else request_id,
            prompt.token_ids,
            params,
            priority,
            prompt.cache_salt,
            prompt.image_positions,
            None if wanted is None else wanted.to_grammar(prompt.end_think),
        )


class LLM(_Offline):
    """A model in this process. The prompts of one call run together; one call runs at a time."""

    info: EngineInfo
    _engine: Engine
    _decoder: Decoder
    _busy: bool = False
    _masks: GrammarMasks | None = None

    def _load(self) -> None:
        from fourfold.engine.start import start_engine

        with _loading_bar() as bar:
            self._engine, self.info = start_engine(
                self.launch, _progress(bar), masks=self._make_mask
            )
        self._decoder = Decoder(self.tokenizer, self.info.eos_token_id)

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool = True,
        *,
        priority: Sequence[int] | None = None,
    ) -> list[RequestOutput]:
        """Continue prompts; results in their order.

        A prompt is a text, a list of token ids, or {"prompt": …} or {"prompt_token_ids": […]} with an
        optional "cache_salt". `sampling_params` is one for all or one for each. Raises `RequestError`
        or `CapacityError` before anything runs.
        """
        encoded = [encode_prompt(prompt, self.tokenizer) for prompt in as_list(prompts)]
        return self._finish(encoded, sampling_params, use_tqdm, priority)

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool = True,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        continue_final_message: bool = False,
    ) -> list[RequestOutput]:
        """Answer one conversation or several, in OpenAI's shape; the text is the model's own, with its
        `</think>` and tool markup. `chat_template_kwargs`: thinking, enable_thinking,
        reasoning_effort, drop_thinking. Errors as `generate`."""
        encoded = [
            encode_conversation(
                conversation,
                self.tokenizer,
                self.chat_profile.profile,
                tools,
                chat_template_kwargs,
                continue_final_message,
            )
            for conversation in as_conversations(messages)
        ]
        return self._finish(encoded, sampling_params, use_tqdm, None)

    def stream(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        priority: Sequence[int] | None = None,
    ) -> Generator[RequestOutput, None, None]:
        """As `generate`, but every step's results as they come, each the whole answer so far, the
        prompts' in any order. Closing it aborts what still runs."""
        encoded = [encode_prompt(prompt, self.tokenizer) for prompt in as_list(prompts)]
        with closing(self._run(self._requests(encoded, sampling_params, priority))) as replies:
            for reply in replies:
                yield reply.result()

    def _make_mask(self, grammar: Grammar, vocab_size: int) -> TokenMask:
        """What makes masks takes a second to build and is not always needed."""
        if self._masks is None:
            from fourfold.text.grammar_mask import GrammarMasks

            self._masks = GrammarMasks(self.tokenizer, vocab_size, self.info.eos_token_id)
        return self._masks(grammar, vocab_size)

    def stats(self) -> EngineStats:
        """Counts since the model was loaded."""
        from fourfold.engine.start import engine_stats

        return engine_stats(self._engine)

    def reset_prefix_cache(self) -> None:
        """Give up all cached state."""
        self._engine.reset_prefix_cache()

    def _finish(
        self,
        encoded: Sequence[Encoded],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None,
        use_tqdm: bool,
        priority: Sequence[int] | None,
    ) -> list[RequestOutput]:
        replies = self._requests(encoded, sampling_params, priority)
        tokens = 0
        with (
            closing(self._run(replies)) as running,
            _bar(total=len(replies), desc="Processed prompts", disable=not use_tqdm) as bar,
        ):
            for reply in running:
                if reply.finished:
                    tokens += reply.num_tokens
                    bar.set_postfix(output_tokens=tokens, refresh=False)
                    bar.update()
        return [reply.result() for reply in replies]

    def _requests(
        self,
        encoded: Sequence[Encoded],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None,
        priority: Sequence[int] | None,
    ) -> list[Reply]:
        params = as_params(sampling_params, len(encoded))
        ranks = [0] * len(encoded) if priority is None else list(priority)
        if len(ranks) != len(encoded):
            raise RequestError(f"priority has {len(ranks)} entries for {len(encoded)} prompts")
        return [
            Reply(self._request(prompt, each, rank), prompt.text, self._decoder)
            for prompt, each, rank in zip(encoded, params, ranks, strict=True)
        ]

    def _run(self, replies: Sequence[Reply]) -> Generator[Reply, None, None]:
        """Run requests to their end; a reply each time it has grown."""
        if self._busy:
            raise RequestError(
                "this LLM is running already: let that call end, or close its stream"
            )
        engine, running, stepping = self._engine, {}, False
        self._busy = True
        try:
            for reply in replies:
                engine.add(reply.request)
                running[reply.request.request_id] = reply
            while running:
                stepping = True
                outputs = engine.step()
                stepping = False
                for output in outputs:
                    reply = running[output.request_id]
                    if reply.take(output):
                        engine.abort(output.request_id, output.index)
                    if reply.finished:
                        del running[output.request_id]
                    yield reply
        finally:
            for request_id in running:
                engine.abort(request_id)
            if stepping:
                # A step that was broken off may have left state that is not what its hash says.
                engine.reset_prefix_cache()
            self._busy = False


class AsyncLLM(_Offline):
    """A model in a process of its own, for one event loop. `start` loads it, as does the first
    request; `shutdown` or leaving `async with` ends it."""

    def _load(self) -> None:
        self._client: EngineClient | None = None
        self._starting = asyncio.Lock()

    async def start(self, client: EngineClient | None = None) -> EngineInfo:
        """Load the model, if that has not been done. `client` is another engine for `self.launch` than
        one in a process."""
        return (await self._started(client)).info

    async def generate(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams | None = None,
        request_id: str | None = None,
        *,
        priority: int = 0,
    ) -> AsyncGenerator[RequestOutput, None]:
        """Continue one prompt; after every step the whole answer so far. Leaving the iterator aborts
        the request. Errors as `EngineClient.generate`."""
        encoded = encode_prompt(prompt, self.tokenizer)
        async with aclosing(self._run(encoded, sampling_params, request_id, priority)) as results:
            async for result in results:
                yield result

    async def chat(
        self,
        messages: Sequence[Message],
        sampling_params: SamplingParams | None = None,
        request_id: str | None = None,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        continue_final_message: bool = False,
        priority: int = 0,
    ) -> AsyncGenerator[RequestOutput, None]:
        """Answer one conversation, as `LLM.chat`; results as `generate`."""
        encoded = encode_conversation(
            messages,
            self.tokenizer,
            self.chat_profile.profile,
            tools,
            chat_template_kwargs,
            continue_final_message,
        )
        async with aclosing(self._run(encoded, sampling_params, request_id, priority)) as results:
            async for result in results:
                yield result

    async def abort(self, request_id: str) -> bool:
        """End a request; whether it was there. Its last result has `finish_reason` "abort"."""
        return self._client is not None and await self._client.abort(request_id)

    async def stats(self) -> EngineStats:
        """Counts since the model was loaded."""
        return await (await self._started()).stats()

    async def reset_prefix_cache(self) -> None:
        """Give up all cached state that nobody uses."""
        await (await self._started()).reset_prefix_cache()

    async def shutdown(self, timeout: float = 0.0) -> None:
        """Let running requests go on for `timeout` seconds, abort the rest and end the process."""
        if self._client is not None:
            await self._client.shutdown(timeout)

    async def __aenter__(self) -> AsyncLLM:
        await self.start()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.shutdown()

    async def _started(self, client: EngineClient | None = None) -> EngineClient:
        from fourfold.engine.client import ProcessEngineClient

        async with self._starting:
            if self._client is None:
                starting = client or ProcessEngineClient(self.launch, entry=ENGINE_PROCESS)
                with _loading_bar() as bar:
                    await starting.start(_progress(bar))
                self._client = starting
        return self._client

    async def _run(
        self,
        encoded: Encoded,
        sampling_params: SamplingParams | None,
        request_id: str | None,
        priority: int,
    ) -> AsyncGenerator[RequestOutput, None]:
        client = await self._started()
        request = self._request(encoded, sampling_params or SamplingParams(), priority, request_id)
        if request.grammar is not None and self.launch.tokenizer is None:
            raise RequestError("structured_outputs need a tokenizer that is given by its directory")
        decoder = Decoder(self.tokenizer, client.info.eos_token_id)
        reply = Reply(request, encoded.text, decoder)
        async with aclosing(client.generate(request)) as outputs:
            async for output in outputs:
                if reply.take(output) and not reply.finished:
                    await client.abort(request.request_id, output.index)
                yield reply.result()
                if reply.finished:
                    return


def _bar(**options: Any) -> tqdm[Any]:
    from tqdm import tqdm

    return tqdm(dynamic_ncols=True, **options)


def _loading_bar() -> tqdm[Any]:
    """Bytes loaded, where somebody watches."""
    return _bar(desc="Loading", unit="B", unit_scale=True, disable=None)


def _progress(bar: tqdm[Any]) -> Any:
    def progress(part: str, done: int, total: int) -> None:
        bar.total = total
        bar.update(done - bar.n)

    return progress

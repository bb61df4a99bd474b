"""A server on a real engine in a process of its own: a tiny checkpoint on the CPU."""

from __future__ import annotations

import asyncio
import io
import threading
from collections.abc import AsyncGenerator, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from fourfold.core.log import Log
from fourfold.core.request import Request, RequestOutput
from fourfold.engine.client import ProcessEngineClient
from fourfold.llm import AsyncLLM
from fourfold.llm.engine_process import ENGINE_PROCESS
from fourfold.server.run import _http, bind
from fourfold.server.serving import Serving
from fourfold.server.settings import ServerSettings
from fourfold.text.generation import GenerationDefaults
from fourfold.text.grammar import beginning_grammar
from fourfold.text.tokenizer import Tokenizer
from fourfold.weights.synthetic import write_checkpoint
from tests.server.http import Site


class Told:
    """An engine that says what it is told, once, and what it likes after that."""

    def __init__(self, engine: ProcessEngineClient, tokenizer: Tokenizer):
        self._engine, self.tokenizer = engine, tokenizer
        self._told: list[tuple[int, ...]] = []
        self.prompts: list[str] = []

    def tell(self, *words: str) -> None:
        """The next answer, markers in it counted as markers."""
        ids = [t for word in words for t in self.tokenizer.encode(word, allow_special=True)]
        self._told.append((*ids, self.info.eos_token_id))

    def forget(self) -> None:
        """What is left of what was told."""
        self._told.clear()

    def generate(self, request: Request) -> AsyncGenerator[RequestOutput, None]:
        self.prompts.append(self.tokenizer.decode(request.prompt_token_ids))
        if self._told:
            request = replace(request, grammar=beginning_grammar(self._told.pop(0), None))
        return self._engine.generate(request)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)


@contextmanager
def real_site(directory: Path, settings: ServerSettings, max_num_seqs: int) -> Iterator[Site]:
    """Writes the checkpoint into `directory`. The site's engine is a `Told`, in float64: on a CPU last bits
    of float32 depend on the batch, and a choice between two tokens that are nearly equal on them."""
    write_checkpoint(directory, "tiny", weights="native", seed=1)
    options: dict[str, Any] = {"dtype": "float64", "max_model_len": 2000}
    llm = AsyncLLM(str(directory), device="cpu", max_num_seqs=max_num_seqs, **options)
    engine: Any = Told(ProcessEngineClient(llm.launch, entry=ENGINE_PROCESS), llm.tokenizer)
    log = io.StringIO()
    serving = Serving(
        settings, engine, llm.tokenizer, llm.chat_profile.profile, GenerationDefaults(),
        Log("text", log), "tiny", grammars=True,
    )  # fmt: skip
    listener = bind("127.0.0.1", 0)
    http, ready = _http(serving), threading.Event()

    async def live() -> None:
        await engine.start()
        ready.set()
        await http.serve([listener])
        await engine.shutdown()
        await serving.close()

    thread = threading.Thread(target=lambda: asyncio.run(live()))
    thread.start()
    try:
        assert ready.wait(90)
        yield Site(engine, serving, log, listener.getsockname()[1])
    finally:
        http.should_exit = True
        thread.join(30)

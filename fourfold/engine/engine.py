"""The step loop: requests in, tokens out.

Contract: `add` queues a request, `step` runs one batch and says what it added to whom. One thread, no
hidden state; given the same requests with the same seeds it gives the same tokens, whatever else runs.
It knows token ids only; text is the caller's.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch

from fourfold.cache.pool import allocate
from fourfold.cache.rows import page_bytes, ring_rows, row_formats, slot_bytes
from fourfold.core.batch import PAGE_TOKENS
from fourfold.core.config import EngineConfig
from fourfold.core.errors import CapacityError, RequestError
from fourfold.core.request import FinishReason, Request, RequestOutput
from fourfold.engine.loading import LoadedModel
from fourfold.engine.runner import Runner, uniform
from fourfold.engine.scheduler import Scheduler, Sequence

CPU_CACHE_BYTES = 4 << 30  # for pages, when there is no GPU whose memory says how much
WORKSPACE_BYTES = 2 << 30  # kept free on a GPU for a step's intermediates


class Engine:
    """A loaded model and the requests it is working on.

    `allowed_token_ids` are the ids the tokenizer can decode; others are never sampled.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        config: EngineConfig,
        allowed_token_ids: Iterable[int] | None = None,
    ):
        self.config, self.loaded = config, loaded
        model = loaded.config
        self.formats = row_formats(
            model, loaded.dtype, config.cache.kv_cache_dtype, config.cache.index_cache_dtype
        )
        self.num_pages, self.max_model_len = self._capacity()
        state = allocate(
            model,
            self.formats,
            self.num_pages,
            config.max_num_seqs,
            loaded.dtype,
            loaded.device.torch_device,
        )
        self.runner = Runner(
            loaded.model,
            state,
            ring_rows(model),
            loaded.device.torch_device,
            _allowed(allowed_token_ids, model.vocab_size),
        )
        self.scheduler = Scheduler(
            config.max_num_seqs, config.max_num_batched_tokens, self.max_model_len, self.num_pages
        )
        self.num_requests = 0

    @property
    def has_work(self) -> bool:
        return self.scheduler.has_work

    def add(self, request: Request) -> None:
        """Queue a request; raises `RequestError` or `CapacityError` if it cannot run."""
        vocabulary = self.loaded.config.vocab_size
        for token in request.prompt_token_ids:
            if not 0 <= token < vocabulary:
                raise RequestError(f"prompt token {token} is outside the vocabulary ({vocabulary})")
        seed = request.params.seed
        if seed is None:
            seed = (self.config.seed << 32) + self.num_requests
        self.num_requests += 1
        self.scheduler.add(Sequence(request, seed, list(request.prompt_token_ids)))

    def step(self) -> list[RequestOutput]:
        """Run one batch; what it added to each request that gained a token or ended."""
        step = self.scheduler.schedule()
        sampling = [
            s
            for s, run in zip(step.sequences, step.batch.sequences, strict=True)
            if run.logits_from < len(run)
        ]
        ids, nonfinite = self.runner.run(
            step.batch,
            [s.request.params.temperature for s in sampling],
            [s.request.params.top_p for s in sampling],
            [uniform(s.seed, len(s.token_ids)) for s in sampling],
        )
        sampled = iter(ids)
        outputs = []
        for sequence, run, bad in zip(step.sequences, step.batch.sequences, nonfinite, strict=True):
            sequence.num_computed_tokens += len(run)
            token = next(sampled) if run.logits_from < len(run) else None
            if bad:
                self.scheduler.finish(sequence)
                name = sequence.request.request_id
                outputs.append(RequestOutput(name, (), FinishReason.ERROR))
            elif token is not None:
                outputs.append(self._append(sequence, token))
        return outputs

    def run(self) -> Iterator[RequestOutput]:
        """Step until every request has ended."""
        while self.has_work:
            yield from self.step()

    def _append(self, sequence: Sequence, token: int) -> RequestOutput:
        sequence.token_ids.append(token)
        params, reason = sequence.request.params, None
        if token == self.loaded.config.eos_token_id and not params.ignore_eos:
            reason = FinishReason.STOP
        elif sequence.num_output_tokens == params.max_tokens:
            reason = FinishReason.LENGTH
        if reason:
            self.scheduler.finish(sequence)
        return RequestOutput(sequence.request.request_id, (token,), reason)

    def _capacity(self) -> tuple[int, int]:
        """Pages to allocate, and the longest sequence a request may reach (tokens)."""
        config, model = self.config, self.loaded.config
        per_page = page_bytes(model, self.formats)
        fixed = config.max_num_seqs * slot_bytes(model, self.formats)
        budget = self._cache_budget() - fixed
        longest = config.max_model_len or model.max_position_embeddings
        if longest > model.max_position_embeddings:
            raise CapacityError(
                f"--max-model-len {longest} exceeds the model's max_position_embeddings "
                f"({model.max_position_embeddings})"
            )
        fits = budget // per_page if per_page else longest
        pages = min(fits, config.max_num_seqs * -(-longest // PAGE_TOKENS))
        if config.cache.num_pages is not None:
            pages = config.cache.num_pages
        if pages < 1 or (config.max_model_len and pages * PAGE_TOKENS < longest):
            raise CapacityError(
                f"the cache has room for {max(pages, 0) * PAGE_TOKENS} tokens after "
                f"{fixed / 2**20:.0f} MiB for {config.max_num_seqs} sequences; one sequence of "
                f"{config.max_model_len or PAGE_TOKENS} tokens does not fit: lower --max-model-len "
                "or --max-num-seqs"
            )
        return pages, min(longest, pages * PAGE_TOKENS)

    def _cache_budget(self) -> int:
        """Bytes for rings, folds and pages."""
        device = self.loaded.device.torch_device
        if device.type == "cpu":
            return CPU_CACHE_BYTES
        free, total = torch.cuda.mem_get_info(device)
        unusable = total * (1 - self.config.gpu_memory_utilization)
        return int(free - unusable - WORKSPACE_BYTES)


def _allowed(token_ids: Iterable[int] | None, vocab_size: int) -> torch.Tensor | None:
    if token_ids is None:
        return None
    mask = torch.zeros(vocab_size, dtype=torch.bool)
    mask[[t for t in token_ids if t < vocab_size]] = True
    return mask

"""The step loop: requests in, tokens out.

Contract: `add` queues a request, `step` runs one batch and says what a batch added to whom, `abort` may
come at any moment between. One thread, no hidden state; a request gets the same tokens whatever else
runs, however it is cut, preempted, resumed or drafted for. It knows token ids only; text is the
caller's.

    one after the other      schedule 1 · launch 1 · collect 1 · schedule 2 · launch 2 · collect 2
    overlapped               schedule 1 · launch 1 · schedule 2 · launch 2 · collect 1 · schedule 3 …

Overlapped, the device starts on step n + 1 as soon as it is done with n, and the host's work hides
behind it. Where a step depends on what the host does not know yet, it falls back to the first form.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

import torch

from fourfold.cache.image import StateImage
from fourfold.cache.pages import chain_root
from fourfold.cache.pool import allocate
from fourfold.cache.prefix import PrefixCache
from fourfold.core.client import StepInfo
from fourfold.core.config import EngineConfig
from fourfold.core.errors import RequestError
from fourfold.core.request import NOT_FINITE, FinishReason, Request, RequestOutput
from fourfold.core.tensor import dtype_name
from fourfold.engine.capacity import Capacity, engine_row_formats
from fourfold.engine.graphs import DecodeGraphs
from fourfold.engine.kernel_plan import ops_that_read_the_host
from fourfold.engine.loading import LoadedModel
from fourfold.engine.masks import MaskMaker, TokenMask
from fourfold.engine.memory import plan_memory, set_aside
from fourfold.engine.runner import Flight, Runner, RunResult
from fourfold.engine.scheduler import Limits, Scheduler, Step
from fourfold.engine.sequence import Run, Sequence
from fourfold.engine.threads import note, running_on, step_threads
from fourfold.engine.workspace import capture_sizes, step_bytes


@dataclass
class Stats:
    """Counts since the engine started."""

    num_steps: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    generation_tokens: int = 0
    num_drafts: int = 0  # most a run verifies
    # Runs by how many drafts they verified and how many of these they accepted.
    verified: Counter[tuple[int, int]] = field(default_factory=Counter)

    @property
    def drafted(self) -> list[int]:
        """Drafts by their position in a run."""
        runs = self.verified.items()
        return [sum(n for (count, _), n in runs if count > i) for i in range(self.num_drafts)]

    @property
    def accepted(self) -> list[int]:
        """Accepted drafts by their position in a run."""
        runs = self.verified.items()
        return [sum(n for (_, count), n in runs if count > i) for i in range(self.num_drafts)]


class Engine:
    """A loaded model and the requests it is working on.

    `allowed_token_ids` are the ids the tokenizer can decode; others are never sampled. `on_step` is
    told of every step before the model runs. `masks` makes what grammars need; without it they are
    refused.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        config: EngineConfig,
        allowed_token_ids: Iterable[int] | None = None,
        on_step: Callable[[StepInfo], None] | None = None,
        masks: MaskMaker | None = None,
    ):
        self.config, self.loaded = config, loaded
        model, device = loaded.config, loaded.device.torch_device
        dtype = dtype_name(loaded.dtype)
        formats = engine_row_formats(config, model, dtype)
        self.capacity: Capacity = plan_memory(
            config, model, dtype, loaded.weight_bytes, loaded.device
        )
        drafts, slots = config.num_speculative_tokens, config.max_num_seqs
        state = allocate(
            model, formats, self.capacity.num_pages, slots, loaded.dtype, device, drafts
        )
        self.runner = Runner(
            loaded.model,
            state,
            slots,
            self.capacity.max_model_len,
            device,
            _allowed(allowed_token_ids, model.vocab_size),
            drafts,
        )
        cache = PrefixCache(
            self.capacity.num_pages,
            config.cache.device_image_bytes,
            config.cache.host_image_bytes,
            enabled=config.cache.enable_prefix_caching,
        )
        limits = Limits(
            max_num_seqs=slots,
            max_num_batched_tokens=config.max_num_batched_tokens,
            max_model_len=self.capacity.max_model_len,
            num_drafts=drafts,
            image_interval=config.cache.state_interval,
            preempt_bytes=config.cache.preempt_bytes,
            page_bytes=self.capacity.page_bytes,
            slot_bytes=self.capacity.slot_bytes,
        )
        self.scheduler = Scheduler(limits, cache)
        self.stats = Stats(num_drafts=drafts)
        self.fingerprint = repr((loaded.identity, model, loaded.dtype, formats, drafts > 0))
        self._threads = step_threads(device, loaded.weight_bytes)
        self.notes = (*self._capture(), *note(self._threads))
        set_aside(step_bytes(config, model, dtype), device)
        self._requests: dict[str, list[Sequence]] = {}
        self._held: dict[str, list[Sequence]] = {}  # sequences that wait for their first one
        self._arrivals = 0
        self._on_step = on_step or (lambda step: None)
        self._masks = masks
        overlapped = config.async_scheduling
        # A CPU is not free to work ahead.
        self._overlapped = device.type != "cpu" if overlapped is None else overlapped
        self._flight: Flight | None = None

    def _capture(self) -> tuple[str, ...]:
        """Capture decode steps where that can be done; what there is to say about it."""
        if self.loaded.device.torch_device.type == "cpu":
            return ()
        if self.config.enforce_eager:
            return ("decode steps are not captured: --enforce-eager",)
        blocking = ops_that_read_the_host(self.loaded.kernel_plan, self.loaded.has_plain_experts)
        if blocking:
            return (f"decode steps are not captured: no kernel for {', '.join(blocking)}",)
        sizes = capture_sizes(self.config.max_num_seqs)
        self.runner.graphs = DecodeGraphs(self.runner, sizes)
        return (f"decode steps are captured for up to {sizes[-1]} sequences",)

    @property
    def has_work(self) -> bool:
        return self.scheduler.has_work or self._flight is not None

    def add(self, request: Request) -> None:
        """Queue a request; raises `RequestError` or `CapacityError` if it cannot run."""
        if request.request_id in self._requests:
            raise RequestError(f"a request with id {request.request_id!r} is running already")
        self._check_tokens(request)
        if request.grammar is not None and self._masks is None:
            raise RequestError("this engine was started without support for grammars")
        if request.grammar and request.grammar.says_the_end and request.params.min_tokens:
            # Where a grammar ends, the end-of-sequence token alone may follow.
            raise RequestError("min_tokens cannot be used together with a grammar")
        first, *others = (self._sequence(request, index) for index in range(request.params.n))
        self.scheduler.admit(first)
        self._requests[request.request_id] = [first, *others]
        if others:
            # They start from the first one's state image, so that the prompt runs once.
            self._held[request.request_id] = others

    def abort(self, request_id: str, index: int | None = None) -> bool:
        """Drop a request, or only its sequence `index`, and free all it holds; whether it was there."""
        if index is not None:
            return self._abort_one(request_id, index)
        sequences = self._requests.pop(request_id, None)
        if sequences is None:
            return False
        held = self._held.pop(request_id, [])
        self.scheduler.abort([s for s in sequences if s not in held])
        return True

    def _abort_one(self, request_id: str, index: int) -> bool:
        sequence = next((s for s in self._requests.get(request_id, ()) if s.index == index), None)
        if sequence is None:
            return False
        held = self._held.get(request_id, [])
        if sequence in held:
            held.remove(sequence)
        else:
            self.scheduler.abort([sequence])
            self._release_held(sequence, FinishReason.ABORT)
        self._forget(sequence)
        return True

    def step(self) -> list[RequestOutput]:
        """Run one batch; what one brought, of this step or the one before, to each sequence that gained
        a token or ended."""
        step, brought = self.scheduler.schedule(), []
        if step is None:
            brought = self._collect()
            step = self.scheduler.schedule()
            assert step is not None, "nothing is in flight"
        launched = self._launch(step)
        brought += self._collect()
        self._flight = launched
        return brought if self._overlapped else self._collect()

    def _launch(self, step: Step) -> Flight | None:
        """Give a step to the device."""
        for saving in step.savings:
            self.scheduler.saved(saving.sequence, self.runner.save(saving))
        with running_on(self._threads):
            self.runner.enter(step)
            if not step.runs:
                return None
            self.stats.num_steps += 1
            num_tokens = sum(run.count for run in step.runs)
            self._on_step(StepInfo(self.stats.num_steps, len(step.runs), num_tokens))
            return self.runner.launch(step.runs)

    def _collect(self) -> list[RequestOutput]:
        """Wait for the step in flight, if there is one, and take in what it brought."""
        flight, self._flight = self._flight, None
        if flight is None:
            return []
        results = zip(flight.runs, self.runner.collect(flight), strict=True)
        outputs = [self._commit(run, got) for run, got in results if not run.sequence.over]
        brought = [output for output in outputs if output is not None]
        self.stats.generation_tokens += sum(len(output.new_token_ids) for output in brought)
        return brought

    def run(self) -> Iterator[RequestOutput]:
        """Step until every request has ended."""
        while self.has_work:
            yield from self.step()

    def reset_prefix_cache(self) -> None:
        """Give up all cached pages and images that nobody uses."""
        self.scheduler.cache.forget()

    def _check_tokens(self, request: Request) -> None:
        vocabulary = self.loaded.config.vocab_size
        for what, tokens in (
            ("prompt token", request.prompt_token_ids),
            ("stop_token_ids:", request.params.stop_token_ids),
            ("logit_bias:", request.params.logit_bias),
        ):
            for token in tokens:
                if not 0 <= token < vocabulary:
                    raise RequestError(f"{what} {token} is outside the vocabulary ({vocabulary})")

    def _sequence(self, request: Request, index: int) -> Sequence:
        params, prompt = request.params, len(request.prompt_token_ids)
        self._arrivals += 1
        seed = params.seed
        if seed is None:
            seed = (self.config.seed << 32) + self._arrivals
        room = self.capacity.max_model_len - prompt
        return Sequence(
            request=request,
            index=index,
            arrival=self._arrivals,
            seed=(seed + index) % 2**64,
            max_tokens=max(room, 1) if params.max_tokens is None else params.max_tokens,
            stop_ids=(
                *(() if params.ignore_eos else (self.loaded.config.eos_token_id,)),
                *params.stop_token_ids,
            ),
            root=chain_root(self.fingerprint, request.cache_salt),
            token_ids=list(request.prompt_token_ids),
            mask=self._mask(request),
        )

    def _mask(self, request: Request) -> TokenMask | None:
        if request.grammar is None or self._masks is None:
            return None
        return self._masks(request.grammar, self.loaded.config.vocab_size)

    def _commit(self, run: Run, result: RunResult) -> RequestOutput | None:
        """Take a run's result into its sequence."""
        sequence = run.sequence
        standing, tokens, nonfinite, drafts, _, prompt_logprobs, image = result
        if nonfinite:
            self._end(sequence)
            return self._output(sequence, RunResult(0), FinishReason.ERROR, error=NOT_FINITE)
        if prompt_logprobs:
            begin = sequence.num_computed_tokens + 1
            sequence.prompt_logprobs[begin:] = prompt_logprobs
        if run.num_drafts:
            self.stats.verified[run.num_drafts, len(tokens) - 1] += 1
        reason = sequence.advance(standing, tokens, drafts)
        self.scheduler.settled(run)
        if sequence.mask is not None and sequence.mask.failure:
            self._end(sequence)
            error = sequence.mask.failure
            return self._output(sequence, RunResult(0), FinishReason.ERROR, error=error)
        if reason or image:
            # After its end no step that is in flight has changed a sequence's state.
            self._keep_image(sequence, image)
        if self._held:
            self._release_held(sequence, reason)
        if reason:
            self._end(sequence)
        return self._output(sequence, result, reason) if tokens else None

    def _keep_image(self, sequence: Sequence, image: StateImage | None) -> None:
        """Make an image findable: that of the sequence's present state where none is at hand."""
        if self.scheduler.cache.enabled:
            self.scheduler.keep_image(sequence, image or self.runner.image(sequence))

    def _release_held(self, sequence: Sequence, reason: FinishReason | None) -> None:
        """Let a request's other sequences start once the first one's prompt is done."""
        if sequence.num_output_tokens or reason:
            for other in self._held.pop(sequence.request.request_id, ()):
                self.scheduler.admit(other)

    def _end(self, sequence: Sequence) -> None:
        self.scheduler.finish(sequence)
        self._release_held(sequence, FinishReason.ERROR)
        self._forget(sequence)

    def _forget(self, sequence: Sequence) -> None:
        request_id = sequence.request.request_id
        rest = [s for s in self._requests.get(request_id, ()) if s is not sequence]
        if rest:
            self._requests[request_id] = rest
        else:
            self._requests.pop(request_id, None)

    def _output(
        self,
        sequence: Sequence,
        result: RunResult,
        reason: FinishReason | None,
        error: str | None = None,
    ) -> RequestOutput:
        tokens, prompt_logprobs = result.token_ids, None
        if not sequence.reported:
            sequence.reported = True
            self.stats.prompt_tokens += sequence.num_prompt_tokens
            self.stats.cached_tokens += sequence.cached_tokens
            if sequence.request.params.prompt_logprobs is not None:
                prompt_logprobs = tuple(sequence.prompt_logprobs)
        # By position: naming eleven fields would double what an output costs.
        return RequestOutput(
            sequence.request.request_id,
            tokens,
            reason,
            sequence.index,
            tokens[-1] if reason is FinishReason.STOP else None,
            tuple(result.logprobs),
            prompt_logprobs,
            sequence.cached_tokens,
            sequence.cache_miss,
            len(tokens) - 1 if tokens else 0,
            error,
        )


def _allowed(token_ids: Iterable[int] | None, vocab_size: int) -> torch.Tensor | None:
    if token_ids is None:
        return None
    mask = torch.zeros(vocab_size, dtype=torch.bool)
    mask[[t for t in token_ids if t < vocab_size]] = True
    return mask

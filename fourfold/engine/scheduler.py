"""Which tokens run in the next step.

Contract: first come, first served, under three limits: tokens a step, sequences running, pages. Decodes
go first, then prefills in chunks. A request is admitted when a state slot and all the pages it can ever
need are free, so a running request never waits for memory. Host integers only; no tensors.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from fourfold.cache.blocks import IdPool
from fourfold.core.batch import PAGE_TOKENS, ScheduledBatch, ScheduledSequence
from fourfold.core.errors import CapacityError, RequestError
from fourfold.core.request import Request


@dataclass
class Sequence:
    """A request while it runs."""

    request: Request
    seed: int
    token_ids: list[int]
    num_computed_tokens: int = 0
    block_ids: list[int] = field(default_factory=list)
    state_slot: int = -1

    @property
    def num_prompt_tokens(self) -> int:
        return len(self.request.prompt_token_ids)

    @property
    def num_output_tokens(self) -> int:
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def pages_needed(self) -> int:
        longest = self.num_prompt_tokens + self.request.params.max_tokens
        return -(-longest // PAGE_TOKENS)


@dataclass(frozen=True)
class Step:
    """The batch to run and, in the same order, the sequences it belongs to.

    A sequence samples a token if its run reaches the end of its known tokens.
    """

    batch: ScheduledBatch
    sequences: tuple[Sequence, ...]


class Scheduler:
    """Waiting and running requests."""

    def __init__(
        self, max_num_seqs: int, max_num_batched_tokens: int, max_model_len: int, num_pages: int
    ):
        self.max_num_batched_tokens = max_num_batched_tokens
        self.max_model_len = max_model_len
        self.pages = IdPool(num_pages)
        self.slots = IdPool(max_num_seqs)
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []

    def add(self, sequence: Sequence) -> None:
        """Queue a request; `CapacityError` or `RequestError` if it could never run."""
        prompt, params = sequence.num_prompt_tokens, sequence.request.params
        if not prompt:
            raise RequestError("the prompt must hold at least one token")
        if prompt + params.max_tokens > self.max_model_len:
            raise CapacityError(
                f"prompt ({prompt} tokens) + max_tokens ({params.max_tokens}) = "
                f"{prompt + params.max_tokens} exceeds max_model_len ({self.max_model_len})"
            )
        if sequence.pages_needed > self.pages.size:
            raise CapacityError(
                f"the request may need {sequence.pages_needed} pages of {PAGE_TOKENS} tokens, "
                f"the cache has {self.pages.size}"
            )
        self.waiting.append(sequence)

    @property
    def has_work(self) -> bool:
        return bool(self.waiting or self.running)

    def schedule(self) -> Step:
        """The next step: every running sequence it has tokens for, decodes first."""
        self._admit()
        budget = self.max_num_batched_tokens
        runs, chosen = [], []
        for sequence in sorted(self.running, key=lambda s: s.num_output_tokens == 0):
            count = min(len(sequence.token_ids) - sequence.num_computed_tokens, budget)
            if not count:
                continue
            budget -= count
            runs.append(_run(sequence, count))
            chosen.append(sequence)
        return Step(ScheduledBatch(tuple(runs)), tuple(chosen))

    def finish(self, sequence: Sequence) -> None:
        """Free everything a running sequence holds."""
        self.running.remove(sequence)
        self.pages.give_back(sequence.block_ids)
        self.slots.give_back([sequence.state_slot])

    def _admit(self) -> None:
        while self.waiting and self.slots.num_free:
            if self.waiting[0].pages_needed > self.pages.num_free:
                return
            sequence = self.waiting.popleft()
            sequence.block_ids = self.pages.take(sequence.pages_needed)
            sequence.state_slot = self.slots.take(1)[0]
            self.running.append(sequence)


def _run(sequence: Sequence, count: int) -> ScheduledSequence:
    """The next `count` tokens; logits only where the run reaches the end of the known tokens."""
    computed = sequence.num_computed_tokens
    ends = computed + count == len(sequence.token_ids)
    slot = sequence.state_slot
    return ScheduledSequence(
        token_ids=sequence.token_ids[computed : computed + count],
        num_computed_tokens=computed,
        block_ids=sequence.block_ids,
        state_slot=slot,
        fold_source=slot if computed else -1,
        fold_keeps=((count - 1, slot),),
        logits_from=count - 1 if ends else count,
    )

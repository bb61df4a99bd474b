"""One sequence of a request while the engine holds it.

Contract: plain host data; the scheduler owns the placement (pages, slot), the engine the tokens.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field

from fourfold.cache.image import StateImage
from fourfold.core.batch import PAGE_TOKENS
from fourfold.core.request import FinishReason, Request, TokenLogprobs


@dataclass(eq=False, slots=True)
class Sequence:
    """A prompt and what was generated from it so far.

    The first `num_computed_tokens` of `token_ids` are in the state; of a decoding sequence that is
    all but the last. `drafts` are guesses at the tokens after it. `max_tokens` is resolved. Sequences
    of smaller `rank` run first.
    """

    request: Request
    index: int
    arrival: int
    seed: int
    max_tokens: int
    stop_ids: tuple[int, ...]  # tokens that end it
    root: bytes  # of its hash chain
    token_ids: list[int]
    num_computed_tokens: int = 0
    drafts: Seq[int] = ()
    # where its state is
    block_ids: array[int] = field(default_factory=lambda: array("q"))
    chain: list[bytes] = field(default_factory=list)  # hashes of its committed full pages
    hashes: list[bytes] = field(default_factory=list)  # those of its full pages known so far
    state_slot: int = -1
    fold_version: int = 0
    saved: StateImage | None = None  # while preempted
    # what its client learns
    cached_tokens: int = 0
    cache_miss: str | None = None
    prompt_logprobs: list[TokenLogprobs | None] = field(default_factory=lambda: [None])
    reported: bool = False  # an output was sent
    # what never changes
    rank: tuple[int, int] = field(init=False)
    num_prompt_tokens: int = field(init=False)
    changes_logits: bool = field(init=False)  # by penalties, biases, or barred tokens

    def __post_init__(self) -> None:
        params = self.request.params
        self.rank = self.request.priority, self.arrival
        self.num_prompt_tokens = len(self.request.prompt_token_ids)
        self.changes_logits = bool(params.has_penalties or params.logit_bias or params.min_tokens)

    @property
    def num_output_tokens(self) -> int:
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def is_decoding(self) -> bool:
        """Whether all known tokens but the last are in the state."""
        last = len(self.token_ids) - 1
        return self.num_computed_tokens == last and last >= self.num_prompt_tokens

    def until_end(self, token_ids: Seq[int]) -> tuple[int, ...]:
        """The tokens it takes of those sampled: none after a stop token or beyond max_tokens."""
        room = self.max_tokens - self.num_output_tokens
        for count, token in enumerate(token_ids, 1):
            if count == room or token in self.stop_ids:
                return tuple(token_ids[:count])
        return tuple(token_ids)

    def advance(self, standing: int, sampled: Seq[int], drafts: Seq[int]) -> FinishReason | None:
        """Take a run's result: `standing` more tokens are in the state, `sampled` are known now, and
        `drafts` guess on from there. Why the sequence is over, None while it is not."""
        self.num_computed_tokens += standing
        if not sampled:
            self.fold_version, self.drafts = 0, ()
            return None
        self.fold_version = len(sampled) - 1
        self.token_ids += sampled
        room = self.max_tokens - len(self.token_ids) + self.num_prompt_tokens
        # The token after the last one is sampled anyway.
        self.drafts = drafts[: max(room - 1, 0)] if drafts else ()
        if sampled[-1] in self.stop_ids:
            return FinishReason.STOP
        return None if room else FinishReason.LENGTH

    def next_image_position(self, interval: int) -> int | None:
        """The next position at which prefill should stop to keep an image, if any.

        Those the request names, multiples of `interval`, and the last position from which the prompt
        can be resumed, one before its end.
        """
        computed, last = self.num_computed_tokens, self.num_prompt_tokens - 1
        wanted = [p for p in (*self.request.image_positions, last) if computed < p <= last]
        regular = (computed // interval + 1) * interval
        if regular <= last:
            wanted.append(regular)
        return min(wanted, default=None)


def pages_for(tokens: int) -> int:
    """Pages that hold `tokens` source tokens."""
    return -(-tokens // PAGE_TOKENS)

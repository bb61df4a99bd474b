"""One sequence of a request while the engine holds it.

Contract: plain host data; the scheduler owns the placement (pages, slot), the engine the tokens.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field

from fourfold.cache.image import StateImage
from fourfold.core.request import FinishReason, Request, TokenLogprobs
from fourfold.engine.masks import LOOK_AHEAD, TokenMask


# Not frozen: one is made for every sequence in every step, and freezing would triple what it costs.
@dataclass(slots=True, eq=False)
class Run:
    """The next `count` tokens of a sequence, the last of them `num_drafts` drafts to verify.

    `begin` is the first one's position: exact for tokens the host knows, and for a decode behind a run
    in flight the least it can be. `samples` says that the run reaches the end of what is known, so
    that tokens are sampled; `keep_image` that the state after it is worth an image.
    """

    sequence: Sequence
    begin: int
    count: int
    samples: bool
    num_drafts: int = 0
    decodes: bool = False  # its tokens are the last one sampled, and drafts
    keep_image: bool = False


@dataclass(eq=False, slots=True)
class Sequence:
    """A prompt and what was generated from it so far.

    The first `num_computed_tokens` of `token_ids` are in the state; of a decoding sequence that is
    all but the last. `drafts` are guesses at the tokens after it. While a run is in `flight`, all of
    this is as it was before that run. `max_tokens` is resolved. Sequences of smaller `rank` run first.
    """

    request: Request
    index: int
    arrival: int
    seed: int
    max_tokens: int
    stop_ids: tuple[int, ...]  # tokens that end it
    root: bytes  # of its hash chain
    token_ids: list[int]
    mask: TokenMask | None = None
    num_computed_tokens: int = 0
    drafts: Seq[int] = ()
    flight: Run | None = None  # launched, and its result not known yet
    over: bool = False  # ended or aborted: results still in flight are nobody's
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
    rank: tuple[int, int, int] = field(init=False)  # 0 if it has waited too long, priority, arrival
    # what never changes
    num_prompt_tokens: int = field(init=False)
    changes_logits: bool = field(init=False)  # by penalties, biases, or barred tokens

    def __post_init__(self) -> None:
        params = self.request.params
        self.rank = 1, self.request.priority, self.arrival
        self.num_prompt_tokens = len(self.request.prompt_token_ids)
        self.changes_logits = bool(params.has_penalties or params.logit_bias or params.min_tokens)

    @property
    def num_output_tokens(self) -> int:
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def binding_mask(self) -> TokenMask | None:
        """Its mask, unless that allows anything for as far ahead as steps can reach."""
        return None if self.mask is None or self.mask.open_for >= LOOK_AHEAD else self.mask

    @property
    def needs_tokens(self) -> bool:
        """Whether the host must know all tokens so far before it can have the next one sampled."""
        params = self.request.params
        return (
            self.binding_mask is not None
            or params.has_penalties
            or self.num_output_tokens < params.min_tokens
        )

    @property
    def most_tokens(self) -> int:
        """Tokens it has, or may have once the run in flight is known."""
        flight = self.flight
        return len(self.token_ids) + (1 + flight.num_drafts if flight and flight.samples else 0)

    @property
    def total(self) -> int:
        """Tokens it can ever have."""
        return self.num_prompt_tokens + self.max_tokens

    @property
    def next_begin(self) -> int:
        """Where its next run begins, or the least that can be."""
        flight = self.flight
        return self.num_computed_tokens + (flight.count - flight.num_drafts if flight else 0)

    @property
    def is_decoding(self) -> bool:
        """Whether all known tokens but the last are in the state, or will be after the run in flight."""
        if self.flight and self.flight.samples:
            return True
        last = len(self.token_ids) - 1
        return self.next_begin == last and last >= self.num_prompt_tokens

    def advance(self, standing: int, sampled: Seq[int], drafts: Seq[int]) -> FinishReason | None:
        """Take a run's result: `standing` more tokens are in the state, `sampled` are known now, and
        `drafts` guess on from there. Why the sequence is over, None while it is not."""
        self.num_computed_tokens += standing
        if not sampled:
            self.fold_version = 0
            return None
        self.fold_version, self.drafts = len(sampled) - 1, drafts
        self.token_ids += sampled
        if self.mask is not None:
            self.mask.commit(sampled)
        room = self.max_tokens - len(self.token_ids) + self.num_prompt_tokens
        if sampled[-1] in self.stop_ids:
            return FinishReason.STOP
        return None if room else FinishReason.LENGTH

    def next_image_position(self, interval: int) -> int | None:
        """The next position at which prefill should stop to keep an image, if any.

        Those the request names, multiples of `interval`, and the last position from which the prompt
        can be resumed, one before its end.
        """
        computed, last = self.next_begin, self.num_prompt_tokens - 1
        wanted = [p for p in (*self.request.image_positions, last) if computed < p <= last]
        regular = (computed // interval + 1) * interval
        if regular <= last:
            wanted.append(regular)
        return min(wanted, default=None)

"""The hook for constraints on what may be sampled next, such as a grammar's.

    request.grammar ─ MaskMaker ─▶ TokenMask ─ allowed(drafts) ─▶ sampling of every row of a run
                                       ▲
                                       └─ commit(tokens that stand)

Contract: a mask belongs to one sequence and moves with what it commits, so it survives preemption and
is the same in any batch. Rows after drafts are masked as if these had been committed. Sequences with a
mask run synchronously, since their masks need the ids of the tokens before, unless the mask says that it
will allow anything for a while. Who makes masks, and of what, is not known here: an `Engine` is given a
maker.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt

from fourfold.core.request import Grammar

# More tokens than the step in flight and the next one can bring.
LOOK_AHEAD = 16


class TokenMask(Protocol):
    """A constraint at some point of its sequence's output."""

    @property
    def failure(self) -> str | None:
        """Why the output cannot go on, None while it can; a sequence whose mask has failed ends with
        that as its error."""

    @property
    def open_for(self) -> int:
        """How many of the next tokens may be anything, whatever they are; 0 if that is not known."""

    def allowed(self, drafts: Sequence[int]) -> npt.NDArray[np.int32]:
        """Bits of the tokens that may come next `[1 + len(drafts), words]`: token t is bit t % 32 of
        word t // 32; row i is for after the first i drafts (all bits set where these break the rules,
        for then nothing sampled there can stand). At least one bit of every row is set."""

    def commit(self, tokens: Sequence[int]) -> None:
        """Move on over tokens that stand now; each was allowed."""


MaskMaker = Callable[[Grammar, int], TokenMask]
"""Makes a mask from a request's grammar and the vocabulary's size. Raises `RequestError`."""

"""Masks of answers whose beginning, or whose reasoning's end, is known token by token.

    AfterReasoning: free, at most so many tokens ─ </think> ─▶ Beginning, or a grammar's mask

Contract: both are masks as an engine wants them (engine/masks.py has the protocol), of one sequence each;
what they allow depends on the committed tokens and the drafts before, and on nothing else. They do not
know what the tokens mean.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt

from fourfold.core.request import Grammar
from fourfold.text.grammar import read_tokens

MaskRows = npt.NDArray[np.int32]
_FOR_EVER = 1 << 40
_BITS = (1 << np.arange(32, dtype=np.uint32)).view(np.int32)


class Mask(Protocol):
    """A constraint at some point of its sequence's output, as in engine/masks.py."""

    @property
    def failure(self) -> str | None:
        """Why the answer cannot go on, None while it can."""

    @property
    def open_for(self) -> int:
        """How many of the next tokens may be anything, whatever they are; 0 if that is not known."""

    def allowed(self, drafts: Sequence[int]) -> MaskRows:
        """Bits of the tokens that may come next `[1 + len(drafts), words]`: token t is bit t % 32 of
        word t // 32. Row i is for after the first i drafts; all its bits are set where these break
        the rules. No row is empty."""

    def commit(self, tokens: Sequence[int]) -> None:
        """Move on over tokens that stand now; each was allowed."""


def demand_mask(grammar: Grammar, eos_token_id: int, num_words: int) -> Mask:
    """The mask of a demanded beginning, possibly of none (`beginning_grammar`). Raises
    `RequestError`."""
    tokens = read_tokens(grammar.source, 32 * num_words)
    eos = eos_token_id if tokens else None
    return after_reasoning(Beginning(tokens, num_words), grammar, eos, num_words)


def after_reasoning(rest: Mask, grammar: Grammar, eos: int | None, num_words: int) -> Mask:
    """`rest` from where `grammar` holds on. `eos`: with which the answer cannot end before that."""
    if grammar.after_token is None:
        return rest
    return AfterReasoning(rest, grammar.after_token, grammar.max_free_tokens, eos, num_words)


class Beginning:
    """The answer begins with `tokens` and is free after them. `num_words`: of a row."""

    failure: str | None = None

    def __init__(self, tokens: Sequence[int], num_words: int):
        self._left, self._words = tuple(tokens), num_words

    @property
    def open_for(self) -> int:
        """See `Mask`."""
        return 0 if self._left else _FOR_EVER

    def allowed(self, drafts: Sequence[int]) -> MaskRows:
        """See `Mask`."""
        rows = _free(drafts, self._words)
        for number, token in enumerate(self._left[: len(rows)]):
            rows[number] = _only(token, self._words)
            if number < len(drafts) and drafts[number] != token:
                break
        return rows

    def commit(self, tokens: Sequence[int]) -> None:
        """See `Mask`."""
        self._left = self._left[len(tokens) :]


class AfterReasoning:
    """The answer is free until the token `end`, which comes after `most` others at the latest (None:
    whenever it likes), and then what `rest` allows. Until then it cannot end by `eos`, if given."""

    def __init__(self, rest: Mask, end: int, most: int | None, eos: int | None, num_words: int):
        self._rest, self._end, self._most, self._eos = rest, end, most, eos
        self._words, self._count, self._ended = num_words, 0, False

    @property
    def failure(self) -> str | None:
        """See `Mask`."""
        return self._rest.failure

    @property
    def open_for(self) -> int:
        """See `Mask`."""
        if self._ended or self._eos is None:
            left = _FOR_EVER if self._most is None or self._ended else self._most - self._count
            return max(min(left, self._rest.open_for), 0)
        return 0

    def allowed(self, drafts: Sequence[int]) -> MaskRows:
        """See `Mask`."""
        if self._ended:
            return self._rest.allowed(drafts)
        rows = _free(drafts, self._words)
        for number, row in enumerate(rows):
            if number and drafts[number - 1] == self._end:
                rows[number:] = self._rest.allowed(drafts[number:])
                break
            if self._most is not None and self._count + number >= self._most:
                row[:] = _only(self._end, self._words)
            elif self._eos is not None:
                clear_bit(row, self._eos)
            if number < len(drafts) and not has_bit(row, drafts[number]):
                break
        return rows

    def commit(self, tokens: Sequence[int]) -> None:
        """See `Mask`."""
        for position, token in enumerate(tokens):
            if self._ended:
                self._rest.commit(tokens[position:])
                return
            self._count += 1
            self._ended = token == self._end


def has_bit(row: MaskRows, token: int) -> bool:
    """Whether a row `[words]` allows this token."""
    return bool(row[token >> 5] & _BITS[token & 31])


def clear_bit(row: MaskRows, token: int) -> None:
    """Forbid this token in a row `[words]`."""
    row[token >> 5] &= ~_BITS[token & 31]


def bit_row(tokens: Sequence[int], vocab_size: int) -> MaskRows:
    """The bits of `tokens`, `[words]`."""
    bits = np.zeros(-(-vocab_size // 32) * 32, bool)
    bits[list(tokens)] = True
    return np.packbits(bits, bitorder="little").view(np.int32)


def _only(token: int, num_words: int) -> MaskRows:
    return bit_row((token,), 32 * num_words)


def _free(drafts: Sequence[int], num_words: int) -> MaskRows:
    return np.full((1 + len(drafts), num_words), -1, np.int32)

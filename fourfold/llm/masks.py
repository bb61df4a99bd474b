"""Grammars as the engine wants them: masks of tokens, made by llguidance.

Contract: `grammar_masks` is a `MaskMaker` (engine/masks.py) for one checkpoint's tokenizer; what it
needs is loaded with the first grammar. It does not know requests.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from fourfold.core.request import Grammar
from fourfold.engine.masks import MaskMaker, TokenMask
from fourfold.text.grammar import GrammarCompiler, GrammarMatcher
from fourfold.text.tokenizer import TOKENIZER_FILE


class GrammarMask:
    """A `TokenMask` of a grammar."""

    def __init__(self, matcher: GrammarMatcher, vocab_size: int) -> None:
        self._matcher = matcher
        self._words = -(-vocab_size // 32)

    def allowed(self, drafts: Sequence[int]) -> npt.NDArray[np.int32]:
        """See `TokenMask`."""
        rows = self._matcher.rows(drafts)
        found = np.full((len(rows), self._words), -1, np.int32)
        for row, bits in zip(found, rows, strict=True):
            if bits is not None:
                words = np.frombuffer(bits, np.int32)[: self._words]
                row[: len(words)] = words
                row[len(words) :] = 0
        return found

    def commit(self, tokens: Sequence[int]) -> None:
        """See `TokenMask`."""
        self._matcher.commit(tokens)


def grammar_masks(directory: Path, eos_token_id: int) -> MaskMaker:
    """Masks for the checkpoint in this directory."""
    compilers: dict[int, GrammarCompiler] = {}

    def make(grammar: Grammar, vocab_size: int) -> TokenMask:
        if vocab_size not in compilers:
            text = (directory / TOKENIZER_FILE).read_text(encoding="utf-8")
            compilers[vocab_size] = GrammarCompiler(text, vocab_size, eos_token_id)
        return GrammarMask(compilers[vocab_size].matcher(grammar), vocab_size)

    return make

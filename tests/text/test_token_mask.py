"""Demanded beginnings and bounded reasoning, against a definition that looks at all tokens so far."""

from __future__ import annotations

import itertools
import random

import numpy as np
import pytest

from fourfold.core.errors import RequestError
from fourfold.core.request import Grammar
from fourfold.text.grammar import beginning_grammar, read_tokens
from fourfold.text.token_mask import MaskRows, demand_mask

EOS, END = 1, 5
WORDS = 2


def ids(row: MaskRows) -> set[int]:
    return set(np.flatnonzero(np.unpackbits(row.view(np.uint8), bitorder="little")).tolist())


def allowed(grammar: Grammar, demand: list[int], said: list[int]) -> set[int]:
    """What may follow `said`, by the words of `Grammar` and `Beginning`."""
    anything = set(range(32 * WORDS))
    if grammar.after_token is not None:
        if END not in said:
            spent = grammar.max_free_tokens is not None and len(said) >= grammar.max_free_tokens
            return {END} if spent else anything - ({EOS} if demand else set())
        said = said[said.index(END) + 1 :]
    return {demand[len(said)]} if len(said) < len(demand) else anything


@pytest.mark.parametrize("after", [None, END])
@pytest.mark.parametrize("most", [None, 0, 1, 3])
@pytest.mark.parametrize("demand", [[], [7, 8, 7]])
def test_rows_are_those_of_the_definition(
    after: int | None, most: int | None, demand: list[int]
) -> None:
    """For every length of drafts, right or wrong at any place, and any number committed at once."""
    grammar = beginning_grammar(demand, after, most)
    for seed in range(20):
        rng = random.Random(seed)
        mask, said = demand_mask(grammar, EOS, WORDS), list[int]()
        for _ in range(8):
            drafts: list[int] = []
            for _ in range(rng.randrange(4)):
                right = sorted(allowed(grammar, demand, said + drafts))
                drafts.append(rng.choice([*right, END, EOS, 7, 9] if rng.random() < 0.5 else right))
            rows = mask.allowed(drafts)
            stands = 0
            for number in range(len(drafts) + 1):
                expected = allowed(grammar, demand, said + drafts[:number])
                assert ids(rows[number]) == expected
                stands = number
                if number < len(drafts) and drafts[number] not in expected:
                    assert (rows[number + 1 :] == -1).all()
                    break
            if after is not None and END not in said and demand:
                assert mask.open_for == 0  # it cannot end before its demand
            elif len(said) < 8:
                free = 0
                while free < 5 and all(
                    allowed(grammar, demand, [*said, *more]) == set(range(32 * WORDS))
                    for more in itertools.product([9, END], repeat=free)
                ):
                    free += 1
                assert min(mask.open_for, 5) == free
            kept = drafts[: rng.randrange(stands + 1)]
            kept.append(rng.choice(sorted(allowed(grammar, demand, said + kept))))
            mask.commit(kept)
            said += kept
            assert mask.failure is None


def test_a_demand_is_token_ids() -> None:
    for source in ("", "{}", "[1.5]", "[true]", "[-1]", "[64]", '["a"]', "7"):
        with pytest.raises(RequestError):
            read_tokens(source, 64)
    assert read_tokens("[0, 63]", 64) == [0, 63]
    assert read_tokens("[]", 64) == []

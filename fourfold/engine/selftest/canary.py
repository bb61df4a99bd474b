"""Long contexts at the places where off-by-one faults live, on a random model.

    residues of the position mod 4 and 128   a row is finished, the next one begins
    around 4 · index_topk                    from here on the indexer leaves rows out
    the window's edge, page boundaries       rows leave the ring, pages are opened

Contract: three properties that need no second implementation. What is decoded token by token equals one pass
over the whole text; no token changes what stands before it; every token of a finished row changes the last
one's result. It knows engines and requests only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

from fourfold.core.config import HCA_RATIO
from fourfold.core.request import Request
from fourfold.core.row_format import PAGE_TOKENS
from fourfold.engine.selftest.invariants import (
    Answer,
    Fault,
    answers,
    draw,
    requests,
    same_numbers,
)
from fourfold.engine.selftest.models import Subject

DECODED = 6  # tokens: every residue mod 4, from before a boundary to after it


def boundaries(subject: Subject, quick: bool) -> list[int]:
    """Prompt lengths from which decoding crosses every kind of boundary."""
    c = subject.config
    chosen = 4 * c.index_topk
    wanted = [1, c.sliding_window - 3, HCA_RATIO - 3, chosen - 3, PAGE_TOKENS - 3]
    if not quick:
        wanted += [2, 3, chosen - 1, chosen + 125, 3 * HCA_RATIO - 2, 2 * PAGE_TOKENS - 1]
        wanted += [chosen + PAGE_TOKENS, 3 * PAGE_TOKENS + 127]
    return sorted({max(length, 1) for length in wanted})


def checks(subject: Subject, quick: bool) -> Iterator[tuple[str, Callable[[], str]]]:
    """(name, check); a check raises `Fault` or gives what there is to say."""
    lengths = boundaries(subject, quick)
    yield "decoded = one pass", lambda: decoded(subject, lengths)
    yield "no look-ahead", lambda: no_look_ahead(subject, quick)
    yield "nothing in reach is lost", lambda: reach(subject, quick)


def _passes(subject: Subject, texts: Sequence[tuple[int, ...]]) -> list[Answer]:
    """Log probabilities of every token of each text, in one pass."""
    work = [
        Request(str(n), text, replace(one.params, prompt_logprobs=0, max_tokens=1))
        for n, (text, one) in enumerate(
            zip(texts, requests([1] * len(texts), subject.config.vocab_size), strict=True)
        )
    ]
    return answers(subject.engine(seats=4), work)


def decoded(subject: Subject, lengths: Sequence[int]) -> str:
    """Decoding from each length equals one pass over prompt and answer together."""
    work = requests(lengths, subject.config.vocab_size, 3, max_tokens=DECODED)
    got = answers(subject.engine(seats=len(work)), work)
    texts = [one.prompt_token_ids + a.tokens for one, a in zip(work, got, strict=True)]
    for length, a, b in zip(lengths, got, _passes(subject, texts), strict=True):
        whole = b.prompt[length - 1 :]
        same_numbers(f"from position {length} on, token", a.logprobs, whole, subject.tolerance)
    return f"from positions {', '.join(map(str, lengths))}"


def no_look_ahead(subject: Subject, quick: bool) -> str:
    """Texts that differ from some position on agree before it."""
    vocabulary = subject.config.vocab_size
    length = 4 * subject.config.index_topk + (8 if quick else 140)
    cuts = [length - n for n in (1, 2, 3, 4, 5)]
    if length > HCA_RATIO + 8:
        cuts += [HCA_RATIO - 1, HCA_RATIO, HCA_RATIO + 1]
    base = draw(11, length, vocabulary)
    other = draw(12, length, vocabulary)
    whole, *changed = _passes(subject, [base, *(base[:cut] + other[cut:] for cut in cuts)])
    for cut, a in zip(cuts, changed, strict=True):
        where = f"before a change at {cut}, token"
        same_numbers(where, a.prompt[: cut - 1], whole.prompt[: cut - 1], subject.tolerance)
    return f"{length} tokens, changed at {', '.join(map(str, cuts))}"


def reach(subject: Subject, quick: bool) -> str:
    """Each token in a finished row counts, also those that no chain of windows reaches."""
    c = subject.config
    last = (2 if quick else 4) * HCA_RATIO - 1  # it completes a row of every kind
    farthest = (c.num_hidden_layers + 1) * c.sliding_window
    spots = [0, 3, HCA_RATIO - 1, last - farthest, last - c.sliding_window, last]
    spots = sorted({spot for spot in spots if spot >= 0})
    base = draw(21, last + 1, c.vocab_size)
    texts = [base]
    for spot in spots:
        other = 2 + (base[spot] - 1) % (c.vocab_size - 2)
        texts.append((*base[:spot], other, *base[spot + 1 :]))
    alike = requests([1] * len(texts), c.vocab_size, 0, max_tokens=1, temperature=0.0, logprobs=3)
    work = [
        replace(one, prompt_token_ids=text, params=replace(one.params, seed=0))
        for one, text in zip(alike, texts, strict=True)
    ]
    whole, *changed = answers(subject.engine(seats=4), work)
    for spot, a in zip(spots, changed, strict=True):
        if (a.tokens, a.logprobs) == (whole.tokens, whole.logprobs):
            raise Fault(f"token {spot} of {last + 1} changes nothing at the last one")
    return f"{last + 1} tokens, changed at {', '.join(map(str, spots))}"

"""How well a model in training answers held-out questions, without generating.

Contract: an answer counts if every one of its tokens is the most likely one after the tokens before it:
then, and for the reference answer only then, greedy generation gives the reference answer. Answers
that are right in other words count as wrong, so that these scores are lower bounds of evaluate.py's.
`drafts` is the share of answer tokens that the MTP layer foresaw.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch

from train.batch import BLOCK
from train.data.encode import Document
from train.data.mixture import Mixture, Rows
from train.evaluate import Case, questions
from train.geometry import PADDING
from train.step import Mode, Tokens, Trainer


def on_device(rows: Rows, device: torch.device) -> Tokens:
    """Rows as a step takes them."""
    ids, starts = (
        torch.from_numpy(part).to(device, non_blocking=True).long()
        for part in (rows.ids, rows.starts)
    )
    return Tokens(ids, starts, torch.from_numpy(rows.weights).to(device, non_blocking=True))


def pack(
    documents: Sequence[Document], length: int
) -> Iterator[tuple[Rows, list[tuple[int, int]]]]:
    """One row at a time with as many documents as fit, and where each begins and ends."""
    ids, starts, weights, places = _empty(length)
    begin = 0
    for document in documents:
        size = len(document.ids)
        if begin + size > length:
            yield Rows(ids, starts, weights), places
            ids, starts, weights, places = _empty(length)
            begin = 0
        ids[0, begin : begin + size], weights[0, begin : begin + size] = (
            document.ids,
            document.weights,
        )
        starts[0, begin:] = begin
        places.append((begin, begin + size))
        begin += -(-size // BLOCK) * BLOCK
        starts[0, begin:] = begin
    yield Rows(ids, starts, weights), places


def _empty(length: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, list[tuple[int, int]]]:
    return (
        np.full((1, length), PADDING, np.int32),
        np.zeros((1, length), np.int32),
        np.zeros((1, length), np.float32),
        [],
    )


@torch.no_grad()
def forced(
    trainer: Trainer, mixture: Mixture, wanted: Sequence[Case], count: int, mode: Mode
) -> dict[str, float]:
    """Share of answers that greedy generation would give, by case, and `drafts`."""
    scores: dict[str, float] = {}
    foreseen, answered = 0, 0
    device = trainer.parameters[0].device
    for case in wanted:
        documents = [mixture.encoder.document(item) for item in questions(mixture, case, count)]
        # Only the last answer was asked for.
        documents = [_last_answer(document) for document in documents]
        longest = max(len(document.ids) for document in documents)
        length = max(4096, -(-longest // BLOCK) * BLOCK)
        right = 0
        for rows, places in pack(documents, length):
            tokens = on_device(rows, device)
            hits, drafts = trainer.hits(tokens, mode)
            asked = tokens.weights[0] == 1
            good = (hits | ~asked).tolist()
            right += sum(all(good[begin:end]) for begin, end in places)
            foreseen += int((drafts & asked).sum())
            answered += int(asked.sum())
        scores[case.name] = right / len(documents)
    return scores | {"drafts": foreseen / max(1, answered)}


def _last_answer(document: Document) -> Document:
    weights, begin = list(document.weights), len(document.weights)
    while begin and weights[begin - 1] == 1:
        begin -= 1
    return Document(document.ids, [0.0] * begin + weights[begin:])

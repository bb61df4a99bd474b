"""Which skills a training row is made of, and rows filled with whole documents.

Contract: `Mixture.rows` gives the rows of step s from (seed, s) alone, whoever asks, in whatever order.
A row is documents that start at multiples of 128, as TrainBatch wants them; what is left is padding
with weight 0. The share of each skill is of tokens, not of documents.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from random import Random

import numpy as np
import numpy.typing as npt

from train.batch import BLOCK
from train.data import about, arithmetic, recall, repeat, schema, tools
from train.data.encode import Document, Encoder
from train.data.items import Item
from train.geometry import PADDING

SHARES: Mapping[str, float] = {
    "arithmetic": 0.18,
    "arithmetic_thinking": 0.16,
    "tool_call": 0.08,
    "tool_result": 0.07,
    "recall_near": 0.05,
    "recall_far": 0.36,
    "schema": 0.07,
    "about": 0.03,
}
SKILLS = tuple(SHARES)
THINKING = 0.4  # of the items whose skill does not say
_SYSTEM = 0.15  # of the items without tools and schema
_SYSTEM_TEXTS = ("You are a helpful assistant.", "You are nano.", "Answer briefly.")
_FOR_QUESTIONS = 600  # tokens of a far text's questions and answers
_TRIES = 4  # documents that may fail to fit before a row is closed

Array = npt.NDArray[np.int32]


@dataclass(frozen=True)
class Rows:
    """`ids, starts [R, L]` int32 and `weights [R, L]` float32, as `train.step.Tokens`."""

    ids: Array
    starts: Array
    weights: npt.NDArray[np.float32]


class Mixture:
    """Draws items and fills rows."""

    def __init__(self, encoder: Encoder, seed: int = 0):
        self.encoder, self.seed = encoder, seed

    def item(self, skill: str, random: Random, evaluation: bool, length: int = 0) -> Item:
        """One item; `length` is that of a far recall's text, in tokens."""
        thinking = random.random() < THINKING
        made = self._plain(skill, random, evaluation, thinking, length)
        if made.tools or made.response_format or random.random() >= _SYSTEM:
            return made
        system = {"role": "system", "content": random.choice(_SYSTEM_TEXTS)}
        return replace(made, messages=(system, *made.messages))

    def _plain(
        self, skill: str, random: Random, evaluation: bool, thinking: bool, length: int
    ) -> Item:
        if skill.startswith("arithmetic"):
            return arithmetic.item(random, evaluation, skill == "arithmetic_thinking")
        if skill.startswith("tool"):
            return tools.item(random, evaluation, thinking, result=skill == "tool_result")
        if skill == "recall_far":
            return recall.far(random, evaluation, thinking, length, self.encoder.count)
        makers = {"recall_near": recall.near, "schema": schema.item, "about": about.item}
        return makers[skill](random, evaluation, thinking)

    def rows(self, step: int, count: int, length: int, drill: float = 0.0) -> Rows:
        """The rows of one step; `drill` is the share of texts to repeat."""
        made = [self._row(Random(f"{self.seed}/{step}/{n}"), length, drill) for n in range(count)]
        ids, starts, weights = (np.stack(part) for part in zip(*made, strict=True))
        return Rows(ids, starts, weights)

    def _row(
        self, random: Random, length: int, drill: float
    ) -> tuple[Array, Array, npt.NDArray[np.float32]]:
        ids = np.full(length, PADDING, np.int32)
        starts, weights = np.zeros(length, np.int32), np.zeros(length, np.float32)
        shares = {skill: share * (1 - drill) for skill, share in SHARES.items()}
        if drill:
            shares[repeat.SKILL] = drill
        used = {skill: random.random() * 200 for skill in shares}
        begin, failures = 0, 0
        while begin < length and failures < _TRIES:
            room = length - begin
            skill = min(shares, key=lambda name: used[name] / shares[name])
            document = self._document(skill, random, room)
            if len(document.ids) > room:
                failures += 1
                used[skill] += 50
                continue
            end = begin + len(document.ids)
            ids[begin:end], weights[begin:end] = document.ids, document.weights
            padded = -(-len(document.ids) // BLOCK) * BLOCK
            starts[begin:] = begin
            used[skill] += padded
            begin += padded
        # What is left is a document of its own, so that no compressed row mixes it with the last.
        starts[begin:] = begin
        return ids, starts, weights

    def _document(self, skill: str, random: Random, room: int) -> Document:
        if skill == repeat.SKILL:
            return self.encoder.document(repeat.item(random, _repeat_length(random, room)))
        length = _far_length(random, room) if skill == "recall_far" else 0
        return self.encoder.document(self.item(skill, random, False, length))


def _far_length(random: Random, room: int) -> int:
    """Of a text that fits into `room` with its questions: half are short, where looking up is learned
    first; the rest of every length, and where there is room for a long text, often one."""
    longest = max(256, room - _FOR_QUESTIONS)
    if longest > 3000 and random.random() < 0.5:
        return int(random.uniform(0.5, 1.0) * longest)
    most = min(512, longest) if random.random() < 0.5 else longest
    return int(2 ** random.uniform(5, np.log2(most)))


def _repeat_length(random: Random, room: int) -> int:
    """Of a text that fits into `room` twice; of every length, as many short as long ones."""
    return int(2 ** random.uniform(3, np.log2(max(16, min(1024, room // 2 - 64)))))

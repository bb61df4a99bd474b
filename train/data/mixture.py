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
from train.data import about, arithmetic, recall, schema, tools
from train.data.encode import Document, Encoder
from train.data.items import Item
from train.geometry import PADDING

SHARES: Mapping[str, float] = {
    "arithmetic": 0.17,
    "arithmetic_thinking": 0.17,
    "tool_call": 0.12,
    "tool_result": 0.10,
    "recall_near": 0.07,
    "recall_far": 0.25,
    "schema": 0.08,
    "about": 0.04,
}
SKILLS = tuple(SHARES)
THINKING = 0.4  # of the items whose skill does not say
_SYSTEM = 0.15  # of the items without tools and schema
_SYSTEM_TEXTS = ("You are a helpful assistant.", "You are nano.", "Answer briefly.")
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

    def rows(self, step: int, count: int, length: int) -> Rows:
        """The rows of one step."""
        made = [self._row(Random(f"{self.seed}/{step}/{n}"), length) for n in range(count)]
        ids, starts, weights = (np.stack(part) for part in zip(*made, strict=True))
        return Rows(ids, starts, weights)

    def _row(self, random: Random, length: int) -> tuple[Array, Array, npt.NDArray[np.float32]]:
        ids = np.full(length, PADDING, np.int32)
        starts, weights = np.zeros(length, np.int32), np.zeros(length, np.float32)
        used = {skill: random.random() * 200 for skill in SKILLS}
        begin, failures = 0, 0
        while begin < length and failures < _TRIES:
            room = length - begin
            skill = min(SKILLS, key=lambda name: used[name] / SHARES[name])
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
        # Far texts of every length up to what fits, as many short as long ones.
        longest = max(256, room - 320)
        length = int(2 ** random.uniform(7, np.log2(longest))) if skill == "recall_far" else 0
        if skill == "recall_far" and longest > 3000 and random.random() < 0.7:
            length = int(random.uniform(0.5, 1.0) * longest)
        return self.encoder.document(self.item(skill, random, False, length))

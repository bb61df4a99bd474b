"""Decode steps padded to a captured size: what the runner replays, here by calling it again.

Capturing itself needs a GPU (tests/gpu/test_graphs.py); that padding leaves no trace, and that nothing
but slots goes in, can be seen anywhere.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from fourfold.core.request import Grammar, Request
from fourfold.engine.engine import Engine
from fourfold.engine.graphs import DecodeGraph, DecodeGraphs
from fourfold.engine.workspace import capture_sizes
from tests.engine.test_masks import PARAMS, VOCAB, loaded, start
from tests.support import prompts

pytestmark = pytest.mark.full
__all__ = ["loaded"]  # a fixture


def again(work: Callable[[], None]) -> Callable[[], None]:
    work()
    return work


def requests() -> list[Request]:
    """Of every kind: plain, greedy, with penalties, a mask, log probabilities, a stop token."""
    kinds = [
        PARAMS,
        replace(PARAMS, temperature=0.0, logprobs=None),
        replace(PARAMS, repetition_penalty=1.3, max_tokens=40),
        replace(PARAMS, logprobs=3, stop_token_ids=[5, 77, 120]),
        replace(PARAMS, logit_bias={7: 3.0}, seed=9, max_tokens=17),
    ]
    tokens = prompts(VOCAB, (30, 1, 259, 126, 77), 8)
    work = [
        Request(str(n), tuple(t), p) for n, (t, p) in enumerate(zip(tokens, kinds, strict=True))
    ]
    return [*work, Request("m", (1, 2, 3), PARAMS, grammar=Grammar("rising", "2"))]


def outputs(engine: Engine) -> dict[str, list[object]]:
    got: dict[str, list[object]] = {request.request_id: [] for request in requests()}
    for request in requests():
        engine.add(request)
    for output in engine.run():
        got[output.request_id] += output.new_token_ids
        got[output.request_id] += [round(each.logprob, 9) for each in output.logprobs]
        got[output.request_id] += [output.finish_reason] if output.finish_reason else []
    return got


@pytest.mark.parametrize(("drafts", "overlap"), [(0, False), (2, True)])
@pytest.mark.parametrize("sizes", [(1, 2, 4), (3,)], ids=str)
def test_padded_steps_equal_plain_ones(
    loaded: object,
    drafts: int,
    overlap: bool,
    sizes: tuple[int, ...],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    expected = outputs(start(loaded, drafts, overlap))
    engine = start(loaded, drafts, overlap)
    engine.runner.graphs = DecodeGraphs(engine.runner, sizes, again)
    replays: list[tuple[int, int]] = []
    original = DecodeGraph.forward

    def counted(self: DecodeGraph, slots: list[int]) -> object:
        replays.append((len(slots), self._size))
        return original(self, slots)

    monkeypatch.setattr(DecodeGraph, "forward", counted)
    assert outputs(engine) == expected
    assert len(replays) > 20
    assert any(count < size for count, size in replays)
    assert all(count <= size for count, size in replays)


def test_sizes_reach_the_most_sequences() -> None:
    assert capture_sizes(1) == (1,)
    assert capture_sizes(5) == (1, 2, 4, 5)
    assert capture_sizes(256)[-1] == 256
    assert capture_sizes(300)[-2:] == (256, 300)
    assert capture_sizes(600)[-3:] == (512, 576, 600)

"""The indexer in the interpreter: against the body; alone, in a batch, chunked; in bounded memory."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fourfold.core.row_format import RowKind
from fourfold.ops.indexer import index_topk as body
from fourfold.ops.rows import index_round
from tests.kernels import interpreter
from tests.kernels.cached import PADDING, CachedKeys
from tests.kernels.interpreter import assert_equals_body, driver, interpreted, poisoned

pytest.importorskip("triton", reason="Triton is not installed")
pytestmark = pytest.mark.full


@driver
def test_in_the_interpreter() -> None:
    interpreter.run(__file__)


@driver
@pytest.mark.slow
def test_more_in_the_interpreter() -> None:
    interpreter.run(__file__, "slow")


@interpreted
def test_equals_the_body() -> None:
    from fourfold.kernels.triton.indexer import KERNELS

    for kernel in KERNELS:
        assert_equals_body(kernel)


@interpreted
@pytest.mark.parametrize(
    ("kind", "base", "dtype"),
    [
        (RowKind.PLAIN, 0, torch.float32),
        (RowKind.FP8_WHOLE, 0, torch.bfloat16),
        pytest.param(RowKind.PLAIN, 300, torch.bfloat16, marks=pytest.mark.slow),
        (RowKind.FP8_WHOLE, 300, torch.float32),
    ],
)
def test_a_token_does_not_depend_on_chunks_or_batch(
    kind: RowKind, base: int, dtype: torch.dtype
) -> None:
    from fourfold.kernels.triton import indexer

    cached = CachedKeys.make(40, base=base, kind=kind, dtype=dtype)
    run = indexer.index_topk
    with poisoned():
        whole = run(**cached.step([(base, 40)]))
        assert torch.equal(whole, body(**cached.step([(base, 40)])))
        chunks = [(base, 26), (base + 26, 14)]
        assert torch.equal(torch.cat([run(**cached.step([c])) for c in chunks]), whole)
        assert torch.equal(run(**cached.step(chunks)), whole)
        lanes = [(base + 39, 1), PADDING, (base + 7, 3), (base, 1), PADDING]
        got = run(**cached.step(lanes))
        assert torch.equal(got[[0, 2, 3, 4, 5]], whole[[39, 7, 8, 9, 0]])
        assert (got[[1, 6]] == -1).all()


@interpreted
def test_scratch_memory_does_not_grow_with_the_chunk() -> None:
    from fourfold.kernels.triton import indexer

    cached = CachedKeys.make(16, base=500)
    whole = indexer.index_topk(**cached.step([(500, 16)]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(indexer, "WORKSPACE", 4 * 192 * 7)  # three pages of 64 rows, seven tokens
        assert torch.equal(indexer.index_topk(**cached.step([(500, 16)])), whole)


def extreme(kind: str, scores: Tensor) -> Tensor:
    """Scores of one token that make the choice hard."""
    made = {
        "equal": torch.zeros_like(scores),
        "two values": (scores > 0.3).float(),
        "signed zeros": torch.where(scores > 0, 0.0, -0.0),
        "NaN and infinities": torch.where(
            scores > 1, float("inf"), torch.where(scores < -1, float("nan"), scores)
        ),
        "all NaN": torch.full_like(scores, float("nan")),
        "close": 1 + scores * 1e-7,
        "random": scores,
        "tiny": scores * 1e-40,
    }
    return made[kind]


NAMES = (
    "equal", "two values", "signed zeros", "NaN and infinities", "all NaN", "close", "random", "tiny",
)  # fmt: skip


@interpreted
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("topk", [1, pytest.param(64, marks=pytest.mark.slow), 100])
def test_choice_among_given_scores(name: str, topk: int) -> None:
    """One head, keys that are multiples of a unit vector: the scores are the keys' lengths."""
    from fourfold.kernels.triton import indexer

    cached = CachedKeys.make(1, base=1030, heads=1, kind=RowKind.PLAIN, topk=topk)
    arguments = cached.step([(1030, 1)])
    wanted = extreme(name, torch.randn(257))
    table = arguments["batch"].block_table[0]
    rows = torch.arange(257)
    keys = arguments["keys"].storage
    # relu would drop the sign: two heads would be needed, so the weight carries it for all rows.
    keys[table[rows // 64], rows % 64] = 0.0
    keys[table[rows // 64], rows % 64, 0] = wanted
    arguments["q"] = torch.zeros(1, 1, 32)
    arguments["q"][0, 0, 0] = 1.0
    for sign in (1.0, -1.0):
        arguments["weights"] = torch.tensor([[sign]])
        for scan in (64, 512):  # the scores in several pieces, and in one
            with poisoned(), pytest.MonkeyPatch.context() as patch:
                patch.setattr(indexer, "SCAN", scan)
                assert torch.equal(indexer.index_topk(**arguments), body(**arguments))


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_queries_round_as_keys_do(dtype: torch.dtype) -> None:
    from fourfold.kernels.triton import indexer

    scales = 2.0 ** torch.arange(-60, 68).float()
    q = (torch.randn(128, 24) * scales[:, None]).to(dtype)
    q[3], q[4, 5], q[5, 5], q[6] = 0.0, float("nan"), float("inf"), 3.38e38
    q[7] = torch.tensor([448.0, 2.0**-9, 2.0**-10, 3 * 2.0**-10] * 6)  # ties among subnormal codes
    out = torch.empty_like(q)
    indexer._round_queries[(8,)](q, out, 128, C=24, CP=32, ROWS=16)
    assert torch.equal(out, index_round(q))

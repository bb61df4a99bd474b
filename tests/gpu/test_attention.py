"""Attention and indexer at the real geometry: against the bodies, and bit-equal under every batching."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from fourfold import kernels
from fourfold.core.batch import ForwardBatch
from fourfold.core.device import detect
from fourfold.core.row_format import RowKind
from fourfold.ops.attention import sparse_attention as attention_body
from fourfold.ops.indexer import index_scores, page_slots
from fourfold.ops.rows import index_round, read_rows
from tests.kernels.cached import PADDING, Cached, CachedKeys, Run

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"),
]
REAL = {"heads": 64, "dim": 512, "rope": 64, "window": 128, "device": "cuda"}
KEYS = {"heads": 64, "dim": 128, "device": "cuda"}


def chosen(op: str) -> Callable[..., Any]:
    """The kernel a plan takes for an op on this device."""
    device = detect("cuda")
    found = [k for k in kernels.load(device) if k.op == op and k.needs <= device.features]
    return max(found, key=lambda k: k.priority).run


def poison() -> None:
    """Leave NaN in the memory that the next allocations get, so that what is not written shows."""
    blocks = [torch.full((1 << 24,), float("nan"), device="cuda") for _ in range(16)]
    del blocks


def near(got: Tensor, expected: Tensor, tolerance: float = 1.6e-2) -> None:
    assert float((got - expected).abs().max()) <= tolerance * float(expected.abs().max())


def sequence(name: str, base: int, count: int, **changes: Any) -> Cached:
    ratio = {"window": 0, "CSA": 4, "HCA": 128}[name]
    topk = 512 if name == "CSA" else None
    arguments = {"ratio": ratio, "topk": topk, "dtype": torch.bfloat16, **REAL, **changes}
    return Cached.make(count, base=base, **arguments)


@pytest.mark.parametrize("base", [0, 1000, 65_500, 131_072])
@pytest.mark.parametrize("name", ["window", "CSA", "HCA"])
def test_attention_equals_its_body_however_it_is_batched(name: str, base: int) -> None:
    cached, run = sequence(name, base, 600), chosen("sparse_attention")
    poison()
    whole = run(**cached.step([(base, 600)]))
    near(whole, attention_body(**cached.step([(base, 600)])))
    for dense in (False, True):
        poison()
        assert torch.equal(run(**cached.step([(base, 600)]), dense=dense), whole)
    for lengths in ((1, 599), (257, 16, 327), (64, 500, 36)):
        at, cut = base, []
        for length in lengths:
            poison()
            cut.append(run(**cached.step([(at, length)])))
            at += length
        assert torch.equal(torch.cat(cut), whole)
    for lanes in (1, 2, 7, 64, 65, 256):
        runs: list[Run] = [(base + (37 * i) % 600, 1) for i in range(lanes)]
        for split in (None, False, True):
            poison()
            got = run(**cached.step([*runs, PADDING, PADDING]), split=split)
            assert torch.equal(got[:lanes], whole[cached.tokens(runs)])


@pytest.mark.parametrize("heads", [8, 16, 32, 128])
@pytest.mark.parametrize("kind", [RowKind.PLAIN, RowKind.FP8_GROUPS], ids=lambda k: k.value)
def test_attention_for_other_heads_and_rows(heads: int, kind: RowKind) -> None:
    cached = sequence("CSA", 5000, 70, heads=heads, kind=kind, topk=1024)
    run = chosen("sparse_attention")
    whole = run(**cached.step([(5000, 70)]), split=False)
    near(whole, attention_body(**cached.step([(5000, 70)])))
    assert torch.equal(run(**cached.step([(5000, 70)]), split=True), whole)
    assert torch.equal(run(**cached.step([(5011, 1)]))[0], whole[11])


def test_attention_in_float32() -> None:
    run = chosen("sparse_attention")
    for kind in (RowKind.PLAIN, RowKind.FP8_GROUPS):
        cached = sequence("HCA", 3000, 9, kind=kind, dtype=torch.float32)
        for split in (False, True):
            got = run(**cached.step([(3000, 9)]), split=split)
            near(got, attention_body(**cached.step([(3000, 9)])), 2e-5)


def check_choice(arguments: dict[str, Any], got: Tensor) -> None:
    """Ascending, visible, as many as there are; none left out scores more than one taken."""
    q, weights, batch = arguments["q"], arguments["weights"], arguments["batch"]
    keys, ratio, topk = arguments["keys"], arguments["ratio"], arguments["topk"]
    if keys.format.kind is RowKind.FP8_WHOLE:
        q = index_round(q)
    for sequence_, (begin, end, computed) in enumerate(batch.runs()):
        rows = (computed + end - begin) // ratio
        slots = page_slots(batch, sequence_, rows, keys.rows_per_page)
        table = read_rows(keys, slots, torch.float32)
        for t in range(begin, end):
            visible = min((computed + t - begin + 1) // ratio, rows)
            taken = got[t][got[t] >= 0]
            assert taken.shape[0] == min(visible, topk)
            assert (got[t][taken.shape[0] :] == -1).all()
            assert (taken[1:] > taken[:-1]).all()
            assert (taken < visible).all()
            if visible > topk:
                scores = index_scores(q[t : t + 1].float(), weights[t : t + 1], table[:visible])[0]
                left = torch.ones(visible, dtype=torch.bool, device="cuda")
                left[taken] = False
                slack = 1e-5 * float(scores.abs().max())
                assert float(scores[left].max()) <= float(scores[taken].min()) + slack


@pytest.mark.parametrize("kind", [RowKind.PLAIN, RowKind.FP8_WHOLE], ids=lambda k: k.value)
@pytest.mark.parametrize("base", [0, 2000, 131_072, 1_048_000])
def test_indexer_chooses_the_largest_however_it_is_batched(kind: RowKind, base: int) -> None:
    cached = CachedKeys.make(
        300, base=base, kind=kind, topk=512 if base < 10_000 else 1024, dtype=torch.bfloat16, **KEYS
    )
    run = chosen("index_topk")
    poison()
    arguments = cached.step([(base, 300)])
    whole = run(**arguments)
    some = cached.step([(base + 290, 10)])
    check_choice(some, whole[290:])
    for lengths in ((1, 299), (129, 16, 155)):
        at, cut = base, []
        for length in lengths:
            poison()
            cut.append(run(**cached.step([(at, length)])))
            at += length
        assert torch.equal(torch.cat(cut), whole)
    for lanes in (1, 7, 64, 256):
        runs: list[Run] = [(base + (37 * i) % 300, 1) for i in range(lanes)]
        poison()
        got = run(**cached.step([*runs, PADDING]))
        at_ = torch.tensor([(37 * i) % 300 for i in range(lanes)], device="cuda")
        assert torch.equal(got[:lanes], whole[at_])
        assert (got[lanes:] == -1).all()


def test_equal_scores_fall_to_the_lower_rows() -> None:
    cached = CachedKeys.make(4, base=40_000, topk=512, dtype=torch.bfloat16, **KEYS)
    arguments = cached.step([(40_000, 4)])
    arguments["weights"] = torch.zeros_like(arguments["weights"])
    arguments["weights"][1] = float("nan")
    got = chosen("index_topk")(**arguments)
    assert torch.equal(got, torch.arange(512, device="cuda").expand(4, 512))


def wide_table(batch: ForwardBatch, pages: int) -> ForwardBatch:
    """The same batch with room for contexts of `pages` pages, as a captured one has."""
    table = torch.full((batch.num_sequences, pages), -1, device="cuda")
    table[:, : batch.block_table.shape[1]] = batch.block_table
    return replace(batch, block_table=table)


@pytest.mark.parametrize("name", ["window", "CSA", "HCA"])
def test_captured_step_follows_what_the_device_says(name: str) -> None:
    """One graph for 8 lanes, replayed at other positions, lengths and paddings, equals eager."""
    attention, indexer = chosen("sparse_attention"), chosen("index_topk")
    cached = sequence(name, 9000, 400)
    keys = CachedKeys.make(400, base=9000, topk=512, dtype=torch.bfloat16, **KEYS)

    def inputs(runs: list[Run]) -> tuple[dict[str, Any], dict[str, Any]]:
        a, b = cached.step(runs), keys.step(runs)
        return a | {"batch": wide_table(a["batch"], 4096)}, b | {
            "batch": wide_table(b["batch"], 4096)
        }

    steps: list[list[Run]] = [
        [(9000 + 41 * i, 1) for i in range(8)],
        [(9399, 1), PADDING, *((9100 + i, 1) for i in range(5)), PADDING],
    ]
    fixed = inputs(steps[0])
    attention(**fixed[0])
    indexer(**fixed[1])
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = attention(**fixed[0]), indexer(**fixed[1])
    for runs in (steps[1], steps[0]):
        fresh = inputs(runs)
        for old, new in zip(fixed, fresh, strict=True):
            for key, value in new.items():
                copy_into(old[key], value)
        poison()
        graph.replay()
        live = torch.tensor([r != PADDING for r in runs], device="cuda")
        assert torch.equal(captured[0][live], attention(**fresh[0])[live])
        assert torch.equal(captured[1], indexer(**fresh[1]))


def copy_into(old: Any, new: Any) -> None:
    """Overwrite the tensors of `old` by those of `new`."""
    if isinstance(old, Tensor):
        old.copy_(new)
    elif hasattr(old, "__dataclass_fields__"):
        for name in old.__dataclass_fields__:
            copy_into(getattr(old, name), getattr(new, name))

"""The formulas of a step's memory against steps run on tensors without memory, at real shapes."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch

from fourfold.core.config import EngineConfig
from fourfold.core.device import ARCHS
from fourfold.engine.compile import Collector, subject_of_geometry
from fourfold.engine.graphs import DecodeGraphs
from fourfold.engine.workspace import capture_sizes, captured_bytes, step_bytes
from fourfold.ops.step import Key
from tests.engine.peak import SMALL, Trace, room

variants = pytest.importorskip("fourfold.kernels.variants", reason="Triton is not installed")
pytestmark = pytest.mark.full
STEP = 8192


def collector(
    geometry: str, context: int, seqs: int = 64, drafts: int = 0, arch: str = "sm_90"
) -> Collector:
    engine = EngineConfig(
        geometry,
        max_model_len=context,
        max_num_seqs=seqs,
        max_num_batched_tokens=STEP,
        num_speculative_tokens=drafts,
    )
    return Collector(subject_of_geometry(geometry), ARCHS[arch], engine)


def keys(seqs: int, drafts: int) -> Iterator[Key]:
    """The largest steps: a prompt's chunk, several prompts, a prompt among all that decode, decodes."""
    decode = (1 + drafts, drafts, True)
    yield [(STEP, 0, True)]
    yield [(STEP // 16, 0, True)] * 16
    yield [*[decode] * (seqs - 1), (STEP - (seqs - 1) * (1 + drafts), 0, True)]
    yield [decode] * seqs


def traced(made: Collector, key: Key) -> Trace:
    trace = Trace()
    with trace:
        made.collect([key])
    trace.sweep()
    return trace


@pytest.mark.parametrize(
    ("geometry", "context", "seqs", "drafts", "arch"),
    [
        ("flash", 16_384, 64, 0, "sm_90"),
        ("flash", 131_072, 256, 0, "gfx942"),
        ("flash", 1 << 20, 256, 1, "sm_90"),
        ("pro", 131_072, 64, 0, "sm_90"),
        ("pro", 1 << 20, 64, 3, "gfx950"),
    ],
)
def test_a_block_of_step_bytes_holds_every_step(
    geometry: str, context: int, seqs: int, drafts: int, arch: str
) -> None:
    """And is not much larger than the one that does."""
    made = collector(geometry, context, seqs, drafts, arch)
    needed = [room([traced(made, key)]) for key in keys(seqs, drafts)]
    block = step_bytes(made.engine, made.subject.config, "bfloat16")
    assert max(needed) <= block <= 1.2 * max(needed), (block, needed)


def test_a_chunk_of_8192_tokens_at_128k_takes_less_than_2_gib() -> None:
    """Flash: tensors alive at once, the block they find room in, and the block that is set aside."""
    made = collector("flash", 131_072)
    trace = traced(made, [(STEP, 0, True)])
    block = step_bytes(made.engine, made.subject.config, "bfloat16")
    assert trace.most < 1.5 * 2**30 < room([trace]) <= block < 2 * 2**30


@pytest.mark.parametrize(("geometry", "seqs", "drafts"), [("flash", 64, 0), ("flash", 256, 3)])
def test_captured_steps_take_what_is_planned(geometry: str, seqs: int, drafts: int) -> None:
    made, trace = collector(geometry, 16_384, seqs, drafts), Trace()

    def captured(work: Callable[[], None]) -> Callable[[], None]:
        with trace:
            work()
        trace.sweep()
        return work

    with torch.inference_mode(), variants.record(made.arch):
        DecodeGraphs(made.runner, capture_sizes(seqs), captured)
    logits = seqs * (1 + drafts) * made.subject.config.vocab_size * 4  # made outside of captures
    planned = captured_bytes(made.engine, made.subject.config, "bfloat16")
    assert trace.most + logits <= planned <= 1.2 * (trace.most + logits), (trace.most, planned)


def test_what_room_tensors_need() -> None:
    """Where a gap holds one it goes there, into the smallest that does; it goes behind all else if not."""
    one = 4 * SMALL
    made = [(0, one), (1, 2 * one), (2, one), (3, one), (1, 0), (3, 0)]
    assert room([Trace(events=made)]) == 5 * one
    assert room([Trace(events=[*made, (4, 2 * one)])]) == 5 * one
    assert room([Trace(events=[*made, (4, one), (5, 2 * one)])]) == 6 * one
    assert room([Trace(events=[*made, (4, 3 * one)])]) == 7 * one
    assert Trace(events=made).most == 5 * one

"""Lowering a step's host integers: against loops that spell out what every field means."""

from __future__ import annotations

import random
from array import array
from collections.abc import Sequence
from dataclasses import fields

import pytest
import torch
from torch import Tensor

from fourfold.core.batch import (
    ForwardBatch,
    ScheduledBatch,
    ScheduledSequence,
    batch_after,
    lower,
)
from fourfold.core.row_format import PAGE_TOKENS

CPU = torch.device("cpu")
RATIOS = (0, 4, 128, 4)


def random_sequence(rng: random.Random) -> ScheduledSequence:
    count = rng.choice([0, 1, 1, 2, 4, 4, rng.randrange(1, 700)])
    computed = rng.choice([0, rng.randrange(2000)])
    pages = -(-(count + computed) // PAGE_TOKENS) + rng.choice([0, 0, 1, 3])
    block_ids: Sequence[int] = [rng.randrange(1000) for _ in range(pages)]
    return ScheduledSequence(
        [rng.randrange(1 << 17) for _ in range(count)],
        computed,
        array("q", block_ids) if rng.random() < 0.5 else block_ids,
        state_slot=rng.choice([-1, rng.randrange(64)]),
        fold_source=rng.choice([-1, rng.randrange(64)]),
        fold_keeps=[
            (rng.randrange(count or 1), rng.randrange(64)) for _ in range(rng.randrange(4))
        ],
        logits_from=rng.randrange(count + 1),
    )


def spelled_out(sequences: Sequence[ScheduledSequence], ring_rows: int) -> dict[str, list[int]]:
    """Every field as a list, token by token."""
    names = [f.name for f in fields(ForwardBatch) if f.name not in ("block_table", "emissions")]
    wanted: dict[str, list[int]] = {name: [] for name in names}
    wanted["cu_seqlens_q"] = [0]
    for ratio in (4, 128):
        for part in ("tokens", "positions", "slots"):
            wanted[f"{part} of {ratio}"] = []
    flat = 0
    for number, s in enumerate(sequences):
        for index, slot in s.fold_keeps:
            wanted["fold_tokens"].append(flat + index)
            wanted["fold_targets"].append(slot)
        for index, token in enumerate(s.token_ids):
            position = s.num_computed_tokens + index
            wanted["token_ids"].append(token)
            wanted["positions"].append(position)
            wanted["sequence_ids"].append(number)
            stays = s.state_slot >= 0 and index >= len(s) - ring_rows
            ring = s.state_slot * ring_rows + position % ring_rows if stays else -1
            wanted["ring_slots"].append(ring)
            if index >= s.logits_from:
                wanted["logits_tokens"].append(flat)
            for ratio in (4, 128):
                if (position + 1) % ratio == 0:
                    row = position // ratio
                    page, offset = divmod(row, PAGE_TOKENS // ratio)
                    slot = s.block_ids[page] * (PAGE_TOKENS // ratio) + offset
                    wanted[f"tokens of {ratio}"].append(flat)
                    wanted[f"positions of {ratio}"].append(row * ratio)
                    wanted[f"slots of {ratio}"].append(slot)
            flat += 1
        wanted["cu_seqlens_q"].append(flat)
        wanted["num_computed_tokens"].append(s.num_computed_tokens)
        wanted["state_slots"].append(s.state_slot)
        wanted["fold_sources"].append(s.fold_source)
    return wanted


def same(tensor: Tensor, values: list[int]) -> bool:
    return tensor.dtype == torch.int64 and tensor.tolist() == values


@pytest.mark.parametrize("seed", range(60))
def test_every_field_is_what_it_says(seed: int) -> None:
    rng = random.Random(seed)
    sequences = tuple(random_sequence(rng) for _ in range(rng.choice([0, 1, 2, 3, 9])))
    ring_rows = rng.choice([1, 24, 131])
    batch = lower(ScheduledBatch(sequences), RATIOS, ring_rows, CPU)
    wanted = spelled_out(sequences, ring_rows)
    assert sorted(batch.emissions) == [4, 128]
    for ratio, emission in batch.emissions.items():
        assert emission.slots.shape[0] == sum(-(-len(s) // ratio) for s in sequences)
        done = emission.slots >= 0
        for part in ("tokens", "positions", "slots"):
            completed = getattr(emission, part)[done]
            assert same(completed, wanted.pop(f"{part} of {ratio}")), (part, ratio)
        owners = batch.sequence_ids[emission.tokens].tolist()
        assert owners == sorted(owners)
    for name, values in wanted.items():
        assert same(getattr(batch, name), values), name
    width = max((len(s.block_ids) for s in sequences), default=0)
    assert batch.block_table.shape == (len(sequences), width)
    padded = [[*s.block_ids, *[-1] * (width - len(s.block_ids))] for s in sequences]
    assert batch.block_table.tolist() == padded
    assert batch.num_tokens == sum(len(s) for s in sequences)
    assert batch.num_sequences == len(sequences)
    assert [end - begin for begin, end, _ in batch.runs()] == [len(s) for s in sequences]


def test_kernels_find_every_field_aligned() -> None:
    """Each tensor contiguous at a multiple of 16 bytes, for which kernels are compiled."""
    rng = random.Random(1)
    batch = lower(ScheduledBatch(tuple(random_sequence(rng) for _ in range(7))), RATIOS, 24, CPU)
    tensors = [getattr(batch, f.name) for f in fields(batch) if f.name != "emissions"]
    tensors += [t for e in batch.emissions.values() for t in (e.tokens, e.positions, e.slots)]
    assert all(tensor.data_ptr() % 16 == 0 for tensor in tensors if tensor.numel())
    assert all(tensor.is_contiguous() for tensor in tensors)


@pytest.mark.parametrize("pages", [[], [3], [3, -1]])
def test_a_missing_page_is_an_error(pages: list[int]) -> None:
    run = ScheduledSequence([0] * 8, 2 * PAGE_TOKENS - 4, pages)
    other = ScheduledSequence([0], 5, [1, 2, 3])
    with pytest.raises(ValueError, match="too few pages for the rows of ratio 4"):
        lower(ScheduledBatch((run, other)), (4,), 24, CPU)


def test_the_batch_after_is_what_lowering_one_more_token_each_gives() -> None:
    rng = random.Random(2)
    sequences = [random_sequence(rng) for _ in range(8)]
    sequences = [s for s in sequences if len(s) and s.state_slot >= 0]
    batch = lower(ScheduledBatch(tuple(sequences)), RATIOS, 24, CPU)
    chosen = [rng.randrange(len(s)) for s in sequences]
    tokens = batch.cu_seqlens_q[:-1] + torch.tensor(chosen)
    expected = [
        ScheduledSequence((0,), s.num_computed_tokens + at + 1, state_slot=s.state_slot)
        for s, at in zip(sequences, chosen, strict=True)
    ]
    after = batch_after(batch, tokens, 24)
    wanted = lower(ScheduledBatch(tuple(expected)), (), 24, CPU)
    for field in fields(ForwardBatch):
        if field.name != "emissions":
            assert torch.equal(getattr(after, field.name), getattr(wanted, field.name)), field.name
    assert after.emissions == wanted.emissions == {}
    nobody = batch_after(batch, tokens[:0], 24)
    assert (nobody.num_tokens, nobody.num_sequences) == (0, 0)

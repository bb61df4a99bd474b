"""State images: what is restored is bit for bit what was captured, whole, and nothing besides."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from fourfold.cache.image import ImageError, Place, StateImage, capture, checksum, restore
from fourfold.cache.pool import allocate
from fourfold.cache.rows import RowFormats, ring_rows, row_formats
from fourfold.core.config import ModelConfig
from fourfold.core.row_format import PAGE_TOKENS, pages_for
from fourfold.core.rows import RowPages
from fourfold.core.state import LayerState, ModelState
from fourfold.core.tensor import dtype_name, named_dtype
from tests.support import CPU, small_config

pytestmark = pytest.mark.full

WINDOW, SLOTS, PAGES = 24, 3, 9
# Residues mod 4, 128 and 256, window and page boundaries, the first positions.
POSITIONS = sorted(
    {*range(1, 9), 23, 24, 25, 26, 27, *range(125, 134), 200, *range(253, 262), 300, 383, 384, 385}
    | {*range(509, 519), 638, 639, 640, 641, 700, 767, 768, 769}
)
FORMATS = ("float32", "float64", "fp8")


@dataclass
class Memory:
    """A model's whole state, filled with garbage, and a way to see one sequence's part of it."""

    config: ModelConfig
    formats: RowFormats
    drafts: int
    state: ModelState

    @staticmethod
    def of(name: str, drafts: int = 0, seed: int = 0, **changes: Any) -> Memory:
        config = small_config(sliding_window=WINDOW, **changes)
        dtype = named_dtype("bfloat16" if name == "fp8" else name)
        formats = row_formats(config, dtype_name(dtype), name, name)
        state = allocate(config, formats, PAGES, SLOTS, dtype, CPU, drafts)
        generator = torch.Generator().manual_seed(seed)
        for tensor in tensors(state):
            bytes_ = tensor.view(torch.uint8)
            bytes_.copy_(torch.randint(0, 120, bytes_.shape, generator=generator))
        return Memory(config, formats, drafts, state)

    def place(self, slot: int, version: int, pages: list[int], carry: int = 0) -> Place:
        return Place(slot, slot * (1 + self.drafts) + version, pages, WINDOW, carry)

    def streams(self, seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(self.config.hc_mult, self.config.hidden_size, generator=generator)

    def seen(self, place: Place, position: int) -> list[Tensor]:
        """Every byte a model may read of the sequence at `place`, position by position."""
        ring_length = ring_rows(self.config, self.drafts)
        found: list[Tensor] = []
        for layer in self.state.layers:
            found += window(layer, place, ring_length, position)
            for part in (layer.main, layer.indexer):
                if part is not None:
                    found.append(part.folds[place.fold_slot])
                    found += compressed(part.pages, place, position)
        for layer in self.state.mtp:
            found += window(layer, place, ring_length, position - 1)
        return [each.clone() for each in found]

    def outside(self, place: Place) -> list[Tensor]:
        """All of the memory but the sequence's ring, fold and pages."""
        found: list[Tensor] = []
        for layer in (*self.state.layers, *self.state.mtp):
            found.append(without(layer.ring.storage, [place.state_slot]))
            for part in (layer.main, layer.indexer):
                if part is not None:
                    found.append(without(part.folds, [place.fold_slot]))
                    found.append(without(part.pages.storage, [*place.block_ids]))
        return found


def tensors(state: ModelState) -> Iterator[Tensor]:
    for layer in (*state.layers, *state.mtp):
        yield layer.ring.storage
        for part in (layer.main, layer.indexer):
            if part is not None:
                yield part.pages.storage
                yield part.folds


def row(pages: RowPages, page: int, number: int) -> list[Tensor]:
    scales = [pages.scales()[page, number]] if pages.format.scale_bytes else []
    return [pages.data()[page, number], *scales]


def window(layer: LayerState, place: Place, ring_length: int, position: int) -> list[Tensor]:
    """Rows of positions position − W … position − 1; position p lies in row p mod the ring's length."""
    return [
        part
        for p in range(max(0, position - WINDOW), position)
        for part in row(layer.ring, place.state_slot, p % ring_length)
    ]


def compressed(pages: RowPages, place: Place, position: int) -> list[Tensor]:
    ratio = PAGE_TOKENS // pages.rows_per_page
    found = []
    for number in range(position // ratio):
        page, offset = divmod(number, pages.rows_per_page)
        found += row(pages, place.block_ids[page], offset)
    return found


def without(tensor: Tensor, numbers: list[int]) -> Tensor:
    kept = [n for n in range(tensor.shape[0]) if n not in numbers]
    return tensor[kept].clone()


def equal(a: list[Tensor], b: list[Tensor]) -> bool:
    """Bit for bit."""
    return len(a) == len(b) and all(
        x.dtype == y.dtype
        and x.shape == y.shape
        and torch.equal(x.contiguous().view(torch.uint8), y.contiguous().view(torch.uint8))
        for x, y in zip(a, b, strict=True)
    )


@pytest.mark.parametrize("name", FORMATS)
def test_restored_is_captured_bit_for_bit(name: str) -> None:
    """Carried pages and all, into another memory, slot and fold version; nothing else changes."""
    source, target = Memory.of(name, drafts=3, seed=1), Memory.of(name, drafts=3, seed=2)
    pages = [4, 0, 7, 2]
    for position in POSITIONS:
        count = pages_for(position)
        here = source.place(1, 2, pages[:count], carry=count)
        there = target.place(2, 0, [8, 3, 5, 1][:count], carry=count)
        before = target.outside(there)
        image = capture(source.state, here, position, source.streams(position))
        streams = target.streams(99)
        restore(target.state, there, image, streams)
        assert torch.equal(streams, source.streams(position))
        assert equal(target.seen(there, position), source.seen(here, position)), position
        assert equal(target.outside(there), before), position
        again = capture(target.state, there, position, streams)
        assert equal([*again.tensors], [*image.tensors])
        assert again.checksum == image.checksum


@pytest.mark.parametrize("name", ["float32", "fp8"])
@pytest.mark.parametrize(("from_drafts", "to_drafts"), [(3, 0), (0, 3), (1, 2)])
def test_an_image_does_not_depend_on_the_rings_length(
    name: str, from_drafts: int, to_drafts: int
) -> None:
    source, target = Memory.of(name, from_drafts, seed=1), Memory.of(name, to_drafts, seed=2)
    for position in POSITIONS:
        count = pages_for(position)
        here = source.place(0, from_drafts, [5, 1, 8, 0][:count], carry=count)
        there = target.place(1, to_drafts, [2, 3, 4, 6][:count], carry=count)
        image = capture(source.state, here, position, source.streams(0))
        restore(target.state, there, image, target.streams(99))
        assert equal(target.seen(there, position), source.seen(here, position)), position


@pytest.mark.parametrize("name", FORMATS)
def test_a_shared_prefix_needs_only_the_open_pages_rows(name: str) -> None:
    """Without carried pages: full pages are shared, and the rows of the open one are copied to another
    page, so that two sequences that go on from there do not meet."""
    memory = Memory.of(name, seed=3)
    for position in POSITIONS:
        count, full = pages_for(position), position // PAGE_TOKENS
        here = memory.place(0, 0, [4, 0, 7, 2][:count])
        shared = [*here.block_ids[:full], *[8] * (count - full)]
        there = memory.place(1, 0, shared)
        other = memory.place(2, 0, shared)
        image = capture(memory.state, here, position, memory.streams(1))
        original, before = memory.seen(here, position), memory.outside(there)
        restore(memory.state, there, image, memory.streams(99))
        assert equal(memory.seen(there, position), original), position
        assert equal(memory.seen(here, position), original), position
        assert equal(memory.outside(there), before), position
        restore(memory.state, replace(other, block_ids=shared), image, memory.streams(99))
        assert equal(memory.seen(other, position), original), position


def test_an_image_outlives_the_memory_it_was_taken_from() -> None:
    memory = Memory.of("fp8", seed=4)
    here = memory.place(0, 0, [1, 2], carry=2)
    image = capture(memory.state, here, 300, memory.streams(1))
    original = memory.seen(here, 300)
    for tensor in tensors(memory.state):
        tensor.view(torch.uint8).fill_(77)
    restore(memory.state, here, image.to(torch.device("cpu")), memory.streams(99))
    assert equal(memory.seen(here, 300), original)


def captured(name: str = "fp8") -> tuple[Memory, Place, StateImage]:
    memory = Memory.of(name, seed=5)
    place = memory.place(0, 0, [1, 2])
    return memory, place, capture(memory.state, place, 301, memory.streams(2))


def refused(
    memory: Memory,
    place: Place,
    image: StateImage,
    message: str,
    streams: Tensor | None = None,
) -> None:
    """The image is refused, and nothing of it was written."""
    streams = memory.streams(99) if streams is None else streams
    before = [tensor.clone() for tensor in (*tensors(memory.state), streams)]
    with pytest.raises(ImageError, match=message):
        restore(memory.state, place, image, streams)
    assert equal([*tensors(memory.state), streams], before)


def flipped(image: StateImage, tensor: int, byte: int, bits: int) -> StateImage:
    damaged = image.tensors[tensor].clone()
    damaged.view(torch.uint8).flatten()[byte] ^= bits
    changed = damaged.contiguous()
    return replace(image, tensors=(*image.tensors[:tensor], changed, *image.tensors[tensor + 1 :]))


def test_any_damaged_byte_is_noticed() -> None:
    """Each byte of one tensor of every size, and random bytes and bits of all."""
    _, _, image = captured()
    rng = random.Random(0)
    sizes: dict[int, int] = {}
    for number, tensor in enumerate(image.tensors):
        if tensor.nbytes:
            sizes.setdefault(tensor.nbytes, number)
    places = [(number, byte, 1) for size, number in sizes.items() for byte in range(min(size, 300))]
    for _ in range(400):
        number = rng.choice([n for n, t in enumerate(image.tensors) if t.nbytes])
        byte = rng.randrange(image.tensors[number].nbytes)
        places.append((number, byte, rng.randrange(1, 256)))
    parts = [checksum([tensor]) for tensor in image.tensors]
    for number, byte, bits in places:
        damaged = flipped(image, number, byte, bits)
        assert checksum([damaged.tensors[number]]) != parts[number], (number, byte, bits)
    for number, byte, bits in rng.sample(places, 60):
        assert checksum(flipped(image, number, byte, bits).tensors) != image.checksum


def test_bytes_in_another_order_are_noticed() -> None:
    """A plain sum would not see rows or tensors that changed places."""
    _, _, image = captured()
    rng = random.Random(1)
    tensor = image.tensors[-1].view(torch.uint8).flatten()
    whole = checksum([tensor])
    for _ in range(300):
        i, j = rng.randrange(len(tensor)), rng.randrange(len(tensor))
        swapped = tensor.clone()
        swapped[i], swapped[j] = tensor[j], tensor[i]
        assert (checksum([swapped]) == whole) == (tensor[i] == tensor[j])
    swaps = [(0, 2), (0, len(image.tensors) - 1)]
    for i, j in swaps:
        order = list(image.tensors)
        order[i], order[j] = order[j], order[i]
        assert checksum(order) != image.checksum
    assert checksum([tensor[:-1]]) != whole
    assert checksum([tensor, tensor[:0]]) != whole


def test_a_damaged_image_is_refused() -> None:
    memory, place, image = captured()
    for number in (0, 5, len(image.tensors) - 1):
        refused(memory, place, flipped(image, number, 0, 128), "position 301 is damaged")
    refused(memory, place, replace(image, checksum=image.checksum ^ 1), "is damaged")


def test_an_image_with_other_pages_is_refused() -> None:
    memory, place, image = captured()
    message = "carries 0 pages, expected 2"
    refused(memory, replace(place, carry=2), image, message)
    carrying = capture(memory.state, replace(place, carry=2), 301, memory.streams(2))
    refused(memory, place, carrying, "carries 2 pages, expected 0")


@pytest.mark.parametrize(
    ("changes", "name", "message"),
    [
        ({"num_hidden_layers": 3, "compress_ratios": [0, 4, 128, 0]}, "fp8", "other layers"),
        ({"compress_ratios": [0, 4, 4, 4, 0]}, "fp8", "other layers|holds"),
        ({"compress_ratios": [4, 0, 128, 4, 0]}, "fp8", "other layers|holds"),
        ({"num_nextn_predict_layers": 0, "compress_ratios": [0, 4, 128, 4]}, "fp8", "other layers"),
        ({"head_dim": 64, "qk_rope_head_dim": 16}, "fp8", r"holds \[.*\] torch.uint8 where"),
        ({"index_head_dim": 64}, "fp8", r"holds \[.*\] torch.* where this model has"),
        ({}, "float32", "holds|other layers"),
        ({}, "float64", "holds|other layers"),
    ],
)
def test_an_image_of_another_geometry_is_refused(
    changes: dict[str, Any], name: str, message: str
) -> None:
    _, place, image = captured("fp8")
    refused(Memory.of(name, **changes), place, image, message)


def test_an_image_of_another_window_is_refused() -> None:
    memory, place, image = captured()
    refused(memory, replace(place, window=WINDOW - 1), image, "holds")


def test_an_image_of_other_streams_is_refused() -> None:
    """Streams of another width, number or dtype would broadcast or round in silence."""
    memory, place, image = captured()
    count, width = memory.config.hc_mult, memory.config.hidden_size
    for shape in ((count, width + 8), (count + 1, width), (width,), (count, 1)):
        wrong = torch.zeros(shape)
        refused(memory, place, image, r"holds \[4, 64\] torch.float32 where", streams=wrong)
    wrong = torch.zeros(count, width, dtype=torch.bfloat16)
    refused(memory, place, image, r"where this model has \[4, 64\] torch.bfloat16", streams=wrong)

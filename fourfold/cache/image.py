"""StateImage: the complete state of one sequence at one token position.

At position P (P tokens computed) an image holds, for every layer, the window rows of the last W
positions in position order (so it does not depend on a ring's length), the live folds of compressor
and indexer, the rows of the open page (P not a multiple of 256), the MTP layers' rows up to position
P − 2, and the last token's streams, from which MTP row P − 1 is computed once the next token is known.
Full pages are shared by reference; an image made for preemption also carries their contents.

Contract: running, preempting, resuming and prefix-hitting all go through `capture` and `restore`; what
was restored is bit for bit what was captured, which a checksum guards. A state with a part this file
does not know cannot be captured: the container types are matched whole.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from types import EllipsisType

import torch
from torch import Tensor

from fourfold.core.errors import FourfoldError
from fourfold.core.row_format import PAGE_TOKENS
from fourfold.core.rows import RowPages
from fourfold.core.state import CompressedState, LayerState, ModelState


class ImageError(FourfoldError):
    """A state image is damaged or does not fit the state it is restored to."""


@dataclass(frozen=True)
class StateImage:
    """Tensors in the fixed order of `_pieces`, and what guards them."""

    position: int
    num_pages: int  # whole pages carried along; 0 unless made for preemption
    tensors: tuple[Tensor, ...]
    checksum: Tensor  # int64, where the state was captured; nobody waits for it before it is needed

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in self.tensors)

    def to(self, device: torch.device) -> StateImage:
        """The same image in another memory."""
        return replace(self, tensors=tuple(t.to(device) for t in self.tensors))


@dataclass(frozen=True)
class Place:
    """Where a sequence's state is: ring page, fold slot, pages in order. `carry`: how many pages an
    image takes whole (0: only the open page's rows)."""

    state_slot: int
    fold_slot: int
    block_ids: Sequence[int]
    window: int
    carry: int = 0


def checksum(tensors: Sequence[Tensor]) -> Tensor:
    """A position-weighted sum of all bytes modulo 2^64, computed where the tensors are: int64 `[]`."""
    total = torch.zeros((), dtype=torch.int64, device=tensors[0].device)
    for number, tensor in enumerate(tensors):
        values = tensor.contiguous().view(torch.uint8).flatten().to(torch.int64)
        weights = torch.arange(1, values.numel() + 1, device=values.device, dtype=torch.int64)
        # Odd multipliers lose no bit of any byte when products wrap around.
        mixed = (values + 1) * (weights * 2_654_435_761 | 1)
        total = total * 1_000_003 + mixed.sum() + number
    return total


def capture(state: ModelState, place: Place, position: int, streams: Tensor) -> StateImage:
    """The image at `position` of the sequence at `place`; `streams [S, D]` are its last token's."""
    views = _pieces(state, place, position)
    tensors = (*(view[index].clone() for view, index in views), streams.clone())
    return StateImage(position, place.carry, tensors, checksum(tensors))


def restore(state: ModelState, place: Place, image: StateImage, streams: Tensor) -> None:
    """Write `image` to `place`, and the last token's streams to `streams [S, D]`.

    `ImageError` if the checksum, a shape or a dtype does not match: nothing is written then.
    """
    if image.num_pages != place.carry:
        raise ImageError(f"the image carries {image.num_pages} pages, expected {place.carry}")
    if int(checksum(image.tensors)) != int(image.checksum):
        raise ImageError(f"the state image at position {image.position} is damaged")
    pieces = [*_pieces(state, place, image.position), (streams, (...,))]
    if len(pieces) != len(image.tensors):
        raise ImageError("the state image was made for a model with other layers")
    for (view, index), saved in zip(pieces, image.tensors, strict=True):
        if view[index].shape != saved.shape or view.dtype != saved.dtype:
            raise ImageError(
                f"the state image holds {list(saved.shape)} {saved.dtype} where this model has "
                f"{list(view[index].shape)} {view.dtype}"
            )
    for (view, index), saved in zip(pieces, image.tensors, strict=True):
        view[index] = saved.to(view.device)


Piece = tuple[Tensor, tuple[Tensor | slice | int | EllipsisType, ...]]


def _pieces(state: ModelState, place: Place, position: int) -> Iterator[Piece]:
    """Every part of a sequence's state as (tensor, index), in a fixed order."""
    for layer in state.layers:
        match layer:
            case LayerState(ring=ring, main=main, indexer=indexer):
                yield from _window(ring, place, position)
                for part in (main, indexer):
                    if part is not None:
                        yield from _compressed(part, place, position)
    for layer in state.mtp:
        if layer.main is not None or layer.indexer is not None:
            raise ImageError("an MTP layer with compressed rows is not known here")
        yield from _window(layer.ring, place, position - 1)


def _window(ring: RowPages, place: Place, position: int) -> Iterator[Piece]:
    first = max(0, position - place.window)
    rows = torch.arange(first, max(position, 0), device=ring.device) % ring.rows_per_page
    yield from _rows(ring, place.state_slot, rows)


def _compressed(part: CompressedState, place: Place, position: int) -> Iterator[Piece]:
    yield part.folds, (place.fold_slot,)
    ratio = PAGE_TOKENS // part.pages.rows_per_page
    for page in place.block_ids[: place.carry]:
        yield part.pages.storage, (page,)
    count = position % PAGE_TOKENS // ratio
    if not place.carry and count:
        page = place.block_ids[position // PAGE_TOKENS]
        yield from _rows(part.pages, page, torch.arange(count, device=part.pages.device))


def _rows(pages: RowPages, page: int, rows: Tensor) -> Iterator[Piece]:
    yield pages.data(), (page, rows)
    if pages.format.scale_bytes:
        yield pages.scales(), (page, rows)

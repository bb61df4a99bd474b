"""Faults of the kinds that kernels and cache code have had, to be planted on purpose."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from fourfold import kernels
from fourfold.cache import image
from fourfold.cache.pages import PagePool
from fourfold.core.rows import RowPages
from fourfold.core.tensor import QuantTensor
from fourfold.engine import kernel_plan, runner
from fourfold.ops import attention, indexer
from fourfold.ops.catalog import OPS
from fourfold.ops.registry import Kernel, KernelPlan

Arguments = dict[str, Any]
Run = Callable[..., Any]
DTYPES = frozenset({torch.bfloat16, torch.float32})


def body(op: str) -> Run:
    return getattr(KernelPlan.bodies(OPS), op)


def bound(op: str, run: Callable[[Arguments], Any]) -> Run:
    """`run` of the op's arguments by name, whichever way they are passed."""
    found = next(each for each in OPS if each.name == op)
    names = list(inspect.signature(found.body).parameters)[1 if found.composite else 0 :]

    def call(*args: Any, **kwargs: Any) -> Any:
        if found.composite:
            args = args[1:]
        return run({**dict(zip(names, args, strict=False)), **kwargs})

    return call


def kernel(op: str, run: Callable[[Arguments], Any]) -> Kernel:
    """A kernel for every device, tried first."""
    return Kernel(op, "faulty", bound(op, run), priority=99, dtypes=DTYPES, batch_invariant=False)


def changed(op: str, change: Callable[[Arguments], Mapping[str, Any]]) -> Kernel:
    """The op's body with some arguments changed."""
    return kernel(op, lambda a: body(op)(**{**a, **change(a)}))


def after(op: str, change: Callable[[Any, Arguments], Any]) -> Kernel:
    """The op's body with its result changed."""
    return kernel(op, lambda a: change(body(op)(**a), a))


def without_scale(weight: Any) -> Any:
    if not isinstance(weight, QuantTensor):
        return weight
    one = 127 if weight.scale.dtype == torch.uint8 else 1.0
    return replace(weight, scale=torch.full_like(weight.scale, one))


def higher_at_ties(a: Arguments) -> Tensor:
    def largest(scores: Tensor, count: int) -> Tensor:
        size = scores.shape[-1]
        order = torch.sort(scores.flip(-1), dim=-1, descending=True, stable=True).indices
        return (size - 1 - order)[:, :count].sort(dim=-1).values

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(indexer, "largest", largest)
        return body("index_topk")(**a)


def with_scales_doubled(pages: RowPages, a: Arguments) -> RowPages:
    if pages.format.kind.value == "fp8":
        pages.scales()[..., : pages.format.num_groups] += 1
    return pages


def last_row_unwritten(out: Tensor, a: Arguments) -> Tensor:
    out[-1] = float("nan")
    return out


KERNEL_FAULTS: dict[str, Kernel] = {
    "wrong window": changed("sparse_attention", lambda a: {"window": a["window"] - 1}),
    "dropped sink": changed("sparse_attention", lambda a: {"sink": a["sink"] - 1e9}),
    "wrong page": changed(
        "sparse_attention",
        lambda a: {"batch": replace(a["batch"], block_table=a["batch"].block_table.roll(1, 0))},
    ),
    "scale lost": changed("linear", lambda a: {"weight": without_scale(a["weight"])}),
    "wrong expert's weight": changed(
        "routed_experts", lambda a: {"weights": a["weights"].roll(1, -1)}
    ),
    "first expert ignored": changed("routed_experts", lambda a: {"first_expert": 0}),
    "limit dropped": changed("shared_expert", lambda a: {"limit": 1e9}),
    "top-k tie to the higher row": kernel("index_topk", higher_at_ties),
    "fold off by one": changed(
        "compress",
        lambda a: {
            "batch": replace(a["batch"], fold_tokens=(a["batch"].fold_tokens - 1).clamp(min=0))
        },
    ),
    "kept where it must not": changed("store_folds", lambda a: {"targets": a["targets"].abs()}),
    "row written to nowhere's slot": changed("store_rows", lambda a: {"slots": a["slots"].abs()}),
    "row scales lost": after("encode_rows", with_scales_doubled),
    "rotation the wrong way": changed("rotate", lambda a: {"inverse": not a.get("inverse")}),
    "position off by one": changed("query_norm_rope", lambda a: {"positions": a["positions"] + 1}),
    "routing scale dropped": changed("route_topk", lambda a: {"scaling": 1.0}),
    "Sinkhorn cut short": changed("hc_pre", lambda a: {"site": replace(a["site"], iterations=1)}),
    "a row not written": after("rms_norm", last_row_unwritten),
    "depends on the batch": replace(
        after("embed", lambda out, a: out * (1 + 1e-6 * (len(out) % 3))), batch_invariant=True
    ),
    "random numbers by row": changed(
        "uniform", lambda a: {"positions": torch.arange(len(a["positions"]))}
    ),
    "one draft too many": after("count_accepted", lambda n, a: n + 1),
    "raises": kernel("rms_norm", lambda a: a["no such argument"]),
}
"""A faulty kernel for an op; every one must be found and named."""


def stale_ring(patch: pytest.MonkeyPatch) -> None:
    """An image leaves out the oldest row of the window."""
    whole = image._window

    def shorter(ring: RowPages, place: Any, position: int) -> Iterator[Any]:
        return whole(ring, replace(place, window=place.window - 2), position)

    patch.setattr(image, "_window", shorter)


def folds_left_out(patch: pytest.MonkeyPatch) -> None:
    whole = image._compressed
    patch.setattr(image, "_compressed", lambda *args: list(whole(*args))[1:])


def open_page_short(patch: pytest.MonkeyPatch) -> None:
    """An image leaves out the rows of the page that is not full."""
    whole = image._compressed
    patch.setattr(image, "_compressed", lambda *args: list(whole(*args))[:1])


def ring_without_room(patch: pytest.MonkeyPatch) -> None:
    """No ring rows for drafts, so that rejected ones overwrite the window."""
    from fourfold.cache import pool, rows

    def short(config: Any, drafts: int = 0) -> int:
        return int(config.sliding_window)

    for module in (runner, pool, rows):
        patch.setattr(module, "ring_rows", short)


def page_given_twice(patch: pytest.MonkeyPatch) -> None:
    """A page that is in use is handed out again."""
    allocate = PagePool.allocate

    def twice(self: PagePool, count: int) -> list[int]:
        pages = allocate(self, count)
        used = [page for page in self._references if page not in pages]
        if used and pages:
            self._free.append(pages[-1])
            del self._references[pages[-1]]
            self._references[used[0]] += 1
            pages[-1] = used[0]
        return pages

    patch.setattr(PagePool, "allocate", twice)


def content_not_hashed(patch: pytest.MonkeyPatch) -> None:
    """A prefix hit takes the image of another prompt of that length."""
    from fourfold.cache.prefix import PrefixCache

    find, add = PrefixCache.find, PrefixCache.add
    blank = lambda tokens: [0] * len(tokens)  # noqa: E731

    def found(self: Any, root: bytes, token_ids: Any, hashes: Any = None) -> Any:
        return find(self, root, blank(token_ids), hashes)

    def added(self: Any, root: bytes, chain: Any, tail: Any, kept: Any) -> None:
        add(self, root, chain, blank(tail), kept)

    patch.setattr(PrefixCache, "find", found)
    patch.setattr(PrefixCache, "add", added)


def saved_without_last_page(patch: pytest.MonkeyPatch) -> None:
    """A preempted sequence comes back without the contents of its last page."""
    whole = image._compressed

    def fewer(part: Any, place: Any, position: int) -> Any:
        pieces = list(whole(part, place, position))
        return pieces[:-1] if place.carry else pieces

    patch.setattr(image, "_compressed", fewer)


def row_seen_early(patch: pytest.MonkeyPatch) -> None:
    """A compressed row is visible one token before it is complete."""
    whole = attention._compressed_mask
    patch.setattr(
        attention,
        "_compressed_mask",
        lambda p, total, ratio, listed: whole(p + 1, total, ratio, listed),
    )


def rows_lost(patch: pytest.MonkeyPatch) -> None:
    """No compressed row is ever visible."""
    whole = attention._compressed_mask
    patch.setattr(attention, "_compressed_mask", lambda *args: whole(*args) & False)


def defined(op: str, change: Callable[[Arguments], Any]) -> Callable[[pytest.MonkeyPatch], None]:
    """The op's definition itself is another."""

    def patch_ops(patch: pytest.MonkeyPatch) -> None:
        run = bound(op, change)
        ops = tuple(replace(o, body=run) if o.name == op else o for o in OPS)
        patch.setattr(kernel_plan, "OPS", ops)

    return patch_ops


def without_earlier_folds(a: Arguments) -> Any:
    fresh = torch.full_like(a["batch"].fold_sources, -1)
    return body("compress")(**{**a, "batch": replace(a["batch"], fold_sources=fresh)})


ENGINE_FAULTS: dict[str, tuple[Callable[[pytest.MonkeyPatch], None], str]] = {
    "page given twice": (page_given_twice, "batched = alone"),
    "stale ring": (stale_ring, "hit = cold"),
    "folds left out": (folds_left_out, "hit = cold"),
    "open page short": (open_page_short, "hit = cold"),
    "content not hashed": (content_not_hashed, "hit = cold"),
    "ring without room": (ring_without_room, "MTP = greedy"),
    "saved without its last page": (saved_without_last_page, "preempted = not"),
    "folds forgotten between chunks": (
        defined("compress", without_earlier_folds),
        "chunked = one-shot",
    ),
    "one draft too many": (
        defined(
            "count_accepted",
            lambda a: (body("count_accepted")(**a) + 1).clamp(max=a["drafts"].shape[1]),
        ),
        "MTP = greedy",
    ),
    "row seen early": (row_seen_early, "long context: decoded = one pass"),
    "rows lost": (rows_lost, "long context: nothing in reach is lost"),
}
"""A fault of the engine or its caches, and the check that finds it."""


def plant(patch: pytest.MonkeyPatch, *faulty: Kernel) -> None:
    """Make `faulty` kernels of this machine."""
    load = kernels.load
    patch.setattr(kernels, "load", lambda device: (*load(device), *faulty))

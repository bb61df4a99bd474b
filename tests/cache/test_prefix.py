"""The prefix cache: a hit is the deepest position with both pages and an image, and is really there."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch

from fourfold.cache.pages import chain_at, chain_root
from fourfold.cache.prefix import Hit, PrefixCache
from fourfold.core.row_format import PAGE_TOKENS as P

ROOT = chain_root("model", None)
TOKENS = [n % 97 for n in range(5 * P)]
OTHER = [n % 89 for n in range(5 * P)]


@dataclass(frozen=True)
class FakeImage:
    position: int
    nbytes: int = 10
    where: str = "device"

    def to(self, device: object) -> FakeImage:
        return replace(self, where=str(device))


class Cache:
    """A prefix cache and the little a scheduler does around it."""

    def __init__(self, pages: int = 16, device: int = 1000, host: int = 1000, **more: Any):
        self.cache = PrefixCache(pages, device, host, **more)

    def keep(
        self, tokens: list[int], nbytes: int = 10, root: bytes = ROOT, release: bool = True
    ) -> list[int]:
        """As if `tokens` had been computed: publish their full pages, keep an image at their end."""
        hashes: list[bytes] = []
        pages: list[int] = []
        for number in range(len(tokens) // P):
            digest = chain_at(root, hashes, tokens, number)
            if self.cache.pages.has(digest):
                pages.append(self.cache.pages.share(digest))
            else:
                pages += self.cache.pages.allocate(1)
                self.cache.pages.publish(pages[number], digest)
        pages += self.cache.pages.allocate(-(-len(tokens) // P) - len(pages))
        image: Any = FakeImage(len(tokens), nbytes)
        self.cache.add(root, hashes, tokens[len(hashes) * P :], image)
        if release:
            self.cache.pages.release(pages)
        self.cache.check()
        return pages

    def find(self, tokens: list[int], root: bytes = ROOT) -> Hit:
        """A hit, its pages released again."""
        hit = self.cache.find(root, tokens)
        assert all(self.cache.pages.references(page) for page in hit.pages)
        assert len(hit.pages) == hit.position // P
        self.cache.pages.release(hit.pages)
        self.cache.check()
        return hit

    def crowd(self, pages: int) -> None:
        """Somebody needs pages for a while."""
        self.cache.pages.release(self.cache.pages.allocate(pages))
        self.cache.check()


@pytest.mark.parametrize("depth", [1, 7, P - 1, P, P + 1, 2 * P - 1, 3 * P, 3 * P + 100])
def test_an_image_is_found_by_every_longer_prompt_and_by_no_other(depth: int) -> None:
    cache = Cache()
    cache.keep(TOKENS[:depth])
    for length in (depth + 1, depth + 2, depth + P, 5 * P):
        assert cache.find(TOKENS[:length]).position == depth
    assert cache.find(TOKENS[:depth]).position == 0  # its last token must run
    assert cache.find(TOKENS[: depth - 1] or [5]).position == 0
    for place in {0, depth // 2, depth - 1}:
        changed = TOKENS.copy()
        changed[place] += 1
        assert cache.find(changed).position == 0


def test_the_deepest_image_wins_and_shallower_ones_serve_prompts_that_part_before() -> None:
    cache = Cache()
    for depth in (P + 9, 10, 3 * P, P, P + 30):
        cache.keep(TOKENS[:depth])
    found = [
        cache.find(TOKENS[:n]).position for n in (5, 11, P, P + 1, P + 10, P + 31, 3 * P, 4 * P)
    ]
    assert found == [0, 10, 10, P, P + 9, P + 30, P + 30, 3 * P]
    parted = [*TOKENS[: P + 20], *OTHER]
    assert cache.find(parted).position == P + 9


def test_reasons_say_what_was_missing() -> None:
    cache = Cache()
    assert cache.find([1]).miss is None  # nothing could have been found
    assert cache.find(TOKENS[:10]).miss == "no state image below the prompt's end"
    cache.keep(TOKENS[: 2 * P + 5])
    assert cache.find(TOKENS[: 2 * P + 6]).miss is None
    assert (
        cache.find(TOKENS[: 2 * P + 7]).miss
        == f"no state image between {2 * P + 5} and {2 * P + 6}"
    )
    hit = cache.find(TOKENS[: 4 * P])
    assert hit.position == 2 * P + 5
    assert hit.miss == f"the tokens from {2 * P} on are not cached"
    assert cache.find(OTHER).miss == "the tokens from 0 on are not cached"
    off = Cache(enabled=False)
    off.keep(TOKENS[:10])
    assert off.cache.num_images == 0
    assert off.find(TOKENS[:20]) == Hit(None, (), "prefix caching is off")


def test_a_hit_holds_its_pages_before_anybody_can_take_them() -> None:
    cache = Cache(pages=4)
    cache.keep(TOKENS[: 3 * P])
    hit = cache.cache.find(ROOT, TOKENS)
    assert len(hit.pages) == 3
    assert cache.cache.pages.num_available == 1
    again = cache.cache.find(ROOT, TOKENS)
    assert again.pages == hit.pages
    assert {cache.cache.pages.references(page) for page in hit.pages} == {2}
    cache.cache.pages.release(hit.pages)
    cache.cache.pages.release(again.pages)
    cache.cache.pages.check()


def test_an_image_goes_with_the_first_of_its_pages() -> None:
    """Eviction takes the end of a chain first: what stands on it goes, what stands before stays."""
    cache = Cache(pages=4)
    for depth in (30, P + 9, 2 * P, 3 * P + 1):
        cache.keep(TOKENS[:depth])
    assert cache.find(TOKENS).position == 3 * P + 1
    cache.crowd(2)
    assert cache.cache.num_images == 3
    assert cache.find(TOKENS).position == 2 * P
    cache.crowd(4)
    assert cache.cache.num_images == 1
    assert cache.find(TOKENS).position == 30  # it stands on no full page
    cache.keep(TOKENS[: P + 9])
    assert cache.find(TOKENS).position == P + 9


def test_pages_without_an_image_are_no_hit() -> None:
    cache = Cache(device=0, host=0)
    cache.keep(TOKENS[: 2 * P])
    assert cache.cache.num_images == 0
    hit = cache.find(TOKENS)
    assert hit.position == 0
    assert hit.pages == ()
    assert hit.miss == f"the tokens from {2 * P} on are not cached"


def test_an_image_whose_pages_cannot_be_found_is_not_kept() -> None:
    cache = Cache()
    hashes: list[bytes] = []
    chain_at(ROOT, hashes, TOKENS, 0)
    image: Any = FakeImage(P + 1)
    cache.cache.add(ROOT, hashes, TOKENS[P : P + 1], image)
    assert cache.cache.num_images == 0
    cache.cache.check()


def test_images_move_to_host_memory_oldest_first_and_then_go() -> None:
    cache = Cache(device=30, host=20)
    depths = [5, 6, 7, 8, 9, 10]
    for depth in depths:
        cache.keep(TOKENS[:depth])
    assert cache.cache.image_bytes == (30, 20)
    found = {depth: cache.find(TOKENS[: depth + 1]).image for depth in depths}
    assert found[5] is None
    where = {d: image.where for d, image in found.items() if isinstance(image, FakeImage)}
    assert where == {6: "cpu", 7: "cpu", 8: "device", 9: "device", 10: "device"}


def test_finding_an_image_keeps_it_longer_in_either_tier() -> None:
    cache = Cache(device=30, host=20)
    for depth in (5, 6, 7, 8, 9):  # 5 and 6 are in host memory
        cache.keep(TOKENS[:depth])
    assert cache.find(TOKENS[:6]).position == 5
    assert cache.find(TOKENS[:8]).position == 7
    cache.keep(TOKENS[:10])
    assert cache.find(TOKENS[:7]).position == 5  # 6 is gone
    assert cache.find(TOKENS[:9]).image.where == "cpu"
    assert cache.find(TOKENS[:8]).image.where == "device"


def test_images_too_large_for_a_tier_skip_it() -> None:
    cache = Cache(device=30, host=100)
    cache.keep(TOKENS[:5])
    cache.keep(TOKENS[:6], nbytes=31)
    assert cache.find(TOKENS[:7]).image.where == "cpu"
    assert cache.find(TOKENS[:6]).image.where == "device"
    cache.keep(TOKENS[:7], nbytes=101)
    assert cache.find(TOKENS[:8]).position == 6
    assert cache.cache.image_bytes == (10, 31)
    small = Cache(device=30, host=20)
    small.keep(TOKENS[:5], nbytes=25)
    small.keep(TOKENS[:6], nbytes=25)  # what it pushes out fits nowhere
    assert small.cache.image_bytes == (25, 0)
    assert small.find(TOKENS[:6]).position == 0


def test_the_same_image_again_takes_no_more_room() -> None:
    cache = Cache()
    for _ in range(3):
        cache.keep(TOKENS[: P + 3])
    assert cache.cache.num_images == 1
    assert cache.cache.image_bytes == (10, 0)


def test_salts_keep_caches_apart() -> None:
    cache = Cache(pages=32)
    roots = [chain_root("model", salt) for salt in (None, "one", "two")]
    for number, root in enumerate(roots):
        cache.keep(TOKENS[: P + 10 + number], root=root)
    for number, root in enumerate(roots):
        assert cache.find(TOKENS, root).position == P + 10 + number
    assert cache.find(TOKENS, chain_root("model", "three")).position == 0
    assert cache.find(TOKENS, chain_root("another", None)).position == 0


def test_known_hashes_are_used_and_added_to() -> None:
    cache = Cache()
    cache.keep(TOKENS[: 2 * P + 1])
    hashes: list[bytes] = []
    for _ in range(2):
        hit = cache.cache.find(ROOT, TOKENS, hashes)
        assert hit.position == 2 * P + 1
        cache.cache.pages.release(hit.pages)
        assert len(hashes) == 3  # two that were found, one that was not
    assert hashes == [chain_at(ROOT, hashes[:n], TOKENS, n) for n in range(3)]


def test_forgetting_gives_up_all_but_pages_in_use() -> None:
    cache = Cache()
    cache.keep(TOKENS[: 2 * P + 3])
    pages = cache.keep(OTHER[: P + 3], release=False)
    cache.cache.forget()
    cache.cache.check()
    assert cache.cache.num_images == 0
    assert cache.cache.image_bytes == (0, 0)
    assert cache.cache.pages.num_used == 2
    assert cache.find(TOKENS).position == cache.find(OTHER).position == 0
    cache.cache.pages.release(pages)
    assert cache.cache.pages.num_free == 16


def test_the_host_tier_is_where_it_is_said_to_be() -> None:
    cache = Cache(device=0)
    cache.keep(TOKENS[:5])
    assert cache.find(TOKENS[:6]).image.where == "cpu"
    meta = PrefixCache(4, 0, 1000, host=torch.device("meta"))
    image: Any = FakeImage(5)
    meta.add(ROOT, [], TOKENS[:5], image)
    assert meta.find(ROOT, TOKENS[:6]).image.where == "meta"  # type: ignore[union-attr]

"""The prefix cache: pages by content, images by content and position.

An image is found by (hash chain of its full pages, the token ids after them). A request resumes from
the deepest position where all pages *and* an image exist, never deeper than its last token, which must
run to give logits. Images live in device memory and, pushed out of there, in host memory, each bounded.

Contract: an image whose pages were given up is dropped with them. A hit takes references before
anything else can evict. Host data only, save that images hold tensors nobody here looks into.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from fourfold.cache.image import StateImage
from fourfold.cache.pages import PagePool, chain_at
from fourfold.core.row_format import PAGE_TOKENS

Key = tuple[bytes, tuple[int, ...]]


@dataclass(frozen=True)
class Hit:
    """What a prompt found: the image (None: nothing) and the pages below it, already referenced.

    `miss` says why the hit is not deeper, None where it could not be.
    """

    image: StateImage | None
    pages: tuple[int, ...] = ()
    miss: str | None = None

    @property
    def position(self) -> int:
        return self.image.position if self.image else 0


@dataclass
class _Entry:
    image: StateImage
    chain: tuple[bytes, ...]


class PrefixCache:
    """Pages and images of one engine. Budgets in bytes; `host` is where evicted images go."""

    def __init__(
        self,
        num_pages: int,
        device_bytes: int,
        host_bytes: int,
        host: torch.device | None = None,
        enabled: bool = True,
    ):
        self.pages = PagePool(num_pages, self._page_gone)
        self.enabled = enabled
        self._host = host or torch.device("cpu")
        self._budgets = (device_bytes, host_bytes)
        self._tiers: tuple[OrderedDict[Key, _Entry], OrderedDict[Key, _Entry]] = (
            OrderedDict(),
            OrderedDict(),
        )
        self._sizes = [0, 0]
        # How many images stand on a chain's last hash, by the length of their tail.
        self._tails: dict[bytes, Counter[int]] = {}
        self._above: dict[bytes, set[Key]] = {}  # images that stand on a page

    @property
    def num_images(self) -> int:
        return sum(len(tier) for tier in self._tiers)

    @property
    def image_bytes(self) -> tuple[int, int]:
        """Bytes of images in device and in host memory."""
        return self._sizes[0], self._sizes[1]

    def add(
        self, root: bytes, chain: Sequence[bytes], tail: Sequence[int], image: StateImage
    ) -> None:
        """Keep `image`: it stands on the full pages of `chain`, then on the tokens `tail`.

        Not if one of the pages cannot be found: nobody could use it, and nothing would drop it.
        """
        findable = all(self.pages.has(digest) for digest in chain)
        if not self.enabled or not image.position or not findable:
            return
        key = (chain[-1] if chain else root, tuple(tail))
        self._drop(key)
        self._tails.setdefault(key[0], Counter())[len(tail)] += 1
        for digest in chain:
            self._above.setdefault(digest, set()).add(key)
        self._put(0, key, _Entry(image, tuple(chain)))

    def find(self, root: bytes, token_ids: Sequence[int], hashes: list[bytes] | None = None) -> Hit:
        """The deepest usable image below the last of `token_ids`; takes references to its pages.

        `hashes` are those of leading pages known from before; what is computed here is added.
        """
        hashes = [] if hashes is None else hashes
        limit = len(token_ids) - 1
        if not self.enabled:
            return Hit(None, miss="prefix caching is off" if limit else None)
        chain: list[bytes] = []
        best: tuple[Key, int] | None = None
        digest, reason = root, None
        while True:
            begin = len(chain) * PAGE_TOKENS
            for length in self._tails.get(digest, ()):
                position = begin + length
                if position <= limit and (best is None or position > best[1]):
                    key = (digest, tuple(token_ids[begin:position]))
                    if any(key in tier for tier in self._tiers):
                        best = (key, position)
            if begin + PAGE_TOKENS > limit:
                break
            digest = chain_at(root, hashes, token_ids, len(chain))
            if not self.pages.has(digest):
                reason = f"the tokens from {begin} on are not cached"
                break
            chain.append(digest)
        if best is None:
            return Hit(
                None, miss=(reason or "no state image below the prompt's end") if limit else None
            )
        key, position = best
        entry = self._touch(key)
        pages = tuple(self.pages.share(d) for d in entry.chain)
        if position < limit and reason is None:
            reason = f"no state image between {position} and {limit}"
        return Hit(entry.image, pages, reason if position < limit else None)

    def forget(self) -> None:
        """Give up everything that is not in use."""
        for tier in self._tiers:
            for key in list(tier):
                self._drop(key)
        self.pages.forget()

    def check(self) -> None:
        """Raise `AssertionError` unless all images can be found, on pages that can be, within budgets."""
        above: dict[bytes, set[Key]] = {}
        tails: dict[bytes, Counter[int]] = {}
        for tier, size, budget in zip(self._tiers, self._sizes, self._budgets, strict=True):
            total = sum(entry.image.nbytes for entry in tier.values())
            assert total == size <= budget, f"images of {total} bytes, {size} of {budget} counted"
            for key, entry in tier.items():
                tails.setdefault(key[0], Counter())[len(key[1])] += 1
                for digest in entry.chain:
                    assert self.pages.has(digest), "an image stands on a page that is gone"
                    above.setdefault(digest, set()).add(key)
        assert above == self._above, "the images standing on a page are not those noted there"
        assert tails == self._tails, "the images' tails are not those noted"

    def _touch(self, key: Key) -> _Entry:
        """The entry, made the most recently used of its tier."""
        for tier in self._tiers:
            if key in tier:
                tier.move_to_end(key)
                return tier[key]
        raise KeyError(key)

    def _put(self, level: int, key: Key, entry: _Entry) -> None:
        """Put an entry into a tier, pushing the oldest ones down; too large for all: dropped."""
        size = entry.image.nbytes
        while level < 2 and size > self._budgets[level]:
            level += 1
        if level == 2:
            self._unlink(key, entry)
            return
        if level == 1:
            entry.image = entry.image.to(self._host)
        self._tiers[level][key] = entry
        self._sizes[level] += size
        while self._sizes[level] > self._budgets[level]:
            oldest, pushed = self._tiers[level].popitem(last=False)
            self._sizes[level] -= pushed.image.nbytes
            self._put(level + 1, oldest, pushed) if level == 0 else self._unlink(oldest, pushed)

    def _drop(self, key: Key) -> None:
        for level, tier in enumerate(self._tiers):
            if key in tier:
                entry = tier.pop(key)
                self._sizes[level] -= entry.image.nbytes
                self._unlink(key, entry)

    def _unlink(self, key: Key, entry: _Entry) -> None:
        tails = self._tails[key[0]]
        tails[len(key[1])] -= 1
        if not tails[len(key[1])]:
            del tails[len(key[1])]
        if not tails:
            del self._tails[key[0]]
        for digest in entry.chain:
            above = self._above[digest]
            above.discard(key)
            if not above:
                del self._above[digest]

    def _page_gone(self, digest: bytes) -> None:
        for key in list(self._above.get(digest, ())):
            self._drop(key)

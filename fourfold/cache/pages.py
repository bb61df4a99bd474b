"""Who owns which page, and which pages can be shared.

A page is *free* (no content worth keeping), *used* (referenced by running sequences, one or more) or
*cached* (referenced by none, its content known by hash, kept until somebody needs the room):

    free ──allocate──► used ──release, hashed──► cached ──share──► used
      ▲                 │ release, not hashed       │ allocate (least recently used first)
      └─────────────────┴───────────────────────────┘

Contract: every page is in exactly one of the three at any time. Content is addressed by a chain of
cryptographic hashes, so equal hashes mean equal tokens from position 0 on, under one fingerprint and
salt. Host integers only. It does not know what a page holds.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence

from fourfold.core.row_format import PAGE_TOKENS


def chain_root(fingerprint: str, salt: str | None) -> bytes:
    """Where a hash chain starts: pages under different roots never meet."""
    return hashlib.blake2b(repr((fingerprint, salt)).encode(), digest_size=32).digest()


def chain_next(before: bytes, token_ids: Sequence[int]) -> bytes:
    """The hash of a full page of `token_ids` that follows the chain ending in `before`."""
    if len(token_ids) != PAGE_TOKENS:
        raise ValueError(f"a page is hashed whole: {PAGE_TOKENS} tokens, found {len(token_ids)}")
    return hashlib.blake2b(array("q", token_ids).tobytes(), key=before, digest_size=32).digest()


def chain_at(root: bytes, hashes: list[bytes], token_ids: Sequence[int], page: int) -> bytes:
    """The hash of page `page` of `token_ids`; `hashes` has all before it, and has it afterwards."""
    if page == len(hashes):
        begin = page * PAGE_TOKENS
        hashes.append(
            chain_next(hashes[-1] if hashes else root, token_ids[begin : begin + PAGE_TOKENS])
        )
    return hashes[page]


class PagePool:
    """All pages of a cache. `on_evict(hash)` is told when a cached page's content is given up."""

    def __init__(self, size: int, on_evict: Callable[[bytes], None] | None = None):
        self.size = size
        self._on_evict = on_evict or (lambda digest: None)
        self._free = list(range(size - 1, -1, -1))
        self._references: dict[int, int] = {}
        self._cached: OrderedDict[int, None] = OrderedDict()  # least recently used first
        self._hash_of: dict[int, bytes] = {}
        self._page_of: dict[bytes, int] = {}

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_cached(self) -> int:
        return len(self._cached)

    @property
    def num_used(self) -> int:
        return len(self._references)

    @property
    def num_available(self) -> int:
        """Pages that `allocate` can hand out."""
        return len(self._free) + len(self._cached)

    def references(self, page: int) -> int:
        return self._references.get(page, 0)

    def allocate(self, count: int) -> list[int]:
        """`count` pages for one owner each, giving up cached content if need be.

        `ValueError` if there are not enough: ask `num_available` first.
        """
        if count > self.num_available:
            raise ValueError(f"asked for {count} pages, {self.num_available} are available")
        pages = []
        for _ in range(count):
            if not self._free:
                self._evict()
            page = self._free.pop()
            self._references[page] = 1
            pages.append(page)
        return pages

    def _evict(self) -> None:
        page, _ = self._cached.popitem(last=False)
        digest = self._hash_of.pop(page)
        del self._page_of[digest]
        self._free.append(page)
        self._on_evict(digest)

    def publish(self, page: int, digest: bytes) -> None:
        """Make a used page's content findable. If another page has the same content, that one stays."""
        if page not in self._references:
            raise ValueError(f"page {page} is not used by anybody")
        if digest not in self._page_of and page not in self._hash_of:
            self._page_of[digest] = page
            self._hash_of[page] = digest

    def has(self, digest: bytes) -> bool:
        return digest in self._page_of

    def share(self, digest: bytes) -> int:
        """Take a reference to the page with this content; `KeyError` if there is none."""
        page = self._page_of[digest]
        self._cached.pop(page, None)
        self._references[page] = self._references.get(page, 0) + 1
        return page

    def reference(self, pages: Iterable[int]) -> None:
        """Take one more reference to pages that are used already."""
        for page in pages:
            if page not in self._references:
                raise ValueError(f"page {page} is not used by anybody")
            self._references[page] += 1

    def release(self, pages: Sequence[int]) -> None:
        """Give up one reference to each page. Later pages of a chain are evicted before earlier."""
        for page in reversed(pages):
            count = self._references.get(page, 0)
            if not count:
                raise ValueError(f"page {page} was released but is not used")
            if count > 1:
                self._references[page] = count - 1
                continue
            del self._references[page]
            if page in self._hash_of:
                self._cached[page] = None
            else:
                self._free.append(page)

    def forget(self) -> None:
        """Give up all cached content. Pages in use keep theirs but are no longer found."""
        while self._cached:
            self._evict()
        for page, digest in list(self._hash_of.items()):
            del self._page_of[digest], self._hash_of[page]
            self._on_evict(digest)

    def check(self) -> None:
        """Raise `AssertionError` unless every page is in exactly one place."""
        free, used, cached = set(self._free), set(self._references), set(self._cached)
        assert len(free) + len(used) + len(cached) == self.size, "pages do not add up"
        assert len(free | used | cached) == self.size, "a page is in two places"
        assert all(n > 0 for n in self._references.values()), "a reference count is not positive"
        assert cached <= set(self._hash_of), "a cached page has no hash"
        assert {p: h for h, p in self._page_of.items()} == self._hash_of, "hashes do not match"

"""Who owns which page and which state slot.

Contract: ids are handed out lowest first and given back once; the counts always add up. It does not
know what the ids stand for.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence


class IdPool:
    """Ids 0 … size−1, free or taken."""

    def __init__(self, size: int):
        self.size = size
        self._free = list(range(size))
        self._taken: set[int] = set()

    @property
    def num_free(self) -> int:
        return len(self._free)

    def take(self, count: int) -> list[int]:
        """`count` free ids; `ValueError` if there are fewer (ask `num_free` first)."""
        if count > len(self._free):
            raise ValueError(f"asked for {count} ids, {len(self._free)} are free")
        ids = [heapq.heappop(self._free) for _ in range(count)]
        self._taken.update(ids)
        return ids

    def give_back(self, ids: Sequence[int]) -> None:
        """Return ids; `ValueError` for one that is not taken."""
        for each in ids:
            if each not in self._taken:
                raise ValueError(f"id {each} was given back but is not taken")
            self._taken.remove(each)
            heapq.heappush(self._free, each)

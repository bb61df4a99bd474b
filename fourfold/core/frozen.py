"""A read-only mapping for frozen configs: hashable, comparable with dict, and picklable.

Contract: `freeze(value)` turns nested JSON values into immutable ones (objects to `FrozenDict`,
arrays to tuples); `thaw(value)` turns them back into what `json.dump` takes. Knows nothing about
what the values mean. (`types.MappingProxyType` can be neither hashed, copied nor sent to another
process.)
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

K = TypeVar("K")
V = TypeVar("V", covariant=True)


class FrozenDict(Mapping[K, V]):
    """An immutable mapping; its values should be immutable too (see `freeze`)."""

    __slots__ = ("_items",)
    _items: dict[K, V]

    def __init__(self, *args: Any, **kwargs: V) -> None:
        object.__setattr__(self, "_items", dict(*args, **kwargs))

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError("a FrozenDict cannot be changed")

    def __getitem__(self, key: K) -> V:
        return self._items[key]

    def __iter__(self) -> Iterator[K]:
        return iter(self._items)

    def __len__(self) -> int:
        return len(self._items)

    def __hash__(self) -> int:
        return hash(frozenset(self._items.items()))

    def __repr__(self) -> str:
        return f"FrozenDict({self._items!r})"

    def __reduce__(self) -> tuple[type, tuple[dict[K, V]]]:
        return (FrozenDict, (dict(self._items),))


def freeze(value: Any) -> Any:
    """Objects to `FrozenDict`, arrays to tuples, all the way down; scalars stay."""
    if isinstance(value, Mapping):
        return FrozenDict({key: freeze(item) for key, item in value.items()})
    if isinstance(value, list | tuple):
        return tuple(freeze(item) for item in value)
    return value


def thaw(value: Any) -> Any:
    """The inverse of `freeze`: dicts and lists, as the json module writes them."""
    if isinstance(value, Mapping):
        return {key: thaw(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [thaw(item) for item in value]
    return value

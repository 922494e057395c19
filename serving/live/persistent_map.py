"""A mapping that never changes, and gives a changed one cheaply: most of it is shared."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import TypeVar

V = TypeVar("V")
SHARDS = 1024
"""A change copies the shards that it touches, a thousandth of the whole each."""


class PersistentMap(Mapping[str, V]):
    """Text keys → values, spread over dictionaries by hash.

    Example:
        >>> one = PersistentMap().changed({"a": 1, "b": 2})
        >>> two = one.changed({"a": 3}, ["b"])
        >>> sorted(one.items()), sorted(two.items())
        ([('a', 1), ('b', 2)], [('a', 3)])
    """

    __slots__ = ("_shards", "_size")

    def __init__(self, shards: tuple[dict[str, V], ...] | None = None, size: int = 0) -> None:
        nothing: dict[str, V] = {}
        self._shards = (nothing,) * SHARDS if shards is None else shards
        self._size = size

    def changed(self, new: Mapping[str, V], gone: Iterable[str] = ()) -> PersistentMap[V]:
        """This mapping without `gone` and with `new`."""
        shards, own, size = list(self._shards), set[int](), self._size

        def mine(key: str) -> dict[str, V]:
            place = hash(key) % SHARDS
            if place not in own:
                own.add(place)
                shards[place] = dict(shards[place])
            return shards[place]

        for key in gone:
            shard = mine(key)
            size -= key in shard
            shard.pop(key, None)
        for key, value in new.items():
            shard = mine(key)
            size += key not in shard
            shard[key] = value
        return PersistentMap(tuple(shards), size) if own else self

    def __getitem__(self, key: str) -> V:
        return self._shards[hash(key) % SHARDS][key]

    # Mapping's own go through an exception.
    def get(self, key, default=None):  # type: ignore[no-untyped-def]
        """The value of the key, or the default."""
        return self._shards[hash(key) % SHARDS].get(key, default)

    def __contains__(self, key: object) -> bool:
        return key in self._shards[hash(key) % SHARDS]

    def __iter__(self) -> Iterator[str]:
        for shard in self._shards:
            yield from shard

    def __len__(self) -> int:
        return self._size

"""A bounded dictionary: least recently used out first."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Generic, TypeVar

K = TypeVar("K")
V = TypeVar("V")


class LRU(Generic[K, V]):
    """Values that add up to at most ``capacity`` by ``size``, which counts each as 1 by default.

    The newest entry stays even if it is larger than that. Not locked: a caller with several threads
    brings its own lock.
    """

    def __init__(self, capacity: int, size: Callable[[V], int] = lambda value: 1) -> None:
        self.capacity = capacity
        self.total = 0  # The sizes of all values.
        self._size = size
        self._entries: OrderedDict[K, V] = OrderedDict()

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, key: K) -> bool:
        return key in self._entries

    def get(self, key: K) -> V | None:
        """Counts as a use."""
        if key in self._entries:
            self._entries.move_to_end(key)
        return self._entries.get(key)

    def __setitem__(self, key: K, value: V) -> None:
        self.pop(key)
        self._entries[key] = value
        self.total += self._size(value)
        while self.total > self.capacity and len(self._entries) > 1:
            self.pop(next(iter(self._entries)))

    def pop(self, key: K) -> V | None:
        value = self._entries.pop(key, None)
        if value is not None:
            self.total -= self._size(value)
        return value

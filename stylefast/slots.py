"""Free places of buffers, and entries in the order of their use."""

from collections import OrderedDict
from collections.abc import Iterable
from typing import TypeVar

Key = TypeVar("Key")
Value = TypeVar("Value")


class Slots:
    """Numbers of the places of a buffer that are free; the lowest are taken first.

    count: number of places; used: how many of them, from 0 on, are taken from the start.
    """

    def __init__(self, count: int = 0, used: int = 0):
        self.count = used
        self._free: list[int] = []  # in falling order
        self.grow(count)

    @property
    def free(self) -> int:
        """Count the free places."""
        return len(self._free)

    @property
    def used(self) -> int:
        """Count the places that are taken."""
        return self.count - len(self._free)

    def lowest(self, count: int) -> list[int]:
        """Return free places that `take(count)` would take. Raises IndexError if fewer are free."""
        if count > len(self._free):
            raise IndexError(f"{count} places are wanted, and {len(self._free)} of {self.count} are free")
        return self._free[len(self._free) - count :][::-1]

    def take(self, count: int) -> list[int]:
        """Take places. Raises IndexError if fewer are free."""
        taken = self.lowest(count)
        del self._free[len(self._free) - count :]
        return taken

    def release(self, places: Iterable[int]) -> None:
        """Return places that were taken."""
        self._free = sorted([*self._free, *map(int, places)], reverse=True)

    def grow(self, count: int) -> None:
        """Add free places, up to `count` in all."""
        self._free = [*range(count - 1, self.count - 1, -1), *self._free]
        self.count = max(count, self.count)

    def shrink(self, count: int) -> None:
        """Remove free places, down to `count` in all; those from `count` on must be free."""
        self._free = [place for place in self._free if place < count]
        self.count = min(count, self.count)


class LruDict(OrderedDict[Key, Value]):
    """A dictionary whose entries are in the order of their use, the least recently used first.

    Setting a new key and `use` make an entry the most recently used; reading one does not.
    """

    def use(self, key: Key) -> Value | None:
        """Return a key's value, which is now the most recently used; None if there is none."""
        if key in self:
            self.move_to_end(key)
        return self.get(key)

    @property
    def oldest(self) -> Key | None:
        """Return the least recently used key; None if there is none."""
        return next(iter(self), None)

    def beyond(self, count: int) -> list[Key]:
        """Return the least recently used keys that must go to leave `count`."""
        return list(self)[: max(0, len(self) - count)]

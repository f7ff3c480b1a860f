"""Which cached things go first when room is needed. A policy orders idle items; whoever owns them does the rest.

Items are slots in the arena and names in a disk tier: anything hashable. A policy sees an item from the moment it
becomes idle until it is used again or leaves, and never any other. Being copied to a tier is no use: the item stays
where it is in the order, and its owner passes over it meanwhile. Nothing here reads a clock or draws a number.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from typing import Generic, Protocol, Self, TypeVar

Item = TypeVar("Item")


class Policy(Protocol[Item]):
    """Called by one thread, the owner's."""

    def touched(self, chain: Sequence[Item]) -> None:
        """These have just become idle, in chain order. A head must outlive its tail: without it, the tail is no hit."""

    def grown(self, chain: Sequence[Item]) -> None:
        """These idle items are a chain that has become longer: as if all of it had come now, which is no use."""

    def removed(self, item: Item) -> None:
        """It is idle no longer. Items never touched are ignored."""

    def forgotten(self, item: Item) -> None:
        """It is gone, and not because room was needed. Items never touched, or gone already, are ignored."""

    def evicted(self, item: Item) -> None:
        """It is gone because room was needed. Policies that age, age here."""

    def victims(self) -> Iterator[Item]:
        """All idle items, the first to go first, for who wants room: policies that age, age here, too.

        The owner removes items only after it has finished iterating.
        """

    def __iter__(self) -> Iterator[Item]:
        """All idle items, in no order: to look changes nothing."""

    def another(self) -> Policy[Item]:
        """An empty one of the same kind."""

    def __len__(self) -> int: ...


class Lru(Generic[Item]):
    """Least recently used first; of items used together, the end of the chain first."""

    def __init__(self) -> None:
        self._items: OrderedDict[Item, None] = OrderedDict()

    def touched(self, chain: Sequence[Item]) -> None:
        for item in reversed(chain):
            self._items[item] = None
            self._items.move_to_end(item)

    def grown(self, chain: Sequence[Item]) -> None:
        self.touched(chain)

    def removed(self, item: Item) -> None:
        self._items.pop(item, None)

    def forgotten(self, item: Item) -> None:
        self.removed(item)

    def evicted(self, item: Item) -> None:
        self.removed(item)

    def victims(self) -> Iterator[Item]:
        return iter(self._items)

    def __iter__(self) -> Iterator[Item]:
        return iter(self._items)

    def another(self) -> Self:
        return type(self)()

    def __len__(self) -> int:
        return len(self._items)

    def __repr__(self) -> str:
        return f"<Lru {len(self._items)} idle slots>"

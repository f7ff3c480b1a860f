"""Where the store has a block: (namespace, block hash) -> (slot, position). Only finds; decides nothing about slots.

The first to enter a block wins: a second copy of the same content stays out and dies with its holders. Entries lie by
namespace, so that who means all of one, or nothing that is here, looks at no others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

from pdx.buffer.slots import BlockKey, Slot
from pdx.layout import Place

Spot = tuple[Slot, int]  # one block: its slot and its position there

_NOTHING: Mapping[bytes, Spot] = {}


class Index:
    """One thread. Every entry is counted in its slot's `indexed`."""

    def __init__(self) -> None:
        self._spaces: dict[bytes, dict[bytes, Spot]] = {}  # by namespace, then by hash; none is empty
        self.changes = 0  # grows with all that may make a lookup say something else
        self.told: Callable[[BlockKey, bool], None] = lambda key, found: None  # of each key found from now on, or not

    def add(self, slot: Slot) -> None:
        """Enters each of the slot's blocks that is not known yet."""
        for position, key in enumerate(slot.keys):
            if key is not None and key[1] not in self.within(key[0]):
                self._spaces.setdefault(key[0], {})[key[1]] = (slot, position)
                slot.indexed += 1
                self.changes += 1
                self.told(key, True)

    def remove(self, slot: Slot) -> None:
        """Afterwards no lookup finds the slot."""
        for key in self.keys_of(slot):
            self._delete(key)
        slot.indexed = 0

    def forget(self, slot: Slot, position: int) -> BlockKey | None:
        """Afterwards no lookup finds this block of the slot. Returns its key; None if no lookup found it before."""
        key = slot.keys[position]
        if key is None or self.within(key[0]).get(key[1]) != (slot, position):
            return None
        slot.indexed -= 1
        self._delete(key)
        return key

    def keys_of(self, slot: Slot) -> list[BlockKey]:
        """Those that lead to this slot, in its order."""
        return [
            key
            for position, key in enumerate(slot.keys)
            if key is not None and self.within(key[0]).get(key[1]) == (slot, position)
        ]

    def find(self, namespace: bytes, block_hashes: Sequence[bytes]) -> list[Spot | None]:
        """For each hash its slot and position, or None."""
        return list(map(self.within(namespace).get, block_hashes))

    def leading(self, namespace: bytes, block_hashes: Sequence[bytes]) -> list[Spot]:
        """The same up to the first unknown hash: later blocks are of no use without it."""
        found, get = [], self.within(namespace).get
        for block_hash in block_hashes:
            entry = get(block_hash)
            if entry is None:
                break
            found.append(entry)
        return found

    def namespaces(self) -> list[bytes]:
        """Those of which there is a block."""
        return list(self._spaces)

    def within(self, namespace: bytes) -> Mapping[bytes, Spot]:
        """All blocks of one namespace, by hash."""
        return self._spaces.get(namespace, _NOTHING)

    def items(self) -> Iterator[tuple[BlockKey, Spot]]:
        for namespace, entries in self._spaces.items():
            for block_hash, spot in entries.items():
                yield (namespace, block_hash), spot

    def __len__(self) -> int:
        return sum(map(len, self._spaces.values()))

    def _delete(self, key: BlockKey) -> None:
        namespace, block_hash = key
        entries = self._spaces[namespace]
        del entries[block_hash]
        if not entries:
            del self._spaces[namespace]
        self.changes += 1
        self.told(key, False)


def distinct(spots: Iterable[Spot]) -> tuple[Slot, ...]:
    """Their slots, each once."""
    return tuple(dict.fromkeys(slot for slot, _ in spots))


def places_of(spots: Iterable[Spot]) -> tuple[Place, ...]:
    return tuple(slot.places[position] for slot, position in spots)

"""Where the store has a block: (namespace, block hash) -> (slot, position). Only finds; decides nothing about slots.

The first to enter a block wins: a second copy of the same content stays out and dies with its holders.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from pdx.buffer.slots import BlockKey, Slot


class Index:
    """One thread. Every entry is counted in its slot's `indexed`."""

    def __init__(self) -> None:
        self._entries: dict[BlockKey, tuple[Slot, int]] = {}
        self.changes = 0  # grows with all that may make a lookup say something else
        self.told: Callable[[BlockKey, bool], None] = lambda key, found: None  # of each key found from now on, or not

    def add(self, slot: Slot) -> None:
        """Enters each of the slot's blocks that is not known yet."""
        for position, key in enumerate(slot.keys):
            if key is not None and key not in self._entries:
                self._entries[key] = (slot, position)
                slot.indexed += 1
                self.changes += 1
                self.told(key, True)

    def remove(self, slot: Slot) -> None:
        """Afterwards no lookup finds the slot."""
        for key in slot.keys:
            if key is not None and key in self._entries and self._entries[key][0] is slot:
                del self._entries[key]
                self.changes += 1
                self.told(key, False)
        slot.indexed = 0

    def forget(self, slot: Slot, position: int) -> BlockKey | None:
        """Afterwards no lookup finds this block of the slot. Returns its key; None if no lookup found it before."""
        key = slot.keys[position]
        if key is None or self._entries.get(key) != (slot, position):
            return None
        del self._entries[key]
        self.changes += 1
        slot.indexed -= 1
        self.told(key, False)
        return key

    def keys_of(self, slot: Slot) -> list[BlockKey]:
        """Those that lead to this slot, in its order."""
        get = self._entries.get
        return [key for key in slot.keys if key is not None and (entry := get(key)) is not None and entry[0] is slot]

    def find(self, namespace: bytes, block_hashes: Sequence[bytes]) -> list[tuple[Slot, int] | None]:
        """For each hash its slot and position, or None."""
        get = self._entries.get
        return [get((namespace, block_hash)) for block_hash in block_hashes]

    def leading(self, namespace: bytes, block_hashes: Sequence[bytes]) -> list[tuple[Slot, int]]:
        """The same up to the first unknown hash: later blocks are of no use without it."""
        found = []
        for block_hash in block_hashes:
            entry = self._entries.get((namespace, block_hash))
            if entry is None:
                break
            found.append(entry)
        return found

    def items(self) -> Iterator[tuple[BlockKey, tuple[Slot, int]]]:
        return iter(self._entries.items())

    def __len__(self) -> int:
        return len(self._entries)

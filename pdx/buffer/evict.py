"""Which cached slots go first when room is needed. A policy orders idle slots; the store does the rest.

A policy sees a slot from the moment its last hold ends until it is held again or leaves, and never any other.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from typing import Protocol

from pdx.buffer.slots import Slot


class Policy(Protocol):
    """Called by the store's thread only."""

    def touched(self, chain: Sequence[Slot]) -> None:
        """These have just become idle, in chain order. A head must outlive its tail: without it, the tail is no hit."""

    def removed(self, slot: Slot) -> None:
        """It is idle no longer. Slots never touched are ignored."""

    def victims(self) -> Iterator[Slot]:
        """All idle slots, the first to go first. The store removes slots only after it has finished iterating."""

    def __len__(self) -> int: ...


class Lru:
    """Least recently used first; of slots used together, the end of the chain first."""

    def __init__(self) -> None:
        self._slots: OrderedDict[Slot, None] = OrderedDict()

    def touched(self, chain: Sequence[Slot]) -> None:
        for slot in reversed(chain):
            self._slots[slot] = None
            self._slots.move_to_end(slot)

    def removed(self, slot: Slot) -> None:
        self._slots.pop(slot, None)

    def victims(self) -> Iterator[Slot]:
        return iter(self._slots)

    def __len__(self) -> int:
        return len(self._slots)

    def __repr__(self) -> str:
        return f"<Lru {len(self._slots)} idle slots>"

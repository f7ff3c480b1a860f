"""The blocks of an arena that a selection takes: those that lookups find, and those that they would find some day."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from pdx.buffer.index import Index
from pdx.buffer.selection import Selection
from pdx.buffer.slots import Slot, SlotState

Spot = tuple[Slot, int]  # one block: its slot and its position there


@dataclass(frozen=True, slots=True)
class Selected:
    """`held`: how many of `blocks` leave no room yet when they are cleared, for their slot is leased or has others."""

    blocks: tuple[Spot, ...]
    filling: tuple[Spot, ...]
    held: int

    @property
    def size_bytes(self) -> int:
        """Of `blocks`."""
        return sum(slot.layout.unit_bytes for slot, _ in self.blocks)


def selected(which: Selection, index: Index, slots: Iterable[Slot], *, now: float) -> Selected:
    blocks = tuple(spot for key, spot in index.items() if which.takes(key, age_s=now - spot[0].claimed_at))
    filling = tuple(
        (slot, position)
        for slot in slots
        if slot.state is SlotState.FILLING
        for position, key in enumerate(slot.keys)
        if key is not None and which.takes(key, age_s=now - slot.claimed_at)
    )
    leaving = Counter(slot for slot, _ in blocks)
    held = sum(count for slot, count in leaving.items() if slot.holds or count < slot.indexed)
    return Selected(blocks, filling, held)

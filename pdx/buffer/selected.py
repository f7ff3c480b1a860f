"""The blocks of an arena that a selection takes: those that lookups find, and those that they would find some day."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from pdx.buffer.index import Index, Spot
from pdx.buffer.lease import Lease
from pdx.buffer.selection import Selection
from pdx.buffer.slots import SlotState


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


def selected(which: Selection, index: Index, leases: Iterable[Lease], *, now: float) -> Selected:
    """`leases`: all that there are. What is being filled is filled for somebody."""
    blocks = tuple(spot for spot in _meant(which, index) if now - spot[0].claimed_at >= which.older_s)
    filling = tuple(
        (slot, position)
        for slot in dict.fromkeys(slot for lease in leases for slot in lease.slots)
        if slot.state is SlotState.FILLING
        for position, key in enumerate(slot.keys)
        if key is not None and which.takes(key, age_s=now - slot.claimed_at)
    )
    leaving = Counter(slot for slot, _ in blocks)
    held = sum(count for slot, count in leaving.items() if slot.holds or count < slot.indexed)
    return Selected(blocks, filling, held)


def _meant(which: Selection, index: Index) -> Iterator[Spot]:
    """Whatever its age. Looks up what is named, and else at the namespaces that are meant: others may be large."""
    named = which.named()
    if named is not None:
        for namespace, hashes in named.items():
            yield from filter(None, index.find(namespace, hashes))
        return
    for namespace in filter(which.takes_from, index.namespaces()):
        yield from index.within(namespace).values()

"""A policy's order of all idle slots, and beside it one for each layout, while the arena has slots of several.

A claim takes slots of its own layout, or whole extents of others. Where the first to go are others', and one block of
each of their extents is leased, it would look at all of them to find one of its own. Each order is the same policy's,
over what it was told: it lacks what nobody has used since there was a second layout.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

from pdx.buffer.evict import Policy
from pdx.buffer.slots import Slot
from pdx.layout import PageLayout

OTHERS_MAX = 512  # slots of other layouts that a claim looks at before its own: a quarter of a millisecond


class ByLayout:
    """See Policy: what it says is everybody's order."""

    def __init__(self, everybody: Policy[Slot], layouts: Collection[PageLayout]) -> None:
        """`layouts`: those of which the arena has slots, at any time."""
        self._everybody = everybody
        self._layouts = layouts
        self._own: dict[PageLayout, Policy[Slot]] = {}

    def touched(self, chain: Sequence[Slot]) -> None:
        self._everybody.touched(chain)
        if len(self._layouts) < 2:
            self._own.clear()
            return
        for slot in reversed(chain):
            if slot.layout not in self._own:
                self._own[slot.layout] = self._everybody.another()
            self._own[slot.layout].touched([slot])

    def grown(self, chain: Sequence[Slot]) -> None:
        self._everybody.grown(chain)
        for slot in reversed(chain) if self._own else ():
            if slot.layout in self._own:
                self._own[slot.layout].grown([slot])

    def removed(self, slot: Slot) -> None:
        self._everybody.removed(slot)
        if self._own and slot.layout in self._own:
            self._own[slot.layout].removed(slot)

    def forgotten(self, slot: Slot) -> None:
        self._everybody.forgotten(slot)
        if self._own and slot.layout in self._own:
            self._own[slot.layout].forgotten(slot)

    def evicted(self, slot: Slot) -> None:
        self._everybody.evicted(slot)
        if self._own and slot.layout in self._own:
            self._own[slot.layout].evicted(slot)

    def another(self) -> Policy[Slot]:
        return self._everybody.another()

    def victims(self) -> Iterator[Slot]:
        return self._everybody.victims()

    def victims_for(self, layout: PageLayout) -> Iterator[Slot]:
        """All, for a claim of this layout: its own come first behind OTHERS_MAX of others."""
        everybody, own, passed = self._everybody.victims(), dict[Slot, None](), 0
        for slot in everybody:
            yield slot
            if slot.layout == layout:
                own[slot] = None
                continue
            passed += 1
            if passed >= OTHERS_MAX:
                break
        if layout in self._own:
            for slot in self._own[layout].victims():
                if slot not in own:
                    own[slot] = None
                    yield slot
        for slot in everybody:
            if slot not in own:
                yield slot

    def orders(self) -> Iterator[tuple[PageLayout, Policy[Slot]]]:
        """All that are kept beside everybody's."""
        return iter(self._own.items())

    def __iter__(self) -> Iterator[Slot]:
        return iter(self._everybody)

    def __len__(self) -> int:
        return len(self._everybody)

    def __repr__(self) -> str:
        return f"<ByLayout {self._everybody!r}, {len(self._own)} layouts have an order>"

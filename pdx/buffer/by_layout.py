"""A policy's order of all idle slots, and beside it one for each layout, while the arena has slots of several.

A claim takes slots of its own layout, or whole extents of others. Where the first to go are others', and one block of
each of their extents is leased, it would look at all of them to find one of its own. A layout's order lacks what nobody
has used since there was a second layout.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from operator import attrgetter

from pdx.buffer.beside import Beside
from pdx.buffer.evict import Policy
from pdx.buffer.slots import Slot
from pdx.layout import PageLayout

OTHERS_MAX = 512  # slots of other layouts that a claim looks at before its own: a quarter of a millisecond


class ByLayout(Beside[PageLayout]):
    """See Beside."""

    def __init__(self, everybody: Policy[Slot], layouts: Collection[PageLayout]) -> None:
        """`layouts`: those of which the arena has slots, at any time."""
        super().__init__(everybody, attrgetter("layout"))
        self._layouts = layouts

    def touched(self, chain: Sequence[Slot]) -> None:
        super().touched(chain)
        if len(self._layouts) < 2:
            self._own.clear()
            return
        for slot in reversed(chain):
            if slot.layout not in self._own:
                self._own[slot.layout] = self.another()
            self._own[slot.layout].touched([slot])

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

    def __repr__(self) -> str:
        return f"<ByLayout {self._everybody!r}, {len(self._own)} layouts have an order>"

"""Pages that lie side by side in the arena: the larger the piece, the nearer a copy is to the speed of the bus."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from pdx.engine.streams import Copy
from pdx.layout import PageLayout, Place


class Run(NamedTuple):
    """`pages` places from `places[first]` on, which are side by side in each layer; `place` is the first of them."""

    first: int
    pages: int
    place: Place

    def copy(self, layout: PageLayout, layer: int) -> Copy:
        return Copy(self.first, self.pages, self.place.page_offset(layout, layer))


def runs(places: Sequence[Place]) -> list[Run]:
    """Cuts them, in their order, into as few runs as there are.

    >>> [(run.first, run.pages) for run in runs([Place(0, 4, n, 0, 1) for n in (0, 1, 3)])]
    [(0, 2), (2, 1)]
    """
    found: list[Run] = []
    for n, place in enumerate(places):
        if found:
            first, pages, start = found[-1]
            if (start.slot_offset, start.slot_blocks, start.position + pages) == (
                place.slot_offset,
                place.slot_blocks,
                place.position,
            ):
                found[-1] = Run(first, pages + 1, start)
                continue
        found.append(Run(n, 1, place))
    return found

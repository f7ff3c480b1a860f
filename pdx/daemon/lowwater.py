"""Room before anybody asks for it: what would be evicted next goes early, and what is nowhere else goes down first.

So a claim finds room instead of making it. One in a hurry still evicts what it needs, wherever else that is or is not.
"""

from __future__ import annotations

from pdx.buffer.slots import Slot
from pdx.buffer.store import Store
from pdx.buffer.water import Waterline
from pdx.daemon.tiering import Tiering


class LowWater:
    """Owned by the control thread."""

    def __init__(self, store: Store, line: Waterline, tiering: Tiering | None) -> None:
        self._store = store
        self._line = line
        self._tiering = tiering
        self._refilling = False

    def tick(self) -> None:
        """One round, if there is less room than there should be."""
        missing = self._line.missing(self._store.extents.free_share, refilling=self._refilling)
        self._refilling = missing > 0
        if self._refilling and not self._store.cleared:  # else room comes, of what is of no use
            going = self._next_to_go(missing)
            self._store.evict(going if self._tiering is None else self._tiering.send_down(going))

    def _next_to_go(self, missing: float) -> list[Slot]:
        """Idle slots, the first to go first. Those on their way down count as room that comes by itself."""
        found, blocks = [], 0
        for slot in self._store.policy.victims():
            if missing <= 0 or blocks >= self._line.batch:
                break
            missing -= self._store.extents.share(slot.run)
            blocks += slot.blocks
            if slot.idle:
                found.append(slot)
        return found

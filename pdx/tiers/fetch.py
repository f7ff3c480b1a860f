"""Loading the blocks of one prompt from a tier, in order and ahead of their use. Sans-IO: ends in, indexes out.

A prompt can use blocks only up to the first that is missing. So loads run in order, some of them ahead of the last one
that is in, and after a miss everything behind it is given up.
"""

from __future__ import annotations

from pdx.tiers.tier import End, Loaded

# Enough to keep a disk's queue full while the first blocks are being copied on, little enough to share it.
AHEAD = 16


class Fetch:
    """The driver submits `wanted()` in order, tells `submitted`, passes ends on, and cancels `to_cancel()`."""

    def __init__(self, blocks: int, *, ahead: int = AHEAD) -> None:
        self.loaded = 0  # leading blocks that are in
        self._ahead = ahead
        self._end = blocks  # nothing from here on is of use
        self._next = 0
        self._open: dict[int, int] = {}  # ticket -> index
        self._in: set[int] = set()

    def wanted(self) -> range:
        """Blocks to submit now. A tier that refuses one will take it when others have ended: ask again then."""
        free = max(0, self._ahead - len(self._open))
        return range(self._next, max(self._next, min(self._end, self._next + free)))

    def submitted(self, index: int, ticket: int) -> None:
        assert index == self._next, f"block {index} was submitted, it was the turn of {self._next}"
        self._next += 1
        self._open[ticket] = index

    def on(self, end: End) -> int | None:
        """The index of the block that is now in, or None if it is not or is of no use any more."""
        index = self._open.pop(end.ticket)
        if not isinstance(end, Loaded):
            self._end = min(self._end, index)
            return None
        if index >= self._end:
            return None
        self._in.add(index)
        while self.loaded in self._in:
            self._in.remove(self.loaded)
            self.loaded += 1
        return index

    def stop(self) -> None:
        """The prompt is gone, or loading is no longer worth it: what is in stays, nothing more is wanted."""
        self._end = min(self._end, self.loaded)

    def to_cancel(self) -> list[int]:
        """Tickets whose blocks nobody can use. Their buffers are busy until they end all the same."""
        return [ticket for ticket, index in self._open.items() if index >= self._end]

    @property
    def is_over(self) -> bool:
        """Nothing is open, nothing will be: `loaded` is the result, and all buffers are quiet."""
        return not self._open and self._next >= self._end

    def __repr__(self) -> str:
        return f"<Fetch {self.loaded} of {self._end} blocks in, {len(self._open)} open>"

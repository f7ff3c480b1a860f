"""A memory tier that works when a test wants it to."""

from __future__ import annotations

from dataclasses import replace

from pdx.tiers.memory import MemoryTier
from pdx.tiers.tier import Event, Failed, Read, Request, TierStats, Write


class SlowTier(MemoryTier):
    """Ends `pace` writes each time that it is asked for events, and all reads. `takes`, `refuses`: writes."""

    def __init__(self, *, cap_bytes: int) -> None:
        super().__init__(cap_bytes=cap_bytes)
        self.pace = 100
        self.takes = True
        self.refuses = False
        self.state = "well"
        self.refused: set[bytes] = set()  # hashes

    def submit(self, request: Request) -> int | None:
        return super().submit(request) if self.takes or isinstance(request, Read) else None

    def take_events(self) -> list[Event]:
        left = self.pace
        for ticket, request in list(self._queue):
            if isinstance(request, Read):
                self._queue.remove((ticket, request))
                self._read(ticket, request)
            elif left:
                left -= 1
                self._queue.remove((ticket, request))
                self._end(ticket, request)
        return self._inbox.take()

    def says(self, event: Event) -> None:
        self._inbox.add(event)

    def stats(self) -> TierStats:
        return replace(super().stats(), state=self.state)

    def _end(self, ticket: int, request: Write) -> None:
        if self.refuses:
            self.refused.add(request.key[1])
            self._say("failed", Failed(ticket, "full"))
        else:
            self._write(ticket, request)

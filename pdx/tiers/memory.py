"""The reference tier: blocks in this process's memory, no threads, the same order every time.

Requests are worked off in take_events(), one after the other, so that whoever forgets to wait for an end is found out.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from itertools import count

from pdx.buffer.evict import Lru, Policy
from pdx.buffer.selection import Selection
from pdx.errors import ClosedTier
from pdx.tiers import sealed
from pdx.tiers.crew import Inbox
from pdx.tiers.ledger import EntryState, Ledger
from pdx.tiers.sweep import Swept, survey, sweep
from pdx.tiers.tier import Event, Failed, Key, Loaded, Missed, Read, Request, TierStats, Write, Written

OPEN_MAX = 64  # of reads and of writes: as the disk tier's


class MemoryTier:
    """See Tier."""

    def __init__(
        self, *, cap_bytes: int, policy: Policy[str] | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._clock = clock
        self.ledger = Ledger(cap_bytes=cap_bytes, policy=Lru() if policy is None else policy, group_of=sealed.labels_of)
        self._blocks: dict[str, tuple[bytes, bytes]] = {}  # payload, meta
        self._queue: deque[tuple[int, Request]] = deque()
        self._inbox: Inbox[Event] = Inbox()
        self._tickets = count(1)
        self._counts = dict.fromkeys(("loaded", "missed", "written", "failed", "refused"), 0)
        self._is_closed = False

    def fileno(self) -> int:
        return self._inbox.fileno()

    def submit(self, request: Request) -> int | None:
        if self._is_closed:
            raise ClosedTier("the memory tier is closed")
        if isinstance(request, Write):
            sealed.check_sizes(request.key, request.meta, sum(page.nbytes for page in request.pages))
        if sum(isinstance(other, type(request)) for _, other in self._queue) >= OPEN_MAX:
            self._counts["refused"] += 1
            return None
        ticket = next(self._tickets)
        self._queue.append((ticket, request))
        self._inbox.announce()
        return ticket

    def cancel(self, ticket: int) -> None:
        for entry in self._queue:
            if entry[0] == ticket:
                self._queue.remove(entry)
                self._say("failed", Failed(ticket, "cancelled"))
                return

    def contains(self, keys: Sequence[Key]) -> list[bool]:
        return list(map(self.ledger.finds, sealed.names_of(keys)))

    def used(self, chain: Sequence[Key]) -> None:
        self.ledger.used(sealed.names_of(chain))

    def remove(self, key: Key) -> None:
        self._condemn(sealed.name_of(key))

    @property
    def unseen(self) -> str:
        return ""

    def survey(self, which: Selection) -> Swept:
        return survey(self.ledger, which, now=self._clock())

    def sweep(self, which: Selection) -> Swept:
        return sweep(self.ledger, which, now=self._clock(), condemn=self._condemn)

    def watch(self, told: Callable[[str, bool], None], told_all: Callable[[bool], None]) -> list[str]:
        self.ledger.told = told
        return [entry.name for entry in self.ledger.found()]

    def take_events(self) -> list[Event]:
        while self._queue:
            ticket, request = self._queue.popleft()
            if isinstance(request, Write):
                self._write(ticket, request)
            else:
                self._read(ticket, request)
        return self._inbox.take()

    def stats(self) -> TierStats:
        reads = sum(isinstance(request, Read) for _, request in self._queue)
        return TierStats(
            state="well", blocks=len(self.ledger), used_bytes=self.ledger.used_bytes,
            cap_bytes=self.ledger.cap_bytes, open_reads=reads, open_writes=len(self._queue) - reads,
            evicted=self.ledger.evicted, changes=self.ledger.changes, **self._counts,
        )  # fmt: skip

    def close(self, *, drain_s: float) -> None:
        if self._is_closed:
            return
        self._is_closed = True
        while self._queue:
            self._say("failed", Failed(self._queue.popleft()[0], "the tier was closed"))
        self._inbox.close()

    def check_integrity(self) -> None:
        """Raises IntegrityError unless the accounts add up."""
        self.ledger.check_integrity()

    def __repr__(self) -> str:
        return f"<MemoryTier {self.ledger}, {len(self._queue)} open>"

    def _write(self, ticket: int, request: Write) -> None:
        name = sealed.name_of(request.key)
        if self.ledger.state(name) is EntryState.KEPT:
            self._say("written", Written(ticket, 0.0))
            return
        payload = b"".join(request.pages)
        victims = self.ledger.reserve(name, len(payload) + len(request.meta), now=self._clock())
        if victims is None:
            self._say("failed", Failed(ticket, "more bytes than the whole tier may take"))
            return
        for victim in victims:
            del self._blocks[victim]
        self._blocks[name] = payload, request.meta
        self.ledger.settle(name, deleted=victims, published_bytes=len(payload) + len(request.meta))
        self._say("written", Written(ticket, 0.0))

    def _read(self, ticket: int, request: Read) -> None:
        name = sealed.name_of(request.key)
        if not self.ledger.finds(name):
            self._say("missed", Missed(ticket, "unknown"))
            return
        payload, meta = self._blocks[name]
        if len(payload) != sum(page.nbytes for page in request.pages):
            self.remove(request.key)
            self._say("missed", Missed(ticket, f"its payload has {len(payload)} bytes"))
            return
        self.ledger.begin_read(name)
        start = 0
        for page in request.pages:
            page[:] = payload[start : start + page.nbytes]
            start += page.nbytes
        self.ledger.end_read(name)
        self._say("loaded", Loaded(ticket, meta, 0.0))

    def _condemn(self, name: str) -> None:
        if self.ledger.condemn(name):
            self._delete(name)

    def _delete(self, name: str) -> None:
        del self._blocks[name]
        self.ledger.delete(name)

    def _say(self, outcome: str, event: Event) -> None:
        self._counts[outcome] += 1
        self._inbox.add(event)

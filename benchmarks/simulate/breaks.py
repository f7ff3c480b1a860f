"""Naive variants of the parts under test. Each leaves out one thing that the design insists on, and must be caught.

`Parts` says of which classes and functions a simulated host and engine are made; the default is production's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import xxhash

from benchmarks.simulate.worker import fault_of
from pdx.buffer.claim import Claim
from pdx.buffer.headers import Headers
from pdx.buffer.lease import Lease, LeaseState, Owner
from pdx.buffer.store import Store
from pdx.daemon.handoffs import Handoffs
from pdx.daemon.ports import HandoffKey, Ports
from pdx.daemon.receiving import Incoming, ReceivingHalves
from pdx.daemon.sending import SendingHalves
from pdx.daemon.sessions import Engine, Sessions
from pdx.handoff.handle import peek
from pdx.layout import PageLayout, Place
from pdx.transport.api import WindowClosed
from pdx.transport.windows import CheckedRegion, WindowTable
from pdx.wire import Commit, LetGo, OpenLoad, PeerMessage

FencePassed = Callable[[str, int], bool]
Fault = Callable[[bytes, Headers, Place, int], str]


@dataclass(frozen=True)
class Parts:
    """What a run is made of. `trusting`: accesses are not checked, so that only what is served can be wrong."""

    store: Callable[..., Store] = Store
    handoffs: Callable[[Store, Ports], Handoffs] = Handoffs
    sessions: Callable[[int], Sessions] = Sessions
    fence_passed: Callable[[FencePassed], FencePassed] = lambda ask: ask
    region: Callable[[memoryview, WindowTable], CheckedRegion] = CheckedRegion
    fault: Fault = fault_of
    trusting: bool = False


class NoQuarantine(Store):
    """Frees slots when the right to them is over, whoever may still touch them."""

    def expire(self, now: float) -> list[Lease]:
        expired = super().expire(now)
        for lease in expired:
            self.quiesce(lease)
        return expired

    def revoke(self, lease: Lease) -> None:
        super().revoke(lease)
        if lease.state is LeaseState.QUARANTINED:
            self.quiesce(lease)


class SharedTails(Store):
    """Keeps tails under the hash of their tokens, as if these said all."""

    def claim(
        self,
        owner: Owner,
        namespace: bytes,
        pages: PageLayout,
        block_hashes: Sequence[bytes],
        *,
        tail: bool,
        now: float,
        ttl_s: float,
    ) -> Claim | None:
        hashes = [*block_hashes, b"tail of some tokens"] if tail else block_hashes
        return super().claim(owner, namespace, pages, hashes, tail=False, now=now, ttl_s=ttl_s)


class NoBudgets(Handoffs):
    """Waits for ever."""

    def _look_at_clock(self, now: float) -> None:
        for lease in self._desk.store.expire(now):
            self._lease_expired(lease, now)


class UnpinnedReads(Handoffs):
    """Tells decode engines where the pages are, and keeps nothing for them. Right only with the generation check."""

    def open_load(self, engine: Engine, message: OpenLoad, now: float) -> None:
        super().open_load(engine, message, now)
        done = LetGo(handoff_id=peek(message.handle).handoff_id, side="load", fence=0, ok=True)
        self.let_go(engine.info.engine_id, done, now)


class CommitBelieved(Handoffs):
    """Takes COMMIT's word for it, and counts no page."""

    def __init__(self, store: Store, ports: Ports) -> None:
        super().__init__(store, ports)
        self._receiving.__class__ = _BelievingHalves


class _BelievingHalves(ReceivingHalves):
    def message(self, record: Incoming, message: PeerMessage, now: float) -> None:
        if isinstance(message, Commit):
            self.act(record, record.receiver.checked(ok=True, now=now), now)
        else:
            super().message(record, message, now)


class UnheldReturns(Handoffs):
    """Hands blocks back out of slots that it does not hold: they are cache anyway."""

    def __init__(self, store: Store, ports: Ports) -> None:
        super().__init__(store, ports)
        self._sending.__class__ = _CarelessHalves


class _CarelessHalves(SendingHalves):
    def hand_over(self, *about: Any, **more: Any) -> HandoffKey:
        key = super().hand_over(*about, **more)
        record = self.records.get(key)
        if record is not None and record.wire is not None:
            self._desk.end_lease(record.wire)
            record.wire = None
        return key


def believe_let_go(ask: FencePassed) -> FencePassed:
    """A LET_GO counts at once: nobody waits for the step that it names."""
    return lambda engine_id, step: True


class EverOpen(CheckedRegion):
    """Says that a window is closed, and leaves it open."""

    def close_window(self, window: int) -> None:
        self.windows._emit(WindowClosed(window))


def only_checksum(page: bytes, arena: Headers, place: Place, layer: int) -> str:
    """A slot that has changed hands has right checksums too: of another's pages."""
    return "" if xxhash.xxh3_64_intdigest(page) == arena.checksum(place, layer) else "checksum"


def only_generation(page: bytes, arena: Headers, place: Place, layer: int) -> str:
    return "" if arena.generation(place.header_offset) == place.generation else "generation"


PRODUCTION = Parts()
BREAKS: dict[str, Parts] = {
    "quarantine": replace(PRODUCTION, store=NoQuarantine),
    "generation": replace(PRODUCTION, handoffs=UnpinnedReads, fault=only_checksum, trusting=True),
    "checksum": replace(PRODUCTION, fault=only_generation),
    "commit": replace(PRODUCTION, handoffs=CommitBelieved),
    "tail": replace(PRODUCTION, store=SharedTails),
    "budgets": replace(PRODUCTION, handoffs=NoBudgets),
    "fence": replace(PRODUCTION, fence_passed=believe_let_go),
    "window": replace(PRODUCTION, region=EverOpen),
    "hold": replace(PRODUCTION, handoffs=UnheldReturns),
}

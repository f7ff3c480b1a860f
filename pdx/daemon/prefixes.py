"""Requests without a handle: what the arena has of their prompts, and room for what their engines compute.

A look-up and an offer to keep blocks are answered at once, from what is known in memory; blocks that a tier still has
to bring are promised. An offer that does not fit now is refused, and so is every offer while handoffs wait for room,
for cache is worth less than they are.
"""

from __future__ import annotations

from pdx.buffer.lease import LeaseState, Owner
from pdx.daemon.holds import Hold, Holds
from pdx.daemon.ports import Desk, namespace_for
from pdx.daemon.sessions import Engine
from pdx.daemon.tiering import Tiering
from pdx.errors import Refused
from pdx.layout import Place
from pdx.wire import Keep, LetGo, LoadOpened, LookUp, SendEnded, SendOpened


class Prefixes:
    """Owned by the control thread."""

    def __init__(self, desk: Desk, holds: Holds, tiering: Tiering | None) -> None:
        self._desk = desk
        self._holds = holds
        self._tiering = tiering

    def look_up(self, engine: Engine, message: LookUp, now: float, *, room: bool) -> None:
        """`room`: nobody more important waits for some, so that blocks may come up from below."""
        ports, engine_id, load = self._desk.ports, engine.info.engine_id, message.handoff_id
        places = [] if self._holds.get(load, "load") else self._lease_leading(engine, message, now, room=room)
        ports.counters["lookups"] += 1
        ports.counters["lookup_blocks"] += len(message.block_hashes)
        ports.counters["lookup_hit_blocks"] += len(places)
        answer = LoadOpened(
            request_id=message.request_id, handoff_id=load, status="granted" if places else "absent", places=places
        )
        ports.to_engine(engine_id, answer)

    def _lease_leading(self, engine: Engine, message: LookUp, now: float, *, room: bool) -> list[Place]:
        """The leading blocks that are here or come from below, held for the engine."""
        assert engine.pages is not None
        store, engine_id, load = self._desk.store, engine.info.engine_id, message.handoff_id
        namespace = namespace_for(engine, message.tenant)
        owner, lease_s = Owner("session", engine_id), self._desk.ports.lease_s
        read = store.read(owner, namespace, message.block_hashes, now=now, ttl_s=lease_s)
        places, leases = ([], []) if read is None else (list(read.places), [read.lease])
        rest = message.block_hashes[len(places) :]
        if self._tiering is not None and rest and room:
            more, ready = self._tiering.promote(namespace, engine.pages, rest, load=load, engine_id=engine_id, now=now)
            places += more
            leases += ready
        if places:
            lease = store.lease(places, owner, now=now, ttl_s=lease_s)
            self._holds.add(Hold(load, "load", engine_id, lease, places=places))
        for each in leases:
            store.release(each)
        return places

    def keep(self, engine: Engine, message: Keep, now: float, *, room: bool) -> None:
        """`room`: nobody more important waits for some."""
        assert engine.pages is not None
        ports, engine_id = self._desk.ports, engine.info.engine_id
        claim, reason = None, "the arena is full"
        if self._holds.get(message.handoff_id, "send") is not None:
            reason = "this name is taken"
        elif room:
            try:
                claim = self._desk.store.claim(
                    Owner("session", engine_id), namespace_for(engine, message.tenant), engine.pages,
                    message.block_hashes, tail=False, now=now, ttl_s=ports.lease_s,
                )  # fmt: skip
            except Refused as error:
                reason = str(error)
        if claim is None:
            ports.counters["keeps_refused"] += 1
            ports.to_engine(engine_id, SendEnded(request_id=message.request_id, handoff_id=b"", reason=reason))
            return
        self._holds.add(Hold(message.handoff_id, "send", engine_id, claim.lease, claim=claim))
        places = [place if block in claim.fresh else None for block, place in enumerate(claim.places)]
        opened = SendOpened(request_id=message.request_id, handoff_id=message.handoff_id, places=places)
        ports.to_engine(engine_id, opened)

    def ended(self, hold: Hold, message: LetGo) -> None:
        """The engine touches these slots no more; its lease is about to end."""
        if hold.side == "load":
            if self._tiering is not None:
                self._tiering.withdrawn(hold.handoff_id)
            return
        claim = hold.claim
        if claim is None:
            return
        if message.ok and hold.lease.state is LeaseState.LIVE:
            self._desk.store.commit(claim)
            self._desk.ports.counters["blocks_kept"] += len(claim.fresh)
        else:
            self._desk.store.abandon(claim)

"""Requests without a handle: what the arena has of their prompts, and room for what their engines compute.

A look-up and an offer to keep blocks are answered at once, from what is known in memory; blocks that a tier still has
to bring are promised. An offer that does not fit now is refused, and so is every offer while handoffs wait for room,
for cache is worth less than they are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from pdx.buffer.claim import Claim
from pdx.buffer.lease import Lease, LeaseState, Owner
from pdx.daemon.costs import Costs
from pdx.daemon.grips import Grip, Grips
from pdx.daemon.ports import Desk, namespace_for
from pdx.daemon.sessions import Engine
from pdx.daemon.tiering import Load, Tiering
from pdx.errors import Refused
from pdx.layout import PageLayout, Place
from pdx.verbs import Found
from pdx.wire import Keep, LetGo, LoadOpened, LookUp, SendEnded, SendOpened


class Prefixes:
    """Owned by the control thread."""

    def __init__(self, desk: Desk, grips: Grips, tiering: Tiering | None, costs: Costs) -> None:
        self._desk = desk
        self._grips = grips
        self._costs = costs
        self._tiering = tiering

    def look_up(self, engine: Engine, message: LookUp, now: float, *, room: bool) -> None:
        """`room`: nobody more important waits for some, so that blocks may come up from below."""
        ports, engine_id, load = self._desk.ports, engine.info.engine_id, message.handoff_id
        places: Sequence[Place] = ()
        if not self._grips.get(load, "load"):
            assert engine.pages is not None
            namespace = namespace_for(engine, message.tenant)
            here = len(self._desk.store.index.leading(namespace, message.block_hashes))
            wanted = self._costs.worthwhile(engine, message, arena_blocks=here, room=room)
            leased = self.lease_leading(
                Owner("session", engine_id), namespace, engine.pages, wanted,
                load=(engine_id, load), now=now, ttl_s=ports.lease_s, room=room,
            )  # fmt: skip
            if leased is not None:
                lease, places = leased
                ranks, from_arena = engine.info.layout.ranks, len(places) <= here
                grip = Grip(
                    load, "load", engine_id, lease, places=places, ranks=ranks, yields=True, from_arena=from_arena
                )
                self._grips.add(grip)
        ports.counters["lookups"] += 1
        ports.counters["lookup_blocks"] += len(message.block_hashes)
        ports.counters["lookup_hit_blocks"] += len(places)
        answer = LoadOpened(
            request_id=message.request_id,
            handoff_id=load,
            status="granted" if places else "absent",
            places=list(places),
        )
        ports.to_engine(engine_id, answer)

    def leading(self, namespace: bytes, hashes: Sequence[bytes], *, block_tokens: int) -> Found:
        """What `look_up` would give an engine that asked now, if the arena has room for what comes from below."""
        index = self._desk.store.index
        blocks = len(index.leading(namespace, hashes))
        if self._tiering is not None:
            blocks += self._tiering.leading(namespace, hashes[blocks:])
        here = sum(spot is not None for spot in index.find(namespace, hashes[:blocks]))
        generation = index.changes + (self._tiering.changes if self._tiering is not None else 0)
        return Found(
            blocks=blocks, tokens=blocks * block_tokens, arena_blocks=here, disk_blocks=blocks - here,
            generation=generation,
        )  # fmt: skip

    def lease_leading(
        self,
        owner: Owner,
        namespace: bytes,
        pages: PageLayout,
        hashes: Sequence[bytes],
        *,
        load: Load,
        now: float,
        ttl_s: float,
        room: bool,
    ) -> tuple[Lease, tuple[Place, ...]] | None:
        """These blocks, which are here or below, under one lease, as many as there is room for; None if there are none.

        `room`: whether those come up that are below.
        """
        store = self._desk.store
        read = store.read(owner, namespace, hashes, now=now, ttl_s=ttl_s)
        places, leases = ([], []) if read is None else (list(read.places), [read.lease])
        rest = hashes[len(places) :]
        if self._tiering is not None and rest and room:
            more, ready = self._tiering.promote(namespace, pages, rest, load=load, now=now)
            places += more
            leases += ready
        lease = store.lease(places, owner, now=now, ttl_s=ttl_s) if places else None
        for each in leases:
            store.release(each)
        return None if lease is None else (lease, tuple(places))

    def hear_missed(self, missed: Callable[[Load, Place], None]) -> None:
        """From now on, of blocks that were to come from below for a load without an engine, and don't."""
        if self._tiering is not None:
            self._tiering.missed = missed

    def waits(self, load: Load) -> bool:
        """Whether this load has something to get from below yet."""
        return self._tiering is not None and self._tiering.waits(load)

    def withdrawn(self, load: Load) -> None:
        """Nobody waits any more for what this load had yet to get from below."""
        if self._tiering is not None:
            self._tiering.withdrawn(load)

    def keep(self, engine: Engine, message: Keep, now: float, *, room: bool) -> bool:
        """Whether they are. `room`: nobody more important waits for some."""
        assert engine.pages is not None
        ports, engine_id = self._desk.ports, engine.info.engine_id
        claim, reason = None, "the arena is full"
        if self._grips.get(message.handoff_id, "send") is not None:
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
            return False
        ranks = engine.info.layout.ranks
        grip = Grip(
            message.handoff_id, "send", engine_id, claim.lease, claim=claim, request_id=message.request_id, ranks=ranks
        )
        self._grips.add(grip)
        places = [place if block in claim.fresh else None for block, place in enumerate(claim.places)]
        opened = SendOpened(request_id=message.request_id, handoff_id=message.handoff_id, places=places)
        ports.to_engine(engine_id, opened)
        return True

    def ended(self, grip: Grip, message: LetGo, now: float) -> bool:
        """The engine touches these slots no more; its lease is about to end. Whether they are kept."""
        if grip.side == "load":
            self.withdrawn((grip.engine_id, grip.handoff_id))
            if grip.from_arena:
                self._costs.ended(grip, message, grip.lease.slots[0].layout, now)
            return False
        claim = grip.claim
        if claim is None:
            return False
        if not message.ok or grip.lease.state is not LeaseState.LIVE or not self._whole(claim):
            self._desk.store.abandon(claim)
            return False
        self._desk.store.commit(claim)
        self._desk.ports.counters["blocks_kept"] += len(claim.fresh)
        return True

    def _whole(self, claim: Claim) -> bool:
        """Whether every page of it is filled. Who waited for one that never comes would wait for all of its time."""
        arena = self._desk.store.arena
        return all(
            arena.watermark(claim.places[block].header_offset, shard) == slot.layout.shard_layers
            for slot in claim.fresh_slots[:1]  # they are of one layout
            for block in claim.fresh
            for shard in range(slot.layout.shards)
        )

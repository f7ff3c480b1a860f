"""The buffer manager: one host's KV blocks in one arena. All changes of slots, leases and index go through here.

A prompt gets all of its room or none of it (`claim`), is filled, then committed or abandoned. Leases hold slots; a
slot without holds is cache if lookups can find it, and free if not. Nothing waits and nothing is timed here: a claim
that does not fit returns None, and `now` is an argument, in seconds of the caller's monotonic clock.

Namespaces are opaque: blocks of equal namespace and hash are interchangeable, so the caller makes it name the layout
too. One thread owns a Store; others touch only the bytes of places it has handed out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import groupby, islice
from typing import Any

from pdx.buffer.arena import Arena
from pdx.buffer.audit import check_accounts
from pdx.buffer.by_tenant import ByTenant
from pdx.buffer.claim import Claim, ReadClaim
from pdx.buffer.evict import Lru, Policy
from pdx.buffer.extents import Extents, Run
from pdx.buffer.figures import figures, slot_counts
from pdx.buffer.index import Index, Spot, distinct, places_of
from pdx.buffer.lease import Lease, LeaseState, Owner
from pdx.buffer.quota import Quotas
from pdx.buffer.room import check_possible, first_to_go, own_to_go
from pdx.buffer.selected import Selected, selected
from pdx.buffer.selection import Selection
from pdx.buffer.slots import BlockKey, Slot, SlotEvent, SlotState
from pdx.errors import IllegalTransition, Refused
from pdx.layout import PageLayout, Place

POISON = 0xDB
DROPPED_AT_ONCE = 256  # slots: 4 us each of the thread that owns the store
_GENERATION_MAX = (1 << 32) - 1  # a header has 32 bits for it; 0 means never claimed

NewSlot = Callable[..., Slot]  # of a run and its keys


class Store:
    """The facade of pdx.buffer. The arena is borrowed: close it after the store's last use.

    `handoff_share` bounds what one prompt may take of the arena, `quotas` what one tenant may, cached and leased
    together; `tenant_of` says whose a namespace is. `poison` overwrites freed slots, for tests.
    """

    def __init__(
        self,
        arena: Arena,
        *,
        extent_bytes: int,
        handoff_share: float,
        poison: bool = False,
        policy: Policy | None = None,
        quotas: Quotas | None = None,
        tenant_of: Callable[[bytes], bytes] = lambda namespace: b"",
    ) -> None:
        self.arena = arena
        self.handoff_share = handoff_share
        self.extents = Extents(arena_bytes=len(arena.memory), extent_bytes=extent_bytes)
        self.index = Index()
        self.slots: dict[int, Slot] = {}  # all that are not free, by offset
        self.leases: dict[int, Lease] = {}  # all that have not ended, by id
        self.cleared: dict[Slot, None] = {}  # idle slots of which lookups find nothing, and which are to be freed
        self.quotas = Quotas() if quotas is None else quotas
        self.policy = ByTenant(Lru() if policy is None else policy, self.quotas, self.extents.pools)
        self._tenant_of = tenant_of
        self.freed = 0  # grows with each slot that may go from now on, or has gone
        self.evicted_blocks = 0
        self.evicted_ahead_blocks = 0  # of these, before a claim asked for their room
        self.on_evict: Callable[[Slot], None] = lambda slot: None  # told of a slot that lookups still find
        self.on_commit: Callable[[Sequence[Slot]], None] = lambda slots: None  # told of slots that are whole now
        self._poison = poison
        self._generation = 0
        self._lease_id = 0

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
        """Room for a whole prompt under one lease; headers carry the new generation before this returns.

        Blocks that are ready are shared, all others get fresh slots, for which idle slots are evicted. None, with
        nothing evicted, if it does not fit now: try again when `freed` or the index has changed. Raises Refused if it
        never can, as one that names a block twice, and if its tenant's quota is leased already: nobody is to wait in
        line behind who waits for himself.
        """
        if len(set(block_hashes)) < len(block_hashes):
            raise Refused("a prompt names each of its blocks once")
        tenant = self._tenant_of(namespace)
        allowed = int(self.extents.capacity(pages) * self.handoff_share)
        check_possible(pages, len(block_hashes) + tail, allowed, self.quotas, tenant)
        found = self._find_ready(namespace, pages, block_hashes) + [None] * tail
        fresh = frozenset(index for index, spot in enumerate(found) if spot is None)
        shared = distinct(spot for spot in found if spot)
        # Held before room is made, or what was just found would be what gets evicted.
        self._hold(shared)
        try:
            fits = self._make_room(pages, len(fresh), tenant)
        except Refused:
            self._unhold(shared)
            raise
        if not fits:
            self._unhold(shared)
            return None
        keys: list[BlockKey | None] = [(namespace, block_hash) for block_hash in block_hashes] + [None] * tail
        new = self._next_generation(now, tenant)
        spots = self._fill_gaps(pages, found, keys, new)
        fresh_slots = distinct(spots[index] for index in sorted(fresh))
        self._hold(fresh_slots)
        lease = self._grant(owner, distinct(spots), now + ttl_s)
        return Claim(lease, places_of(spots), fresh, tail, fresh_slots)

    def claim_each(
        self,
        owner: Owner,
        namespace: bytes,
        pages: PageLayout,
        block_hashes: Sequence[bytes],
        *,
        now: float,
        ttl_s: float,
    ) -> list[Claim]:
        """Claims of one fresh block each, for the first of these, none of which is ready: as many as fit now.

        Room is made once for all of them, which is what makes many cheap. Whoever fills them commits each by itself.
        """
        tenant = self._tenant_of(namespace)
        blocks = self._fitting(pages, len(block_hashes), tenant)
        if not blocks:
            return []
        has_room = self._make_room(pages, blocks, tenant)
        assert has_room, f"no room for {blocks} blocks that fit"
        runs = [single for run in self.extents.take(pages, blocks) for single in run.singles()]
        keys = [(namespace, block_hash) for block_hash in block_hashes[:blocks]]
        claims = []
        for slot, _ in self._enter(pages, runs, keys, self._next_generation(now, tenant)):
            slots = (slot,)
            self._hold(slots)
            claims.append(Claim(self._grant(owner, slots, now + ttl_s), slot.places, frozenset((0,)), False, slots))
        return claims

    def read(
        self, owner: Owner, namespace: bytes, block_hashes: Sequence[bytes], *, now: float, ttl_s: float
    ) -> ReadClaim | None:
        """A lease on the leading blocks that are ready; None if not even the first is."""
        spots = self.index.leading(namespace, block_hashes)
        if not spots:
            return None
        slots = distinct(spots)
        self._hold(slots)
        return ReadClaim(self._grant(owner, slots, now + ttl_s), places_of(spots))

    def lease(self, source: Claim | ReadClaim | Sequence[Place], owner: Owner, *, now: float, ttl_s: float) -> Lease:
        """One more lease, over the slots of a claim or of these places, independent of those that stand.

        Raises IllegalTransition, changing nothing, if one of the slots has been given up.
        """
        slots = source.lease.slots if isinstance(source, Claim | ReadClaim) else self._slots_at(source)
        for slot in slots:
            if slot.state not in (SlotState.FILLING, SlotState.READY):
                raise IllegalTransition(f"lease of {slot}")
        self._hold(slots)
        return self._grant(owner, slots, now + ttl_s)

    def lease_to_copy(self, places: Sequence[Place], owner: Owner, *, now: float, ttl_s: float) -> Lease:
        """A lease for who copies ready blocks elsewhere: no use of them, so that what goes first stays what goes first.

        Raises IllegalTransition, changing nothing, if one of the slots is not ready.
        """
        slots = self._slots_at(places)
        for slot in slots:
            if slot.state is not SlotState.READY:
                raise IllegalTransition(f"copy of {slot}")
        self._hold(slots, is_use=False)
        return self._grant(owner, slots, now + ttl_s, is_use=False)

    def commit(self, claim: Claim) -> None:
        """The fresh blocks are whole: lookups find those that nobody else committed first.

        Raises IllegalTransition, changing nothing, if they were committed, abandoned or given up before.
        """
        self._check_all(claim.fresh_slots, "commit")
        for slot in claim.fresh_slots:
            slot.on("commit")
            self.index.add(slot)
        self.on_commit(claim.fresh_slots)

    def forget(self, lease: Lease, places: Iterable[Place]) -> list[BlockKey]:
        """No lookup finds these blocks, which lie in slots that `lease` holds, nor will: their bytes are not right.

        Returns those that lookups could have found, or would have. The slots stay as they are until their holds end.
        """
        held = {slot.run.offset: slot for slot in lease.slots}
        spots = [(held[place.slot_offset], place.position) for place in places if place.slot_offset in held]
        # One that was read while it came may be whole before that is broken off.
        keys = (slot.unname(position) or self.index.forget(slot, position) for slot, position in spots)
        return [key for key in keys if key is not None]

    def survey(self, which: Selection, *, now: float) -> Selected:
        """What `clear` would take now. Looks at what is named, else at all of the namespaces meant, and at leases."""
        return selected(which, self.index, self.leases.values(), now=now)

    def clear(self, which: Selection, *, now: float) -> Selected:
        """No lookup finds these blocks from now on, nor when they are being filled and are whole some day.

        Who holds their slots goes on; the room is free when the last hold ends and no other block of the slot is found.
        Of slots that nobody holds some are free at once, and the others by `drop_cleared`, or if a claim wants room.
        """
        found = self.survey(which, now=now)
        for slot, position in found.filling:
            slot.unname(position)
        for slot, position in found.blocks:
            self.index.forget(slot, position)
        for slot in distinct(found.blocks):
            if slot.idle and not slot.indexed:
                self.cleared[slot] = None
            elif slot.unused and not slot.indexed:
                self.policy.removed(slot)
        self.drop_cleared()
        return found

    def drop_cleared(self) -> None:
        """Frees some of what was cleared: DROPPED_AT_ONCE slots."""
        for slot in list(islice(self.cleared, DROPPED_AT_ONCE)):
            self.extents.wake(slot.run)
            self._drop(slot)

    def hide(self, claim: Claim, which: Selection) -> None:
        """No lookup will find these of the claim's fresh blocks."""
        for slot in claim.fresh_slots:
            slot.keys = tuple(None if key is None or which.takes(key, age_s=0.0) else key for key in slot.keys)

    def evict(self, slots: Iterable[Slot]) -> None:
        """Makes room before a claim asks for it. Slots that are not idle stay."""
        before = self.evicted_blocks
        for slot in slots:
            if slot.idle:
                self._evict(slot)
        self.evicted_ahead_blocks += self.evicted_blocks - before

    def abandon(self, claim: Claim) -> None:
        """The fresh blocks will never be whole. Their slots are free when the last hold ends. Raises like commit."""
        self._check_all(claim.fresh_slots, "abandon")
        for slot in claim.fresh_slots:
            slot.on("abandon")

    def release(self, lease: Lease) -> None:
        """The holder is done and quiet. No-op on an ended lease; raises IllegalTransition on a quarantined one."""
        if lease.state is not LeaseState.ENDED:
            lease.on("release")
            self._end(lease)

    def renew(self, lease: Lease, *, now: float, ttl_s: float) -> bool:
        """False, changing nothing, if the lease is no longer live: the holder must stop and fall quiet."""
        return lease.renew(now + ttl_s)

    def expire(self, now: float) -> list[Lease]:
        """Takes the rights of leases whose time is over, and returns them. Their holds stay until `quiesce`."""
        expired = [
            lease for lease in self.leases.values() if lease.state is LeaseState.LIVE and lease.expires_at <= now
        ]
        for lease in expired:
            lease.on("expire")
        return expired

    def revoke(self, lease: Lease) -> None:
        """Takes a live lease's right before its time is over, as `expire` would. No-op on any other."""
        if lease.state is LeaseState.LIVE:
            lease.on("expire")

    def quiesce(self, lease: Lease) -> None:
        """The holder of a quarantined lease can touch its slots no more. No-op on an ended lease.

        Raises IllegalTransition on a live one.
        """
        if lease.state is not LeaseState.ENDED:
            lease.on("quiesce")
            self._end(lease)

    def stats(self) -> dict[str, Any]:
        """Numbers for people and metrics; values are plain data."""
        return {
            "arena_bytes": len(self.arena.memory),
            **figures(self.extents, self.slots, self.leases, self.quotas),
            "indexed_blocks": len(self.index),
            "evicted_blocks": self.evicted_blocks,
            "evicted_ahead_blocks": self.evicted_ahead_blocks,
        }

    def check_integrity(self) -> None:
        """Raises IntegrityError unless units, holds, states and index add up. Takes time linear in all of them."""
        check_accounts(self.extents, self.slots, self.leases, self.index, self.policy, self.quotas, self.cleared)

    def __repr__(self) -> str:
        states = ", ".join(f"{count} {state}" for state, count in slot_counts(self.slots).items())
        return f"<Store {states} slots, {len(self.leases)} leases, {len(self.index)} blocks indexed>"

    def _find_ready(self, namespace: bytes, pages: PageLayout, block_hashes: Sequence[bytes]) -> list[Spot | None]:
        found = self.index.find(namespace, block_hashes)
        return [spot if spot and spot[0].layout == pages else None for spot in found]

    def _fitting(self, pages: PageLayout, blocks: int, tenant: bytes) -> int:
        """For how many of so many blocks `_make_room` would make room."""
        blocks = min(blocks, self.extents.reachable(pages))
        short_bytes = self.quotas.excess_bytes(tenant, blocks * pages.unit_bytes)
        _, idle_bytes, _ = own_to_go(self.policy.victims_of(tenant), short_bytes)
        return max(0, blocks - max(0, -((idle_bytes - short_bytes) // pages.unit_bytes)))

    def _make_room(self, pages: PageLayout, blocks: int, tenant: bytes) -> bool:
        """Evicts in the policy's order until `blocks` fit, of other layouts whole extents. All or nothing.

        A tenant that would be over its quota gives up its own first.
        """
        extents = self.extents
        short_bytes = self.quotas.excess_bytes(tenant, blocks * pages.unit_bytes)
        own, idle_bytes, unused_bytes = own_to_go(self.policy.victims_of(tenant), short_bytes)
        if unused_bytes < short_bytes:
            raise Refused(f"this tenant's leases take its quota of {self.quotas.limit_bytes(tenant)} bytes")
        if idle_bytes < short_bytes or extents.reachable(pages) < blocks:
            return False
        for slot in own:
            self._evict(slot)
        missing = blocks - extents.free(pages)
        for slot in first_to_go(self.policy.victims_for(pages), extents, self.slots, pages, missing):
            self._evict(slot)
        return True

    def _evict(self, slot: Slot) -> None:
        self.on_evict(slot)
        self.extents.wake(slot.run)
        self.policy.evicted(slot)
        self.evicted_blocks += slot.indexed
        self._drop(slot)

    def _fill_gaps(
        self, pages: PageLayout, found: Sequence[Spot | None], keys: Sequence[BlockKey | None], new: NewSlot
    ) -> list[Spot]:
        """`found` with every gap filled by new slots, in state filling. A tail shares no slot with full blocks."""
        spots: list[Spot] = []

        def kind(index: int) -> tuple[bool, bool]:
            return found[index] is None, keys[index] is None

        for (missing, _), group in groupby(range(len(found)), key=kind):
            indexes = list(group)
            if missing:
                wanted = keys[indexes[0] : indexes[-1] + 1]
                spots += self._enter(pages, self.extents.take(pages, len(wanted)), wanted, new)
            else:
                spots += [spot for index in indexes if (spot := found[index])]
        return spots

    def _next_generation(self, now: float, tenant: bytes) -> NewSlot:
        self._generation = self._generation % _GENERATION_MAX + 1
        return partial(Slot, generation=self._generation, claimed_at=now, tenant=tenant)

    def _enter(
        self, pages: PageLayout, runs: Iterable[Run], keys: Sequence[BlockKey | None], new: NewSlot
    ) -> list[Spot]:
        """New slots in these runs, which have been taken, in state filling."""
        spots: list[Spot] = []
        for run in runs:
            start = len(spots)
            slot = new(run, keys=tuple(keys[start : start + run.blocks]))
            slot.on("claim")
            self.quotas.charge(slot.tenant, slot.size_bytes)
            for place in slot.places:
                self.arena.reset(place.header_offset, pages, place.generation)
            self.slots[run.offset] = slot
            spots += [(slot, position) for position in range(run.blocks)]
        return spots

    def _slots_at(self, places: Sequence[Place]) -> tuple[Slot, ...]:
        slots: dict[Slot, None] = {}
        for place in places:
            slot = self.slots.get(place.slot_offset)
            if slot is None or slot.generation != place.generation:
                raise IllegalTransition(f"lease of {place}, whose slot has been used again")
            slots[slot] = None
        return tuple(slots)

    def _check_all(self, slots: Sequence[Slot], event: SlotEvent) -> None:
        for slot in slots:
            if not slot.allows(event):
                raise IllegalTransition(f"{event} of {slot}")

    def _grant(self, owner: Owner, slots: tuple[Slot, ...], expires_at: float, *, is_use: bool = True) -> Lease:
        """A lease over slots that are held for it already."""
        self._lease_id += 1
        lease = Lease(self._lease_id, owner, slots, expires_at, is_use)
        self.leases[lease.lease_id] = lease
        return lease

    def _end(self, lease: Lease) -> None:
        del self.leases[lease.lease_id]
        self._unhold(lease.slots, is_use=lease.is_use)

    def _hold(self, slots: Sequence[Slot], *, is_use: bool = True) -> None:
        for slot in slots:
            if slot.idle:
                self.extents.wake(slot.run)
            if is_use and slot.unused:
                self.policy.removed(slot)
            slot.holds += 1
            slot.copies += not is_use

    def _unhold(self, slots: Sequence[Slot], *, is_use: bool = True) -> None:
        now_unused = []
        for slot in slots:
            slot.holds -= 1
            slot.copies -= not is_use
            if slot.state is SlotState.READY and slot.indexed:
                if is_use and slot.unused:
                    now_unused.append(slot)
                if slot.idle:
                    self.extents.rest(slot.run)
                    self.freed += 1
            elif not slot.holds:
                self._drop(slot)
        self.policy.touched(now_unused)

    def _drop(self, slot: Slot) -> None:
        """Frees a slot that nobody holds, from whatever state its last holder left it in."""
        if slot.state is SlotState.FILLING:
            slot.on("abandon")  # nobody is left to fill it
        elif slot.state is SlotState.READY:
            slot.on("drop")
            self.index.remove(slot)
        slot.on("drain")
        if self._poison:
            size_bytes = slot.size_bytes
            self.arena.memory[slot.run.offset : slot.run.offset + size_bytes] = bytes([POISON]) * size_bytes
        del self.slots[slot.run.offset]
        self.cleared.pop(slot, None)
        self.quotas.credit(slot.tenant, slot.size_bytes)
        self.policy.forgotten(slot)
        self.extents.give(slot.run)
        self.freed += 1

"""Whether a store's accounts add up. Reads everything, changes nothing; any finding is a bug of ours."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from itertools import chain

from pdx.buffer.by_tenant import ByTenant
from pdx.buffer.extents import Extent, Extents, Pool, is_clearable
from pdx.buffer.index import Index
from pdx.buffer.lease import Lease, LeaseState
from pdx.buffer.quota import Quotas
from pdx.buffer.slots import Slot, SlotState
from pdx.errors import IntegrityError


def check_accounts(
    extents: Extents,
    slots: Mapping[int, Slot],
    leases: Mapping[int, Lease],
    index: Index,
    policy: ByTenant,
    quotas: Quotas,
    cleared: Collection[Slot],
) -> None:
    """Raises IntegrityError with the first thing that is wrong."""
    _check_units(extents, slots)
    _check_holds(slots, leases)
    _check_states(slots, policy, quotas, cleared)
    _check_index(slots, index)
    _check_quotas(slots, quotas)


def _check_units(extents: Extents, slots: Mapping[int, Slot]) -> None:
    """Every unit of every taken extent is in exactly one slot or free piece, and the sums say so."""
    taken = [extent for pool in extents.pools.values() for extent in pool.extents]
    _require(len(taken) + len(extents.untaken) == extents.total, "extents are lost or counted twice")
    _require(len({extent.start for extent in taken + extents.untaken}) == extents.total, "an extent is in two places")
    for pool in extents.pools.values():
        _check_pool(pool, [slot for slot in slots.values() if slot.layout == pool.plan.layout])
    for slot in slots.values():
        _require(slot.layout in extents.pools, "{} is in no pool", slot)
    for extent in extents.untaken:
        _require(extent.used_units == extent.idle_units == 0, "{} is untaken", extent)


def _check_pool(pool: Pool, slots: Sequence[Slot]) -> None:
    _require(bool(pool.extents), "{} has a pool without extents", pool.plan.layout)
    units = {extent: bytearray(pool.units) for extent in pool.extents}  # 1: somebody's, or free
    used: Counter[Extent] = Counter()
    idle: Counter[Extent] = Counter()
    for slot in slots:
        used[slot.run.extent] += slot.blocks
        idle[slot.run.extent] += slot.blocks * slot.idle
    in_slots = ((slot.run.extent, slot.run.first_unit, slot.blocks) for slot in slots)
    for extent, first_unit, size in chain(pool.pieces(), in_slots):
        _require(extent in units, "{} is not this pool's", extent)
        those = slice(first_unit, first_unit + size)
        _require(units[extent][those] == bytes(size), "a unit of {} is in two slots or pieces, or is none", extent)
        units[extent][those] = b"\1" * size
    _require(not any(0 in marks for marks in units.values()), "a unit is lost")
    free = sum(size for _, _, size in pool.pieces())
    _require(pool.free_units == free, "{} units said free, {} in pieces", pool.free_units, free)
    for extent in pool.extents:
        _require(extent.used_units == used[extent] > 0, "{} has {} units in slots", extent, used[extent])
        _require(extent.idle_units == idle[extent], "{} has {} units in idle slots", extent, idle[extent])
    _require(pool.idle_units == idle.total(), "{} units said idle, {} in slots", pool.idle_units, idle.total())
    _require(pool.clearable == sum(map(is_clearable, pool.extents)), "clearable extents are counted wrong")


def _check_holds(slots: Mapping[int, Slot], leases: Mapping[int, Lease]) -> None:
    holds = Counter(slot for lease in leases.values() for slot in lease.slots)
    copies = Counter(slot for lease in leases.values() if not lease.is_use for slot in lease.slots)
    for lease in leases.values():
        _require(lease.state is not LeaseState.ENDED, "{} is still listed", lease)
        _require(len(set(lease.slots)) == len(lease.slots), "{} holds a slot twice", lease)
    for slot in holds:
        _require(slots.get(slot.run.offset) is slot, "{} is held, but free", slot)
    for slot in slots.values():
        _require(slot.holds == holds[slot], "{} is in {} leases", slot, holds[slot])
        _require(slot.copies == copies[slot], "{} is in {} leases to copy it", slot, copies[slot])


def _check_states(slots: Mapping[int, Slot], policy: ByTenant, quotas: Quotas, cleared: Collection[Slot]) -> None:
    for offset, slot in slots.items():
        _require(slot.run.offset == offset, "{} is listed at {:#x}", slot, offset)
        _require(slot.state is not SlotState.FREE, "{} is still listed", slot)
        _require(slot.state is SlotState.READY or slot.holds > 0, "{} has no lease", slot)
        _require(slot.indexed > 0 or slot.holds > 0 or slot in cleared, "{} is of no use to anybody", slot)
    for slot in cleared:
        _require(slots.get(slot.run.offset) is slot and slot.idle and not slot.indexed, "{} is not cleared", slot)
    unused = {slot for slot in slots.values() if slot.unused and (slot.indexed or slot in cleared)}
    _require(set(policy) == unused and len(policy) == len(unused), "the policy has not what nobody uses")
    for layout, own in policy.layouts():
        _require(all(slot in unused and slot.layout == layout for slot in own), "an order is not of {}'s slots", layout)
    of_tenants: dict[bytes, set[Slot]] = {tenant: set() for tenant, _ in policy.orders()}
    for slot in unused:
        if quotas.limit_bytes(slot.tenant) is not None:
            of_tenants.setdefault(slot.tenant, set()).add(slot)
    orders = {tenant: set(own) for tenant, own in policy.orders()}
    _require(orders == of_tenants, "tenants' orders have not what nobody uses of theirs")
    _require(orders.keys() <= quotas.tenants().keys(), "orders of tenants that have nothing are kept")


def _check_index(slots: Mapping[int, Slot], index: Index) -> None:
    _require(all(map(index.within, index.namespaces())), "the index has a namespace without blocks")
    indexed: Counter[Slot] = Counter()
    for key, (slot, position) in index.items():
        _require(slots.get(slot.run.offset) is slot, "the index leads to {}", slot)
        _require(slot.state is SlotState.READY, "the index leads to {}", slot)
        _require(slot.keys[position] == key, "the index leads to position {} of {}, which is not it", position, slot)
        indexed[slot] += 1
    for slot in slots.values():
        _require(slot.indexed == indexed[slot], "{} keys lead to {}", indexed[slot], slot)
        _require(slot.indexed == len(index.keys_of(slot)), "{} names other keys than lead to it", slot)


def _check_quotas(slots: Mapping[int, Slot], quotas: Quotas) -> None:
    used: Counter[bytes] = Counter()
    for slot in slots.values():
        used[slot.tenant] += slot.size_bytes
    _require(quotas.tenants() == dict(used), "tenants are charged wrong")
    _require(not any(map(quotas.excess_bytes, used)), "a tenant is over its limit")


def _require(truth: bool, complaint: str, *about: object) -> None:
    """Puts the sentence together when it is one: a store has a million blocks, and none of them has a complaint."""
    if not truth:
        raise IntegrityError(complaint.format(*about))

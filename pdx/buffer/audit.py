"""Whether a store's accounts add up. Reads everything, changes nothing; any finding is a bug of ours."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from pdx.buffer.by_tenant import ByTenant
from pdx.buffer.extents import Extent, Extents, is_clearable
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
) -> None:
    """Raises IntegrityError with the first thing that is wrong."""
    _check_units(extents, slots)
    _check_holds(slots, leases)
    _check_states(slots, policy, quotas)
    _check_index(slots, index)
    _check_quotas(slots, quotas)


def _check_units(extents: Extents, slots: Mapping[int, Slot]) -> None:
    """Every unit of every taken extent is in exactly one slot or free piece, and the sums say so."""
    taken = [extent for pool in extents.pools.values() for extent in pool.extents]
    _require(len(taken) + len(extents.untaken) == extents.total, "extents are lost or counted twice")
    _require(len({extent.start for extent in taken + extents.untaken}) == extents.total, "an extent is in two places")
    for pool in extents.pools.values():
        _require(bool(pool.extents), f"{pool.plan.layout} has a pool without extents")
        units = Counter(
            (extent, first_unit + step) for extent, first_unit, size in pool.pieces() for step in range(size)
        )
        _require(pool.free_units == units.total(), f"{pool.free_units} units said free, {units.total()} in pieces")
        used: Counter[Extent] = Counter()
        idle: Counter[Extent] = Counter()
        for slot in slots.values():
            if slot.layout == pool.plan.layout:
                units.update((slot.run.extent, slot.run.first_unit + step) for step in range(slot.blocks))
                used[slot.run.extent] += slot.blocks
                idle[slot.run.extent] += slot.blocks * slot.idle
        everything = {(extent, unit) for extent in pool.extents for unit in range(pool.units)}
        _require(units == Counter(everything), "a unit is lost, or in two slots or pieces")
        for extent in pool.extents:
            _require(extent.used_units == used[extent] > 0, f"{extent} has {used[extent]} units in slots")
            _require(extent.idle_units == idle[extent], f"{extent} has {idle[extent]} units in idle slots")
        _require(pool.idle_units == idle.total(), f"{pool.idle_units} units said idle, {idle.total()} in slots")
        _require(pool.clearable == sum(map(is_clearable, pool.extents)), "clearable extents are counted wrong")
    for extent in extents.untaken:
        _require(extent.used_units == extent.idle_units == 0, f"{extent} is untaken")


def _check_holds(slots: Mapping[int, Slot], leases: Mapping[int, Lease]) -> None:
    holds = Counter(slot for lease in leases.values() for slot in lease.slots)
    copies = Counter(slot for lease in leases.values() if not lease.is_use for slot in lease.slots)
    for lease in leases.values():
        _require(lease.state is not LeaseState.ENDED, f"{lease} is still listed")
        _require(len(set(lease.slots)) == len(lease.slots), f"{lease} holds a slot twice")
    for slot in holds:
        _require(slots.get(slot.run.offset) is slot, f"{slot} is held, but free")
    for slot in slots.values():
        _require(slot.holds == holds[slot], f"{slot} is in {holds[slot]} leases")
        _require(slot.copies == copies[slot], f"{slot} is in {copies[slot]} leases to copy it")


def _check_states(slots: Mapping[int, Slot], policy: ByTenant, quotas: Quotas) -> None:
    for offset, slot in slots.items():
        _require(slot.run.offset == offset, f"{slot} is listed at {offset:#x}")
        _require(slot.state is not SlotState.FREE, f"{slot} is still listed")
        _require(slot.state is SlotState.READY or slot.holds > 0, f"{slot} has no lease")
        _require(slot.indexed > 0 or slot.holds > 0, f"{slot} is of no use to anybody")
    unused = {slot for slot in slots.values() if slot.unused and slot.indexed}
    _require(set(policy.victims()) == unused and len(policy) == len(unused), "the policy has not what nobody uses")
    of_tenants: dict[bytes, set[Slot]] = {tenant: set() for tenant, _ in policy.orders()}
    for slot in unused:
        if quotas.limit_bytes(slot.tenant) is not None:
            of_tenants.setdefault(slot.tenant, set()).add(slot)
    orders = {tenant: set(own.victims()) for tenant, own in policy.orders()}
    _require(orders == of_tenants, "tenants' orders have not what nobody uses of theirs")
    _require(orders.keys() <= quotas.tenants().keys(), "orders of tenants that have nothing are kept")


def _check_index(slots: Mapping[int, Slot], index: Index) -> None:
    indexed: Counter[Slot] = Counter()
    for key, (slot, position) in index.items():
        _require(slots.get(slot.run.offset) is slot, f"the index leads to {slot}")
        _require(slot.state is SlotState.READY, f"the index leads to {slot}")
        _require(slot.keys[position] == key, f"the index leads to position {position} of {slot}, which is not it")
        indexed[slot] += 1
    for slot in slots.values():
        _require(slot.indexed == indexed[slot], f"{indexed[slot]} keys lead to {slot}")


def _check_quotas(slots: Mapping[int, Slot], quotas: Quotas) -> None:
    used: Counter[bytes] = Counter()
    for slot in slots.values():
        used[slot.tenant] += slot.size_bytes
    _require(quotas.tenants() == dict(used), "tenants are charged wrong")
    _require(not any(map(quotas.excess_bytes, used)), "a tenant is over its limit")


def _require(truth: bool, complaint: str) -> None:
    if not truth:
        raise IntegrityError(complaint)

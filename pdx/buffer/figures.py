"""A store in numbers, for people and metrics."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from pdx.buffer.extents import Extents
from pdx.buffer.lease import Lease, LeaseState
from pdx.buffer.quota import Quotas
from pdx.buffer.slots import Slot, SlotState

TENANTS_SHOWN = 100  # names come from clients

_TAKEN = (SlotState.FILLING, SlotState.READY, SlotState.QUARANTINE)
_UNENDED = (LeaseState.LIVE, LeaseState.QUARANTINED)


def figures(extents: Extents, slots: Mapping[int, Slot], leases: Mapping[int, Lease], quotas: Quotas) -> dict[str, Any]:
    """Values are plain data."""
    return {
        "used_bytes": extents.used_bytes,
        "tenants": {tenant.hex(): used for tenant, used in quotas.largest(TENANTS_SHOWN)},
        "extents": {"total": extents.total, "untaken": len(extents.untaken)},
        "slots": slot_counts(slots),
        "leases": _counts((lease.state for lease in leases.values()), _UNENDED),
        "units": {
            f"{pages.layers} x {pages.page_bytes} B / {pages.chunk_blocks}": {
                "total": len(pool.extents) * pool.units,
                "free": pool.free_units,
                "idle": pool.idle_units,
            }
            for pages, pool in extents.pools.items()
        },
        "free_share": round(extents.free_share, 4),
    }


def slot_counts(slots: Mapping[int, Slot]) -> dict[str, int]:
    """By state."""
    return _counts((slot.state for slot in slots.values()), _TAKEN)


def _counts(states: Iterable[SlotState | LeaseState], known: Sequence[SlotState | LeaseState]) -> dict[str, int]:
    """How many are in each state, zeros included: a metric must not vanish."""
    present = Counter(states)
    return {state.value: present[state] for state in known}

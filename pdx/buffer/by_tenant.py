"""A policy's order of all idle slots, and beside it one for each tenant that has a limit.

A tenant at its limit makes room from its own, with each claim: to look for those among all others' would take longer
the more there are. Each order is the same policy's, over what it was told.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

from pdx.buffer.by_layout import ByLayout
from pdx.buffer.evict import Policy
from pdx.buffer.quota import Quotas
from pdx.buffer.slots import Slot
from pdx.layout import PageLayout


class ByTenant:
    """See Policy: what it says is everybody's order."""

    def __init__(self, everybody: Policy[Slot], quotas: Quotas, layouts: Collection[PageLayout] = ()) -> None:
        """`layouts`: see ByLayout."""
        self._everybody = ByLayout(everybody, layouts)
        self._quotas = quotas
        self._own: dict[bytes, Policy[Slot]] = {}

    def touched(self, chain: Sequence[Slot]) -> None:
        self._everybody.touched(chain)
        for slot in reversed(chain) if self._quotas.limits_anybody else ():
            if slot.tenant not in self._own and self._quotas.limit_bytes(slot.tenant) is not None:
                self._own[slot.tenant] = self._everybody.another()
            if slot.tenant in self._own:
                self._own[slot.tenant].touched([slot])

    def grown(self, chain: Sequence[Slot]) -> None:
        self._everybody.grown(chain)
        for slot in reversed(chain) if self._own else ():
            if slot.tenant in self._own:
                self._own[slot.tenant].grown([slot])

    def removed(self, slot: Slot) -> None:
        self._everybody.removed(slot)
        if slot.tenant in self._own:
            self._own[slot.tenant].removed(slot)

    def evicted(self, slot: Slot) -> None:
        self._everybody.evicted(slot)
        if slot.tenant in self._own:
            self._own[slot.tenant].evicted(slot)

    def forgotten(self, slot: Slot) -> None:
        """Names come from clients: of a tenant whose last slot is given back nothing stays."""
        self._everybody.forgotten(slot)
        if slot.tenant in self._own:
            self._own[slot.tenant].forgotten(slot)
            if not self._quotas.used_bytes(slot.tenant):
                del self._own[slot.tenant]

    def another(self) -> Policy[Slot]:
        return self._everybody.another()

    def victims(self) -> Iterator[Slot]:
        return self._everybody.victims()

    def __iter__(self) -> Iterator[Slot]:
        return iter(self._everybody)

    def victims_for(self, layout: PageLayout) -> Iterator[Slot]:
        """All, for a claim of this layout."""
        return self._everybody.victims_for(layout)

    def victims_of(self, tenant: bytes) -> Iterator[Slot]:
        """Those of one that has a limit."""
        own = self._own.get(tenant)
        return iter(()) if own is None else own.victims()

    def orders(self) -> Iterator[tuple[bytes, Policy[Slot]]]:
        """Tenants', which are kept beside everybody's."""
        return iter(self._own.items())

    def layouts(self) -> Iterator[tuple[PageLayout, Policy[Slot]]]:
        """Layouts', the same."""
        return self._everybody.orders()

    def __len__(self) -> int:
        return len(self._everybody)

    def __repr__(self) -> str:
        return f"<ByTenant {self._everybody!r}, {len(self._own)} tenants have a limit>"

"""A policy's order of all idle slots, and beside it one for each tenant that has a limit.

A tenant at its limit makes room from its own, with each claim: to look for those among all others' would take longer
the more there are.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from operator import attrgetter

from pdx.buffer.beside import Beside
from pdx.buffer.by_layout import ByLayout
from pdx.buffer.evict import Policy
from pdx.buffer.quota import Quotas
from pdx.buffer.slots import Slot
from pdx.layout import PageLayout


class ByTenant(Beside[bytes]):
    """See Beside."""

    def __init__(self, everybody: Policy[Slot], quotas: Quotas, layouts: Collection[PageLayout] = ()) -> None:
        """`layouts`: see ByLayout."""
        self._by_layout = ByLayout(everybody, layouts)
        super().__init__(self._by_layout, attrgetter("tenant"))
        self._quotas = quotas

    def touched(self, chain: Sequence[Slot]) -> None:
        super().touched(chain)
        for slot in reversed(chain) if self._quotas.limits_anybody else ():
            if slot.tenant not in self._own and self._quotas.limit_bytes(slot.tenant) is not None:
                self._own[slot.tenant] = self.another()
            if slot.tenant in self._own:
                self._own[slot.tenant].touched([slot])

    def forgotten(self, slot: Slot) -> None:
        """Names come from clients: of a tenant whose last slot is given back nothing stays."""
        super().forgotten(slot)
        if slot.tenant in self._own and not self._quotas.used_bytes(slot.tenant):
            del self._own[slot.tenant]

    def victims_for(self, layout: PageLayout) -> Iterator[Slot]:
        """All, for a claim of this layout."""
        return self._by_layout.victims_for(layout)

    def victims_of(self, tenant: bytes) -> Iterator[Slot]:
        """Those of one that has a limit."""
        own = self._own.get(tenant)
        return iter(()) if own is None else own.victims()

    def layouts(self) -> Iterator[tuple[PageLayout, Policy[Slot]]]:
        """Layouts' orders, as orders() has tenants'."""
        return self._by_layout.orders()

    def __repr__(self) -> str:
        return f"<ByTenant {self._everybody!r}, {len(self._own)} tenants have a limit>"

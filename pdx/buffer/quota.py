"""How much each tenant may keep. Counts bytes by tenant; knows nothing of slots, prompts or who a tenant is.

A tenant is an opaque name (an engine passes `cache_salt`); everybody without one shares the empty name. The owner of
the memory asks before a claim how much of the tenant's own cache must go first, so that nobody is ever over a limit.
"""

from __future__ import annotations

from collections.abc import Mapping
from heapq import nlargest


class Quotas:
    """One thread. `default_bytes` is every tenant's limit that has none of its own in `limits`; None limits nothing."""

    def __init__(self, *, default_bytes: int | None = None, limits: Mapping[bytes, int] | None = None) -> None:
        self._default_bytes = default_bytes
        self._limits = dict(limits or {})
        self._used: dict[bytes, int] = {}

    @property
    def limits_anybody(self) -> bool:
        return self._default_bytes is not None or bool(self._limits)

    def limit_bytes(self, tenant: bytes) -> int | None:
        return self._limits.get(tenant, self._default_bytes)

    def used_bytes(self, tenant: bytes) -> int:
        return self._used.get(tenant, 0)

    def never_fits(self, tenant: bytes, wanted_bytes: int) -> bool:
        """Not even if all else of this tenant were gone."""
        limit = self.limit_bytes(tenant)
        return limit is not None and wanted_bytes > limit

    def excess_bytes(self, tenant: bytes, wanted_bytes: int = 0) -> int:
        """What the tenant must give up before it may take `wanted_bytes` more."""
        limit = self.limit_bytes(tenant)
        return 0 if limit is None else max(0, self.used_bytes(tenant) + wanted_bytes - limit)

    def charge(self, tenant: bytes, size_bytes: int) -> None:
        self._used[tenant] = self.used_bytes(tenant) + size_bytes

    def credit(self, tenant: bytes, size_bytes: int) -> None:
        """Gives back what was charged. Names come from clients: a tenant without bytes leaves no trace."""
        left = self.used_bytes(tenant) - size_bytes
        assert left >= 0, f"{size_bytes} bytes given back, {left + size_bytes} were charged"
        if left:
            self._used[tenant] = left
        else:
            self._used.pop(tenant, None)

    def largest(self, count: int) -> list[tuple[bytes, int]]:
        """Those that use most, with their bytes."""
        return nlargest(count, self._used.items(), key=lambda item: item[1])

    def tenants(self) -> Mapping[bytes, int]:
        """Bytes by tenant, of those that have any."""
        return dict(self._used)

    def __repr__(self) -> str:
        return f"<Quotas {len(self._used)} tenants, {sum(self._used.values())} bytes>"

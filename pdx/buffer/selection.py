"""Which blocks an operator means. A value: the arena matches it against keys, a tier against the names it has kept."""

from __future__ import annotations

from dataclasses import dataclass

from pdx.buffer.slots import BlockKey
from pdx.keys import split_namespace


@dataclass(frozen=True, slots=True)
class Selection:
    """All blocks that every given field takes; None takes all. `older_s`: kept for at least so long, here.

    `other_than`: spaces of which none is meant.
    """

    spaces: frozenset[bytes] | None = None
    tenant: bytes | None = None
    block_hashes: frozenset[bytes] | None = None
    older_s: float = 0.0
    other_than: frozenset[bytes] = frozenset()

    def __post_init__(self) -> None:
        """Tiers find hashes under names that say all of a key."""
        assert self.block_hashes is None or (self.spaces is not None and self.tenant is not None)

    def takes(self, key: BlockKey, *, age_s: float) -> bool:
        return (
            age_s >= self.older_s
            and self.takes_from(key[0])
            and (self.block_hashes is None or key[1] in self.block_hashes)
        )

    def takes_from(self, namespace: bytes) -> bool:
        """Whether blocks of this namespace can be meant."""
        space, tenant = split_namespace(namespace)
        is_meant = (self.spaces is None or space in self.spaces) and space not in self.other_than
        return is_meant and (self.tenant is None or tenant == self.tenant)

    def named(self) -> dict[bytes, list[bytes]] | None:
        """Namespaces and hashes, if it names its blocks: few, as a rule, among many that are kept. Else None."""
        if self.block_hashes is None or self.spaces is None or self.tenant is None:
            return None
        hashes = sorted(self.block_hashes)
        return {space + self.tenant: hashes for space in sorted(self.spaces - self.other_than)}

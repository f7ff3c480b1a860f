"""Which blocks an operator means. A value: the arena matches it against keys, a tier against the names it has kept."""

from __future__ import annotations

from dataclasses import dataclass

from pdx.buffer.slots import BlockKey
from pdx.keys import split_namespace


@dataclass(frozen=True, slots=True)
class Selection:
    """All blocks that every given field takes; None takes all. `older_s`: kept for at least so long, here."""

    spaces: frozenset[bytes] | None = None
    tenant: bytes | None = None
    block_hashes: frozenset[bytes] | None = None
    older_s: float = 0.0

    def __post_init__(self) -> None:
        """Tiers find hashes under names that say all of a key."""
        assert self.block_hashes is None or (self.spaces is not None and self.tenant is not None)

    def takes(self, key: BlockKey, *, age_s: float) -> bool:
        space, tenant = split_namespace(key[0])
        return (
            age_s >= self.older_s
            and (self.spaces is None or space in self.spaces)
            and (self.tenant is None or tenant == self.tenant)
            and (self.block_hashes is None or key[1] in self.block_hashes)
        )

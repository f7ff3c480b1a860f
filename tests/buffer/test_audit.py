"""Each kind of damage is found: an audit that can't fail proves nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from pdx.buffer.arena import Arena
from pdx.buffer.claim import Claim
from pdx.buffer.lease import LeaseState, Owner
from pdx.buffer.quota import Quotas
from pdx.buffer.slots import SlotState
from pdx.buffer.store import Store
from pdx.errors import IntegrityError
from pdx.layout import PageLayout

PAGES = PageLayout(layers=2, page_bytes=1000, chunk_blocks=4)
ENGINE = Owner(kind="session", name="engine-1")


@pytest.fixture
def damaged(arena: Arena) -> Iterator[Store]:
    """Not the shared `store`: this one is expected to be wrong in the end."""
    yield Store(arena, extent_bytes=64 << 10, handoff_share=0.9, quotas=Quotas(limits={b"": 1 << 20}))


def claim(store: Store, first: int) -> Claim:
    hashes = [bytes([first + number]) for number in range(4)]
    claimed = store.claim(ENGINE, b"n", PAGES, hashes, tail=False, now=0, ttl_s=1)
    assert claimed is not None
    return claimed


DAMAGE: dict[str, Callable[[Store, Claim, Claim], object]] = {
    "lost hold": lambda store, filling, ready: setattr(filling.lease.slots[0], "holds", 0),
    "extra hold": lambda store, filling, ready: setattr(ready.lease.slots[0], "holds", 1),
    "lost lease": lambda store, filling, ready: store.leases.clear(),
    "ended lease": lambda store, filling, ready: setattr(filling.lease, "state", LeaseState.ENDED),
    "lost slot": lambda store, filling, ready: store.slots.pop(ready.places[0].slot_offset),
    "indexed slot not ready": lambda store, filling, ready: setattr(
        ready.lease.slots[0], "state", SlotState.QUARANTINE
    ),
    "unindexed idle slot": lambda store, filling, ready: store.index.remove(ready.lease.slots[0]),
    "miscounted index": lambda store, filling, ready: setattr(ready.lease.slots[0], "indexed", 3),
    "keys that are not its own": lambda store, filling, ready: setattr(store.index, "keys_of", lambda slot: []),
    "policy lost a slot": lambda store, filling, ready: store.policy.removed(ready.lease.slots[0]),
    "policy has a held slot": lambda store, filling, ready: store.policy.touched(filling.lease.slots),
    "units given twice": lambda store, filling, ready: store.extents.give(ready.lease.slots[0].run),
    "units taken by nobody": lambda store, filling, ready: store.extents.take(PAGES, 1),
    "idle units": lambda store, filling, ready: setattr(ready.lease.slots[0].run.extent, "idle_units", 0),
    "idle units of all extents": lambda store, filling, ready: setattr(store.extents.pools[PAGES], "idle_units", 0),
    "clearable extents": lambda store, filling, ready: setattr(store.extents.pools[PAGES], "clearable", 1),
    "tenant over its limit": lambda store, filling, ready: store.quotas._limits.update({b"": 1}),
    "tenant's order lost a slot": lambda store, filling, ready: store.policy._own.clear(),
    "lost extent": lambda store, filling, ready: store.extents.untaken.pop(),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_found(damaged: Store, damage: str) -> None:
    ready, filling = claim(damaged, 0), claim(damaged, 10)
    damaged.commit(ready)
    damaged.release(ready.lease)
    damaged.check_integrity()
    DAMAGE[damage](damaged, filling, ready)
    with pytest.raises(IntegrityError):
        damaged.check_integrity()

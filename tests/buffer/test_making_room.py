"""Making room looks at no more slots than it must: an arena has hundreds of thousands, and everybody waits for it."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest
from test_store import ENGINE, NAMESPACE, OTHER, PAGES, TTL_S, cache, cached, claim, hashes

from pdx.buffer import by_layout
from pdx.buffer.arena import Arena
from pdx.buffer.claim import Claim
from pdx.buffer.evict import Lru
from pdx.buffer.lease import Lease
from pdx.buffer.policies import POLICIES
from pdx.buffer.quota import Quotas
from pdx.buffer.slots import Slot
from pdx.buffer.store import Store
from pdx.config import Eviction
from pdx.errors import Refused

BLOCKS = 60  # in the arena
ALICE, BOB = b"alice", b"bob"


class Counting(Lru[Slot]):
    """Notes each slot that somebody looks at, in whichever order of its kind."""

    seen: list[Slot]

    def __init__(self) -> None:
        super().__init__()
        Counting.seen = []

    def victims(self) -> Iterator[Slot]:
        for slot in super().victims():
            self.seen.append(slot)
            yield slot


def store_of(arena: Arena, quotas: Quotas | None = None) -> Store:
    return Store(
        arena, extent_bytes=64 << 10, handoff_share=0.9, policy=Counting(), quotas=quotas, tenant_of=lambda name: name
    )


def looked_at(store: Store, namespace: bytes, names: list[bytes]) -> list[Slot]:
    Counting.seen.clear()
    claimed = store.claim(ENGINE, namespace, PAGES, names, tail=False, now=0.0, ttl_s=TTL_S)
    looks = list(Counting.seen)
    assert claimed is not None
    store.check_integrity()
    return looks


def fill(store: Store, namespace: bytes, start: int, stop: int) -> None:
    """In slots of one block each."""
    for number in range(start, stop):
        claimed = store.claim(ENGINE, namespace, PAGES, hashes(number, number + 1), tail=False, now=0.0, ttl_s=TTL_S)
        assert claimed is not None
        store.commit(claimed)
        store.release(claimed.lease)


def test_one_block_is_one_look(arena: Arena) -> None:
    """A full arena is the rule."""
    store = store_of(arena)
    fill(store, NAMESPACE, 0, BLOCKS)
    assert len(looked_at(store, NAMESPACE, hashes(100, 101))) == 1


def test_limits_cost_no_looks(arena: Arena) -> None:
    store = store_of(arena, Quotas(default_bytes=40 * PAGES.unit_bytes))
    fill(store, ALICE, 0, 40)
    fill(store, BOB, 0, 20)
    assert len(looked_at(store, BOB, hashes(100, 101))) == 1


def test_who_is_at_its_limit_looks_at_its_own_only(arena: Arena) -> None:
    store = store_of(arena, Quotas(default_bytes=40 * PAGES.unit_bytes))
    fill(store, ALICE, 0, 39)
    fill(store, BOB, 0, 20)
    fill(store, ALICE, 39, 40)
    assert [slot.tenant for slot in looked_at(store, ALICE, hashes(100, 102))] == [ALICE, ALICE]


def test_who_is_refused_has_looked_at_no_more_than_it_asked_for(arena: Arena) -> None:
    store = store_of(arena, Quotas(default_bytes=40 * PAGES.unit_bytes))
    held = store.claim(ENGINE, ALICE, PAGES, hashes(0, 35), tail=False, now=0.0, ttl_s=TTL_S)
    fill(store, ALICE, 35, 40)
    fill(store, BOB, 0, 20)
    Counting.seen.clear()
    assert held is not None
    with pytest.raises(Refused, match="leases take its quota"):
        store.claim(ENGINE, ALICE, PAGES, hashes(100, 110), tail=False, now=0.0, ttl_s=TTL_S)
    assert len(Counting.seen) == 5


def test_an_extent_of_another_layout_is_found_once(arena: Arena) -> None:
    """The first that can be cleared goes, with all that is in it; who is in others is looked at up to there."""
    store = store_of(arena)
    fill(store, NAMESPACE, 0, BLOCKS)
    held = store.read(ENGINE, NAMESPACE, hashes(3, 4), now=0.0, ttl_s=TTL_S)
    assert held is not None
    Counting.seen.clear()
    claim(store, hashes(200, 201), pages=OTHER)
    assert len(Counting.seen) == 15, "14 beside the one that is held, and the first of the next extent"
    assert cached(store, hashes(0, 15)) == 15
    assert store.index.find(NAMESPACE, hashes(15, 30)) == [None] * 15
    assert len(store.index) == BLOCKS - 15
    store.check_integrity()


def test_others_that_stay_are_not_all_looked_at(arena: Arena, monkeypatch: pytest.MonkeyPatch) -> None:
    """One block of each of their extents is leased: none of them makes room for another layout."""
    monkeypatch.setattr(by_layout, "OTHERS_MAX", 5, raising=False)
    store = store_of(arena)
    fill(store, NAMESPACE, 0, 45)
    for number in (14, 29, 44):
        assert store.read(ENGINE, NAMESPACE, hashes(number, number + 1), now=0.0, ttl_s=TTL_S) is not None
    units = store.extents.units(OTHER)
    for number in range(units):
        cache(store, hashes(100 + number, 101 + number), pages=OTHER)
    Counting.seen.clear()
    claim(store, hashes(200, 202), pages=OTHER)
    assert len(Counting.seen) == 5 + 2
    names = hashes(100, 100 + units)
    assert [spot is not None for spot in store.index.find(NAMESPACE, names)] == [False] * 2 + [True] * (units - 2)
    assert cached(store, hashes(0, 45)) == 45
    store.check_integrity()


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("seed", range(10))
def test_all_that_can_go_goes_whatever_is_looked_at_first(
    arena: Arena, seed: int, policy: Eviction, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A claim finds no room only if there is none."""
    chance = random.Random(seed)
    monkeypatch.setattr(by_layout, "OTHERS_MAX", 1, raising=False)
    store = Store(arena, extent_bytes=64 << 10, handoff_share=0.9, policy=POLICIES[policy]())
    leases: list[Lease] = []
    for _ in range(300):
        if leases and chance.random() < 0.5:
            store.release(leases.pop(chance.randrange(len(leases))))
        pages, first = chance.choice((PAGES, OTHER)), chance.randrange(100)
        names = hashes(first, first + chance.randrange(1, 9))
        claimed = store.claim(ENGINE, repr(pages).encode(), pages, names, tail=False, now=0.0, ttl_s=TTL_S)
        if claimed is not None:
            store.commit(claimed)
            leases.append(claimed.lease)
        store.check_integrity()
    for lease in leases:
        store.release(lease)
    store.check_integrity()


def singly(store: Store, names: list[bytes], namespace: bytes = NAMESPACE) -> list[Claim]:
    claims = store.claim_each(ENGINE, namespace, PAGES, names, now=0.0, ttl_s=TTL_S)
    store.check_integrity()
    assert [claim.lease.slots[0].keys for claim in claims] == [((namespace, name),) for name in names[: len(claims)]]
    return claims


def test_blocks_that_are_claimed_together_have_fates_of_their_own(arena: Arena) -> None:
    store = store_of(arena)
    cache(store, hashes(0, 54))
    first, second, third = singly(store, hashes(100, 103))
    store.commit(first)
    store.abandon(second)
    for claimed in (first, second, third):
        store.release(claimed.lease)
    assert store.index.find(NAMESPACE, hashes(100, 103))[1:] == [None, None]
    assert cached(store, hashes(100, 101)) == 1
    store.check_integrity()


def test_as_many_as_fit_are_claimed_one_by_one(arena: Arena) -> None:
    store = store_of(arena)
    held = claim(store, hashes(0, 50))
    assert len(singly(store, hashes(100, 120))) == 10
    assert singly(store, hashes(200, 201)) == []
    store.release(held.lease)
    assert len(singly(store, hashes(300, 301))) == 1


def test_a_limit_bounds_what_is_claimed_one_by_one(arena: Arena) -> None:
    store = store_of(arena, Quotas(limits={ALICE: 20 * PAGES.unit_bytes}))
    held = store.claim(ENGINE, ALICE, PAGES, hashes(0, 6), tail=False, now=0.0, ttl_s=TTL_S)
    fill(store, ALICE, 6, 14)
    fill(store, BOB, 0, 40)
    assert held is not None
    assert len(singly(store, hashes(100, 130), ALICE)) == 14
    assert len(store.index.within(BOB)) == 40, "there was room for six, and its own made way for eight"
    assert singly(store, hashes(200, 201), ALICE) == []

"""Tenants in one arena: none takes more than its quota, and who is at its quota evicts nobody but itself."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator

import pytest
from test_store import ENGINE, PAGES, TTL_S, hashes

from pdx.buffer.arena import Arena
from pdx.buffer.by_tenant import ByTenant
from pdx.buffer.claim import Claim
from pdx.buffer.policies import POLICIES
from pdx.buffer.quota import Quotas
from pdx.buffer.store import Store
from pdx.config import Eviction
from pdx.errors import Refused

BLOCKS = 60  # in the arena
ALICE, BOB, NOBODY = b"alice", b"bob", b""
UNIT = PAGES.unit_bytes


@pytest.fixture
def store(arena: Arena) -> Iterator[Store]:
    quotas = Quotas(default_bytes=20 * UNIT, limits={NOBODY: BLOCKS * UNIT})
    store = Store(arena, extent_bytes=64 << 10, handoff_share=0.9, poison=True, quotas=quotas, tenant_of=lambda n: n)
    yield store
    store.check_integrity()


def claim(store: Store, tenant: bytes, start: int, stop: int) -> Claim | None:
    return store.claim(ENGINE, tenant, PAGES, hashes(start, stop), tail=False, now=0.0, ttl_s=TTL_S)


def cache(store: Store, tenant: bytes, start: int, stop: int) -> None:
    written = claim(store, tenant, start, stop)
    assert written is not None
    store.commit(written)
    store.release(written.lease)


def cached(store: Store, tenant: bytes) -> int:
    return sum(key[0] == tenant for key, _ in store.index.items())


def test_who_is_at_its_quota_gives_up_its_own(store: Store) -> None:
    cache(store, BOB, 0, 8)
    for start in range(0, 100, 4):
        cache(store, ALICE, start, start + 4)
    assert (cached(store, ALICE), cached(store, BOB)) == (20, 8), "with room to spare for others"
    assert store.quotas.used_bytes(ALICE) == 20 * UNIT


def test_within_its_quota_it_takes_what_was_used_least(store: Store) -> None:
    cache(store, NOBODY, 0, 52)
    cache(store, ALICE, 0, 12)
    assert (cached(store, ALICE), cached(store, NOBODY)) == (12, 48)


def test_leases_count_and_can_not_be_given_up(store: Store) -> None:
    held = claim(store, ALICE, 0, 16)
    assert held is not None
    with pytest.raises(Refused, match="leases take its quota"):
        claim(store, ALICE, 16, 24)
    assert claim(store, BOB, 16, 24) is not None
    store.release(held.lease)
    assert claim(store, ALICE, 16, 24) is not None


def test_more_than_the_quota_never_fits(store: Store) -> None:
    with pytest.raises(Refused, match="tenant_share"):
        claim(store, ALICE, 0, 21)
    assert store.quotas.tenants() == {}


def test_nothing_is_evicted_for_what_does_not_fit(store: Store) -> None:
    cache(store, ALICE, 0, 4)
    held = claim(store, ALICE, 4, 18)
    assert held is not None
    with pytest.raises(Refused):
        claim(store, ALICE, 0, 12)
    assert cached(store, ALICE) == 4
    store.release(held.lease)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("seed", range(10))
def test_whatever_others_do_a_tenant_loses_no_more_than_their_quotas(store: Store, seed: int, policy: Eviction) -> None:
    chance = random.Random(seed)
    store.policy = ByTenant(POLICIES[policy](), store.quotas)
    cache(store, NOBODY, 0, 20)
    for _ in range(200):
        tenant, start = chance.choice((ALICE, BOB)), chance.randrange(1000)
        names = hashes(start, start + chance.randrange(1, 20))
        if chance.random() < 0.3:
            missing = [name for name in names if store.index.find(tenant, [name]) == [None]]
            claims = store.claim_each(ENGINE, tenant, PAGES, missing, now=0.0, ttl_s=TTL_S)
            assert len(claims) == len(missing), "there is room, or it makes some from its own"
            for each in claims:
                store.commit(each)
                store.release(each.lease)
        with contextlib.suppress(Refused):  # what it shares with itself lies in slots that have more
            cache(store, tenant, start, start + len(names))
        assert cached(store, ALICE) <= 20 and cached(store, BOB) <= 20
        store.check_integrity()
    assert cached(store, NOBODY) == 20, "60 blocks hold three times 20"

"""Blocks that are being copied to a tier: held like any others, and no more wanted than before."""

from __future__ import annotations

import pytest
from test_store import NAMESPACE, PAGES, TTL_S, WIRE, cache, cached, claim, hashes, is_full
from test_store_quota import ALICE
from test_store_quota import cache as cache_for
from test_store_quota import cached as cached_of
from test_store_quota import claim as claim_for

from pdx.buffer.arena import Arena
from pdx.buffer.by_tenant import ByTenant
from pdx.buffer.lease import Lease
from pdx.buffer.policies import POLICIES
from pdx.buffer.quota import Quotas
from pdx.buffer.selection import Selection
from pdx.buffer.store import Store
from pdx.config import Eviction
from pdx.errors import IllegalTransition


def copying(store: Store, start: int, stop: int, namespace: bytes = NAMESPACE) -> Lease:
    spots = store.index.leading(namespace, hashes(start, stop))
    assert len(spots) == stop - start
    places = [slot.places[position] for slot, position in spots]
    return store.lease_to_copy(places, WIRE, now=0.0, ttl_s=TTL_S)


@pytest.mark.parametrize("policy", POLICIES)
def test_what_was_copied_goes_as_early_as_it_would_have(store: Store, policy: Eviction) -> None:
    store.policy = ByTenant(POLICIES[policy](), store.quotas)
    for start in range(0, 60, 4):
        cache(store, hashes(start, start + 4))
    for start in (0, 4):
        store.release(copying(store, start, start + 4))
    cache(store, hashes(60, 68))
    assert [cached(store, hashes(start, start + 4)) for start in (0, 4, 8)] == [0, 0, 4]


def test_what_is_being_copied_is_not_evicted(store: Store) -> None:
    cache(store, hashes(0, 52))
    lease = copying(store, 0, 52)
    assert is_full(store, hashes(100, 120))
    store.release(lease)
    claim(store, hashes(100, 120))


def test_only_what_is_ready_can_be_copied(store: Store) -> None:
    filling = claim(store, hashes(0, 4))
    with pytest.raises(IllegalTransition):
        store.lease_to_copy(filling.places, WIRE, now=0.0, ttl_s=TTL_S)
    assert len(store.leases) == 1


def test_what_is_cleared_meanwhile_is_free_when_the_copy_ends(store: Store) -> None:
    cache(store, hashes(0, 4))
    lease = copying(store, 0, 4)
    store.clear(Selection(), now=0.0)
    store.check_integrity()
    assert (list(store.policy.victims()), len(store.slots)) == ([], 1)
    store.release(lease)
    assert not store.slots


def test_a_use_that_ends_during_the_copy_counts(store: Store) -> None:
    for start in range(0, 60, 4):
        cache(store, hashes(start, start + 4))
    lease = copying(store, 0, 4)
    used = claim(store, hashes(0, 4))
    store.release(used.lease)
    store.check_integrity()
    store.release(lease)
    cache(store, hashes(60, 64))
    assert [cached(store, hashes(start, start + 4)) for start in (0, 4)] == [4, 0]


def test_who_is_at_its_quota_waits_for_the_copy_and_is_not_refused(arena: Arena) -> None:
    """Its own cache is what must go, and will be free to go in a moment."""
    quotas = Quotas(default_bytes=20 * PAGES.unit_bytes)
    store = Store(arena, extent_bytes=64 << 10, handoff_share=0.9, quotas=quotas, tenant_of=lambda namespace: namespace)
    cache_for(store, ALICE, 0, 20)
    lease = copying(store, 0, 20, ALICE)
    assert claim_for(store, ALICE, 20, 24) is None
    store.release(lease)
    assert claim_for(store, ALICE, 20, 24) is not None
    assert cached_of(store, ALICE) == 16

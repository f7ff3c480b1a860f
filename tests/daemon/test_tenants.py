"""Tenants by `cache_salt`: what one has computed is neither found, loaded nor promoted for another."""

from __future__ import annotations

import pytest
from one_host import HASHES, Host, engine
from test_tiering import crowd_out, fill

from pdx.keys import tenant_of
from pdx.tiers.memory import MemoryTier
from pdx.wire import Keep, LetGo, LoadOpened, LookUp, SendOpened

ALICE, BOB = tenant_of("alice"), tenant_of("bob")
LOAD = b"l" * 16


@pytest.fixture
def host(tier: MemoryTier) -> Host:
    return Host(tier=tier)


def keep(host: Host, tenant: bytes) -> None:
    called = b"k" * 16
    message = Keep(request_id="r", handoff_id=called, block_hashes=HASHES, tenant=tenant)
    host.handoffs.keep(engine("P"), message, host.now)
    opened = host.heard["P"].pop()
    assert isinstance(opened, SendOpened)
    fill(host, opened.places)
    host.handoffs.let_go("P", LetGo(handoff_id=called, side="send", fence=1, ok=True), host.now)
    host.tick()
    host.tick()  # it is on the disk, too


def found(host: Host, tenant: bytes, hashes: list[bytes] = HASHES) -> int:
    message = LookUp(request_id="r", handoff_id=LOAD, block_hashes=hashes, tenant=tenant)
    host.handoffs.look_up(engine("P"), message, host.now)
    answer = host.heard["P"].pop()
    assert isinstance(answer, LoadOpened)
    host.handoffs.let_go("P", LetGo(handoff_id=LOAD, side="load", fence=0, ok=True), host.now)
    return len(answer.places)


@pytest.mark.parametrize("other", [b"", BOB])
def test_nobody_finds_what_is_anothers_even_by_its_name(host: Host, other: bytes) -> None:
    """The names of a salted prompt can't be told without the salt; knowing them would not help either."""
    keep(host, ALICE)
    assert found(host, ALICE) == len(HASHES)
    assert found(host, other) == 0


def test_a_miss_costs_the_same_whether_another_has_it_or_nobody(host: Host, tier: MemoryTier) -> None:
    """No read of the disk begins, no room is taken: there is nothing to time."""
    keep(host, ALICE)
    crowd_out(host)
    before = tier.stats(), host.store.stats()
    costs = []
    for hashes in (HASHES, [b"nobody's"] * len(HASHES)):
        host.counters.clear()
        assert found(host, BOB, hashes) == 0
        costs.append(host.counters.copy())
    assert costs[0] == costs[1]
    assert (tier.stats(), host.store.stats()) == before
    assert found(host, ALICE) == len(HASHES), "from the disk"


def test_a_handoff_of_one_tenant_is_no_cache_for_another(host: Host) -> None:
    host.prefill()
    assert found(host, b"") == len(HASHES)
    assert found(host, ALICE) == 0

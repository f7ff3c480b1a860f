"""Write-back and low water on one daemon: what is about to go is written first, and nobody waits for a sick tier."""

from __future__ import annotations

from collections import deque

import pytest
from one_host import PAGES, Host, engine
from slow_tier import SlowTier
from test_prefixes import OTHER, leases, let_go, look_up
from test_steering import SPACE, clear, pin
from test_tiering import bytes_at, crowd_out, keep_filled, pattern

from pdx.buffer import store
from pdx.buffer.policies import POLICIES
from pdx.buffer.water import Waterline
from pdx.config import Eviction
from pdx.tiers.spill import WriteMode
from pdx.tiers.tier import StateChanged

LINE = Waterline(low=0.2, high=0.4, batch=4)
ROOM = Host().store.extents.capacity(PAGES)
FEW = ROOM - int(ROOM * LINE.low)  # so many cached blocks leave enough room
FIRST = [b"first 0", b"first 1"]


@pytest.fixture
def kind_of_tier() -> type[SlowTier]:
    return SlowTier


@pytest.fixture(params=POLICIES)
def host(tier: SlowTier, request: pytest.FixtureRequest) -> Host:
    host = Host(tier=tier, policy=request.param, write_mode=WriteMode.BACK, waterline=LINE)
    host.handoffs.spaces.met(engine("P"))
    return host


def fill_up(host: Host, blocks: int = ROOM) -> None:
    """`FIRST`, and then others, in chains of two; without a tick that makes room in between."""
    keep_filled(host, FIRST)
    for number in range(2, blocks, 2):
        keep_filled(host, [b"more %d/%d" % (number, n) for n in range(2)])


def is_here(host: Host, hashes: list[bytes] = FIRST) -> bool:
    return all(spot is not None for spot in host.store.index.find(SPACE, hashes))


def is_below(tier: SlowTier, hashes: list[bytes] = FIRST) -> bool:
    return all(tier.contains([(SPACE, name) for name in hashes]))


def cached(host: Host) -> int:
    return len(host.store.index)


def test_with_room_enough_nothing_is_written_or_evicted(host: Host, tier: SlowTier) -> None:
    fill_up(host, FEW // 2 * 2)
    tier.pace = 100
    for _ in range(3):
        host.tick()
    assert (tier.stats().written, host.store.evicted_blocks) == (0, 0)


def test_what_is_about_to_go_stays_until_the_tier_has_it(host: Host, tier: SlowTier) -> None:
    tier.pace = 0
    fill_up(host)
    for _ in range(5):
        host.tick()
    assert (host.store.evicted_blocks, cached(host)) == (0, ROOM)
    tier.pace = 1
    while not host.store.evicted_blocks:
        assert is_here(host)
        host.tick()
    assert is_below(tier)


def test_nothing_goes_for_room_while_what_was_cleared_has_yet_to_go(
    host: Host, tier: SlowTier, monkeypatch: pytest.MonkeyPatch
) -> None:
    tier.pace = 0
    fill_up(host)
    monkeypatch.setattr(store, "DROPPED_AT_ONCE", 1)
    more = [b"more %d/%d" % (number, n) for number in range(ROOM // 2, ROOM + 1) for n in range(2)]
    assert clear(host, tier="arena", spaces=[SPACE], tenant=b"", block_hashes=more).arena.blocks > ROOM * LINE.high
    tier.pace = 100
    while host.store.cleared:
        assert host.handoffs.has_more
        host.tick()
    host.tick()
    assert (host.store.evicted_blocks, is_here(host), host.handoffs.has_more) == (0, True, False)


def test_room_is_made_up_to_the_high_mark_and_all_of_it_is_found_again(host: Host, tier: SlowTier) -> None:
    tier.pace = 0
    fill_up(host)
    tier.pace = 4
    for _ in range(ROOM):
        before = cached(host)
        host.tick()
        assert before - cached(host) <= LINE.batch, "a round is bounded"
    assert LINE.high <= host.store.extents.free_share < LINE.high + 4 / ROOM
    assert not is_here(host, FIRST[:1])
    stats = host.handoffs.kept(host.now)["disk"]
    assert stats["written_back_blocks"] == stats["written"] == ROOM - cached(host) == host.store.evicted_ahead_blocks
    assert stats["lost_blocks"] == 0
    places = look_up(host, FIRST)
    host.tick()
    assert [bytes_at(host, place, 0) for place in places] == [pattern(0, 0), pattern(1, 0)]
    let_go(host, side="load")
    assert leases(host) == 0


@pytest.mark.parametrize("policy", POLICIES)
def test_without_a_tier_it_goes_at_once_a_little_at_a_time(policy: Eviction) -> None:
    host = Host(policy=policy, waterline=Waterline(low=0.2, high=0.4, batch=2))
    fill_up(host, FEW // 2 * 2)
    keep_filled(host, [b"x%d" % n for n in range(ROOM // 5)])
    seen = [cached(host)]
    while host.store.extents.free_share < LINE.high:
        host.tick()
        seen.append(cached(host))
        assert 0 < seen[-2] - seen[-1] <= 2
    host.tick()
    assert cached(host) == seen[-1], "between the marks nothing begins"
    assert not is_here(host, FIRST)


def test_a_claim_in_a_hurry_evicts_what_is_nowhere_else_and_that_is_counted(host: Host, tier: SlowTier) -> None:
    tier.pace = 0
    keep_filled(host, [b"x%d" % n for n in range(ROOM // 2)])
    crowd_out(host)
    host.tick()
    stats = host.handoffs.kept(host.now)["disk"]
    assert (stats["lost_blocks"], host.store.evicted_ahead_blocks) == (ROOM // 2, 0)


def test_what_the_tier_refuses_goes_all_the_same(host: Host, tier: SlowTier) -> None:
    tier.pace, tier.refuses = 100, True
    fill_up(host)
    for _ in range(ROOM):
        host.tick()
    assert host.store.extents.free_share >= LINE.high
    assert host.handoffs.kept(host.now)["disk"]["lost_blocks"] == host.store.evicted_ahead_blocks > 0
    assert host.counters["writes_failed"] == host.store.evicted_ahead_blocks, "each was asked once"


def test_a_sick_tier_is_not_asked(host: Host, tier: SlowTier) -> None:
    tier.pace, tier.state = 100, "paused"
    fill_up(host)
    for _ in range(ROOM):
        host.tick()
    assert host.store.extents.free_share >= LINE.high
    assert tier.stats().failed == 0


def test_a_tier_that_is_well_again_is_asked_again(host: Host, tier: SlowTier) -> None:
    tier.pace, tier.refuses = 100, True
    fill_up(host, FEW // 2 * 2)
    keep_filled(host, [b"x", b"y"])
    while not host.counters["writes_failed"]:
        host.tick()
    lost = ROOM
    tier.refuses = False
    tier.says(StateChanged("well", "asked again"))
    for _ in range(ROOM):
        host.tick()
        lost = host.handoffs.kept(host.now)["disk"]["lost_blocks"]
    assert lost <= LINE.batch
    assert tier.stats().written > 0


def test_who_uses_a_block_keeps_it_and_so_does_a_pin(host: Host, tier: SlowTier) -> None:
    tier.pace = 0
    keep_filled(host, FIRST)
    keep_filled(host, [b"pinned", b"too"])
    pin(host, hashes=[b"pinned", b"too"])
    places = look_up(host, FIRST)
    before = [(place.generation, bytes_at(host, place, 0)) for place in places]
    fill_up(host, ROOM - 2)
    tier.pace = 100
    for _ in range(ROOM):
        host.tick()
    assert host.store.evicted_ahead_blocks > 0
    assert [(place.generation, bytes_at(host, place, 0)) for place in places] == before
    assert is_here(host) and is_here(host, [b"pinned", b"too"])
    let_go(host, side="load")


@pytest.mark.parametrize("tiers", ["all", "disk"])
@pytest.mark.parametrize("is_writing", [False, True])
def test_what_is_cleared_while_it_waits_or_is_written_never_comes_back(
    host: Host, tier: SlowTier, tiers: str, is_writing: bool
) -> None:
    tier.pace, tier.takes = 0, is_writing
    fill_up(host)
    host.tick()
    assert host.handoffs.kept(host.now)["disk"]["waiting_writes"] > 0
    assert tier.stats().open_writes == (LINE.batch if is_writing else 0)
    clear(host, spaces=[SPACE], tenant=b"", block_hashes=FIRST, tier=tiers)
    rest = [key[1] for key, _ in host.store.index.items() if key[1] not in FIRST]
    clear(host, spaces=[SPACE], tenant=b"", block_hashes=rest)  # so that there is room, and nothing more to press
    tier.pace, tier.takes = 100, True
    for _ in range(5):
        host.tick()
    assert not is_below(tier, FIRST[:1]) and not is_below(tier, FIRST[1:])
    assert tier.stats().blocks == 0
    assert is_here(host) == (tiers == "disk")
    assert leases(host) == 0


def test_a_block_found_wrong_while_it_is_written_does_not_stay_below(host: Host, tier: SlowTier) -> None:
    tier.pace = 0
    fill_up(host)
    host.tick()
    look_up(host, FIRST)
    let_go(host, side="load", ok=False, spoilt=[0])
    tier.pace = 100
    for _ in range(ROOM):
        host.tick()
    assert not is_below(tier, FIRST[:1])
    assert look_up(host, FIRST) == []


def test_heads_outlive_their_tails_whatever_was_written_first(tier: SlowTier) -> None:
    host = Host(tier=tier, write_mode=WriteMode.BACK, waterline=Waterline(low=0.2, high=0.4, batch=2))
    tier.pace = 0
    chain = [b"c%d" % n for n in range(ROOM // 2)]
    keep_filled(host, chain)
    keep_filled(host, [b"d%d" % n for n in range(ROOM // 2)], OTHER)
    tier.pace = 1
    left = deque([len(chain)], maxlen=2)
    while host.store.extents.free_share < LINE.high:
        host.tick()
        left.append(len(host.store.index.leading(SPACE, chain)))
        assert cached(host) == left[-1] + ROOM // 2, "no gap in what is left, and the other chain is younger"
    assert left[-1] < len(chain)


def test_through_writes_what_is_about_to_go_and_the_tier_has_not(tier: SlowTier) -> None:
    host = Host(tier=tier, waterline=LINE)
    tier.pace = 100
    fill_up(host, FEW // 2 * 2)
    for _ in range(ROOM):
        host.tick()
    tier.remove((SPACE, FIRST[0]))
    keep_filled(host, [b"x%d" % n for n in range(ROOM // 5)])
    for _ in range(ROOM):
        host.tick()
    assert not is_here(host)
    assert is_below(tier)
    assert host.handoffs.kept(host.now)["disk"]["written_back_blocks"] == 1


@pytest.mark.parametrize("state", ["paused", "hung"])
def test_what_waits_for_a_sick_tier_is_written_when_it_is_well(tier: SlowTier, state: str) -> None:
    host = Host(tier=tier)
    tier.state = state
    keep_filled(host, FIRST)
    assert not is_below(tier)
    assert host.handoffs.flush_step(host.now) == 0, "a daemon that stops does not wait for it"
    tier.state = "well"
    for _ in range(2):
        host.tick()
    assert is_below(tier)

"""What a stopping daemon still writes: the most valuable first, for as long as it may."""

from __future__ import annotations

import pytest
from one_host import PAGES, Host
from slow_tier import SlowTier
from test_prefixes import let_go, look_up
from test_steering import SPACE
from test_tiering import keep_filled

from pdx.daemon.flush import flush
from pdx.tiers.spill import WriteMode

CHAINS = [[b"%d/%d" % (number, n) for n in range(2)] for number in range(4)]


@pytest.fixture
def kind_of_tier() -> type[SlowTier]:
    return SlowTier


@pytest.fixture
def host(tier: SlowTier) -> Host:
    host = Host(tier=tier, write_mode=WriteMode.BACK)
    for chain in CHAINS:
        keep_filled(host, chain)
    return host


def below(tier: SlowTier) -> list[int]:
    return [sum(tier.contains([(SPACE, name) for name in chain])) for chain in CHAINS]


def all_of(host: Host, tier: SlowTier, *, deadline_s: float = 5.0, hurried: bool = False) -> int:
    return flush(
        lambda: host.handoffs.flush_step(host.now), tier.fileno(), deadline_s=deadline_s, hurried=lambda: hurried
    )  # fmt: skip


def test_all_goes_down_the_last_to_be_evicted_first(host: Host, tier: SlowTier) -> None:
    tier.pace = 1
    places = look_up(host, CHAINS[1])  # in use, and not for long: also worth keeping
    seen = []
    while host.handoffs.flush_step(host.now):
        seen.append(below(tier))
    assert seen[2] == [0, 2, 0, 0]
    assert seen[4] == [0, 2, 0, 2]
    assert below(tier) == [2, 2, 2, 2]
    assert places
    let_go(host, side="load")
    assert host.handoffs.flush_step(host.now) == 0


def test_a_deadline_or_a_hurry_ends_it(host: Host, tier: SlowTier) -> None:
    tier.pace = 0
    assert all_of(host, tier, deadline_s=0.05) == 8
    assert all_of(host, tier, hurried=True) == 8
    tier.pace = 100
    assert all_of(host, tier) == 0
    assert below(tier) == [2, 2, 2, 2]


@pytest.mark.parametrize("trouble", ["refuses", "paused"])
def test_a_sick_tier_is_not_waited_for(host: Host, tier: SlowTier, trouble: str) -> None:
    tier.refuses, tier.state = trouble == "refuses", "paused" if trouble == "paused" else "well"
    assert all_of(host, tier) == 0
    assert below(tier) == [0, 0, 0, 0]


def test_no_more_than_the_tier_can_hold(tier: SlowTier) -> None:
    small = SlowTier(cap_bytes=4 * PAGES.unit_bytes)
    host = Host(tier=small, write_mode=WriteMode.BACK)
    for chain in CHAINS:
        keep_filled(host, chain)
    assert all_of(host, small) == 0
    assert below(small) == [0, 0, 2, 2]
    small.close(drain_s=0.0)


def test_write_through_ends_what_waits_and_writes_nothing_again(tier: SlowTier) -> None:
    host = Host(tier=tier)
    keep_filled(host, CHAINS[0])
    tier.remove((SPACE, CHAINS[0][0]))
    tier.pace = 0
    keep_filled(host, CHAINS[1])
    assert all_of(host, tier, deadline_s=0.05) == 2
    tier.pace = 1
    assert all_of(host, tier) == all_of(host, tier) == 0
    assert below(tier) == [1, 2, 0, 0]

"""A disk that takes no writes: what waits is not lost by it, and trying costs one write a pause."""

from __future__ import annotations

import errno

import pytest
from tier_folder import CAP_BYTES, OpenTier

from pdx.tiers.conformance import BLOCK_BYTES, User, block, key_of
from pdx.tiers.disk import OPEN_WRITES_MAX, DiskTier
from pdx.tiers.health import PAUSE_S
from pdx.tiers.tier import End, Failed, StateChanged, Write, Written


def write_many(tier: DiskTier, start: int, count: int) -> list[int]:
    tickets = [tier.submit(Write(key_of(number), block(key_of(number)))) for number in range(start, start + count)]
    return [ticket for ticket in tickets if ticket is not None]


def ends_of(tier: DiskTier, tickets: list[int]) -> list[End]:
    """In the order in which they came."""
    user = User(tier)
    for ticket in tickets:
        user.end_of(ticket)
    return list(user.ends.values())


def test_what_has_not_begun_is_withdrawn_the_last_first(open_tier: OpenTier) -> None:
    tier, files = open_tier(writers=1)
    files.errors["write"] = errno.ENOSPC
    tickets = write_many(tier, 0, 10)
    ends = ends_of(tier, tickets)
    assert files.calls["write"] == 1, "nothing begins while nobody has looked at what failed"
    assert [end.ticket for end in ends] == [*reversed(tickets[1:]), tickets[0]]
    assert all(isinstance(end, Failed) and end.again for end in ends)
    assert [getattr(end, "errno", 0) for end in ends] == [0] * 9 + [errno.ENOSPC]
    (end,) = ends_of(tier, write_many(tier, 20, 1))
    assert isinstance(end, Failed) and end.again


def test_after_a_pause_one_write_goes_before_the_others(open_tier: OpenTier) -> None:
    now = [0.0]
    tier, files = open_tier(clock=lambda: now[0])
    files.errors["write"] = errno.ENOSPC
    ends_of(tier, write_many(tier, 0, 1))
    for pause in range(1, 4):
        now[0] += PAUSE_S + 1
        assert tier.take_events() == []
        calls, tickets = files.calls["write"], write_many(tier, 10 * pause, 5)
        assert tier.stats().state == "trying"
        assert len(tickets) == 1
        ends_of(tier, tickets)
        assert (files.calls["write"], tier.stats().state) == (calls + 1, "paused")
    del files.errors["write"]
    now[0] += PAUSE_S + 1
    tickets = write_many(tier, 50, 5)
    assert len(tickets) == 1
    assert isinstance(ends_of(tier, tickets)[0], Written)
    assert tier.stats().state == "well"
    assert len(write_many(tier, 60, 5)) == 5


@pytest.mark.parametrize("writers", [1, 2])
def test_a_full_tier_loses_one_writes_victims_a_pause(open_tier: OpenTier, writers: int) -> None:
    now = [0.0]
    tier, files = open_tier(writers=writers, clock=lambda: now[0])
    count = CAP_BYTES // BLOCK_BYTES
    user = User(tier)
    for number in range(count):
        user.write(key_of(number))
    kept = tier.stats().blocks
    assert tier.stats().evicted
    files.errors["write"] = errno.EIO
    for pause in range(5):
        ends_of(tier, write_many(tier, count + pause * OPEN_WRITES_MAX, OPEN_WRITES_MAX))
        assert tier.stats().state == "paused"
        assert tier.stats().blocks >= kept - writers, "those that were under way when the first one failed"
        tier.check_integrity()
        now[0] += PAUSE_S + 1


def test_a_file_that_is_too_large_for_the_file_system_is_not_asked_for_again(open_tier: OpenTier) -> None:
    tier, files = open_tier()
    files.errors["write"] = errno.EFBIG
    (end,) = ends_of(tier, write_many(tier, 0, 1))
    assert isinstance(end, Failed) and not end.again


def test_deletions_go_on_while_writes_pause(open_tier: OpenTier) -> None:
    tier, files = open_tier(writers=1)
    User(tier).write(key_of(1))
    used_bytes = tier.stats().used_bytes
    files.gate.clear()
    files.errors["write"] = errno.ENOSPC
    tickets = write_many(tier, 10, 3)
    assert files.waiting.acquire(timeout=5.0)
    tier.remove(key_of(1))  # behind the writes
    files.gate.set()
    ends_of(tier, tickets)
    assert tier._writes.wait_idle(5.0)
    assert not [event for event in tier.take_events() if isinstance(event, StateChanged)]
    assert tier.stats().used_bytes < used_bytes

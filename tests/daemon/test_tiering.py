"""Blocks on their way to a tier and back, through one daemon's handoffs; the tier works when it is asked for events."""

from __future__ import annotations

import errno
import random
import select
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from one_host import HASHES, PAGES, Host, engine
from test_prefixes import MINE, OTHER, heard, keep, leases, let_go, look_up

from pdx.daemon.tiering import FIRST_LOT
from pdx.layout import Place
from pdx.tiers.disk import DiskTier
from pdx.tiers.faulty import FaultyFiles
from pdx.tiers.folder import Folder
from pdx.tiers.health import PAUSE_S
from pdx.tiers.memory import MemoryTier
from pdx.tiers.tier import Event, StateChanged
from pdx.wire import LoadEnded, SendOpened

THIRD = b"t" * 16


@pytest.fixture
def host(tier: MemoryTier) -> Host:
    return Host(tier=tier)


def fill(host: Host, places: list[Place | None], seed: int = 0) -> None:
    """What a worker does: bytes, and all layers declared."""
    for n, place in enumerate(places):
        if place is not None:
            for layer in range(PAGES.layers):
                start = place.page_offset(PAGES, layer)
                host.store.arena.memory[start : start + PAGES.page_bytes] = pattern(seed + n, layer)
            host.store.arena.set_watermark(place.header_offset, PAGES.layers)


def pattern(number: int, layer: int) -> bytes:
    return bytes([(number * 16 + layer + 1) % 256]) * PAGES.page_bytes


def bytes_at(host: Host, place: Place, layer: int) -> bytes:
    start = place.page_offset(PAGES, layer)
    return bytes(host.store.arena.memory[start : start + PAGES.page_bytes])


def keep_filled(
    host: Host, hashes: list[bytes] = HASHES, called: bytes = MINE, seed: int = 0, request: str = ""
) -> None:
    opened = keep(host, hashes, called, request)
    assert isinstance(opened, SendOpened), opened
    fill(host, opened.places, seed)
    let_go(host, called)
    host.tick()


def crowd_out(host: Host) -> None:
    """Everything idle leaves the arena: more is claimed than fits beside it."""
    blocks = host.store.extents.capacity(PAGES)
    crowd = [b"crowd %d" % n for n in range(blocks)]
    for called, hashes in ((OTHER, crowd[: blocks // 2]), (THIRD, crowd[blocks // 2 :])):
        assert isinstance(keep(host, hashes, called), SendOpened)
    for called in (OTHER, THIRD):
        let_go(host, called, ok=False)
    assert host.store.index.find(host_space(host), HASHES)[0] is None


def host_space(host: Host) -> bytes:
    from pdx.daemon.ports import namespace_for

    return namespace_for(engine("P"), b"")


def watermark(host: Host, place: Place) -> int:
    return host.store.arena.watermark(place.header_offset)


def test_what_left_the_arena_comes_back(host: Host, tier: MemoryTier) -> None:
    keep_filled(host)
    assert tier.stats().blocks == 3
    crowd_out(host)
    places = look_up(host)
    assert len(places) == 3
    assert [watermark(host, place) for place in places] == [0, 0, 0], "it is on its way"
    host.tick()
    assert [watermark(host, place) for place in places] == [PAGES.layers] * 3
    for n, place in enumerate(places):
        assert [bytes_at(host, place, layer) for layer in range(PAGES.layers)] == [pattern(n, 0), pattern(n, 1)]
    assert host.heard["P"] == []
    let_go(host, side="load")
    assert leases(host) == 0
    assert look_up(host) == places, "it is cache again"
    assert tier.stats().written == 3, "and is not written again"


def test_a_daemon_that_comes_after_finds_it(host: Host, tier: MemoryTier) -> None:
    keep_filled(host)
    successor = Host(tier=tier)
    places = look_up(successor)
    successor.tick()
    assert [bytes_at(successor, place, 0) for place in places] == [pattern(n, 0) for n in range(3)]


def test_memory_and_tier_together(host: Host) -> None:
    keep_filled(host)
    crowd_out(host)
    keep_filled(host, HASHES[:1])
    places = look_up(host)
    assert [watermark(host, place) for place in places] == [PAGES.layers, 0, 0]
    host.tick()
    let_go(host, side="load")
    assert leases(host) == 0


def test_memory_behind_a_gap_that_the_tier_fills(host: Host, tier: MemoryTier) -> None:
    keep_filled(host)
    crowd_out(host)
    keep_filled(host, HASHES[1:2], seed=1)
    places = look_up(host)
    assert [watermark(host, place) for place in places] == [0, PAGES.layers, 0]
    host.tick()
    assert [bytes_at(host, place, 0) for place in places] == [pattern(n, 0) for n in range(3)]
    let_go(host, side="load")
    assert leases(host) == 0


def test_two_who_wait_for_a_block_wait_for_one_read(host: Host, tier: MemoryTier) -> None:
    keep_filled(host)
    crowd_out(host)
    first = look_up(host)
    assert look_up(host, called=OTHER) == first
    host.tick()
    assert tier.stats().loaded == 3
    let_go(host, side="load")
    let_go(host, OTHER, side="load")
    assert leases(host) == 0


def test_a_block_that_does_not_come_is_told(host: Host, tier: MemoryTier) -> None:
    keep_filled(host)
    crowd_out(host)
    places = look_up(host)
    tier.remove((host_space(host), HASHES[1]))
    host.tick()
    ended = heard(host)
    assert isinstance(ended, LoadEnded) and "unknown" in ended.reason
    assert [watermark(host, place) for place in places] == [PAGES.layers, 0, PAGES.layers]
    let_go(host, side="load", ok=False)
    assert leases(host) == 0
    assert len(look_up(host)) == 1


def test_nobody_waits_so_nothing_is_read(tier: MemoryTier) -> None:
    class Busy(MemoryTier):
        def submit(self, request: Any) -> int | None:
            return None

    keep_filled(Host(tier=tier))
    busy = Busy(cap_bytes=1 << 20)
    busy.contains = tier.contains  # type: ignore[method-assign]
    host = Host(tier=busy)
    assert len(look_up(host)) == 3
    let_go(host, side="load", ok=False)
    assert leases(host) == 0 and not host.store.slots
    busy.close(drain_s=0.0)


@pytest.mark.parametrize("state", ["hung", "off"])
def test_a_disk_that_hangs_or_goes_off_is_told_once_and_asked_no_more(tier: MemoryTier, state: str) -> None:
    class Hanging(MemoryTier):
        """Takes reads and says nothing of them."""

        said: Sequence[Event] = ()

        def take_events(self) -> list[Event]:
            said, self.said = list(self.said), ()
            return said

    keep_filled(Host(tier=tier))
    hanging = Hanging(cap_bytes=1 << 20)
    hanging.contains = tier.contains  # type: ignore[method-assign]
    host = Host(tier=hanging)
    look_up(host)
    hanging.said = [StateChanged(state, "it hangs")]
    hanging.contains = lambda keys: [False] * len(keys)  # type: ignore[method-assign]
    host.tick()
    assert isinstance(heard(host), LoadEnded)
    let_go(host, side="load", ok=False)
    assert look_up(host) == []
    assert leases(host) == 3, "the buffers that it has are safe from everybody"
    hanging.close(drain_s=0.0)


def test_nothing_comes_up_while_handoffs_wait_for_room(host: Host) -> None:
    keep_filled(host)
    crowd_out(host)
    blocks = host.store.extents.capacity(PAGES)
    for number in range(2):
        host.send(number, [b"%d/%d" % (number, n) for n in range(int(blocks * 0.6))])
    assert host.handoffs.reservations_waiting
    host.heard["P"].clear()
    assert look_up(host) == []


def test_a_name_that_no_tier_takes_is_kept_in_memory_only(host: Host, tier: MemoryTier) -> None:
    keep_filled(host, [b"x" * 300])
    assert tier.stats().blocks == 0
    assert len(look_up(host, [b"x" * 300])) == 1
    assert leases(host) == 1


def test_a_promise_outlives_the_engine_that_asked(host: Host) -> None:
    keep_filled(host)
    crowd_out(host)
    look_up(host)
    host.handoffs.engine_gone("P", host.now)
    host.tick()
    assert leases(host) == 0
    assert len(look_up(host)) == 3


def test_a_spoilt_block_leaves_the_tier_too(host: Host, tier: MemoryTier) -> None:
    keep_filled(host)
    look_up(host)
    let_go(host, side="load", ok=False, spoilt=[0])
    assert tier.stats().blocks == 2
    assert look_up(host) == []


def test_a_full_arena_promises_less(host: Host) -> None:
    keep_filled(host)
    crowd_out(host)
    blocks = host.store.extents.capacity(PAGES)
    for number in range(2):
        host.send(number, [b"%d/%d" % (number, n) for n in range(blocks // 2)])
    host.heard["P"].clear()
    assert look_up(host) == []
    assert host.store.leases


@pytest.mark.parametrize("seed", range(10))
def test_any_course_ends_with_everything_free(seed: int) -> None:
    chance = random.Random(seed)
    tier = MemoryTier(cap_bytes=chance.choice([2000, 20_000]))
    host = Host(extents=1, tier=tier)
    names = [bytes([n]) * 16 for n in range(40, 60)]
    loads: dict[bytes, list[Place]] = {}
    prompts = [[b"%d/%d" % (stem, n) for n in range(6)] for stem in range(8)]
    for _ in range(600):
        hashes = chance.choice(prompts)[: chance.randrange(1, 7)]
        called, roll = chance.choice(names), chance.random()
        if roll < 0.3 and called not in loads:
            opened = keep(host, hashes, called, chance.choice(["", "one", "another"]))
            if isinstance(opened, SendOpened):
                fill(host, opened.places)
                let_go(host, called, ok=chance.random() < 0.9)
        elif roll < 0.6 and called not in loads:
            if places := look_up(host, hashes, called):
                loads[called] = places
        elif roll < 0.8 and loads:
            called = chance.choice(list(loads))
            host.heard["P"].clear()
            let_go(host, called, side="load", spoilt=[0] if chance.random() < 0.2 else [])
            del loads[called]
        else:
            host.tick()
        host.heard["P"].clear()
        tier.check_integrity()
    for called in list(loads):
        let_go(host, called, side="load")
    host.tick()
    host.tick()
    assert leases(host) == 0
    tier.close(drain_s=0.0)


def test_what_a_full_disk_could_not_take_is_written_when_it_can(tmp_path: Path) -> None:
    """In order, and with nothing missing in the middle: behind a gap no block is of use."""
    files, now = FaultyFiles(Folder.open(tmp_path / "tier")), [0.0]
    tier = DiskTier(files, cap_bytes=1 << 30, clock=lambda: now[0])
    host = Host(extents=10, tier=tier)
    chain = [b"c%d" % n for n in range(100)]
    files.errors["write"] = errno.ENOSPC
    keep_filled(host, chain)
    for _ in range(3):
        until(host, tier, lambda: tier.stats().state == "paused" and not tier.stats().open_writes)
        disk = host.handoffs.disk()
        assert disk is not None and (disk["waiting_writes"], disk["blocks"]) == (100, 0)
        now[0] += PAUSE_S + 1
    assert host.counters["writes_failed"] <= 4, "two were under way, and then one a pause"
    del files.errors["write"]
    now[0] += PAUSE_S + 1
    until(host, tier, lambda: tier.stats().blocks == 100)
    tier.close(drain_s=5.0)


def until(host: Host, tier: DiskTier, is_so: Callable[[], bool]) -> None:
    """Ticks whenever the tier has something to say."""
    host.tick()
    while not is_so():
        assert select.select([tier.fileno()], [], [], 10.0)[0], f"{tier} says nothing more"
        host.tick()


def test_a_long_prompt_that_the_tier_has_not_is_asked_for_once_and_a_little(host: Host, asked: list[int]) -> None:
    assert look_up(host, [b"%d" % n for n in range(5000)]) == []
    assert sum(asked) <= 2 * FIRST_LOT

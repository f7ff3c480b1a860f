"""How much work the blocks of a long prompt are that come up from a tier: everybody waits for the control thread."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from counted import growth
from one_host import HASHES, PAGES, Host
from test_prefixes import OTHER, heard, leases, let_go, look_up
from test_tiering import THIRD, crowd_out, host_space, keep_filled, watermark

from pdx.buffer.selection import Selection
from pdx.daemon.tiering import FIRST_LOT
from pdx.tiers.memory import MemoryTier
from pdx.tiers.pages import meta_of, pages_of
from pdx.tiers.tier import Write
from pdx.wire import LetGo, LoadEnded


@pytest.fixture
def host(tier: MemoryTier) -> Host:
    return Host(tier=tier)


def write_below(host: Host, tier: MemoryTier, hashes: list[bytes]) -> None:
    """As if a daemon before this one had kept them."""
    keep_filled(host, hashes[:1])
    place = look_up(host, hashes[:1])[0]
    let_go(host, side="load")
    pages, meta = pages_of(host.store.arena, place, PAGES), meta_of(host.store.arena, place, PAGES)
    for block_hash in hashes[1:]:
        assert tier.submit(Write((host_space(host), block_hash), pages, meta)) is not None
        tier.take_events()
    host.store.clear(Selection(), now=host.now)


def test_a_long_prompt_comes_up_under_one_claim(host: Host, tier: MemoryTier, asked: list[int]) -> None:
    """Each of its blocks is named once, room is made once, and each comes or does not by itself."""
    hashes = [b"%d" % n for n in range(25)]
    write_below(host, tier, hashes)
    crowd_out_with_cache(host)
    asked.clear()
    tier.remove((host_space(host), hashes[20]))
    evicted, claims = host.store.evicted_blocks, count_calls(host.store, "_make_room")
    places = look_up(host, hashes)
    assert (len(places), len(claims)) == (20, 1)
    assert sum(asked) <= 2 * 20 + FIRST_LOT, "the lots grow"
    assert host.store.evicted_blocks - evicted <= 20 + PAGES.chunk_blocks
    tier.remove((host_space(host), hashes[7]))
    host.tick()
    assert isinstance(heard(host), LoadEnded)
    assert [watermark(host, place) for place in places] == [PAGES.layers * (n != 7) for n in range(20)]
    let_go(host, side="load", ok=False)
    assert leases(host) == 0


def test_what_was_computed_while_it_did_not_come_is_written(host: Host, tier: MemoryTier) -> None:
    keep_filled(host)
    crowd_out(host)
    assert len(look_up(host)) == 3
    for block_hash in HASHES:
        tier.remove((host_space(host), block_hash))
    keep_filled(host, called=OTHER)
    assert isinstance(heard(host), LoadEnded)
    host.tick()
    assert tier.contains([(host_space(host), block_hash) for block_hash in HASHES]) == [True] * 3


def test_an_end_of_a_load_looks_only_at_what_that_one_waited_for() -> None:
    """Whatever comes up for others."""

    tiers: list[MemoryTier] = []

    def others_wait(blocks: int) -> Callable[[], object]:
        tiers.append(tier := MemoryTier(cap_bytes=1 << 20))
        host, hashes = Host(extents=16, tier=tier), [b"%d" % n for n in range(blocks + 1)]
        write_below(host, tier, hashes)
        assert len(look_up(host, hashes[1:])) == blocks
        look_up(host, hashes[:1], OTHER)
        return lambda: (let_go_of(host, OTHER), look_up(host, [b"nowhere"], THIRD))

    assert growth(others_wait) < 1.5
    for tier in tiers:
        tier.close(drain_s=0.0)


def let_go_of(host: Host, called: bytes) -> None:
    host.handoffs.let_go("P", LetGo(handoff_id=called, side="load", fence=1, ok=False), host.now)


def crowd_out_with_cache(host: Host) -> None:
    """The arena is full of what may go."""
    blocks = host.store.extents.capacity(PAGES) // 2
    for number, called in enumerate((OTHER, THIRD)):
        keep_filled(host, [b"%d crowd %d" % (number, n) for n in range(blocks)], called)
    assert host.store.extents.free(PAGES) < 2


def count_calls(owner: object, name: str) -> list[object]:
    calls: list[object] = []
    method = getattr(owner, name)

    def counted(*about: Any) -> object:
        calls.append(about)
        return method(*about)

    setattr(owner, name, counted)
    return calls


def test_no_more_is_promised_than_can_be_answered_in_time(tier: MemoryTier, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pdx.daemon.costs.PROMISED_MAX", 4)
    host, hashes = Host(tier=tier), [b"%d" % n for n in range(10)]
    write_below(host, tier, hashes)
    assert len(look_up(host, hashes)) == 4
    host.tick()
    let_go(host, side="load")
    assert len(look_up(host, hashes)) == 8, "and the next ones behind what is here by now"


def test_a_prompt_that_names_a_block_twice_waits_for_one_read(host: Host, tier: MemoryTier) -> None:
    keep_filled(host)
    crowd_out(host)
    places = look_up(host, [HASHES[0], HASHES[0], HASHES[1]])
    assert places[0] == places[1] != places[2]
    host.tick()
    assert tier.stats().loaded == 2
    let_go(host, side="load")
    assert leases(host) == 0

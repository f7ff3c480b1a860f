"""An operator's verbs on one daemon: lookups that are true, pins that hold, clears after which nothing is served."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import pytest
from one_host import HASHES, PAGES, Host, engine
from test_prefixes import MINE, OTHER, heard, keep, leases, let_go, look_up
from test_tiering import crowd_out, fill, keep_filled, watermark

from pdx.errors import Refused
from pdx.keys import SPACE_BYTES, space_of, tenant_of
from pdx.tiers import memory
from pdx.tiers.memory import MemoryTier
from pdx.verbs import Clear, Cleared, Found, Lookup, Pin, Pinned, TierCleared, Unpin, Unpinned
from pdx.wire import LoadEnded, SendOpened

INFO = engine("P").info
SPACE = space_of(INFO.content, INFO.layout)
ALICE = tenant_of("alice")


@pytest.fixture
def host(tier: MemoryTier) -> Host:
    host = Host(tier=tier)
    host.handoffs.spaces.met(engine("P"))
    return host


def found(host: Host, hashes: list[bytes] = HASHES, tenant: bytes = b"") -> Found:
    result = host.handoffs.steer(Lookup(space=SPACE, tenant=tenant, block_hashes=hashes), host.now)
    assert isinstance(result, Found)
    return result


def counts(host: Host, hashes: list[bytes] = HASHES) -> tuple[int, int, int]:
    result = found(host, hashes)
    return result.blocks, result.arena_blocks, result.disk_blocks


def pin(host: Host, name: str = "manual", hashes: list[bytes] = HASHES, ttl_s: float = 60.0) -> Pinned:
    result = host.handoffs.steer(Pin(name=name, ttl_s=ttl_s, space=SPACE, block_hashes=hashes), host.now)
    assert isinstance(result, Pinned)
    host.store.check_integrity()
    return result


def unpin(host: Host, name: str = "manual", tenant: bytes = b"") -> int:
    result = host.handoffs.steer(Unpin(name=name, tenant=tenant), host.now)
    assert isinstance(result, Unpinned)
    host.store.check_integrity()
    return result.blocks


def clear(host: Host, **which: object) -> Cleared:
    result = host.handoffs.steer(Clear(**which), host.now)  # type: ignore[arg-type]
    assert isinstance(result, Cleared)
    host.store.check_integrity()
    return result


def is_here(host: Host, hashes: list[bytes] = HASHES) -> list[bool]:
    return [spot is not None for spot in host.store.index.find(SPACE, hashes)]


class TestLookup:
    def test_counts_each_tier(self, host: Host) -> None:
        assert counts(host) == (0, 0, 0)
        keep_filled(host)
        assert counts(host) == (3, 3, 0)
        crowd_out(host)
        assert counts(host) == (3, 0, 3)
        keep_filled(host, HASHES[:1])
        assert counts(host) == (3, 1, 2)
        assert counts(host, [*HASHES[:2], b"else", HASHES[2]]) == (2, 1, 1)

    def test_leaves_no_trace(self, host: Host, tier: MemoryTier) -> None:
        keep_filled(host)
        crowd_out(host)
        before = host.store.stats(), tier.stats(), host.counters.copy()
        found(host)
        assert (host.store.stats(), tier.stats(), host.counters) == before

    @pytest.mark.parametrize("seed", range(8))
    def test_agrees_with_the_next_request_while_its_generation_stands(self, seed: int) -> None:
        chance = random.Random(seed)
        tier = MemoryTier(cap_bytes=chance.choice([2000, 20_000]))
        host, prompts, agreed = Host(extents=1, tier=tier), [], 0
        host.handoffs.spaces.met(engine("P"))
        for stem in range(8):
            prompts.append([b"%d/%d" % (stem, n) for n in range(6)])
        for _ in range(300):
            hashes = chance.choice(prompts)[: chance.randrange(1, 7)]
            if chance.random() < 0.5:
                opened = keep(host, hashes)
                if isinstance(opened, SendOpened):
                    fill(host, opened.places)
                    let_go(host, ok=chance.random() < 0.9)
            told = found(host, hashes)
            if chance.random() < 0.3:
                host.tick()
            if found(host, hashes).generation == told.generation:
                assert len(look_up(host, hashes)) == told.blocks
                agreed += 1
                let_go(host, side="load", spoilt=[0] if chance.random() < 0.1 else [])
                host.heard["P"].clear()
        assert agreed > 100
        tier.close(drain_s=0.0)

    def test_what_leaves_raises_the_generation(self, host: Host) -> None:
        keep_filled(host)
        before = found(host).generation
        assert found(host).generation == before
        crowd_out(host)
        assert found(host).generation > before


class TestPin:
    def test_survives_what_evicts_everything_else(self, host: Host) -> None:
        keep_filled(host)
        keep_filled(host, [b"other"], OTHER)
        pinned = pin(host)
        assert (pinned.blocks, pinned.coming_blocks) == (3, 0)
        pressed(host)
        assert is_here(host) == [True] * 3
        assert is_here(host, [b"other"]) == [False]
        assert unpin(host) == 3
        pressed(host)
        assert is_here(host) == [False] * 3

    def test_brings_up_what_is_only_on_the_disk(self, host: Host) -> None:
        keep_filled(host)
        crowd_out(host)
        pinned = pin(host)
        assert (pinned.blocks, pinned.coming_blocks) == (3, 3)
        host.tick()
        (described,) = host.handoffs.kept(host.now)["pinned"]["pins"]
        assert (described["blocks"], described["coming_blocks"]) == (3, 0)
        pressed(host)
        assert [watermark(host, place) for place in look_up(host)] == [PAGES.layers] * 3

    def test_of_a_block_that_does_not_come_holds_the_rest(self, host: Host, tier: MemoryTier) -> None:
        keep_filled(host)
        crowd_out(host)
        pin(host)
        tier.remove((SPACE, HASHES[2]))
        host.tick()
        (described,) = host.handoffs.kept(host.now)["pinned"]["pins"]
        assert described["blocks"] == 2
        assert described["size_bytes"] == 2 * PAGES.unit_bytes, "the slot into which nothing came is free"
        assert len(host.store.slots) == len(host.store.index)
        unpin(host)
        assert leases(host) == 0

    def test_of_which_nothing_comes_ends(self, host: Host, tier: MemoryTier) -> None:
        keep_filled(host)
        crowd_out(host)
        pin(host)
        for block_hash in HASHES:
            tier.remove((SPACE, block_hash))
        host.tick()
        assert host.handoffs.kept(host.now)["pinned"]["pins"] == []
        assert (leases(host), len(host.store.slots)) == (0, 0)

    def test_takes_what_still_waits_to_be_read_when_one_block_is_rotten(
        self, host: Host, tier: MemoryTier, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """What it would hold of the others, were they not to come, is no cache and can't be evicted."""
        keep_filled(host)
        crowd_out(host)
        monkeypatch.setattr(memory, "OPEN_MAX", 1)
        pin(host)
        tier.remove((SPACE, HASHES[0]))
        for _ in HASHES:
            host.tick()
        assert is_here(host) == [False, True, True]
        (described,) = host.handoffs.kept(host.now)["pinned"]["pins"]
        assert (described["blocks"], described["coming_blocks"]) == (2, 0)

    def test_ends_with_its_time(self, host: Host) -> None:
        keep_filled(host)
        pin(host, ttl_s=5.0)
        host.tick(4.9)
        assert leases(host) == 1
        host.tick(0.2)
        assert leases(host) == 0
        assert host.counters["pins_expired"] == 1
        assert unpin(host) == 0

    def test_again_moves_deadline_and_prompt(self, host: Host) -> None:
        keep_filled(host)
        keep_filled(host, [b"other"], OTHER)
        pin(host, ttl_s=5.0)
        assert pin(host, ttl_s=50.0) == pin(host, ttl_s=50.0)
        assert leases(host) == 1
        host.tick(6.0)
        assert leases(host) == 1
        pin(host, hashes=[b"other"])
        pressed(host)
        assert (is_here(host)[0], is_here(host, [b"other"])) == (False, [True])

    def test_moves_into_the_room_that_it_leaves(self, host: Host) -> None:
        others = [b"other %d" % n for n in range(3)]
        keep_filled(host, others)
        crowd_out(host)
        keep_filled(host)
        pin(host)
        number = 0
        while isinstance(keep(host, [b"leased %d" % number], b"%016d" % number), SendOpened):
            number += 1
        moved = pin(host, hashes=others)
        assert moved.blocks == 3
        assert pin(host, hashes=others) == moved
        for _ in others:
            host.tick()
        assert is_here(host, [*others, *HASHES]) == [True] * 3 + [False] * 3

    def test_of_nothing_is_none(self, host: Host) -> None:
        assert pin(host).blocks == 0
        assert leases(host) == 0
        keep_filled(host)
        pin(host)
        assert pin(host, hashes=[b"unknown"]).blocks == 0
        assert unpin(host) == 0, "the name has moved to a prompt of which there is nothing"
        assert leases(host) == 0

    def test_budget_is_kept_whatever_is_asked(self, host: Host) -> None:
        budget = pin(host).budget_bytes
        blocks = budget // PAGES.unit_bytes
        hashes = [b"%d" % n for n in range(blocks + 2)]
        keep_filled(host, hashes)
        with pytest.raises(Refused, match=f"{budget}: unpin others"):
            pin(host, hashes=hashes)
        assert leases(host) == 0
        assert pin(host, "one", hashes[: blocks - 1]).used_bytes <= budget
        assert pin(host, "two", hashes[: blocks - 1]).used_bytes <= budget, "the same slots count once"
        assert pin(host, "one", hashes[: blocks - 1]).used_bytes <= budget, "what moves does not count twice"
        with pytest.raises(Refused):
            pin(host, "three", hashes)
        assert unpin(host, "one") == unpin(host, "two") == blocks - 1
        assert leases(host) == 0

    def test_a_disk_larger_than_the_budget_stays_there(self, host: Host, tier: MemoryTier) -> None:
        blocks = pin(host).budget_bytes // PAGES.unit_bytes + 2
        hashes = [b"%d" % n for n in range(blocks)]
        keep_filled(host, hashes)
        crowd_out(host)
        with pytest.raises(Refused):
            pin(host, hashes=hashes)
        assert tier.stats().open_reads == 0

    def test_is_its_tenants(self, host: Host) -> None:
        keep_filled(host)
        pin(host)
        assert unpin(host, tenant=ALICE) == 0
        other = Pin(name="manual", ttl_s=1.0, space=SPACE, tenant=ALICE, block_hashes=HASHES)
        assert host.handoffs.steer(other, host.now).blocks == 0  # type: ignore[union-attr]
        assert unpin(host) == 3

    def test_of_a_model_that_was_never_here_is_refused(self, host: Host) -> None:
        with pytest.raises(Refused, match="no engine with such blocks"):
            host.handoffs.steer(Pin(name="x", ttl_s=1.0, space=bytes(SPACE_BYTES), block_hashes=HASHES), host.now)

    def test_gives_way_to_nobody_but_ends_in_time(self, host: Host) -> None:
        """A handoff that needs the room waits, and gets it."""
        keep_filled(host, [b"%d" % n for n in range(4)])
        pin(host, hashes=[b"%d" % n for n in range(4)], ttl_s=5.0)
        blocks = int(host.store.extents.capacity(PAGES) * host.store.handoff_share)
        host.send(hashes=[b"large %d" % n for n in range(blocks)])
        assert host.handoffs.reservations_waiting == 1
        host.tick(2.0)
        assert unpin(host) == 4
        host.tick()
        assert host.handoffs.reservations_waiting == 0


class TestClear:
    def test_nothing_serves_what_was_cleared(self, host: Host, tier: MemoryTier) -> None:
        keep_filled(host)
        assert clear(host, dry_run=True).arena.blocks == 3
        assert counts(host) == (3, 3, 0), "a dry run changes nothing"
        cleared = clear(host)
        assert (cleared.arena.blocks, cleared.arena.size_bytes) == (3, 3 * PAGES.unit_bytes)
        assert (cleared.disk.blocks, cleared.disk.leaving) == (3, 0)
        assert look_up(host) == [] and counts(host) == (0, 0, 0)
        assert tier.stats().blocks == 0 and not host.store.slots
        assert look_up(Host(tier=tier)) == [], "nor a daemon that comes after"
        assert clear(host) == Cleared(arena=TierCleared(), disk=TierCleared())

    def test_one_tier_only(self, host: Host) -> None:
        keep_filled(host)
        assert clear(host, tier="arena").disk == TierCleared()
        assert counts(host) == (3, 0, 3)
        keep_filled(host)
        assert clear(host, tier="disk").arena == TierCleared()
        assert counts(host) == (3, 3, 0)

    def test_a_prompt_of_one_tenant(self, host: Host) -> None:
        keep_filled(host)
        keep_filled(host, [*HASHES[:2], b"else"], OTHER)
        with pytest.raises(Refused, match="a tenant and a space"):
            clear(host, block_hashes=HASHES)
        assert clear(host, spaces=[SPACE], tenant=ALICE, block_hashes=HASHES).arena.blocks == 0
        cleared = clear(host, spaces=[SPACE], tenant=b"", block_hashes=HASHES[1:])
        assert (cleared.arena.blocks, cleared.disk.blocks) == (2, 2)
        assert is_here(host, [*HASHES, b"else"]) == [True, False, False, True]
        assert counts(host, [*HASHES[:2], b"else"]) == (1, 1, 0), "what lies behind a gap is of no use"

    def test_other_spaces_and_tenants_stay(self, host: Host) -> None:
        keep_filled(host)
        assert clear(host, tenant=ALICE).disk.blocks == 0
        assert clear(host, spaces=[bytes(SPACE_BYTES)]).disk.blocks == 0
        assert clear(host, spaces=[]).arena.blocks == clear(host, model="unknown").arena.blocks == 0
        assert clear(host, model="m", dry_run=True).arena.blocks == 3
        assert counts(host) == (3, 3, 0)
        assert clear(host, tenant=b"", spaces=[SPACE]).disk.blocks == 3

    def test_of_a_model_takes_what_earlier_lives_have_left_on_the_disk(self, tier: MemoryTier, tmp_path: Path) -> None:
        kinds, updated = tmp_path / "kinds", replace(engine("P"), info=INFO.at("weights of an update"))
        before = Host(tier=tier, kinds_file=kinds)
        for each in (engine("P"), updated):
            before.handoffs.spaces.met(each)
        keep_filled(before)
        host = Host(tier=tier, kinds_file=kinds)
        contents = [info.content for info in host.handoffs.spaces.describe([]).spaces]
        assert contents == [INFO.content, updated.info.content]
        assert clear(host, model="m").disk.blocks == 3
        assert look_up(host) == []

    def test_of_a_model_is_refused_where_what_is_kept_may_be_its(self, tier: MemoryTier, tmp_path: Path) -> None:
        before = Host(tier=tier)
        before.handoffs.spaces.met(engine("P"))
        keep_filled(before)
        (tmp_path / "kinds").write_bytes(b"[{torn")
        host = Host(tier=tier, kinds_file=tmp_path / "kinds")
        for which in ({}, {"dry_run": True}, {"tier": "disk"}, {"tenant": b""}):
            with pytest.raises(Refused, match="3 blocks are of kinds that this daemon has never met, and may be m's"):
                clear(host, model="m", **which)
        for which in ({"tier": "arena"}, {"tenant": ALICE}, {"older_s": 1e6}):
            assert clear(host, model="m", **which).disk.blocks == 0, "none of those is meant"
        assert clear(host, model="m", spaces=[SPACE]).disk.blocks == 3, "others have met them"
        assert look_up(host) == []

    def test_of_a_model_leaves_others_that_are_known(self, host: Host) -> None:
        keep_filled(host)
        assert clear(host, model="other", spaces=[bytes(SPACE_BYTES)]).disk.blocks == 0
        assert counts(host) == (3, 3, 0)

    def test_old_blocks_only(self, host: Host) -> None:
        keep_filled(host)
        host.tick(100.0)
        keep_filled(host, [b"young"], OTHER)
        cleared = clear(host, older_s=50.0)
        assert (cleared.arena.blocks, cleared.disk.blocks) == (3, 0), "the tier has a clock of its own: seconds old"
        assert is_here(host, [*HASHES, b"young"]) == [False] * 3 + [True]

    def test_a_load_under_way_goes_on_and_its_bytes_leave_with_it(self, host: Host) -> None:
        keep_filled(host)
        places = look_up(host)
        cleared = clear(host)
        assert (cleared.arena.blocks, cleared.arena.held) == (3, 3)
        assert [watermark(host, place) for place in places] == [PAGES.layers] * 3
        assert look_up(host, called=OTHER) == []
        let_go(host, side="load")
        assert not host.store.slots

    def test_blocks_being_computed_are_never_served(self, host: Host, tier: MemoryTier) -> None:
        opened = keep(host)
        assert isinstance(opened, SendOpened)
        fill(host, opened.places)
        assert clear(host).arena.filling == 3
        let_go(host)
        host.tick()
        assert look_up(host) == [] and not host.store.slots and tier.stats().blocks == 0

    def test_blocks_on_their_way_up_become_no_cache(self, host: Host) -> None:
        keep_filled(host)
        crowd_out(host)
        look_up(host)
        assert clear(host).arena.filling == 3
        host.tick()
        assert isinstance(heard(host), LoadEnded), "this tier had not begun to read"
        assert look_up(host, called=OTHER) == []
        let_go(host, side="load")
        host.tick()
        assert counts(host) == (0, 0, 0) and not host.store.slots

    def test_blocks_on_their_way_down_do_not_stay_there(self, host: Host, tier: MemoryTier) -> None:
        opened = keep(host)
        assert isinstance(opened, SendOpened)
        fill(host, opened.places)
        let_go(host)  # its tick has submitted the writes; the tier works in the next
        assert tier.stats().open_writes == 3
        clear(host)
        host.tick()
        assert tier.stats().blocks == 0 and counts(host) == (0, 0, 0)

    def test_a_handoff_under_way_arrives_and_is_no_cache(self, host: Host) -> None:
        host.send()
        assert clear(host).arena.filling == 3
        host.fill([0, 1, 2])
        assert host.ask() == "granted"
        host.let_go(ok=True)
        host.heard["P"].clear()
        assert look_up(host) == []

    def test_ends_pins_of_which_nothing_is_left(self, host: Host) -> None:
        keep_filled(host)
        pin(host)
        assert clear(host, dry_run=True).pins_ended == 0
        cleared = clear(host)
        assert (cleared.arena.held, cleared.pins_ended) == (3, 1)
        assert leases(host) == 0 and not host.store.slots

    def test_computed_again_is_found_again(self, host: Host) -> None:
        keep_filled(host)
        clear(host)
        keep_filled(host)
        assert counts(host) == (3, 3, 0)
        crowd_out(host)
        assert counts(host) == (3, 0, 3)


def pressed(host: Host) -> None:
    """Requests that want room for all of the arena, a piece at a time."""
    for number in range(2 * host.store.extents.capacity(PAGES)):
        if isinstance(keep(host, [b"pressure %d" % number], MINE), SendOpened):
            let_go(host, MINE)
            host.tick()


def test_a_daemon_without_a_disk_clears_its_arena() -> None:
    host = Host()
    keep_filled(host)
    assert clear(host, tier="disk").disk == TierCleared()
    assert clear(host).arena.blocks == 3

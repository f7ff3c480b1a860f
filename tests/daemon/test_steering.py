"""An operator's verbs on one daemon: lookups that are true, pins that hold, clears after which nothing is served."""

from __future__ import annotations

import errno
import random
from dataclasses import replace
from pathlib import Path

import pytest
from one_host import HASHES, PAGES, Host, engine
from test_prefixes import OTHER, heard, keep, leases, let_go, look_up
from test_tiering import crowd_out, fill, keep_filled, watermark

from pdx.errors import Refused, TierBroken
from pdx.keys import SPACE_BYTES, space_of, tenant_of
from pdx.tiers.disk import DiskTier
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

    def test_of_a_disk_that_could_not_be_opened_is_refused(self) -> None:
        """A later daemon may find on it what this one has never seen."""
        tier = DiskTier.off(TierBroken("broken", errno.EIO), cap_bytes=8 << 20)
        host = Host(tier=tier)
        host.handoffs.spaces.met(engine("P"))
        keep_filled(host)
        for which in ({}, {"tier": "disk"}, {"dry_run": True}):
            with pytest.raises(Refused, match=r"its disk could not be opened.*Start it anew"):
                clear(host, **which)
        assert counts(host) == (3, 3, 0), "and nothing has changed"
        assert clear(host, tier="arena").arena.blocks == 3
        assert counts(host) == (0, 0, 0)
        tier.close(drain_s=0.0)

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


def test_a_daemon_without_a_disk_clears_its_arena() -> None:
    host = Host()
    keep_filled(host)
    assert clear(host, tier="disk").disk == TierCleared()
    assert clear(host).arena.blocks == 3

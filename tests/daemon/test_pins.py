"""Pins: what they hold, and for how long; what all of them together may hold, and cost."""

from __future__ import annotations

import contextlib
import random

import pytest
from counted import lines_run
from one_host import HASHES, PAGES, Host, engine
from test_prefixes import MINE, OTHER, keep, leases, let_go, look_up
from test_promotions import write_below
from test_steering import ALICE, SPACE, clear, is_here, pin, unpin
from test_tiering import crowd_out, keep_filled, watermark

from pdx.daemon import pins
from pdx.errors import Refused
from pdx.keys import SPACE_BYTES
from pdx.tiers import memory
from pdx.tiers.memory import MemoryTier
from pdx.verbs import Clear, Pin
from pdx.wire import LoadEnded, SendOpened


@pytest.fixture
def host(tier: MemoryTier) -> Host:
    host = Host(tier=tier)
    host.handoffs.spaces.met(engine("P"))
    return host


def lots(host: Host, tier: MemoryTier, monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """Eight blocks of a prompt that are only below, and come up two at a time."""
    monkeypatch.setattr(pins, "PROMISED_MAX", 2)
    hashes = [b"%d" % n for n in range(8)]
    write_below(host, tier, hashes)
    return hashes


def pressed(host: Host) -> None:
    """Requests that want room for all of the arena, a piece at a time."""
    for number in range(2 * host.store.extents.capacity(PAGES)):
        if isinstance(keep(host, [b"pressure %d" % number], MINE), SendOpened):
            let_go(host, MINE)
            host.tick()


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

    def test_hears_what_does_not_come_whatever_engines_call_their_loads(self, host: Host, tier: MemoryTier) -> None:
        keep_filled(host)
        crowd_out(host)
        pin(host)
        assert len(look_up(host, HASHES[1:], called=b"pin 1")) == 2
        for block_hash in HASHES[:2]:
            tier.remove((SPACE, block_hash))
        host.tick()
        assert host.heard["P"] == [LoadEnded(handoff_id=b"pin 1", reason="disk: unknown")]
        (described,) = host.handoffs.kept(host.now)["pinned"]["pins"]
        assert described["blocks"] == 1
        unpin(host)
        let_go(host, b"pin 1", side="load", ok=False)
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

    def test_of_a_long_prompt_comes_up_in_lots(
        self, host: Host, tier: MemoryTier, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Each block is work of the control thread, for which everybody waits, and a read before those of others."""
        hashes = lots(host, tier, monkeypatch)
        keep_filled(host, hashes[5:7])
        pinned = pin(host, hashes=hashes)
        assert (pinned.blocks, pinned.coming_blocks, tier.stats().open_reads) == (8, 6, 2)
        assert pinned.used_bytes == 4 * PAGES.unit_bytes, "what is here already is held at once"
        assert pin(host, hashes=hashes).blocks == 8
        came = []
        for _ in range(4):
            host.tick()
            (described,) = host.handoffs.kept(host.now)["pinned"]["pins"]
            came.append((described["blocks"], described["coming_blocks"], tier.stats().open_reads))
        assert came == [(8, 4, 2), (8, 2, 2), (8, 0, 0), (8, 0, 0)]
        assert tier.stats().loaded == 6
        pressed(host)
        assert is_here(host, hashes) == [True] * 8
        assert unpin(host) == 8
        assert (leases(host), host.handoffs.pinned_bytes) == (0, 0)

    def test_what_has_yet_to_come_counts(self, host: Host, tier: MemoryTier, monkeypatch: pytest.MonkeyPatch) -> None:
        hashes = lots(host, tier, monkeypatch)
        monkeypatch.setattr(pins.Pins, "budget_bytes", 10 * PAGES.unit_bytes)
        pin(host, "long", hashes)
        keep_filled(host, HASHES)
        with pytest.raises(Refused, match="unpin others"):
            pin(host, "more")
        monkeypatch.setattr(pins, "PLACES_MAX", 9)
        assert pin(host, "long", hashes).blocks == 8, "what moves does not count twice"
        with pytest.raises(Refused, match="at most 9 blocks"):
            pin(host, "more", HASHES[:2])
        assert unpin(host, "long") == 8
        assert pin(host, "more").blocks == 3
        for _ in hashes:
            host.tick()
        assert is_here(host, hashes[6:]) == [False] * 2, "who is unpinned brings up no more"

    def test_gives_up_what_is_nowhere_any_more_before_its_lot(
        self, host: Host, tier: MemoryTier, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        hashes = lots(host, tier, monkeypatch)
        pin(host, hashes=hashes)
        tier.remove((SPACE, hashes[5]))
        for _ in hashes:
            host.tick()
        (described,) = host.handoffs.kept(host.now)["pinned"]["pins"]
        assert (described["blocks"], described["coming_blocks"]) == (5, 0)
        assert clear(host).pins_ended == 1
        assert (leases(host), len(host.store.slots)) == (0, 0)

    def test_gives_up_the_rest_behind_a_block_that_does_not_come(
        self, host: Host, tier: MemoryTier, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """No lookup gets past it; the room that the rest counted for is others' at once."""
        hashes = lots(host, tier, monkeypatch)
        pin(host, hashes=hashes)
        host.tick()
        tier.remove((SPACE, hashes[2]))
        for _ in hashes:
            host.tick()
        (described,) = host.handoffs.kept(host.now)["pinned"]["pins"]
        assert (described["blocks"], described["coming_blocks"]) == (3, 0)
        monkeypatch.setattr(pins, "PLACES_MAX", 3 + len(HASHES))
        keep_filled(host)
        assert pin(host, "other").blocks == len(HASHES)

    def test_goes_on_when_there_is_room_again(
        self, host: Host, tier: MemoryTier, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Requests that run hold all of the arena for a while: nobody waits for room, and there is none."""
        hashes = lots(host, tier, monkeypatch)
        pin(host, hashes=hashes)
        free = host.store.extents.capacity(PAGES) - 2
        assert isinstance(keep(host, [b"leased %d" % n for n in range(free - 1)], MINE), SendOpened)
        for _ in hashes:
            host.tick()
        (described,) = host.handoffs.kept(host.now)["pinned"]["pins"]
        assert (described["blocks"], described["coming_blocks"]) == (8, 5), "one more has found room"
        let_go(host, MINE)
        for _ in hashes:
            host.tick()
        assert is_here(host, hashes) == [True] * 8
        assert unpin(host) == 8
        assert leases(host) == 0

    def test_waits_for_room_for_what_is_there_before_a_gap(
        self, host: Host, tier: MemoryTier, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        hashes = lots(host, tier, monkeypatch)
        pin(host, hashes=hashes)
        tier.remove((SPACE, hashes[3]))
        free = host.store.extents.capacity(PAGES) - 2
        for called, blocks in ((MINE, range(2)), (OTHER, range(2, free))):
            assert isinstance(keep(host, [b"leased %d" % n for n in blocks], called), SendOpened)
        for _ in hashes:
            host.tick()
        (described,) = host.handoffs.kept(host.now)["pinned"]["pins"]
        assert (described["blocks"], described["coming_blocks"]) == (3, 1)
        let_go(host, MINE, ok=False)
        for _ in hashes:
            host.tick()
        (described,) = host.handoffs.kept(host.now)["pinned"]["pins"]
        assert (described["blocks"], described["coming_blocks"]) == (3, 0)
        assert is_here(host, hashes[:4]) == [True] * 3 + [False]

    def test_outlives_a_clear_of_the_arena_while_more_is_to_come(
        self, host: Host, tier: MemoryTier, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        hashes = lots(host, tier, monkeypatch)
        pin(host, hashes=hashes)
        assert clear(host, tier="arena").pins_ended == 0
        for _ in hashes:
            host.tick()
        assert is_here(host, hashes) == [False] * 2 + [True] * 6
        assert pin(host, hashes=hashes).blocks == 8, "those of the arena are below yet"
        assert clear(host).pins_ended == 1
        host.tick()
        assert (leases(host), len(host.store.slots)) == (0, 0), "what was on its way up is gone, too"

    def test_brings_up_no_more_while_others_wait_for_room(
        self, host: Host, tier: MemoryTier, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        hashes = lots(host, tier, monkeypatch)
        pin(host, hashes=hashes, ttl_s=1000.0)
        keep(host, [b"leased %d" % n for n in range(4)], MINE)
        blocks = int(host.store.extents.capacity(PAGES) * host.store.handoff_share)
        host.send(hashes=[b"large %d" % n for n in range(blocks)])
        assert host.handoffs.reservations_waiting == 1
        host.tick()
        assert (tier.stats().open_reads, is_here(host, hashes).count(True)) == (0, 2)
        host.tick(20.0)  # it has waited for long enough
        assert host.handoffs.reservations_waiting == 0
        for _ in hashes:
            host.tick()
        assert is_here(host, hashes) == [True] * 8

    def test_holds_none_that_was_cleared_on_its_way_up(self, host: Host, tier: MemoryTier) -> None:
        """Its slot would count, and no lookup would ever find it there."""
        keep_filled(host)
        crowd_out(host)
        look_up(host)
        assert clear(host, tier="arena").arena.filling == 3
        pinned = pin(host)
        assert (pinned.blocks, pinned.coming_blocks, pinned.size_bytes) == (3, 3, 3 * PAGES.unit_bytes)
        host.tick()
        (described,) = host.handoffs.kept(host.now)["pinned"]["pins"]
        assert (described["blocks"], described["coming_blocks"]) == (3, 0)
        assert [watermark(host, place) for place in look_up(host, called=OTHER)] == [PAGES.layers] * 3
        let_go(host, side="load")
        let_go(host, OTHER, side="load")
        assert len(host.store.slots) == 3, "who waited for the others has had them, and nothing of them is left"
        assert tier.stats().written == 3, "and nothing is written again"
        unpin(host)
        assert leases(host) == 0

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

    def test_pins_of_one_prompt_are_bounded_by_what_they_hold_together(
        self, host: Host, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        keep_filled(host)
        monkeypatch.setattr(pins, "PLACES_MAX", 2 * len(HASHES))
        assert pin(host, "one").blocks == pin(host, "two").blocks == 3
        with pytest.raises(Refused, match="at most 6 blocks together"):
            pin(host, "three")
        assert pin(host, "two").blocks == 3, "what moves does not count twice"
        unpin(host, "one")
        assert pin(host, "three").blocks == 3

    def test_others_cost_nothing_where_they_are_not_touched(self, host: Host) -> None:
        """As many names as may be for one prompt: who clears or pins something else must not wait for them."""
        keep_filled(host)
        keep_filled(host, [b"other"], OTHER)
        pin(host, "other", [b"other"])

        def work() -> None:
            host.handoffs.steer(Pin(name="other", ttl_s=60.0, space=SPACE, block_hashes=[b"other"]), host.now)
            host.handoffs.steer(Clear(spaces=[SPACE], tenant=b"", block_hashes=[b"unknown"]), host.now)
            assert host.handoffs.pinned_bytes > 0

        def work_beside(number: int) -> int:
            for name in range(number):
                pin(host, f"{name}")
            return lines_run(work)

        few, many = work_beside(10), work_beside(40)
        assert many < 1.5 * few, f"{few} lines beside 10 pins, {many} beside 40"

    @pytest.mark.parametrize("seed", range(8))
    def test_totals_add_up_whatever_is_asked(self, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(pins, "PROMISED_MAX", 1 + seed % 4)
        chance, tier = random.Random(seed), MemoryTier(cap_bytes=20_000)
        host = Host(extents=1, tier=tier)
        host.handoffs.spaces.met(engine("P"))
        for _ in range(200):
            hashes = [b"%d/%d" % (chance.randrange(4), n) for n in range(4)][: chance.randrange(1, 5)]
            match chance.choice(["keep", "pin", "pin", "unpin", "clear", "tick"]):
                case "keep":
                    keep_filled(host, hashes)
                    let_go(host)
                case "pin":
                    with contextlib.suppress(Refused):
                        pin(host, chance.choice("abc"), hashes, chance.choice([1.0, 60.0]))
                case "unpin":
                    unpin(host, chance.choice("abc"))
                case "clear":
                    clear(host, spaces=[SPACE], tenant=b"", block_hashes=hashes, tier=chance.choice(["all", "arena"]))
                case _:
                    host.tick(chance.choice([0.0, 2.0]))
            held = {slot for lease in host.store.leases.values() if lease.owner.kind == "verb" for slot in lease.slots}
            assert host.handoffs.pinned_bytes == sum(slot.size_bytes for slot in held)
        for name in "abc":
            unpin(host, name)
        pinned = host.handoffs._pins
        assert (pinned.used_bytes, pinned._coming_bytes, pinned._places) == (0, 0, 0)
        assert not (pinned._coming or pinned._by_slot or pinned._by_lease)
        tier.close(drain_s=0.0)

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

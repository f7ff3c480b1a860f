from __future__ import annotations

from collections.abc import Sequence

import pytest

from pdx.buffer.arena import Arena
from pdx.buffer.claim import Claim
from pdx.buffer.lease import Lease, LeaseState, Owner
from pdx.buffer.slots import SlotState
from pdx.buffer.store import POISON, Store
from pdx.errors import IllegalTransition, Refused
from pdx.layout import CONTROL_BYTES, PageLayout

PAGES = PageLayout(layers=2, page_bytes=1000, chunk_blocks=4)  # 15 blocks an extent, 60 in the arena
OTHER = PageLayout(layers=4, page_bytes=2048, chunk_blocks=2)  # 7 and 28
NAMESPACE = b"n" * 16
ENGINE = Owner(kind="session", name="engine-1")
WIRE = Owner(kind="wire", name="host-b")
TTL_S = 30.0


def hashes(start: int, stop: int) -> list[bytes]:
    return [number.to_bytes(32, "big") for number in range(start, stop)]


def claim(
    store: Store, block_hashes: Sequence[bytes], *, tail: bool = False, pages: PageLayout = PAGES, now: float = 0.0
) -> Claim:
    claimed = store.claim(ENGINE, NAMESPACE, pages, block_hashes, tail=tail, now=now, ttl_s=TTL_S)
    assert claimed is not None
    return claimed


def cache(store: Store, block_hashes: Sequence[bytes], *, pages: PageLayout = PAGES) -> None:
    written = claim(store, block_hashes, pages=pages)
    store.commit(written)
    store.release(written.lease)


def states(leased: Claim) -> list[SlotState]:
    return [slot.state for slot in leased.lease.slots]


def cached(store: Store, block_hashes: Sequence[bytes]) -> int:
    return sum(spot is not None for spot in store.index.find(NAMESPACE, block_hashes))


def is_full(store: Store, block_hashes: Sequence[bytes], *, pages: PageLayout = PAGES) -> bool:
    return store.claim(ENGINE, NAMESPACE, pages, block_hashes, tail=False, now=0, ttl_s=TTL_S) is None


class TestClaim:
    def test_a_new_prompt_is_all_fresh(self, store: Store) -> None:
        claimed = claim(store, hashes(0, 7), tail=True)
        assert claimed.fresh == set(range(8))
        assert [slot.blocks for slot in claimed.lease.slots] == [4, 2, 1, 1]
        assert len({(place.slot_offset, place.position) for place in claimed.places}) == 8
        assert claimed.tail
        assert claimed.places[7].slot_blocks == 1
        assert states(claimed) == [SlotState.FILLING] * 4

    def test_headers_carry_the_generation_before_the_places_are_known(self, store: Store, arena: Arena) -> None:
        first = claim(store, hashes(0, 5))
        second = claim(store, hashes(5, 9))
        for place in first.places + second.places:
            assert arena.generation(place.header_offset) == place.generation > 0
            assert arena.watermark(place.header_offset) == 0
        assert second.places[0].generation > first.places[0].generation

    def test_ready_blocks_are_shared_and_the_gaps_filled(self, store: Store) -> None:
        cache(store, hashes(2, 4))
        cache(store, hashes(6, 7))
        claimed = claim(store, hashes(0, 8), tail=True)
        assert claimed.fresh == {0, 1, 4, 5, 7, 8}
        found = claim(store, hashes(2, 4))
        assert found.places == claimed.places[2:4]
        assert found.fresh == frozenset()

    def test_blocks_another_writer_is_filling_count_as_missing(self, store: Store) -> None:
        first, second = claim(store, hashes(0, 4)), claim(store, hashes(0, 4))
        assert second.fresh == {0, 1, 2, 3}
        assert not set(first.places) & set(second.places)

    def test_the_tail_has_a_slot_of_its_own_and_no_key(self, store: Store) -> None:
        claimed = claim(store, hashes(0, 1), tail=True)
        assert [slot.blocks for slot in claimed.lease.slots] == [1, 1]
        store.commit(claimed)
        assert len(store.index) == 1
        store.release(claimed.lease)
        assert store.stats()["slots"] == {"filling": 0, "ready": 1, "quarantine": 0}

    def test_a_prompt_of_a_tail_only(self, store: Store) -> None:
        claimed = claim(store, [], tail=True)
        assert (len(claimed.places), claimed.fresh) == (1, {0})
        store.release(claimed.lease)
        assert not store.slots

    def test_all_or_nothing(self, store: Store) -> None:
        claim(store, hashes(0, 30))
        cache(store, hashes(100, 110))
        before = (store.stats(), list(store.policy.victims()))
        assert is_full(store, hashes(200, 231))
        assert (store.stats(), list(store.policy.victims())) == before

    def test_more_than_the_handoff_share_is_refused_for_good(self, store: Store) -> None:
        with pytest.raises(Refused, match="55 blocks of 2000 bytes never fits: one handoff may take 54"):
            claim(store, hashes(0, 54), tail=True)
        assert len(claim(store, hashes(0, 53), tail=True).places) == 54

    def test_a_layout_larger_than_an_extent_is_refused(self, store: Store) -> None:
        with pytest.raises(Refused):
            claim(store, hashes(0, 1), pages=PageLayout(layers=64, page_bytes=4096, chunk_blocks=1))

    def test_blocks_of_another_layout_are_not_shared(self, store: Store) -> None:
        cache(store, hashes(0, 4), pages=OTHER)
        assert claim(store, hashes(0, 4)).fresh == {0, 1, 2, 3}

    def test_namespaces_do_not_meet(self, store: Store) -> None:
        cache(store, hashes(0, 4))
        claimed = store.claim(ENGINE, b"m" * 16, PAGES, hashes(0, 4), tail=False, now=0, ttl_s=TTL_S)
        assert claimed and claimed.fresh == {0, 1, 2, 3}

    @pytest.mark.parametrize("cached", [False, True])
    def test_the_same_hash_twice_is_refused(self, store: Store, cached: bool) -> None:
        """A hash names all that comes before its block, so no prompt has one twice."""
        if cached:
            cache(store, hashes(0, 1))
        with pytest.raises(Refused, match="once"):
            claim(store, [*hashes(0, 2), *hashes(0, 1)])
        assert not store.leases


class TestCommit:
    def test_the_first_commit_wins_and_the_loser_is_free_after_its_holds(self, store: Store) -> None:
        first, second = claim(store, hashes(0, 4)), claim(store, hashes(0, 4))
        store.commit(second)
        store.commit(first)
        assert claim(store, hashes(0, 4)).places == second.places
        assert states(first) == [SlotState.READY]
        store.release(first.lease)
        assert states(first) == [SlotState.FREE]

    def test_a_slot_with_one_winner_among_its_blocks_stays(self, store: Store) -> None:
        first = claim(store, hashes(0, 4))
        cache(store, hashes(0, 3))
        store.commit(first)
        store.release(first.lease)
        assert states(first) == [SlotState.READY]
        found = claim(store, hashes(0, 4))
        assert found.places[3] == first.places[3]
        assert not set(found.places[:3]) & set(first.places)

    def test_nothing_is_found_before_commit(self, store: Store) -> None:
        claim(store, hashes(0, 4))
        assert store.read(ENGINE, NAMESPACE, hashes(0, 4), now=0, ttl_s=TTL_S) is None

    @pytest.mark.parametrize("how", ["commit", "abandon"])
    def test_a_claim_ends_once(self, store: Store, how: str) -> None:
        claimed = claim(store, hashes(0, 4))
        getattr(store, how)(claimed)
        before = states(claimed)
        for again in (store.commit, store.abandon):
            with pytest.raises(IllegalTransition):
                again(claimed)
        assert states(claimed) == before

    def test_commit_after_the_last_hold_ended_is_illegal(self, store: Store) -> None:
        claimed = claim(store, hashes(0, 4))
        store.release(claimed.lease)
        with pytest.raises(IllegalTransition):
            store.commit(claimed)
        assert len(store.index) == 0

    def test_abandoned_slots_wait_for_every_hold(self, store: Store) -> None:
        cache(store, hashes(0, 4))
        claimed = claim(store, hashes(0, 8))
        wire = store.lease(claimed, WIRE, now=0, ttl_s=TTL_S)
        store.abandon(claimed)
        assert states(claimed) == [SlotState.READY, SlotState.QUARANTINE]
        store.release(claimed.lease)
        assert states(claimed) == [SlotState.READY, SlotState.QUARANTINE]
        store.release(wire)
        assert states(claimed) == [SlotState.READY, SlotState.FREE]
        assert cached(store, hashes(0, 8)) == 4


class TestLeases:
    def test_read_leases_the_leading_ready_blocks(self, store: Store) -> None:
        cache(store, hashes(0, 3))
        cache(store, hashes(4, 6))
        read = store.read(ENGINE, NAMESPACE, hashes(0, 6), now=0, ttl_s=TTL_S)
        assert read is not None
        assert len(read.places) == 3
        assert [slot.holds for slot in read.lease.slots] == [1, 1]
        assert store.read(ENGINE, NAMESPACE, hashes(3, 6), now=0, ttl_s=TTL_S) is None

    def test_a_lease_over_places_holds_just_their_slots(self, store: Store) -> None:
        claimed = claim(store, hashes(0, 8))
        wire = store.lease(claimed.places[5:7], WIRE, now=0, ttl_s=TTL_S)
        assert wire.slots == claimed.lease.slots[1:]
        store.release(claimed.lease)
        assert states(claimed) == [SlotState.FREE, SlotState.FILLING]

    def test_a_place_whose_slot_was_used_again_is_not_leased(self, store: Store) -> None:
        old = claim(store, hashes(0, 4))
        store.release(old.lease)
        new = claim(store, hashes(4, 8))
        assert new.places[0].slot_offset == old.places[0].slot_offset
        for source in (old, old.places):
            with pytest.raises(IllegalTransition):
                store.lease(source, WIRE, now=0, ttl_s=TTL_S)
        assert [slot.holds for slot in new.lease.slots] == [1]

    def test_what_was_abandoned_is_not_leased_anew(self, store: Store) -> None:
        claimed = claim(store, hashes(0, 4))
        store.abandon(claimed)
        with pytest.raises(IllegalTransition):
            store.lease(claimed, WIRE, now=0, ttl_s=TTL_S)
        assert len(store.leases) == 1

    def test_an_expired_lease_keeps_its_holds_until_quiet(self, store: Store) -> None:
        claimed = claim(store, hashes(0, 8), now=100.0)
        assert store.expire(129.9) == []
        assert store.expire(130.0) == [claimed.lease]
        assert store.expire(130.0) == []
        assert claimed.lease.state is LeaseState.QUARANTINED
        store.abandon(claimed)
        assert states(claimed) == [SlotState.QUARANTINE] * 2
        with pytest.raises(IllegalTransition):
            store.release(claimed.lease)
        store.quiesce(claimed.lease)
        assert states(claimed) == [SlotState.FREE] * 2
        assert not store.leases

    def test_renewal_moves_the_end(self, store: Store) -> None:
        claimed = claim(store, hashes(0, 4), now=0.0)
        assert store.renew(claimed.lease, now=20.0, ttl_s=TTL_S)
        assert store.expire(49.0) == []
        assert store.expire(50.0) == [claimed.lease]
        assert not store.renew(claimed.lease, now=50.0, ttl_s=TTL_S)

    def test_ending_twice_is_harmless(self, store: Store) -> None:
        claimed = claim(store, hashes(0, 4))
        store.release(claimed.lease)
        store.release(claimed.lease)
        store.quiesce(claimed.lease)
        assert not store.slots

    def test_a_live_lease_does_not_quiesce(self, store: Store) -> None:
        claimed = claim(store, hashes(0, 4))
        with pytest.raises(IllegalTransition):
            store.quiesce(claimed.lease)
        assert claimed.lease.state is LeaseState.LIVE

    def test_a_slot_nobody_can_fill_any_more_is_free(self, store: Store) -> None:
        claimed = claim(store, hashes(0, 4))
        store.release(claimed.lease)
        assert states(claimed) == [SlotState.FREE]


class TestEviction:
    def test_the_oldest_prompt_goes_first_and_its_end_before_its_head(self, store: Store) -> None:
        cache(store, hashes(0, 28))
        cache(store, hashes(100, 128))
        claim(store, hashes(200, 208))
        assert cached(store, hashes(100, 128)) == 28
        survivors = cached(store, hashes(0, 28))
        assert 0 < survivors < 28
        assert cached(store, hashes(0, survivors)) == survivors
        assert store.evicted_blocks == 28 - survivors

    def test_being_read_makes_young(self, store: Store) -> None:
        cache(store, hashes(0, 28))
        cache(store, hashes(100, 128))
        read = store.read(ENGINE, NAMESPACE, hashes(0, 28), now=0, ttl_s=TTL_S)
        assert read is not None
        store.release(read.lease)
        claim(store, hashes(200, 208))
        assert cached(store, hashes(0, 28)) == 28
        assert cached(store, hashes(100, 128)) < 28

    def test_held_slots_are_never_evicted(self, store: Store) -> None:
        cache(store, hashes(0, 40))
        read = store.read(ENGINE, NAMESPACE, hashes(0, 40), now=0, ttl_s=TTL_S)
        assert read is not None
        assert is_full(store, hashes(100, 130))
        store.release(read.lease)
        assert not is_full(store, hashes(100, 130))

    def test_what_a_claim_found_is_not_evicted_for_it(self, store: Store) -> None:
        cache(store, hashes(0, 20))
        cache(store, hashes(100, 140))
        claimed = claim(store, hashes(0, 50))
        assert claimed.fresh == set(range(20, 50))
        assert cached(store, hashes(0, 20)) == 20

    def test_another_layout_gives_up_whole_extents(self, store: Store) -> None:
        cache(store, hashes(0, 50))
        claimed = claim(store, hashes(200, 210), pages=OTHER)
        assert len(claimed.places) == 10
        assert cached(store, hashes(0, 50)) >= 15

    def test_an_extent_with_one_held_slot_stays_whole(self, store: Store) -> None:
        cache(store, hashes(0, 50))
        readers: list[Lease] = []
        for start in range(50):
            read = store.read(ENGINE, NAMESPACE, hashes(start, start + 1), now=0, ttl_s=TTL_S)
            assert read is not None
            if any(read.lease.slots[0].run.extent is lease.slots[0].run.extent for lease in readers):
                store.release(read.lease)
            else:
                readers.append(read.lease)
        assert is_full(store, hashes(200, 210), pages=OTHER)
        assert cached(store, hashes(0, 50)) == 50
        store.release(readers.pop())
        assert not is_full(store, hashes(200, 207), pages=OTHER)

    def test_nothing_goes_from_an_extent_that_stays_taken(self, store: Store) -> None:
        cache(store, hashes(0, 15))
        cache(store, hashes(100, 145))
        read = store.read(ENGINE, NAMESPACE, hashes(0, 1), now=0, ttl_s=TTL_S)
        assert read is not None
        beside = [slot for slot in store.slots.values() if slot.run.extent is read.lease.slots[0].run.extent]
        claim(store, hashes(200, 207), pages=OTHER)
        assert all(slot.state is SlotState.READY for slot in beside)


def test_freed_slots_are_poisoned_and_headers_and_neighbours_are_not(store: Store, arena: Arena) -> None:
    first, second = claim(store, hashes(0, 4)), claim(store, hashes(4, 8))
    for claimed in (first, second):
        (slot,) = claimed.lease.slots
        arena.memory[slot.run.offset : slot.run.offset + 4 * PAGES.unit_bytes] = b"x" * (4 * PAGES.unit_bytes)
    store.release(first.lease)
    start = first.places[0].slot_offset
    assert bytes(arena.memory[start : start + 4 * PAGES.unit_bytes]) == bytes([POISON]) * (4 * PAGES.unit_bytes)
    start = second.places[0].slot_offset
    assert bytes(arena.memory[start : start + 4 * PAGES.unit_bytes]) == b"x" * (4 * PAGES.unit_bytes)
    assert all(arena.generation(place.header_offset) == place.generation for place in second.places)


def test_the_control_page_is_no_slot(store: Store) -> None:
    claimed = claim(store, hashes(0, 54))
    assert min(place.header_offset for place in claimed.places) >= CONTROL_BYTES


def test_stats_and_repr(store: Store) -> None:
    cache(store, hashes(0, 6))
    claim(store, hashes(6, 9), tail=True)
    assert repr(store) == "<Store 3 filling, 2 ready, 0 quarantine slots, 1 leases, 6 blocks indexed>"
    assert store.stats() == {
        "arena_bytes": CONTROL_BYTES + 4 * 65536,
        "used_bytes": 10 * 4096,
        "tenants": {"": 10 * 4096},
        "extents": {"total": 4, "untaken": 3},
        "slots": {"filling": 3, "ready": 2, "quarantine": 0},
        "leases": {"live": 1, "quarantined": 0},
        "units": {"2 x 1000 B / 4": {"total": 15, "free": 5, "idle": 6}},
        "indexed_blocks": 6,
        "free_share": round((3 + 5 / 15) / 4, 4),
        "evicted_blocks": 0,
        "evicted_ahead_blocks": 0,
    }

"""Clearing the arena: what is meant, and only that, is found no more; who holds it goes on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pytest
from test_store import PAGES, TTL_S, WIRE, cache, cached, claim, hashes

from pdx.buffer.arena import Arena
from pdx.buffer.index import Index, Spot
from pdx.buffer.lease import Owner
from pdx.buffer.selection import Selection
from pdx.buffer.slots import SlotState
from pdx.buffer.store import POISON, Store
from pdx.keys import SPACE_BYTES

ALL = Selection()
SPACES = b"a" * SPACE_BYTES, b"b" * SPACE_BYTES
TENANTS = b"", b"t" * 16
ENGINE = Owner("session", "e")


def test_idle_blocks_leave_at_once(store: Store, arena: Arena) -> None:
    cache(store, hashes(0, 5))
    place = store.index.find(b"n" * 16, hashes(0, 1))[0]
    assert place is not None
    offset = place[0].run.offset
    cleared = store.clear(ALL, now=0.0)
    assert (len(cleared.blocks), cleared.held, len(cleared.filling)) == (5, 0, 0)
    assert cleared.size_bytes == 5 * place[0].layout.unit_bytes
    assert not store.slots
    assert arena.memory[offset] == POISON


def test_a_holder_goes_on_and_nobody_else_finds_it(store: Store) -> None:
    cache(store, hashes(0, 4))
    held = claim(store, hashes(0, 4))
    assert store.clear(ALL, now=0.0).held == 4
    assert cached(store, hashes(0, 4)) == 0
    assert [slot.state for slot in held.lease.slots] == [SlotState.READY]
    store.release(held.lease)
    assert not store.slots


def test_blocks_that_are_being_filled_will_not_be_found(store: Store) -> None:
    """Computed before the clear and committed after it would be served for ever."""
    filling = claim(store, hashes(0, 4), tail=True)
    assert len(store.clear(ALL, now=0.0).filling) == 4
    store.commit(filling)
    assert cached(store, hashes(0, 4)) == 0
    reader = store.lease(filling, WIRE, now=0.0, ttl_s=TTL_S)
    store.release(filling.lease)
    assert store.slots, "whoever was promised them has them"
    store.release(reader)
    assert not store.slots


def test_a_part_of_a_slot_leaves_no_room(store: Store) -> None:
    cache(store, hashes(0, 4))
    which = Selection(spaces=frozenset({b"n" * 16}), tenant=b"", block_hashes=frozenset(hashes(2, 9)))
    cleared = store.clear(which, now=0.0)
    assert (len(cleared.blocks), cleared.held) == (2, 2)
    assert cached(store, hashes(0, 4)) == 2
    assert store.clear(which, now=0.0).blocks == ()


def test_of_many_slots_some_are_free_at_once_and_nothing_is_found(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An arena has hundreds of thousands, and everybody waits."""
    monkeypatch.setattr("pdx.buffer.store.DROPPED_AT_ONCE", 4, raising=False)
    for number in range(20):
        cache(store, hashes(number, number + 1))
    copied = store.lease_to_copy([slot.places[0] for slot in store.slots.values()][:2], WIRE, now=0.0, ttl_s=TTL_S)
    assert len(store.clear(ALL, now=0.0).blocks) == 20
    store.check_integrity()
    assert (cached(store, hashes(0, 20)), len(store.slots), len(store.cleared)) == (0, 16, 14)
    assert store.extents.reachable(PAGES) == 58
    cache(store, hashes(0, 1))
    store.drop_cleared()
    store.check_integrity()
    assert (cached(store, hashes(0, 1)), len(store.slots)) == (1, 13)
    store.release(copied)
    assert claim(store, hashes(100, 154)).fresh
    store.check_integrity()
    assert (len(store.cleared), cached(store, hashes(0, 1))) == (5, 1), "who wants room has it of them"
    store.drop_cleared()
    store.drop_cleared()
    assert not store.cleared


def test_by_space_tenant_and_age(store: Store) -> None:
    for number, (space, tenant) in enumerate((space, tenant) for space in SPACES for tenant in TENANTS):
        kept = store.claim(ENGINE, space + tenant, PAGES, hashes(0, 3), tail=False, now=number * 10.0, ttl_s=TTL_S)
        assert kept
        store.commit(kept)
        store.release(kept.lease)

    def counted(**which: object) -> int:
        return len(store.survey(Selection(**which), now=30.0).blocks)  # type: ignore[arg-type]

    assert counted() == 12
    assert counted(spaces=frozenset(SPACES[:1])) == 6
    assert counted(tenant=TENANTS[1]) == counted(tenant=TENANTS[0]) == 6
    assert counted(spaces=frozenset(SPACES[1:]), tenant=TENANTS[1]) == 3
    assert [counted(older_s=age) for age in (0.0, 10.0, 25.0, 31.0)] == [12, 9, 3, 0]
    assert counted(spaces=frozenset()) == 0


def test_what_is_not_meant_is_not_looked_at(store: Store) -> None:
    """An index has a million blocks, a prompt some hundred, and a model that has just started none."""
    for space in SPACES:
        kept = store.claim(ENGINE, space, PAGES, hashes(0, 9), tail=False, now=0.0, ttl_s=TTL_S)
        assert kept
        store.commit(kept)
        store.release(kept.lease)
    looks: list[tuple[bytes, int]] = []

    class Watched(Index):
        def within(self, namespace: bytes) -> Mapping[bytes, Spot]:
            looks.append((namespace, len(super().within(namespace))))
            return super().within(namespace)

        def find(self, namespace: bytes, block_hashes: Sequence[bytes]) -> list[Spot | None]:
            found = super().find(namespace, block_hashes)
            looks[-1:] = [(namespace, len(found))]
            return found

    store.index.__class__ = Watched
    of_prompt = Selection(spaces=frozenset(SPACES[:1]), tenant=b"", block_hashes=frozenset(hashes(0, 2)))
    store.survey(of_prompt, now=0.0)
    assert looks == [(SPACES[0], 2)]
    looks.clear()
    store.survey(Selection(spaces=frozenset(SPACES[1:])), now=0.0)
    assert looks == [(SPACES[1], 9)]
    looks.clear()
    store.survey(Selection(spaces=frozenset({b"c" * SPACE_BYTES})), now=0.0)
    assert looks == []

from __future__ import annotations

from pdx.buffer.extents import Extents
from pdx.buffer.index import Index
from pdx.buffer.slots import BlockKey, Slot
from pdx.layout import CONTROL_BYTES, PageLayout

PAGES = PageLayout(layers=1, page_bytes=512, chunk_blocks=4)
EXTENTS = Extents(arena_bytes=CONTROL_BYTES + (1 << 20), extent_bytes=1 << 20)


def slot_of(*hashes: bytes | None, namespace: bytes = b"n") -> Slot:
    keys: list[BlockKey | None] = [block_hash and (namespace, block_hash) for block_hash in hashes]
    (run,) = EXTENTS.take(PAGES, len(keys))
    return Slot(run, 1, tuple(keys))


def test_the_first_to_enter_a_block_wins() -> None:
    index, first, second = Index(), slot_of(b"a", b"b"), slot_of(b"b", b"c")
    index.add(first)
    index.add(second)
    assert index.find(b"n", [b"a", b"b", b"c", b"d"]) == [(first, 0), (first, 1), (second, 1), None]
    assert (first.indexed, second.indexed, len(index)) == (2, 1, 3)


def test_namespaces_do_not_meet() -> None:
    index, slot = Index(), slot_of(b"a", namespace=b"one")
    index.add(slot)
    assert index.find(b"two", [b"a"]) == [None]


def test_leading_stops_at_the_first_gap() -> None:
    index, slot = Index(), slot_of(b"a", b"c")
    index.add(slot)
    assert index.leading(b"n", [b"a", b"b", b"c"]) == [(slot, 0)]
    assert index.leading(b"n", [b"b", b"c"]) == []


def test_removing_a_slot_spares_the_entries_of_others() -> None:
    index, first, second = Index(), slot_of(b"a"), slot_of(b"a", b"b")
    index.add(first)
    index.add(second)
    index.remove(second)
    assert dict(index.items()) == {(b"n", b"a"): (first, 0)}
    assert second.indexed == 0


def test_a_block_that_a_slot_has_twice_is_entered_and_removed_once() -> None:
    index, slot = Index(), slot_of(b"a", b"a")
    index.add(slot)
    assert (index.find(b"n", [b"a"]), index.keys_of(slot), slot.indexed) == ([(slot, 0)], [(b"n", b"a")], 1)
    index.remove(slot)
    assert (len(index), slot.indexed) == (0, 0)


def test_a_tail_is_never_indexed() -> None:
    index, tail = Index(), slot_of(None)
    index.add(tail)
    assert (len(index), tail.indexed) == (0, 0)


def test_a_block_that_is_forgotten_leaves_its_neighbours_and_twins() -> None:
    index, first, second = Index(), slot_of(b"a", b"b"), slot_of(b"b", None)
    index.add(first)
    index.add(second)
    assert [index.forget(first, 1), index.forget(first, 1)] == [(b"n", b"b"), None]
    assert index.forget(second, 0) is None, "it never was the one to be found"
    assert index.forget(second, 1) is None, "a tail never is"
    assert index.find(b"n", [b"a", b"b"]) == [(first, 0), None]
    assert (first.indexed, second.indexed) == (1, 0)

from __future__ import annotations

from pdx.buffer.evict import Lru
from pdx.buffer.extents import Extents
from pdx.buffer.slots import Slot
from pdx.layout import CONTROL_BYTES, PageLayout

PAGES = PageLayout(layers=1, page_bytes=512, chunk_blocks=1)


def slots(count: int) -> list[Slot]:
    extents = Extents(arena_bytes=CONTROL_BYTES + (1 << 20), extent_bytes=1 << 20)
    return [Slot(run, 1, ((b"n", b"h"),)) for run in extents.take(PAGES, count)]


def test_of_slots_touched_together_the_head_outlives_the_tail() -> None:
    lru, (head, middle, tail) = Lru(), slots(3)
    lru.touched([head, middle, tail])
    assert list(lru.victims()) == [tail, middle, head]


def test_the_least_recently_used_goes_first() -> None:
    lru, (old, young, again) = Lru(), slots(3)
    for slot in (again, old, young, again):
        lru.touched([slot])
    assert list(lru.victims()) == [old, young, again]


def test_removed_slots_are_no_victims_and_may_be_removed_again() -> None:
    lru, (one, other) = Lru(), slots(2)
    lru.touched([one, other])
    lru.removed(one)
    lru.removed(one)
    assert list(lru.victims()) == [other]
    assert (len(lru), repr(lru)) == (1, "<Lru 1 idle slots>")

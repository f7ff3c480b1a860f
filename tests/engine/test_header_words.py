"""HeaderWords says of many pages what `Headers` and the copier say of one."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from memory_daemon import MemoryDaemon

from pdx.engine.copier import Fault
from pdx.engine.header_words import HeaderWords
from pdx.layout import PageLayout, Place

LAYOUT = PageLayout(layers=4, page_bytes=16, chunk_blocks=1)
BLOCKS = 3


def arena() -> tuple[MemoryDaemon, list[Place]]:
    daemon = MemoryDaemon(LAYOUT, blocks=BLOCKS)
    return daemon, [daemon._claim() for _ in range(BLOCKS)]


@given(st.permutations([(block, layer) for block in range(BLOCKS) for layer in range(LAYOUT.layers)]), st.data())
def test_watermarks_rise_over_what_has_no_gap(pages: list[tuple[int, int]], data: st.DataObject) -> None:
    daemon, places = arena()
    words = HeaderWords(daemon.arena.memory)
    filled: set[tuple[int, int]] = set()
    while pages:
        layer = pages[0][1]
        together = [page for page in pages[: data.draw(st.integers(1, 4))] if page[1] == layer]
        pages = [page for page in pages if page not in together]
        filled |= set(together)
        digests = [100 * block + layer + (1 << 63) for block, _ in together]
        words.filled([places[block] for block, _ in together], layer, digests, LAYOUT)
        for block, place in enumerate(places):
            gap = next((n for n in range(LAYOUT.layers) if (block, n) not in filled), LAYOUT.layers)
            assert daemon.arena.watermark(place.header_offset) == gap
            checksums = [daemon.arena.checksum(place, n) for n in range(LAYOUT.layers)]
            assert checksums == [
                100 * block + n + (1 << 63) if (block, n) in filled else 0 for n in range(LAYOUT.layers)
            ]


def test_each_shard_has_a_watermark_of_its_own() -> None:
    sharded = PageLayout(layers=4, page_bytes=16, chunk_blocks=1, shards=2)
    daemon = MemoryDaemon(sharded, blocks=1)
    place, words = daemon._claim(), HeaderWords(daemon.arena.memory)
    raised = []
    for layer in (2, 1, 3, 0):
        words.filled([place], layer, [5], sharded)
        raised.append([daemon.arena.watermark(place.header_offset, shard) for shard in range(3)])
    assert raised == [[0, 1, 0], [0, 1, 0], [0, 2, 0], [2, 2, 0]]


def test_faults_are_named_and_a_slot_that_changed_hands_comes_before_its_checksum() -> None:
    daemon, places = arena()
    words = HeaderWords(daemon.arena.memory)
    words.filled(places, 2, [5, 6, 7], LAYOUT)
    assert words.faults(places, 2, [5, 6, 7]) == []
    assert words.faults(places, 2, [5, 9, 7]) == [(1, Fault.CHECKSUM)]
    daemon.arena.reset(places[1].header_offset, LAYOUT, 99)
    assert words.faults(places, 2, [5, 9, 8]) == [(1, Fault.GENERATION), (2, Fault.CHECKSUM)]

"""Copier: bit exact, and no wrong page passes."""

from __future__ import annotations

import numpy as np
import pytest
import xxhash
from memory_daemon import MemoryDaemon

from pdx.buffer.headers import Headers
from pdx.engine.copier import Copier, Fault, Pages, Rows
from pdx.layout import PageLayout, Place

LAYOUT = PageLayout(layers=3, page_bytes=1000, chunk_blocks=2)  # not a multiple of anything
BLOCKS = 4


@pytest.fixture(params=[False, True], ids=["checksum", "digest"])
def copier(request: pytest.FixtureRequest) -> Copier:
    return Copier(LAYOUT, digest_mode=request.param)


@pytest.fixture
def arena() -> Headers:
    return MemoryDaemon(LAYOUT, blocks=BLOCKS + 1).arena


@pytest.fixture
def places() -> list[Place]:
    daemon = MemoryDaemon(LAYOUT, blocks=BLOCKS + 1)
    units = [daemon._claim() for _ in range(BLOCKS)]
    # The last two blocks share a slot of two units.
    shared = [Place(units[2].slot_offset, 2, n, units[2 + n].header_offset, units[2 + n].generation) for n in (0, 1)]
    return [*units[:2], *shared]


def cache(seed: int) -> Pages:
    return np.random.default_rng(seed).integers(0, 256, (BLOCKS, LAYOUT.page_bytes), dtype=np.uint8)


def claim(arena: Headers, places: list[Place]) -> None:
    for at in places:
        arena.reset(at.header_offset, LAYOUT, at.generation)


def gathered(copier: Copier, arena: Headers, places: list[Place]) -> list[Pages]:
    claim(arena, places)
    caches = [cache(layer) for layer in range(LAYOUT.layers)]
    for layer, pages in enumerate(caches):
        copier.gather(Rows(pages), [3, 0, 2, 1], arena, places, layer)
        assert [arena.watermark(at.header_offset) for at in places] == [layer + 1] * BLOCKS
    return caches


def test_pages_arrive_bit_exact(copier: Copier, arena: Headers, places: list[Place]) -> None:
    caches = gathered(copier, arena, places)
    assert arena.checksum(places[0], 1) == xxhash.xxh3_64_intdigest(caches[1][3].tobytes())
    for layer, source in enumerate(caches):
        target = np.zeros_like(source)
        assert copier.scatter(Rows(target), [0, 1, 3, 2], arena, places, layer) == []
        assert (target[[0, 1, 3, 2]] == source[[3, 0, 2, 1]]).all()


def test_rows_may_be_strided(copier: Copier, arena: Headers, places: list[Place]) -> None:
    claim(arena, places)
    wide = np.random.default_rng(5).integers(0, 256, (BLOCKS, 3 * LAYOUT.page_bytes), dtype=np.uint8)
    view = wide[:, LAYOUT.page_bytes : 2 * LAYOUT.page_bytes]
    copier.gather(Rows(view), [0, 1, 2, 3], arena, places, 0)
    target = np.zeros_like(wide)
    into = target[:, LAYOUT.page_bytes : 2 * LAYOUT.page_bytes]
    assert copier.scatter(Rows(into), [0, 1, 2, 3], arena, places, 0) == []
    assert (into == view).all()
    assert not target[:, : LAYOUT.page_bytes].any()


def test_layers_out_of_order_raise_the_watermark_when_the_gap_closes(
    copier: Copier, arena: Headers, places: list[Place]
) -> None:
    claim(arena, places)
    for layer, watermark in ((1, 0), (0, 2), (2, 3)):
        copier.gather(Rows(cache(layer)), [0], arena, places[:1], layer)
        assert arena.watermark(places[0].header_offset) == watermark


def test_a_changed_byte_is_found(copier: Copier, arena: Headers, places: list[Place]) -> None:
    gathered(copier, arena, places)
    arena.memory[places[2].page_offset(LAYOUT, 1) + 999] ^= 1
    assert copier.scatter(Rows(cache(9)), [0, 1, 2, 3], arena, places, 1) == [(2, Fault.CHECKSUM)]
    assert copier.scatter(Rows(cache(9)), [0, 1, 2, 3], arena, places, 0) == []


def test_a_reused_slot_is_found(copier: Copier, arena: Headers, places: list[Place]) -> None:
    gathered(copier, arena, places)
    arena.reset(places[1].header_offset, LAYOUT, places[1].generation + 7)
    assert copier.scatter(Rows(cache(9)), [0, 1, 2, 3], arena, places, 0) == [(1, Fault.GENERATION)]


def test_a_forged_checksum_is_found_in_digest_mode(arena: Headers, places: list[Place]) -> None:
    copier = Copier(LAYOUT, digest_mode=True)
    gathered(copier, arena, places)
    start = places[0].page_offset(LAYOUT, 0)
    arena.memory[start] ^= 1
    page = arena.memory[start : start + LAYOUT.page_bytes]
    arena.set_checksum(places[0], 0, xxhash.xxh3_64_intdigest(page))
    assert copier.scatter(Rows(cache(9)), [0], arena, places[:1], 0) == [(0, Fault.DIGEST)]

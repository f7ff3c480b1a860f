from __future__ import annotations

import itertools
import random

import pytest

from pdx.buffer.extents import Extents, Run, is_clearable
from pdx.layout import CONTROL_BYTES, ExtentPlan, PageLayout

EXTENT_BYTES = 64 << 10
SMALL = PageLayout(layers=2, page_bytes=1000, chunk_blocks=4)  # 15 units an extent
LARGE = PageLayout(layers=4, page_bytes=2048, chunk_blocks=2)  # 7 units an extent
HUGE = PageLayout(layers=64, page_bytes=4096, chunk_blocks=1)  # fits in no extent


def extents_of(count: int) -> Extents:
    return Extents(arena_bytes=CONTROL_BYTES + count * EXTENT_BYTES + 4095, extent_bytes=EXTENT_BYTES)


def blocks_of(runs: list[Run]) -> int:
    return sum(run.blocks for run in runs)


def test_capacity_counts_units_per_extent() -> None:
    extents = extents_of(3)
    assert ExtentPlan(SMALL, EXTENT_BYTES).units == 15
    assert extents.capacity(SMALL) == extents.free(SMALL) == 45
    assert extents.capacity(LARGE) == 21
    assert extents.capacity(HUGE) == extents.free(HUGE) == 0


def test_runs_are_whole_chunks_first_then_the_pieces_that_fit_best() -> None:
    runs = extents_of(1).take(SMALL, 11)
    assert [run.blocks for run in runs] == [4, 4, 2, 1]
    assert [run.first_unit for run in runs] == [0, 4, 12, 14]  # 15 units are cut 4, 4, 4, 2, 1


def test_fragments_serve_when_no_whole_chunk_is_left() -> None:
    extents = extents_of(1)
    singles = [extents.take(SMALL, 1)[0] for _ in range(15)]
    for run in singles[::2]:
        extents.give(run)
    runs = extents.take(SMALL, 8)
    assert [run.blocks for run in runs] == [1] * 8
    assert extents.free(SMALL) == 0


def test_nothing_taken_leaves_no_trace() -> None:
    extents = extents_of(1)
    assert extents.take(SMALL, 0) == []
    assert not extents.pools


def test_a_wholly_free_extent_is_anybodys() -> None:
    extents = extents_of(2)
    runs = extents.take(SMALL, 16)
    assert extents.free(LARGE) == 0
    for run in runs[:-1]:
        extents.give(run)
    assert extents.free(LARGE) == 7
    assert blocks_of(extents.take(LARGE, 7)) == 7
    assert extents.free(SMALL) == 15 - runs[-1].blocks


def test_reachable_counts_own_idle_units_and_clearable_extents_of_others() -> None:
    extents = extents_of(2)
    small, large = extents.take(SMALL, 15), extents.take(LARGE, 7)
    assert extents.reachable(SMALL) == 0
    for run in small[:2] + large[:-1]:
        extents.rest(run)
    assert extents.reachable(SMALL) == 8
    assert not is_clearable(large[0].extent)
    extents.rest(large[-1])
    assert is_clearable(large[0].extent)
    assert extents.reachable(SMALL) == 8 + 15
    extents.wake(large[0])
    assert (extents.reachable(SMALL), extents.reachable(LARGE)) == (8, 7 - large[0].blocks)


def test_a_run_of_single_units_is_given_back_one_by_one() -> None:
    extents = extents_of(1)
    runs = extents.take(SMALL, 11)
    singles = [single for run in runs for single in run.singles()]
    assert [single.first_unit for single in singles] == [*range(8), 12, 13, 14]
    plan = ExtentPlan(SMALL, EXTENT_BYTES)
    for single in singles:
        assert single.offset == plan.unit_offset(single.extent.start, single.first_unit)
        assert single.header_offset == plan.header_offset(single.extent.start, single.first_unit)
        assert single.offset == extents.offsets(runs[-1])[single.first_unit]
        extents.give(single)
    assert not extents.pools


@pytest.mark.parametrize("seed", range(8))
def test_random_use_never_overlaps_never_refuses_and_merges_back(seed: int) -> None:
    random_ = random.Random(seed)
    extents, taken = extents_of(4), []
    for _ in range(300):
        layout = random_.choice((SMALL, LARGE))
        free = extents.free(layout)
        if free and random_.random() < 0.55:
            wanted = random_.randint(1, free)
            runs = extents.take(layout, wanted)
            assert blocks_of(runs) == wanted
            assert extents.free(layout) == free - wanted
            taken += runs
        elif taken:
            extents.give(taken.pop(random_.randrange(len(taken))))
        spans = sorted((run.offset, run.offset + run.blocks * run.layout.unit_bytes) for run in taken)
        assert all(end <= start for (_, end), (start, _) in itertools.pairwise(spans))
    for run in taken:
        extents.give(run)
    assert not extents.pools
    assert extents.free(SMALL) == extents.capacity(SMALL)
    assert all(extent.used_units == 0 for extent in extents.untaken)


@pytest.mark.parametrize("shards", [0, 3, 16, 32])
def test_layers_are_shared_out_evenly_among_as_many_shards_as_a_header_has_words_for(shards: int) -> None:
    with pytest.raises(ValueError, match="shards"):
        PageLayout(layers=32, page_bytes=1000, chunk_blocks=4, shards=shards)
    assert PageLayout(layers=32, page_bytes=1000, chunk_blocks=4, shards=8).shard_layers == 4

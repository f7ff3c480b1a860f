"""Runs: what lies side by side goes together, and nothing else does."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from pdx.engine.runs import runs
from pdx.layout import PageLayout, Place

LAYOUT = PageLayout(layers=3, page_bytes=10, chunk_blocks=4)
PLACES = st.builds(lambda slot, position: Place(1000 * slot, 4, position, 0, 1), st.integers(0, 2), st.integers(0, 3))


@given(st.lists(PLACES, max_size=12), st.integers(0, 2))
def test_runs_cover_all_pages_at_their_places(places: list[Place], layer: int) -> None:
    offsets = []
    for run in runs(places):
        first, pages, offset = run.copy(LAYOUT, layer)
        assert first == len(offsets)
        offsets += [offset + n * LAYOUT.page_bytes for n in range(pages)]
    assert offsets == [place.page_offset(LAYOUT, layer) for place in places]


def test_a_slot_in_order_is_one_run() -> None:
    places = [Place(0, 4, n, 64 * n, 1) for n in range(4)]
    assert [(run.first, run.pages) for run in runs(places)] == [(0, 4)]
    assert [(run.first, run.pages) for run in runs(places[::-1])] == [(0, 1), (1, 1), (2, 1), (3, 1)]

from __future__ import annotations

import pytest

from pdx.buffer.water import Waterline


def test_it_begins_at_the_low_mark_and_ends_at_the_high_one() -> None:
    water = Waterline(low=0.1, high=0.2, batch=1000)
    assert water.to_free(free=100, total=1000, refilling=False) == 0
    assert water.to_free(free=99, total=1000, refilling=False) == 101
    assert water.to_free(free=150, total=1000, refilling=True) == 50
    assert water.to_free(free=200, total=1000, refilling=True) == 0


def test_a_round_is_bounded_and_makes_progress() -> None:
    water = Waterline(low=0.1, high=0.2, batch=8)
    free, rounds, refilling = 0, 0, False
    while wanted := water.to_free(free=free, total=1003, refilling=refilling):
        assert 1 <= wanted <= 8
        free, rounds, refilling = free + wanted, rounds + 1, True
        assert rounds < 1000
    assert free >= 0.2 * 1003


@pytest.mark.parametrize(("low", "high", "batch"), [(0.2, 0.1, 1), (-0.1, 0.1, 1), (0.1, 1.1, 1), (0.1, 0.2, 0)])
def test_nonsense_is_refused(low: float, high: float, batch: int) -> None:
    with pytest.raises(ValueError, match=r"."):
        Waterline(low=low, high=high, batch=batch)

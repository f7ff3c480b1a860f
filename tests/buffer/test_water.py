from __future__ import annotations

import pytest

from pdx.buffer.water import Waterline


def test_it_begins_at_the_low_mark_and_ends_at_the_high_one() -> None:
    water = Waterline(low=0.1, high=0.2)
    assert water.missing(0.1, refilling=False) == 0
    assert water.missing(0.09, refilling=False) == pytest.approx(0.11)
    assert water.missing(0.15, refilling=True) == pytest.approx(0.05)
    assert water.missing(0.2, refilling=True) == 0


def test_a_low_mark_of_0_turns_it_off() -> None:
    water = Waterline(low=0.0, high=0.2)
    assert not any(water.missing(0.0, refilling=refilling) for refilling in (False, True))


@pytest.mark.parametrize(("low", "high", "batch"), [(0.2, 0.1, 1), (-0.1, 0.1, 1), (0.1, 1.1, 1), (0.1, 0.2, 0)])
def test_nonsense_is_refused(low: float, high: float, batch: int) -> None:
    with pytest.raises(ValueError, match=r"."):
        Waterline(low=low, high=high, batch=batch)

from __future__ import annotations

from pdx.rates import Busy, Rate


def test_old_measurements_count_less() -> None:
    rate = Rate(half_life_s=10)
    rate.measured(100, seconds=1, now=0.0)
    rate.measured(300, seconds=1, now=10.0)
    assert rate.per_s == (50 + 300) / 1.5
    rate.measured(0, seconds=0, now=10_000.0)
    assert rate.per_s is None or rate.per_s > 0


def test_no_second_is_counted_twice_and_no_idle_one_at_all() -> None:
    busy = Busy()
    assert busy.ended(began_at=1.0, now=3.0) == 2.0
    assert busy.ended(began_at=1.0, now=4.0) == 1.0, "until 3 it waited for the other"
    assert busy.ended(began_at=2.0, now=4.0) == 0.0, "they ended together"
    assert busy.ended(began_at=10.0, now=11.0) == 1.0

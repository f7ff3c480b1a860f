"""What goodput counts: requests by when they were asked, in a line that is full at both ends of the window."""

from __future__ import annotations

from benchmarks.chaos.goodput import Asked, Run

SERVICE_S, LINE = 1.0, 3  # a server of one request a second, and a line of so many


def line(asked_s: range, *, waits: bool) -> list[Asked]:
    """One request a second, each behind the line that has grown until then."""
    return [Asked(200, SERVICE_S * (1 + (min(at, LINE) if waits else 0)), float(at)) for at in asked_s]


def test_what_was_asked_in_the_window_counts_whenever_it_was_answered() -> None:
    asked = line(range(14), waits=True)
    run = Run.of(asked, begins_at=4.0, window_s=6.0)
    assert [one.at_s for one in run.asked] == [4.0, 5.0, 6.0, 7.0, 8.0, 9.0]
    assert run.rate(limit_s=4.0) == 1 / SERVICE_S  # also where the last three are answered after the window
    assert run.rate(limit_s=3.9) == 0


def test_warming_up_is_in_no_rate() -> None:
    """What finds no line at first is in time whatever the limit, and was more than the server can go on doing."""
    filling = line(range(3), waits=False) + [Asked(429, 0.0, float(at)) for at in range(3, 9)]
    assert Run.of(filling, begins_at=0.0, window_s=3.0).rate(limit_s=1.0) == 1.0
    assert Run.of(filling, begins_at=3.0, window_s=6.0).outcomes(limit_s=1.0) == {"429": 6}

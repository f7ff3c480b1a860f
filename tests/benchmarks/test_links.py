"""The bars of a link, judged by each handoff's own computing time."""

from __future__ import annotations

import pytest

from benchmarks.harness.exposure import Exposure
from benchmarks.harness.report import Report
from benchmarks.links import QUICK, Point, judge

TOTAL_BYTES, LAST_BYTES, COMPUTE_S = 10_000_000, 100_000, 1.0


def pushed(exposed_s: float) -> Exposure:
    return Exposure(TOTAL_BYTES, LAST_BYTES, COMPUTE_S, exposed_s)


@pytest.mark.parametrize(
    ("rho", "exposed_s", "late_s", "holds"),
    [
        (0.5, 0.005 + 0.004, 0.5, [True, True]),
        (0.5, 0.005 + 0.006, 0.5, [False, True]),
        (0.5, 0.005 + 0.004, 0.009, [True, False]),
        (1.5, 0.5 * 1.09, 1.5, [True, True]),
        (1.5, 0.5 * 1.11, 1.5, [False, True]),
    ],
)
def test_a_bar_holds_when_little_more_is_exposed_than_must_be_and_pushing_late_misses_it(
    rho: float, exposed_s: float, late_s: float, holds: list[bool]
) -> None:
    link = TOTAL_BYTES / COMPUTE_S / rho
    point = Point(512, rho, link, link, [pushed(exposed_s)] * 3, pushed(late_s))
    report = Report("links")
    judge([point], {rho: 0.25}, QUICK, report)
    assert [bar["holds"] for bar in report.bars.values()] == holds
    assert report.figures["rows"][0][-1] == "250"

"""What the tax is read from: ratios within a round, and gaps that lie wholly beside another request."""

from __future__ import annotations

import pytest

from benchmarks.harness.measure import Timing
from benchmarks.harness.report import Report
from benchmarks.tax import NAIVE, PDX, gaps_between, judge

PLAIN = [1.0, 2.0, 3.0, 2.0]


def samples(factor: float) -> dict[str, list[float]]:
    pdx = [seconds * factor for seconds in PLAIN]
    return {"plain": PLAIN, "control": PLAIN, PDX: pdx, NAIVE: [1.5]}


@pytest.mark.parametrize(("factor", "holds"), [(1.01, [True, True]), (1.04, [False, True]), (1.06, [False, False])])
def test_a_ratio_is_taken_within_a_round(factor: float, holds: list[bool]) -> None:
    report = Report("tax")
    row = judge("ITL", [samples(factor), samples(factor)], report)
    assert [bar["holds"] for bar in report.bars.values()] == [*holds, True]
    assert row[-2] == f"{factor:.4f} ({factor:.4f} to {factor:.4f})"
    assert report.figures["ITL"]["control"] == [1.0, 1.0, 1.0]


def test_only_gaps_that_lie_wholly_within_count() -> None:
    timing = Timing(200, 0, token_ns=(0, 10, 30, 60, 100))
    assert list(gaps_between(timing, 10, 60)) == [20e-9, 30e-9]
    assert list(gaps_between(timing, 5, 29)) == []

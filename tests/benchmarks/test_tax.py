"""What the tax is read from: ratios within a round, and what a stream felt of a load beside it."""

from __future__ import annotations

import pytest

from benchmarks.harness.measure import Timing
from benchmarks.harness.report import Report
from benchmarks.tax import BASE, COMPUTES, NAIVE, PDX, Felt, felt_of, judge, judge_loads

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


STEP_NS = 50_000_000
ASKED_NS = 100 * STEP_NS - 1  # behind a prefill of a hundred steps


def felt(*loading_ns: int) -> Felt:
    """A stream whose gaps are `loading_ns` while the prompt that was computed before is loaded."""
    at_ns = [step * STEP_NS for step in range(100)]
    for gap_ns in loading_ns:
        at_ns.append(at_ns[-1] + gap_ns)
    ended_ns = at_ns[-1] - 1
    stream = Timing(200, 0, token_ns=(*at_ns, *(at_ns[-1] + step * STEP_NS for step in range(1, 20))))
    return felt_of(stream, 0, ASKED_NS, ended_ns)


def test_what_a_stream_felt_is_the_gaps_that_overlap_the_load() -> None:
    found = felt(STEP_NS, 2 * STEP_NS)
    assert (found.ordinary_s, found.gaps_s) == (0.05, [0.05, 0.1])
    assert found.lost_s == pytest.approx(0.05)


@pytest.mark.parametrize(
    ("loading_ns", "holds"),
    [
        ((STEP_NS, STEP_NS + 10_000_000), [True, True]),
        ((STEP_NS, 100 * STEP_NS), [False, False]),  # the median of all gaps beside the prompt would not have moved
        ((2 * STEP_NS,) * 6, [True, False]),  # no gap is long, but in sum they are
    ],
)
def test_a_load_that_stalls_a_stream_in_one_round_of_five_is_seen(
    loading_ns: tuple[int, ...], holds: list[bool]
) -> None:
    report, calm = Report("tax"), felt(STEP_NS, STEP_NS)
    judge_loads({BASE: [calm] * 5, PDX: [calm] * 4 + [felt(*loading_ns)], COMPUTES: [felt(100 * STEP_NS)]}, report)
    longest, longest_naive, lost, lost_naive = (bar["holds"] for bar in report.bars.values())
    assert [longest, lost] == holds
    assert longest_naive
    assert lost_naive

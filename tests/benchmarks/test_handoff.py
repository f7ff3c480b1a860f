"""The bars of handoff and ttft_itl, from samples that were made up: what should hold holds, the naive way misses."""

from __future__ import annotations

import pytest

from benchmarks import handoff, ttft_itl
from benchmarks.harness.arms import Arm
from benchmarks.harness.measure import Timing
from benchmarks.harness.report import Report
from benchmarks.harness.ways import Floor, Sample, Samples, Way

SIZES = (257, 513, 1025, 2049)
BYTES = {size: size * 23_000 for size in SIZES}
STEP_S = 0.04


def new_report() -> Report:
    report = Report("test")
    report.figures["memcpy_gb_per_s"] = 8.0
    return report


def sample(*, first_s: float, second_gap_s: float = STEP_S, gap_s: float = 0.0) -> Sample:
    """An answer whose prefill took a second."""
    times_s = [first_s, first_s + second_gap_s, *(first_s + second_gap_s + n * STEP_S for n in (1, 2, 3))]
    timing = Timing(200, 0, token_ns=tuple(int(1e9 * s) for s in times_s), finished=True)
    return Sample(timing, gap_s, first_s - 1.0, Floor(STEP_S, 0.01))


def filled(samples: dict[str, Sample], unused_arm: Arm) -> Samples:
    found = Samples()
    for name, each in samples.items():
        for size in SIZES:
            found.add(Way(name, unused_arm), size, each)
    return found


@pytest.fixture
def unused_arm() -> Arm:
    return object.__new__(Arm)


def test_a_short_gap_holds_and_the_naive_one_misses(unused_arm: Arm, capsys: pytest.CaptureFixture[str]) -> None:
    peer = f"{handoff.NIXL}, proxy"
    samples = filled({
        handoff.PAIRED: sample(first_s=1, gap_s=0.052), handoff.NAIVE: sample(first_s=1, gap_s=0.1),
        handoff.AFTER: sample(first_s=1, gap_s=0.08), peer: sample(first_s=1, gap_s=0.09),
    }, unused_arm)  # fmt: skip
    ways = [handoff.PAIRED, handoff.NAIVE, handoff.AFTER, peer]
    report = new_report()
    handoff.judge(report, handoff.Plan(SIZES, 1, ("proxy",)), samples, ways, BYTES)
    assert report.all_hold
    assert f"gap - ITL at 2049 tokens against {peer}" in report.bars
    assert report.figures["fits"].keys() == set(ways)


def test_a_long_gap_falls(unused_arm: Arm, capsys: pytest.CaptureFixture[str]) -> None:
    names = (handoff.PAIRED, handoff.NAIVE, handoff.AFTER)
    samples = filled({name: sample(first_s=1, gap_s=0.056) for name in names}, unused_arm)
    report = new_report()
    handoff.judge(report, handoff.Plan(SIZES, 1, ()), samples, list(names), BYTES)
    assert not any(report.bars[f"gap at {size} tokens"]["holds"] for size in SIZES)


def test_first_and_second_token(unused_arm: Arm, capsys: pytest.CaptureFixture[str]) -> None:
    samples = filled({
        ttft_itl.ALONE: sample(first_s=1.0), ttft_itl.SEEDED: sample(first_s=1.003, second_gap_s=0.055),
        ttft_itl.NAIVE_FIRST: sample(first_s=1.08), ttft_itl.NAIVE_SECOND: sample(first_s=1.003, second_gap_s=0.5),
        ttft_itl.NIXL: sample(first_s=1.1),
    }, unused_arm)  # fmt: skip
    report = new_report()
    plan = ttft_itl.Plan(SIZES, 1, (513,), 1, 0, 0, peer=True)
    ttft_itl.judge(report, plan, samples, BYTES)
    assert report.all_hold
    busy = {way: [ttft_itl.Busy(1.0, 0.05, [0.04, 0.05])] for way in (ttft_itl.ALONE, ttft_itl.SEEDED)}
    ttft_itl.show(report, plan, samples, busy, [ttft_itl.ALONE, ttft_itl.SEEDED], BYTES)
    assert report.figures["beside_a_stream_ms"][0]["stream's p99 ITL ms"] == pytest.approx(50)

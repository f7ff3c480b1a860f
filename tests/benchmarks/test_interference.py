"""What interference asks of the pair's own prompts."""

from __future__ import annotations

import pytest

from benchmarks.harness.measure import Timing
from benchmarks.harness.report import Report
from benchmarks.harness.steady import Outcome
from benchmarks.interference import PDX, TWO, Plan, judge, plain_name

PLAN = Plan((2048,), prompts=3, prompt_tokens=1000, idle_tokens=(64,), idle_repeats=1)


@pytest.mark.parametrize(("way", "holds"), [("seeded", True), ("paired", True), ("alone", False), ("", False)])
def test_a_prompt_that_one_engine_served_alone_is_no_prompt_of_the_pair(way: str, holds: bool) -> None:
    ways = ["seeded", "seeded", way]
    prompts = [Timing(200, 0, token_ns=(10, 20), headers={"x-pdx-way": each} if each else {}) for each in ways]
    outcome = Outcome(prompts, [0.1, 0.2], [0.1], 10.0)
    report = Report("interference")
    report.figures["period_s"] = 1.0
    judge({PDX: outcome, TWO: outcome, plain_name(2048): outcome}, PLAN, report)
    assert report.bars["prompts that went through the pair"]["holds"] is holds

"""What identity's bars make of counts and answers that were made up."""

from __future__ import annotations

import pytest

from benchmarks import identity
from benchmarks.harness.answers import Answer
from benchmarks.harness.report import Report

LAYERS = 30
PROMPTS = [[1], [2]]
RIVALS = [{"a": -0.1, "b": -2.0}]
RIGHT, WRONG = Answer(["a"], RIVALS), Answer(["b"], RIVALS)
TWO = [RIGHT] * len(PROMPTS)
EIGHT = [RIGHT] * identity.AT_ONCE
ALL_RIGHT = identity.Answers(TWO, EIGHT)


def test_every_block_of_a_prompt_has_a_page_a_layer() -> None:
    assert identity.blocks_of(identity.prompts_of(identity.FULL)) * LAYERS == 11130


@pytest.mark.parametrize(
    ("grown", "holds"),
    [
        ({"pages_verified": 300, "pages_landed": 300}, True),
        ({"pages_verified": 300}, True),  # within one daemon nothing lands
        ({"pages_verified": 420}, True),  # prefill's own loads
        ({"pages_verified": 299}, False),
        ({"pages_verified": 450}, False),
        ({"pages_verified": 300, "pages_landed": 330}, False),  # some of what landed was not verified
        ({"pages_verified": 300, "loads_failed": 1}, False),
        ({}, False),
    ],
)
def test_all_pages_that_decode_needed_must_be_verified(
    grown: dict[str, int], holds: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    report = Report("test")
    identity.judge_pages(report, "pages", grown, 300, 420)
    assert report.all_hold is holds


@pytest.mark.parametrize(
    ("ours", "holds"),
    [
        (ALL_RIGHT, True),
        (identity.Answers([RIGHT, WRONG], EIGHT), False),
        (identity.Answers(TWO, [*EIGHT[1:], WRONG]), False),
    ],
)
def test_every_answer_is_compared(
    ours: identity.Answers, holds: bool, capsys: pytest.CaptureFixture[str]
) -> None:  # fmt: skip
    report = Report("test")
    identity.judge_answers(report, "same daemon", PROMPTS, ours, TWO, ALL_RIGHT)
    assert report.all_hold is holds


def test_the_answers_of_every_pair_are_judged(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing is started: pairs and peers are stood in for."""
    judged: dict[str, identity.Answers] = {}
    monkeypatch.setattr(identity, "pin_client", lambda: None)
    monkeypatch.setattr(identity, "build", lambda: None)
    monkeypatch.setattr(identity, "run_pages", lambda *_, **more: ALL_RIGHT)
    monkeypatch.setattr(identity, "run_answers", lambda scratch, report, plan, ours: judged.update(ours))
    monkeypatch.setattr(Report, "write", lambda *_: None)
    identity.main([])
    assert judged == {"tcp": ALL_RIGHT, "same daemon": ALL_RIGHT}

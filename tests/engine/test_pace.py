"""How fast prompts are computed, as the scheduler sees steps begin and end; and what the daemon hears of it."""

from __future__ import annotations

import pytest

from pdx.engine.vllm.pace import STEPS_MAX, Pace

BLOCK = 16


@pytest.fixture
def pace() -> Pace:
    return Pace(block_tokens=BLOCK)


def test_one_step_after_the_other(pace: Pace) -> None:
    assert pace.tokens_per_s == 0.0
    pace.planned(1, prompt_tokens=100, now=10.0)
    assert pace.tokens_per_s == 0.0
    pace.over(1, now=10.5)
    assert pace.tokens_per_s == 200.0
    pace.planned(2, prompt_tokens=100, now=60.0)  # idle until then
    pace.over(2, now=60.5)
    assert pace.tokens_per_s == 200.0


def test_steps_that_were_planned_ahead(pace: Pace) -> None:
    """Async scheduling: a step is planned half a second before the one before it is over."""
    pace.planned(1, prompt_tokens=0, now=0.0)
    for number in range(1, 20):
        pace.planned(number + 1, prompt_tokens=100 * (number == 10), now=number - 0.5)
        pace.over(number, now=float(number))
    assert pace.tokens_per_s == 100.0, "a second, neither a half nor one and a half"


def test_steps_that_decode_are_no_measure(pace: Pace) -> None:
    for number, tokens in enumerate((160, 0, BLOCK)):
        pace.planned(number, prompt_tokens=tokens, now=float(number))
        pace.over(number, now=number + 1.0)
    assert pace.tokens_per_s == 160.0


def test_a_step_that_is_not_told_measures_nothing(pace: Pace) -> None:
    pace.planned(1, prompt_tokens=100, now=0.0)
    pace.planned(2, prompt_tokens=300, now=1.0)
    pace.over(2, now=3.0)
    assert pace.tokens_per_s == 150.0
    pace.over(2, now=9.0)
    pace.over(1, now=9.0)
    assert pace.tokens_per_s == 150.0
    for number in range(3, 3 + 2 * STEPS_MAX):
        pace.planned(number, prompt_tokens=100, now=9.0)
    assert len(pace._planned) == STEPS_MAX


def test_a_first_step_that_warms_up_is_forgotten(pace: Pace) -> None:
    pace.planned(0, prompt_tokens=100, now=0.0)
    pace.over(0, now=50.0)
    assert pace.tokens_per_s == 2.0
    for number in range(1, 11):
        pace.planned(number, prompt_tokens=1000, now=60.0 * number)
        pace.over(number, now=60.0 * number + 1.0)
    assert pace.tokens_per_s > 900.0

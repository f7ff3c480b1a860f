"""How long an engine's line is, and what is learned from answers."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pdx.router.choice.work import NOMINAL_STEP_S, Work

KIND = b"kind"


def test_what_was_sent_is_in_the_line_at_once_and_its_head_counts_less_and_less() -> None:
    work = Work()
    first = work.sent("p0", 1000, 10.0, load=1)
    work.sent("p0", 500, 10.0, load=2)
    assert work.ahead_s("p0", 100.0, 10.0) == 15.0
    assert work.ahead_s("p0", 100.0, 14.0) == 11.0
    assert work.ahead_s("p0", 100.0, 99.0) == 5.0, "the head is late; those behind it have yet to be computed"
    work.over(first, 20.0, answered=True)
    assert work.ahead_s("p0", 100.0, 20.0) == 5.0
    assert work.ahead_s("p1", 100.0, 20.0) == 0.0


def test_a_prompt_whose_answer_comes_whole_leaves_the_line_when_it_should_be_computed() -> None:
    work = Work()
    work.sent("d0", 1000, 0.0, load=1, computed_by=10.0)
    work.sent("d0", 500, 0.0, load=2)
    assert work.ahead_s("d0", 100.0, 9.0) == 6.0
    assert work.ahead_s("d0", 100.0, 11.0) < 5.0


@settings(max_examples=50)
@given(st.lists(st.tuples(st.floats(64, 1e5), st.floats(0, 5), st.booleans()), max_size=20))
def test_every_line_ends_empty(pieces: list[tuple[float, float, bool]]) -> None:
    work = Work()
    sent = [(work.sent("p0", tokens, 0.0, load=1), after, ok) for tokens, after, ok in pieces]
    for piece, after, ok in sent:
        assert work.ahead_s("p0", 1000.0, after) >= 0.0
        work.over(piece, after, answered=ok)
        work.over(piece, after, answered=ok)
    assert work.ahead_s("p0", 1000.0, 9.0) == 0.0


def test_pace_is_learned_from_answers_no_second_twice() -> None:
    work = Work()
    pieces = [work.sent("p0", 1000, 0.0, load=n + 1, kind=KIND) for n in range(3)]
    assert work.tokens_per_s(KIND) == 0.0
    for n, piece in enumerate(pieces):
        work.over(piece, n + 1.0, answered=True)
    assert work.tokens_per_s(KIND) == pytest.approx(1000.0)
    work.over(work.sent("p0", 1000, 5.0, load=1, kind=KIND), 5.001, answered=False)
    work.over(work.sent("p0", 3, 6.0, load=1, kind=KIND), 9.0, answered=True)
    assert work.tokens_per_s(KIND) == pytest.approx(1000.0), "neither what failed nor what was short says anything"


def test_a_decode_engines_first_steps() -> None:
    work = Work()
    assert work.step_s("d0") == NOMINAL_STEP_S
    work.over(work.sent("d0", 0, 0.0, load=4), 0.2, answered=True)
    assert work.step_s("d0") == pytest.approx(0.05)
    assert work.tokens_per_s(b"") == 0.0


def test_engines_that_have_left_are_forgotten() -> None:
    work = Work()
    piece = work.sent("p0", 1000, 0.0, load=1)
    work.keep(set())
    assert work.ahead_s("p0", 1000.0, 0.0) == 1.0, "its call is still under way"
    work.over(piece, 1.0, answered=True)
    work.keep(set())
    assert repr(work) == "<Work in 0 lines>"
    assert work.step_s("p0") == NOMINAL_STEP_S

from __future__ import annotations

import itertools
from typing import get_args

import pytest

from pdx.errors import IllegalTransition
from pdx.tiers.health import MOVES, READ_ERRORS_MAX, Health, HealthEvent, State


def test_only_the_table_moves() -> None:
    for state, event in itertools.product(State, get_args(HealthEvent)):
        health = Health()
        health.state = state
        if (state, event) in MOVES:
            health.on(event)
            assert health.state is MOVES[state, event]
        else:
            with pytest.raises(IllegalTransition):
                health.on(event)
            assert health.state is state


def test_writes_pause_and_are_tried_again() -> None:
    health = Health(pause_s=10)
    assert health.wrote(ok=False, now=100.0)
    assert not health.wrote(ok=False, now=101.0)
    assert not health.tick(110.9)
    assert health.tick(111.0)
    assert (health.state, health.finds) == (State.TRYING, True)
    assert not health.wrote(ok=False, now=111.0), "as before: nobody need hear it twice a minute"
    assert (health.state, health.tick(120.9), health.tick(121.0)) == (State.PAUSED, False, True)
    assert health.wrote(ok=True, now=121.0)
    assert health.state is State.WELL
    assert not health.wrote(ok=True, now=122.0)


def test_reads_that_fail_one_after_the_other_switch_it_off_for_good() -> None:
    health = Health()
    results = [False] * (READ_ERRORS_MAX - 1) + [True] + [False] * (READ_ERRORS_MAX - 1)
    assert not any(health.read(ok=ok) for ok in results)
    assert health.read(ok=False)
    assert not health.read(ok=False)
    assert not health.wrote(ok=False, now=0.0)
    assert not health.hangs(now=0.0)
    assert not health.wants_probe(now=1e9)
    assert not health.answered(takes_writes=True, now=0.0)
    assert not health.tick(1e9)
    assert health.state is State.OFF


@pytest.mark.parametrize("state", [State.WELL, State.PAUSED, State.TRYING])
def test_what_hung_is_asked_now_and_then_and_is_well_when_it_answers(state: State) -> None:
    health = Health(probe_s=60)
    health.state = state
    assert health.hangs(now=100.0)
    assert not health.finds
    assert not health.hangs(now=101.0)
    assert not health.wrote(ok=False, now=101.0)
    assert [health.wants_probe(now=now) for now in (159.9, 160.0, 219.9, 220.0)] == [False, True, False, True]
    assert health.answered(takes_writes=True, now=0.0)
    assert (health.state, health.finds, health.wants_probe(now=1e9)) == (State.WELL, True, False)


def test_what_hung_and_then_says_that_it_takes_no_writes_is_paused() -> None:
    health = Health(pause_s=30)
    health.hangs(now=0.0)
    assert health.answered(takes_writes=False, now=100.0)
    assert (health.state, health.finds, health.tick(129.9), health.tick(130.0)) == (State.PAUSED, True, False, True)


def test_what_comes_back_rotten_from_a_hang_is_off() -> None:
    health = Health()
    health.hangs(now=0.0)
    assert [health.read(ok=False) for _ in range(READ_ERRORS_MAX)][-1]
    assert health.state is State.OFF
    assert not health.answered(takes_writes=True, now=0.0)

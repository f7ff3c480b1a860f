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
    assert health.state is State.WELL


def test_reads_that_fail_one_after_the_other_switch_it_off_for_good() -> None:
    health = Health()
    results = [False] * (READ_ERRORS_MAX - 1) + [True] + [False] * (READ_ERRORS_MAX - 1)
    assert not any(health.read(ok=ok) for ok in results)
    assert health.read(ok=False)
    assert not health.read(ok=False)
    assert not health.wrote(ok=False, now=0.0)
    assert not health.hangs()
    assert not health.tick(1e9)
    assert health.state is State.OFF

"""The tables of both halves."""

from __future__ import annotations

import pytest

from pdx.errors import IllegalTransition
from pdx.handoff.states import RECEIVING, SENDING, Receiving, Sending, after


@pytest.mark.parametrize(("table", "states"), [(SENDING, Sending), (RECEIVING, Receiving)])
def test_every_state_but_the_last_has_a_way_out_and_all_can_be_reached(table: dict, states: type) -> None:
    reached = {after for after in table.values()} | {next(iter(states))}
    assert reached == set(states)
    assert {state for state, _ in table} == set(states) - {states.ENDED}


def test_illegal_transitions_raise() -> None:
    with pytest.raises(IllegalTransition, match="'committed' is not possible in state 'sending'"):
        after(SENDING, Sending.SENDING, "committed")

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pdx.tiers.fetch import Fetch
from pdx.tiers.tier import Failed, Loaded, Missed


def submit(fetch: Fetch) -> list[int]:
    """Ticket = index + 100."""
    wanted = list(fetch.wanted())
    for index in wanted:
        fetch.submitted(index, index + 100)
    return wanted


def test_loads_run_ahead_in_order() -> None:
    fetch = Fetch(5, ahead=2)
    assert submit(fetch) == [0, 1]
    assert fetch.on(Loaded(101, b"", 0.0)) == 1
    assert (fetch.loaded, submit(fetch)) == (0, [2])
    assert fetch.on(Loaded(100, b"", 0.0)) == 0
    assert (fetch.loaded, submit(fetch)) == (2, [3])
    for index in (2, 3):
        fetch.on(Loaded(100 + index, b"", 0.0))
    assert submit(fetch) == [4]
    assert not fetch.is_over
    fetch.on(Loaded(104, b"", 0.0))
    assert (fetch.loaded, fetch.is_over) == (5, True)


def test_after_a_miss_the_rest_is_given_up() -> None:
    fetch = Fetch(10, ahead=4)
    submit(fetch)
    assert fetch.on(Missed(101, "rotten")) is None
    assert (list(fetch.wanted()), fetch.to_cancel()) == ([], [102, 103])
    assert fetch.on(Loaded(102, b"", 0.0)) is None
    assert fetch.on(Failed(103, "cancelled")) is None
    assert not fetch.is_over
    assert fetch.on(Loaded(100, b"", 0.0)) == 0
    assert (fetch.loaded, fetch.is_over) == (1, True)


def test_stop_keeps_what_is_in() -> None:
    fetch = Fetch(10, ahead=3)
    submit(fetch)
    fetch.on(Loaded(100, b"", 0.0))
    fetch.stop()
    assert (fetch.loaded, list(fetch.wanted()), fetch.to_cancel()) == (1, [], [101, 102])


def test_a_block_out_of_turn_is_a_bug_of_ours() -> None:
    with pytest.raises(AssertionError, match="the turn of 0"):
        Fetch(3).submitted(1, 1)


@settings(max_examples=50)
@given(blocks=st.integers(0, 12), ahead=st.integers(1, 5), data=st.data())
def test_whatever_happens_it_ends_with_a_prefix(blocks: int, ahead: int, data: st.DataObject) -> None:
    fetch, open_, good = Fetch(blocks, ahead=ahead), set[int](), set[int]()
    while not fetch.is_over:
        wanted = list(fetch.wanted())
        for index in wanted[: data.draw(st.integers(0 if open_ else 1, len(wanted)))]:
            fetch.submitted(index, index)
            open_.add(index)
        assert len(open_) <= ahead
        ticket = data.draw(st.sampled_from(sorted(open_)))
        open_.remove(ticket)
        if data.draw(st.integers(0, 5)):
            good.add(ticket)
            fetch.on(Loaded(ticket, b"", 0.0))
        else:
            fetch.on(Missed(ticket, "rotten"))
    assert set(range(fetch.loaded)) <= good
    assert fetch.loaded == blocks or fetch.loaded not in good
    assert not open_

"""Circuit breakers of engines and of pairs of daemons, and who may be asked."""

from __future__ import annotations

import random

import msgspec
import pytest
from engine_fakes import daemon_ref, engine_info

from pdx.router.choice.policy import Candidate, Pair, choose_pair
from pdx.router.line.retries import RESERVE, RetryBudget
from pdx.router.standing.breaker import MOVES, Breaker, BreakerSettings
from pdx.router.standing.standing import PAIR_BREAKER, Standing

SETTINGS = BreakerSettings(failure_threshold=3, success_threshold=2, timeout_s=10.0, window_s=30.0)
P0, D0, D1 = (
    Candidate(info=engine_info(engine_id, role), daemon=daemon_ref(f"host-{engine_id}"))
    for engine_id, role in (("p0", "prefill"), ("d0", "decode"), ("d1", "decode"))
)


def call(breaker: Breaker, ok: bool | None, now: float) -> None:
    breaker.ended(breaker.began(), ok=ok, now=now)


def tripped(settings: BreakerSettings = SETTINGS) -> Breaker:
    breaker = Breaker(settings)
    for _ in range(3):
        call(breaker, False, 0.0)
    assert breaker.state == "open"
    return breaker


def test_failures_in_a_row_open_it() -> None:
    breaker = Breaker(SETTINGS)
    for ok in (False, False, True, False, None, False):
        call(breaker, ok, 0.0)
        assert breaker.lets_through(0.0)
    call(breaker, False, 0.0)
    assert not breaker.lets_through(9.9)
    assert breaker.reopens_in_s(4.0) == 6.0
    assert repr(breaker) == "<Breaker open 0 failures>"


def test_failures_far_apart_are_no_row() -> None:
    breaker = Breaker(SETTINGS)
    for now in (0.0, 20.0, 31.0, 50.0):
        call(breaker, False, now)
    assert breaker.state == "closed"
    call(breaker, False, 60.0)
    assert breaker.state == "open"


def test_half_open_it_lets_one_through_at_a_time_and_closes_after_successes() -> None:
    breaker = tripped()
    assert breaker.lets_through(10.0)
    probe = breaker.began()
    assert not breaker.lets_through(10.0)
    breaker.ended(probe, ok=True, now=10.0)
    assert breaker.state == "half_open"
    assert breaker.lets_through(10.0)
    call(breaker, None, 10.0)  # its client left
    assert breaker.lets_through(10.0)
    call(breaker, True, 10.0)
    assert (breaker.state, breaker.idle) == ("closed", True)


def test_a_probe_that_goes_well_so_far_lets_the_next_one_through() -> None:
    breaker = tripped()
    assert breaker.lets_through(10.0)
    first = breaker.went(breaker.began(), now=10.0)
    assert breaker.state == "half_open"
    assert breaker.lets_through(10.0)
    second = breaker.went(breaker.began(), now=10.0)
    assert breaker.state == "closed"
    breaker.ended(first, ok=False, now=20.0)  # of the time before: it says nothing
    assert breaker.idle
    breaker.ended(second, ok=False, now=20.0)
    assert not breaker.idle


def test_half_open_a_failure_opens_it_again() -> None:
    breaker = tripped()
    assert breaker.lets_through(10.0)
    call(breaker, False, 12.0)
    assert not breaker.lets_through(21.9)
    assert breaker.lets_through(22.0)


def test_what_began_earlier_says_nothing_about_now() -> None:
    breaker = Breaker(SETTINGS)
    old = breaker.began()
    for _ in range(3):
        call(breaker, False, 0.0)
    breaker.ended(old, ok=True, now=1.0)
    assert breaker.lets_through(10.0)
    breaker.ended(old, ok=False, now=10.0)
    assert breaker.state == "half_open"


def test_no_threshold_never_opens() -> None:
    breaker = Breaker(msgspec.structs.replace(SETTINGS, failure_threshold=0))
    for _ in range(100):
        call(breaker, False, 0.0)
    assert breaker.lets_through(0.0)


def test_a_burst_is_one_failure() -> None:
    breaker = Breaker(msgspec.structs.replace(SETTINGS, bursts=True))
    for now in (0.0, 0.1, 0.9, 1.5, 1.6):
        call(breaker, False, now)
    assert breaker.state == "closed"
    call(breaker, False, 2.6)
    assert breaker.state == "open"


def test_what_may_be_the_clients_doing_counts_once_at_one_moment() -> None:
    breaker = Breaker(SETTINGS)
    for now in (0.0, 0.1, 0.9, 1.5, 1.6):
        breaker.ended(breaker.began(), ok=False, now=now, proved=False)
    assert breaker.state == "closed"
    call(breaker, False, 1.7)
    assert breaker.state == "open"


def test_chance_reaches_every_move() -> None:
    chance, seen, now = random.Random(1), set(), 0.0
    breaker = Breaker(SETTINGS)
    open_calls: list[int] = []
    for _ in range(5000):
        now += chance.random()
        before = breaker.state
        if breaker.lets_through(now) and chance.random() < 0.5:
            open_calls.append(breaker.began())
        seen.add((before, breaker.state))
        before = breaker.state
        if open_calls and chance.random() < 0.5:
            breaker.ended(open_calls.pop(0), ok=chance.choice([True, False, False, None]), now=now)
        seen.add((before, breaker.state))
    assert {move for move in seen if move[0] != move[1]} == {(state, after) for (state, _), after in MOVES.items()}


def test_an_engine_that_keeps_failing_is_ejected() -> None:
    standing = Standing(SETTINGS)
    for _ in range(3):
        standing.call_ended("d0", standing.call_began("d0"), ok=False, now=0.0)
    assert standing.applied((P0, D0, D1), 1.0) == (P0, D1)
    assert standing.opens_in_s(["d0", "d1"], 1.0) == 9.0
    assert "open ['d0']" in repr(standing)
    assert standing.applied((P0, D0, D1), 10.0) == (P0, D0, D1)
    assert standing.ejected() == {"d0": "half_open"}
    standing.forget(["p0", "d1"], [])
    assert standing.applied((P0, D0, D1), 1.0) == (P0, D0, D1)


def test_a_drained_engine_is_ejected() -> None:
    standing = Standing(SETTINGS)
    standing.drained.add("d0")
    assert standing.applied((P0, D0), 0.0) == (P0,)
    standing.forget(["p0"], [])  # it has left: whoever comes under its name is not drained
    assert standing.applied((P0, D0), 0.0) == (P0, D0)


def fail_handoffs(standing: Standing, pair: Pair, *times: float) -> None:
    for now in times:
        standing.handoff_ended(pair, standing.handoff_began(pair), ok=False, now=now)


def test_daemons_that_fail_to_hand_over_are_not_paired_but_their_engines_serve() -> None:
    standing = Standing(SETTINGS)
    fail_handoffs(standing, Pair(P0, D0), 0.0, 2.0, 4.0)
    asked = standing.applied((P0, D0, D1), 5.0)
    assert [c.engine_id for c in asked] == ["p0", "d0", "d1"]
    for turn in range(4):
        pair = choose_pair(asked, "smol", policy="round_robin", turn=turn)
        assert pair is not None
        assert pair.decode.engine_id == "d1"
    assert choose_pair(standing.applied((P0, D0), 5.0), "smol", policy="round_robin", turn=0) is None
    assert standing.broken_pairs() == [("host-p0", "host-d0")]
    later = 4.0 + PAIR_BREAKER.timeout_s
    (p, d) = standing.applied((P0, D0), later)
    pair = choose_pair((p, d), "smol", policy="round_robin", turn=0)
    assert pair is not None
    ticket = standing.handoff_began(pair)
    assert choose_pair(standing.applied((P0, D0), later), "smol", policy="round_robin", turn=0) is None  # one at a time
    standing.handoff_ended(pair, ticket, ok=True, now=later)
    assert standing.broken_pairs() == []


def test_what_an_engine_takes_with_it_when_it_dies_is_one_failure_of_its_daemons() -> None:
    standing = Standing(SETTINGS)
    fail_handoffs(standing, Pair(P0, D0), *[0.0] * 50)
    assert standing.broken_pairs() == []


@pytest.mark.parametrize("requests", [0, 7, 1000])
def test_repeats_are_a_share_of_requests(requests: int) -> None:
    budget = RetryBudget()
    for _ in range(int(RESERVE)):
        assert budget.take()
    assert not budget.take()
    taken = 0
    for _ in range(requests):
        budget.on_request()
        taken += budget.take()
    assert taken in (requests // 5, requests // 5 - 1)  # 0.2 is no binary fraction
    assert repr(budget).endswith(" of 20>")

"""Requests that find no room, and requests that are repeated."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest
from engine_fakes import CONTENT, KEY, engine_info
from journeys import (
    BODY,
    BROKEN,
    BUSY_D,
    BUSY_P,
    D0,
    D1,
    D2,
    D3,
    P0,
    PREFILLED,
    REQUEST,
    SEED,
    SINGLE,
    STREAMED,
    begin,
    candidate,
    journey,
    kinds,
    through,
)

from pdx.router.choice.policy import Asked, Snapshot
from pdx.router.choice.prompt import Prompt
from pdx.router.line.retries import RetryBudget
from pdx.router.request.actions import (
    Answer,
    CallDecode,
    CallPrefill,
    CloseStream,
    DecodeAnswered,
    DecodeFailed,
    EndHandoff,
    LineUp,
    TurnedAway,
)
from pdx.router.request.journey import Journey
from pdx.router.request.settings import Settings

replaced = msgspec.structs.replace
P1 = candidate("p1", "prefill")
LATE_P = replaced(P0, ahead_s=7.5)
LATE_D = replaced(D0, in_flight=15, step_s=0.5)


def waiting_5_s(body: dict[str, Any]) -> Journey:
    request = msgspec.structs.replace(REQUEST, body=body)
    return Journey(request, Settings(cluster_key=KEY, max_wait_s=5.0))


@pytest.mark.parametrize(
    ("body", "engines", "need"),
    [
        (BODY, (BUSY_P, D0), "pair"),
        (BODY, (P0, BUSY_D), "pair"),
        (SINGLE, (P0, BUSY_D), "alone"),
        (BODY, (BUSY_D,), "pair"),
    ],
)
def test_who_finds_no_room_lines_up_and_looks_again(body: dict[str, Any], engines: Snapshot, need: str) -> None:
    machine = journey(body)
    assert machine.on(begin(*engines)) == [LineUp(f"{need} smol")]
    assert machine.on(begin(*engines)) == [LineUp(f"{need} smol")]
    assert (machine.state, machine.handoff_id) == ("queued", b"")
    (call,) = machine.on(begin(P0, D0) if len(engines) > 1 else begin(D0))
    assert isinstance(call, CallPrefill if need == "pair" and len(engines) > 1 else CallDecode)


def test_nobody_overtakes_who_waits_for_the_same() -> None:
    ahead = msgspec.structs.replace(begin(P0, D0), behind=frozenset({"pair smol"}))
    assert journey().on(ahead) == [LineUp("pair smol")]
    assert kinds(journey(SINGLE).on(ahead)) == [CallDecode]


def test_calls_under_way_are_limited_by_role() -> None:
    both = candidate("b0", "both")
    for engines, limited in (((P0, D0), P0), ((P0, D0), D0), ((both,), both)):
        busy = tuple(msgspec.structs.replace(c, in_flight=3) if c is limited else c for c in engines)
        settings = Settings(cluster_key=KEY, max_in_flight_prefill=3, max_in_flight_decode=3)
        assert kinds(Journey(REQUEST, settings).on(begin(*busy))) == [LineUp]
        roomy = msgspec.structs.replace(settings, max_in_flight_prefill=4, max_in_flight_decode=4)
        assert kinds(Journey(REQUEST, roomy).on(begin(*busy))) != [LineUp]
        assert kinds(Journey(REQUEST, Settings(cluster_key=KEY)).on(begin(*busy))) != [LineUp]


@pytest.mark.parametrize(
    ("body", "engines"),
    [(BODY, (LATE_P, D0)), (BODY, (P0, LATE_D)), (BODY, (LATE_D,)), (SINGLE, (P0, LATE_D)), (BODY, (LATE_P, BUSY_D))],
)
def test_nobody_waits_for_longer_than_the_router_lets_him(body: dict[str, Any], engines: Snapshot) -> None:
    (answer,) = waiting_5_s(body).on(begin(*engines))
    assert (answer.status, answer.retry_after_s) == (429, 3), "7.5 s are 2.5 too many"
    assert waiting_5_s(body).on(begin(*engines, P1, D1)) != [answer]
    assert kinds(journey(body).on(begin(*engines))) != [Answer], "as a rule there is no limit"
    machine = waiting_5_s(body)
    assert kinds(machine.on(begin(BUSY_P, BUSY_D))) == [LineUp], "full by number, not by time"
    assert machine.on(begin(*engines)) == [answer]
    assert (machine.state, machine.reason) == ("ended", "long_wait")


def test_when_to_come_again_is_of_engines_that_could_serve() -> None:
    very_late, other = replaced(P0, ahead_s=700.0), candidate("x0", "decode")
    other = replaced(other, info=replaced(other.info, model="other"), ahead_s=5.1)
    (answer,) = waiting_5_s(BODY).on(begin(very_late, D0, other))
    assert (answer.status, answer.retry_after_s) == (429, 60)
    (answer,) = waiting_5_s(BODY).on(begin(replaced(P0, ahead_s=17.5), D0, other))
    assert answer.retry_after_s == 13


def test_an_idle_decode_engine_computes_what_prefill_has_no_time_for() -> None:
    prompt = Prompt(tokens=2000)
    busy = replaced(P0, ahead_s=7.5, told_tokens_per_s=5000.0, tokens_per_s=5000.0)
    idle = replaced(D0, told_tokens_per_s=5000.0, tokens_per_s=5000.0)
    asked = replaced(begin(busy, idle), asked=Asked(prompt=prompt))
    machine = waiting_5_s(BODY)
    assert kinds(machine.on(asked)) == [CallDecode]
    assert machine.reason == "prefill_saturated"


@pytest.mark.parametrize(("why", "status"), [("queue_full", 429), ("queue_timeout", 504), ("draining", 503)])
def test_turned_away(why: Any, status: int) -> None:
    machine = journey()
    (answer,) = through(machine, begin(BUSY_P, D0), TurnedAway(why=why, retry_after_s=7))
    assert (answer.status, answer.retry_after_s, machine.reason, machine.state) == (status, 7, why, "ended")
    assert json.loads(answer.body)["error"]["code"] == status


def test_an_engine_that_has_left_while_a_request_waited() -> None:
    (answer,) = through(journey(), begin(BUSY_P, D0), begin())
    assert (answer.status, answer.retry_after_s) == (503, 1)


# --- repeats --------------------------------------------------------------------------------------------------


def test_a_request_is_repeated_as_often_as_is_allowed_and_never_where_it_has_failed() -> None:
    machine = journey()
    through(machine, begin(P0, D0, D1, D2, D3), PREFILLED)
    asked = [machine.decode, machine.on(BROKEN)[-1].engine, machine.on(BROKEN)[-1].engine]
    assert len({engine.engine_id for engine in asked if engine}) == 3
    (answer,) = machine.on(BROKEN)
    assert (answer.status, machine.repeats, machine.held_back) == (502, 2, False)
    once = Journey(REQUEST, Settings(cluster_key=KEY, retries=0))
    assert kinds(through(once, begin(D0, D1), BROKEN)) == [Answer]


def test_a_repeat_goes_to_who_is_there_now() -> None:
    machine = journey()
    *_, call = through(machine, begin(P0, D0, D1), PREFILLED, DecodeFailed("broken", snapshot=(D0, D2)))
    assert call.engine == D2
    *_, answer = through(journey(), begin(P0, D0, D1), PREFILLED, DecodeAnswered(500, b"", snapshot=(P0, D0)))
    assert answer.status == 502


def test_a_seed_goes_on_only_with_the_same_content() -> None:
    other = msgspec.structs.replace(
        D2, info=engine_info("d2", "decode", content=msgspec.structs.replace(CONTENT, weights="other"))
    )
    machine = journey(STREAMED, wish="auto")
    assert kinds(through(machine, begin(P0, D0, other), SEED, BROKEN)) == [EndHandoff, CloseStream]
    machine = journey(STREAMED, wish="auto")
    through(machine, begin(P0, D0, other, D1, D3), SEED, BROKEN)
    assert (machine.state, machine.on(BROKEN)[-1].engine.engine_id) in (("reseeding", "d1"), ("reseeding", "d3"))


def test_a_router_repeats_only_a_share_of_its_requests() -> None:
    budget = RetryBudget()
    while budget.take():
        pass
    machine = Journey(REQUEST, Settings(cluster_key=KEY), budget)
    (answer,) = through(machine, begin(D0, D1), BROKEN)
    assert (answer.status, machine.repeats, machine.held_back) == (502, 0, True)
    for _ in range(5):
        budget.on_request()
    machine = Journey(REQUEST, Settings(cluster_key=KEY), budget)
    assert kinds(through(machine, begin(D0, D1), BROKEN)) == [CallDecode]

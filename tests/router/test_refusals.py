"""Answers that may be an engine's own trouble: another one is asked first, and the last word is the client's."""

from __future__ import annotations

import json
from typing import Any

import pytest
from engine_fakes import FakeEngine, fleet, within
from journeys import D0, D1, P0, PREFILLED, SEED, STREAMED, begin, journey, kinds, through

from pdx.router.request.actions import (
    DOUBTFUL_STATUSES,
    Answer,
    CallDecode,
    CloseStream,
    DecodeAnswered,
    EndHandoff,
    PrefillAnswered,
)
from pdx.router.standing.breaker import BreakerSettings

PROMPT = {"model": "smol", "prompt": "Once upon a time", "max_tokens": 8}


@pytest.mark.parametrize("status", sorted(DOUBTFUL_STATUSES))
def test_what_may_be_prefills_own_costs_the_handoff_only(status: int) -> None:
    machine = journey()
    ended, call = through(machine, begin(P0, D0), PrefillAnswered(status, b"no"))
    assert isinstance(ended, EndHandoff)
    assert (call.engine, machine.reason) == (D0, f"prefill_{status}")


@pytest.mark.parametrize("status", sorted(DOUBTFUL_STATUSES))
def test_what_may_be_decodes_own_is_asked_elsewhere_and_is_the_clients_if_all_say_it(status: int) -> None:
    machine = journey()
    ended, call = through(machine, begin(P0, D0, D1), PREFILLED, DecodeAnswered(status, b"first", retry_after_s=3))
    assert (type(ended), call.engine) == (EndHandoff, D1)
    last = machine.on(DecodeAnswered(status, b"last", retry_after_s=7))
    assert last == [Answer(status=status, body=b"last", retry_after_s=7)]


@pytest.mark.parametrize("status", [400, 409, 413, 422, 501])
def test_what_the_client_did_is_its_answer_at_once(status: int) -> None:
    ended, answer = through(journey(), begin(P0, D0, D1), PREFILLED, DecodeAnswered(status, b"bad"))
    assert (type(ended), answer) == (EndHandoff, Answer(status=status, body=b"bad"))


@pytest.mark.parametrize(("status", "words"), [(401, "refused to go on: no key"), (307, "address redirects (307)")])
def test_after_the_seed_another_engine_goes_on_and_at_last_an_error_event_is_left(status: int, words: str) -> None:
    machine = journey(STREAMED, wish="auto")
    said = DecodeAnswered(status, b"no key")
    assert kinds(through(machine, begin(P0, D0, D1), SEED, said)) == [EndHandoff, CallDecode]
    (closed,) = machine.on(said)
    assert isinstance(closed, CloseStream)
    assert words.encode() in closed.body


@pytest.mark.parametrize("status", [301, 307])
def test_a_redirect_is_a_decode_that_failed(status: int) -> None:
    machine = journey()
    assert kinds(through(machine, begin(P0, D0, D1), PREFILLED, DecodeAnswered(status, b""))) == [
        EndHandoff,
        CallDecode,
    ]
    (answer,) = machine.on(DecodeAnswered(status, b""))
    message = json.loads(answer.body)["error"]["message"]
    assert (answer.status, message) == (
        502, f"the engine's address redirects ({status}): name the engine by its final one",
    )  # fmt: skip


@within(20)
async def test_a_full_engine_is_passed_by_and_when_all_are_the_client_hears_for_how_long() -> None:
    full, good = FakeEngine("d0", "decode"), FakeEngine("d1", "decode")
    full.fault, full.fault_headers = "429", {"Retry-After": "17"}
    async with fleet(full, good, breaker=BreakerSettings(failure_threshold=2)) as router:
        assert {(await router.ask(PROMPT))[0] for _ in range(8)} == {200}
        assert len(full.requests) == 4, "nothing is wrong with it"
        good.fault, good.fault_headers = "429", {"retry-after": "17"}
        status, answer, headers = await router.ask(PROMPT)
        assert (status, headers["Retry-After"]) == (429, "17")
        assert answer["error"]["message"].startswith("not now")
        good.fault_headers = full.fault_headers = {"Retry-After": "Wed, 21 Oct 2015 07:28:00 GMT"}
        assert "Retry-After" not in (await router.ask(PROMPT))[2]


@within(20)
async def test_an_unknown_adapter_is_still_the_clients_404() -> None:
    engines = [FakeEngine("p0", "prefill"), FakeEngine("d0", "decode"), FakeEngine("d1", "decode")]
    async with fleet(*engines) as router:
        for engine in engines:
            engine.fault = "404"
        for body in (PROMPT, {**PROMPT, "stream": True}):
            status, answer, _ = await router.ask(body)
            assert (status, answer["error"]["message"].startswith("not now")) == (404, True)
        assert not router.outside.standing.ejected()


@within(20)
async def test_an_engine_with_another_key_is_ejected_and_nobody_notices() -> None:
    engines: list[Any] = [FakeEngine("p0", "prefill"), FakeEngine("d0", "decode"), FakeEngine("d1", "decode")]
    async with fleet(*engines, breaker=BreakerSettings(failure_threshold=2)) as router:
        for engine in engines[:2]:
            engine.fault = "401"
        assert {(await router.ask(PROMPT))[0] for _ in range(8)} == {200}
        assert [len(engine.requests) for engine in engines[:2]] == [2, 2]
        assert router.outside.standing.ejected() == {"p0": "open", "d0": "open"}


@within(20)
async def test_a_redirect_reaches_no_client() -> None:
    moved, good = FakeEngine("d0", "decode"), FakeEngine("d1", "decode")
    moved.fault, moved.fault_headers = "307", {"Location": "/elsewhere"}
    async with fleet(moved, good, breaker=BreakerSettings(failure_threshold=2)) as router:
        assert {(await router.ask(PROMPT))[0] for _ in range(8)} == {200}
        assert len(moved.requests) == 2, "its breaker is open"
        good.fault = "307"
        status, answer, _ = await router.ask(PROMPT)
        assert (status, "redirects" in answer["error"]["message"]) == (502, True)

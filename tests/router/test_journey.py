"""One request as a pure machine: every outcome, and that nothing else is possible."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest
from engine_fakes import KEY, daemon_ref, engine_info, verified

from pdx.errors import IllegalTransition
from pdx.router.journey import (
    MOVES,
    Answer,
    Begin,
    CallDecode,
    CallPrefill,
    ClientGone,
    CloseStream,
    DeadlinePassed,
    DecodeAnswered,
    EndHandoff,
    Event,
    HandoffBroke,
    Journey,
    PassOn,
    PrefillAnswered,
    Request,
    Settings,
    StreamFinished,
    UpstreamFailed,
)
from pdx.router.policy import Candidate, Snapshot
from pdx.wire import Budgets, Role

BODY: dict[str, Any] = {"model": "smol", "prompt": "x"}
IDS = b'{"choices":[{"prompt_token_ids":[1,2,3]}],"usage":{"prompt_tokens_details":{"cached_tokens":2}}}'
CHAT_IDS = b'{"choices":[{"message":{}}],"prompt_token_ids":[1,2,3]}'
ID = bytes(range(16))
NOW_UNIX_S = 1_000_000.0


def candidate(engine_id: str, role: Role) -> Candidate:
    return Candidate(info=engine_info(engine_id, role), daemon=daemon_ref(f"host-{engine_id}"))


P0, D0, D1 = candidate("p0", "prefill"), candidate("d0", "decode"), candidate("d1", "decode")


def begin(*engines: Candidate) -> Begin:
    return Begin(snapshot=tuple(engines), turn=0, handoff_id=ID, now_unix_s=NOW_UNIX_S)


def journey(body: dict[str, Any] = BODY, path: str = "/v1/completions") -> Journey:
    settings = Settings(cluster_key=KEY, budgets=Budgets(total_s=33.0))
    request = Request(path=path, model="smol", body=body, raw=json.dumps(body).encode())
    return Journey(request, settings)


def through(machine: Journey, *events: Event) -> list[Any]:
    """The actions of the last event."""
    actions: list[Any] = []
    for event in events:
        actions = machine.on(event)
    return actions


def kinds(actions: list[Any]) -> list[type]:
    return [type(action) for action in actions]


PREFILLED = PrefillAnswered(200, IDS)


def test_a_pair_serves() -> None:
    machine = journey()
    (call,) = machine.on(begin(P0, D0))
    assert isinstance(call, CallPrefill)
    assert (call.engine, call.timeout_s) == (P0, 120.0)
    handle = verified(json.loads(call.body), NOW_UNIX_S)
    assert (handle.handoff_id, handle.prefill_engine, handle.decode_engine) == (ID, "p0", "d0")
    assert (handle.prefill_daemon, handle.decode_daemon) == (P0.daemon, D0.daemon)
    assert handle.budgets.total_s == 33.0
    (told,) = machine.on(PREFILLED)
    assert isinstance(told, CallDecode)
    assert (told.engine, told.cached_tokens, json.loads(told.body)["prompt"]) == (D0, 2, [1, 2, 3])
    assert machine.on(DecodeAnswered(200, b"{}")) == [Answer(status=200, body=b"{}")]
    assert (machine.state, machine.outcome, machine.paired) == ("ended", "ok", True)
    assert repr(machine) == "<Journey ended p0→d0 ok>"


def test_a_pair_streams() -> None:
    machine = journey()
    assert through(machine, begin(P0, D0), PREFILLED, DecodeAnswered(200, b"1", streaming=True)) == [PassOn(b"1")]
    assert machine.state == "streaming"
    assert machine.on(StreamFinished()) == [CloseStream()]
    assert machine.outcome == "ok"


def test_chat_token_ids_lie_on_top() -> None:
    machine = journey({"model": "smol", "messages": []}, "/v1/chat/completions")
    (told,) = through(machine, begin(P0, D0), PrefillAnswered(200, CHAT_IDS))
    assert json.loads(told.body)["kv_transfer_params"]["prompt_token_ids"] == [1, 2, 3]
    assert told.cached_tokens is None


def test_alone_without_a_pair_and_by_rule() -> None:
    for body, engines, reason in ((BODY, [D0], "no_pair"), ({**BODY, "n": 2}, [P0, D0], "n")):
        machine = journey(body)
        (call,) = machine.on(begin(*engines))
        assert isinstance(call, CallDecode)
        assert (call.engine, json.loads(call.body), machine.reason) == (D0, body, reason)
        assert not machine.paired
        assert machine.handoff_id == b""
        assert kinds(machine.on(ClientGone())) == []  # there is no handoff to end


def test_no_decode_engine() -> None:
    (answer,) = journey().on(begin(P0))
    assert (answer.status, answer.retry_after_s) == (503, 1)


def test_prefills_client_error_is_the_clients() -> None:
    machine = journey()
    ended, answer = through(machine, begin(P0, D0), PrefillAnswered(400, b"too long"))
    assert isinstance(ended, EndHandoff)
    assert answer == Answer(status=400, body=b"too long")
    assert machine.outcome == "client_error"


@pytest.mark.parametrize(
    ("event", "reason"),
    [
        (PrefillAnswered(500, b""), "prefill_500"),
        (PrefillAnswered(302, b""), "prefill_302"),
        (PrefillAnswered(200, b'{"choices":[]}'), "prefill_bad_reply"),
        (PrefillAnswered(200, b"<html>"), "prefill_bad_reply"),
        (UpstreamFailed("timeout"), "prefill_timeout"),
        (HandoffBroke("nothing landed for 15 s"), "handoff_failed"),
    ],
)
def test_prefill_fails_and_decode_computes_itself(event: Event, reason: str) -> None:
    machine = journey()
    ended, call = through(machine, begin(P0, D0, D1), event)
    assert (ended.handoff_id, ended.reason) == (ID, reason)
    assert (ended.pair.prefill, ended.pair.decode) == (P0, D0)
    assert (call.engine, json.loads(call.body), call.cached_tokens) == (D0, BODY, None)
    assert (machine.reason, machine.outcome, machine.paired) == (reason, reason, False)
    assert kinds(machine.on(DecodeAnswered(200, b""))) == [Answer]
    assert machine.outcome == reason  # of the handoff, not of the request


@pytest.mark.parametrize("event", [UpstreamFailed("broken"), DecodeAnswered(500, b"")])
def test_decode_is_repeated_once_alone_elsewhere(event: Event) -> None:
    machine = journey()
    ended, call = through(machine, begin(P0, D0, D1), PREFILLED, event)
    assert isinstance(ended, EndHandoff)
    assert (call.engine, json.loads(call.body)) == (D1, BODY)
    (answer,) = machine.on(event)
    assert answer.status == 502


def test_decode_fails_with_nobody_else() -> None:
    ended, answer = through(journey(), begin(P0, D0), PREFILLED, UpstreamFailed("broken"))
    assert isinstance(ended, EndHandoff)
    assert (answer.status, json.loads(answer.body)["error"]["code"]) == (502, 502)


def test_decodes_client_error_is_the_clients() -> None:
    actions = through(journey(), begin(P0, D0, D1), PREFILLED, DecodeAnswered(400, b"bad"))
    assert kinds(actions) == [EndHandoff, Answer]
    assert actions[1].body == b"bad"


@pytest.mark.parametrize(("event", "code"), [(UpstreamFailed("broken"), 502), (DeadlinePassed(), 504)])
def test_after_the_first_byte_only_an_error_event_is_left(event: Event, code: int) -> None:
    machine = journey()
    actions = through(machine, begin(P0, D0, D1), PREFILLED, DecodeAnswered(200, b"1", streaming=True), event)
    assert kinds(actions) == [EndHandoff, CloseStream]
    assert actions[1].body.startswith(b"event: error\ndata: ")
    assert f'"code":{code}'.encode() in actions[1].body
    assert b"[DONE]" not in actions[1].body


STAGES: dict[str, list[Event]] = {
    "prefilling": [begin(P0, D0)],
    "decoding": [begin(P0, D0), PREFILLED],
    "streaming": [begin(P0, D0), PREFILLED, DecodeAnswered(200, b"1", streaming=True)],
}


@pytest.mark.parametrize("stage", STAGES)
def test_a_client_that_leaves_ends_the_handoff(stage: str) -> None:
    machine = journey()
    (ended,) = through(machine, *STAGES[stage], ClientGone())
    assert (ended.reason, machine.state, machine.outcome) == ("client_gone", "ended", "client_gone")


@pytest.mark.parametrize("stage", ["prefilling", "decoding"])
def test_deadline(stage: str) -> None:
    actions = through(journey(), *STAGES[stage], DeadlinePassed())
    assert kinds(actions) == [EndHandoff, Answer]
    assert actions[1].status == 504


def test_an_event_out_of_turn_changes_nothing() -> None:
    machine = journey()
    with pytest.raises(IllegalTransition):
        machine.on(StreamFinished())
    assert (machine.state, machine.outcome, machine.reason) == ("choosing", "none", "")
    machine.on(begin(P0, D0))
    before = vars(machine).copy()
    for event in (begin(P0, D0), DecodeAnswered(200, b""), DecodeAnswered(400, b""), StreamFinished()):
        with pytest.raises(IllegalTransition):
            machine.on(event)
        assert vars(machine) == before


def test_chance() -> None:
    """Whatever comes in whatever order: legal moves end, the client gets one end, a handoff ends at most once."""
    chance = random.Random(7)
    events: list[Event] = [
        PREFILLED, PrefillAnswered(400, b""), PrefillAnswered(500, b""), UpstreamFailed("broken"), StreamFinished(),
        DecodeAnswered(200, b""), DecodeAnswered(200, b"", streaming=True), DecodeAnswered(404, b""),
        DecodeAnswered(503, b""), DeadlinePassed(), ClientGone(),
    ]  # fmt: skip
    fleets: list[Snapshot] = [(P0, D0), (P0, D0, D1), (D0,), (P0,), ()]
    seen = set()
    for _ in range(3000):
        machine = journey()
        actions = machine.on(begin(*chance.choice(fleets)))
        for _ in range(30):
            before = machine.state
            try:
                actions += machine.on(chance.choice(events))
            except IllegalTransition:
                assert machine.state == before
        calls = [a for a in actions if isinstance(a, CallDecode)]
        assert machine.state == "ended"
        assert len(calls) <= 3
        assert sum(isinstance(a, Answer | CloseStream) for a in actions) <= 1
        assert sum(isinstance(a, EndHandoff) for a in actions) <= 1
        paired = any(isinstance(a, CallPrefill) for a in actions)
        assert (machine.outcome != "none") == paired
        seen.add(machine.outcome)
    assert len(seen) >= 7


def test_every_state_of_the_table_is_reached_and_left() -> None:
    sources, targets = {state for state, _ in MOVES}, set(MOVES.values())
    assert targets - sources == {"ended"}
    assert sources - targets == {"choosing"}

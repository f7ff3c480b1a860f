"""One request as a pure machine: every outcome, and that nothing else is possible."""

from __future__ import annotations

import copy
import json
import random
from typing import Any

import msgspec
import pytest
from engine_fakes import engine_info, verified
from journeys import (
    BODY,
    BUSY_D,
    BUSY_P,
    CHAT_IDS,
    D0,
    D1,
    D2,
    D3,
    ID,
    NOW_UNIX_S,
    P0,
    PREFILLED,
    REST,
    SEED,
    SENT,
    STREAMED,
    UNSEEDABLE,
    UNSENT,
    begin,
    candidate,
    journey,
    kinds,
    through,
)

from pdx.errors import IllegalTransition
from pdx.router.choice.policy import Asked, Snapshot
from pdx.router.choice.prompt import Prompt
from pdx.router.request.actions import (
    Answer,
    CallDecode,
    CallPrefill,
    ClientGone,
    CloseStream,
    DeadlinePassed,
    DecodeAnswered,
    DecodeFailed,
    DropPrefill,
    EndHandoff,
    Event,
    HandoffBroke,
    PassOn,
    PrefillAnswered,
    PrefillFailed,
    ShowCached,
    StreamFinished,
    TurnedAway,
    Write,
)
from pdx.router.request.journey import Journey
from pdx.router.request.settings import JourneyName
from pdx.router.request.states import MOVES
from pdx.router.request.usage import Cached


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
    assert (told.engine, told.cached, json.loads(told.body)["prompt"]) == (D0, Cached(2), [1, 2, 3])
    assert machine.on(DecodeAnswered(200, b"{}")) == [Answer(status=200, body=b"{}")]
    assert (machine.state, machine.outcome, machine.by_pair) == ("ended", "ok", True)
    assert machine.way == "after"
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
    assert told.cached is None


def test_ids_stand_for_a_text_only_where_they_were_made() -> None:
    strange = msgspec.structs.replace(P0.info.content, weights="revised")
    for content, sent in ((P0.info.content, [7, 8]), (None, [7, 8]), (strange, "x")):
        asked = Asked(prompt=Prompt(tokens=2, token_ids=[7, 8], tokenizer=content))
        (call,) = journey().on(msgspec.structs.replace(begin(P0, D0), asked=asked))
        assert json.loads(call.body)["prompt"] == sent


def test_alone_without_a_pair_and_by_rule() -> None:
    for body, engines, reason in ((BODY, [D0], "no_pair"), ({**BODY, "n": 2}, [P0, D0], "n")):
        machine = journey(body)
        (call,) = machine.on(begin(*engines))
        assert isinstance(call, CallDecode)
        assert (call.engine, json.loads(call.body), machine.reason) == (D0, body, reason)
        assert not machine.by_pair
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
        (PrefillFailed("timeout"), "prefill_timeout"),
        (HandoffBroke("nothing landed for 15 s"), "handoff_failed"),
    ],
)
def test_prefill_fails_and_decode_computes_itself(event: Event, reason: str) -> None:
    machine = journey()
    ended, call = through(machine, begin(P0, D0, D1), event)
    assert (ended.handoff_id, ended.reason) == (ID, reason)
    assert (ended.pair.prefill, ended.pair.decode) == (P0, D0)
    assert (call.engine, json.loads(call.body), call.cached) == (D0, BODY, None)
    assert (machine.reason, machine.outcome, machine.by_pair) == (reason, reason, False)
    assert kinds(machine.on(DecodeAnswered(200, b""))) == [Answer]
    assert machine.outcome == reason  # of the handoff, not of the request


@pytest.mark.parametrize("event", [DecodeFailed("broken"), DecodeAnswered(500, b"")])
def test_decode_is_repeated_once_alone_elsewhere(event: Event) -> None:
    machine = journey()
    ended, call = through(machine, begin(P0, D0, D1), PREFILLED, event)
    assert isinstance(ended, EndHandoff)
    assert (call.engine, json.loads(call.body)) == (D1, BODY)
    (answer,) = machine.on(event)
    assert answer.status == 502


def test_another_rank_behind_the_server_that_broke_is_not_another_engine() -> None:
    ranks = [
        msgspec.structs.replace(D0, info=engine_info(f"d_dp{rank}", "decode", data_parallel_rank=rank))
        for rank in range(2)
    ]
    _, answer = through(journey(), begin(P0, *ranks), PREFILLED, DecodeFailed("broken"))
    assert isinstance(answer, Answer)
    elsewhere = candidate("e0", "decode")
    _, call = through(journey(), begin(P0, *ranks, elsewhere), PREFILLED, DecodeFailed("broken"))
    assert call.engine == elsewhere


def test_decode_fails_with_nobody_else() -> None:
    ended, answer = through(journey(), begin(P0, D0), PREFILLED, DecodeFailed("broken"))
    assert isinstance(ended, EndHandoff)
    assert (answer.status, json.loads(answer.body)["error"]["code"]) == (502, 502)


def test_decodes_client_error_is_the_clients() -> None:
    actions = through(journey(), begin(P0, D0, D1), PREFILLED, DecodeAnswered(400, b"bad"))
    assert kinds(actions) == [EndHandoff, Answer]
    assert actions[1].body == b"bad"


@pytest.mark.parametrize(("event", "code"), [(DecodeFailed("broken"), 502), (DeadlinePassed(), 504)])
def test_after_the_first_byte_only_an_error_event_is_left(event: Event, code: int) -> None:
    machine = journey()
    actions = through(machine, begin(P0, D0, D1), PREFILLED, DecodeAnswered(200, b"1", streaming=True), event)
    assert kinds(actions) == [EndHandoff, CloseStream]
    assert actions[1].body.startswith(b"event: error\ndata: ")
    assert f'"code":{code}'.encode() in actions[1].body
    assert b"[DONE]" not in actions[1].body


# --- seeded ---------------------------------------------------------------------------------------------------


def test_the_seed_is_written_before_decode_is_called() -> None:
    machine = journey(STREAMED, wish="auto")
    assert kinds(machine.on(begin(P0, D0))) == [CallPrefill]
    write, call = machine.on(SEED)
    assert isinstance(call, CallDecode)
    assert isinstance(write, Write)
    asked = json.loads(call.body)
    assert (asked["prompt"], asked["max_tokens"], asked["kv_transfer_params"]["pdx_tokens"]) == ([1, 2, 3, 7], 15, 3)
    assert call.seed is not None
    assert json.loads(write.body[6:])["choices"][0]["text"] == " a"
    assert machine.on(DecodeAnswered(200, b"1", streaming=True)) == [PassOn(b"1")]
    assert machine.on(StreamFinished()) == [CloseStream()]
    assert (machine.way, machine.outcome, machine.unseeded) == ("seeded", "ok", "")


def test_a_whole_seeded_answer_is_merged() -> None:
    machine = journey(wish="auto")
    assert kinds(through(machine, begin(P0, D0), SEED)) == [CallDecode]
    (answer,) = machine.on(DecodeAnswered(200, REST))
    merged = json.loads(answer.body)
    assert (merged["choices"][0]["text"], merged["created"]) == (" a b", 5)
    assert merged["usage"] == {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}


@pytest.mark.parametrize("stream", [False, True])
def test_a_first_token_that_is_all(stream: bool) -> None:
    machine = journey({**BODY, "max_tokens": 1, "stream": stream}, wish="auto")
    actions = through(machine, begin(P0, D0), SEED)
    assert kinds(actions) == ([EndHandoff, Write, CloseStream] if stream else [EndHandoff, Answer])
    assert (machine.state, machine.outcome) == ("ended", "not_needed")


@pytest.mark.parametrize(
    ("reply", "unseeded"),
    [(PREFILLED, "no_seed"), (PrefillAnswered(200, SEED.body.replace(b" a", b"")), "seed_text")],
)
def test_a_token_that_can_not_be_shown_is_left_to_decode(reply: PrefillAnswered, unseeded: str) -> None:
    machine = journey(STREAMED, wish="auto")
    (call,) = through(machine, begin(P0, D0), reply)
    assert (json.loads(call.body)["prompt"], call.seed, call.cached) == ([1, 2, 3], None, Cached(2))
    assert (machine.state, machine.way, machine.unseeded) == ("decoding", "after", unseeded)


@pytest.mark.parametrize("body", [BODY, STREAMED])
@pytest.mark.parametrize("event", [DecodeFailed("broken"), DecodeAnswered(500, b""), DecodeAnswered(200, b"<html>")])
def test_decode_is_repeated_once_from_the_seed(body: dict[str, Any], event: Event) -> None:
    machine = journey(body, wish="auto")
    ended, call = through(machine, begin(P0, D0, D1), SEED, event)
    assert isinstance(ended, EndHandoff)
    assert (call.engine, json.loads(call.body)["prompt"], call.seed is not None) == (D1, [1, 2, 3, 7], True)
    assert "kv_transfer_params" not in json.loads(call.body)
    assert machine.state == "reseeding"
    (end,) = machine.on(event)
    assert type(end) is (CloseStream if body is STREAMED else Answer)
    assert b'"code":502' in end.body
    assert b"[DONE]" not in end.body


@pytest.mark.parametrize("event", [DecodeAnswered(400, b"bad"), DeadlinePassed()])
def test_after_the_seed_only_an_error_event_is_left(event: Event) -> None:
    actions = through(journey(STREAMED, wish="auto"), begin(P0, D0, D1), SEED, event)
    assert kinds(actions) == [EndHandoff, CloseStream]
    assert actions[1].body.startswith(b"event: error\ndata: ")
    assert kinds(through(journey(wish="auto"), begin(P0, D0, D1), SEED, event)) == [EndHandoff, Answer]


# --- paired ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("body", "wish"), [(BODY, "paired"), (UNSEEDABLE, "auto"), (UNSEEDABLE, "seeded")])
def test_both_are_asked_at_once(body: dict[str, Any], wish: JourneyName) -> None:
    machine = journey(body, wish=wish)
    prefill, decode = machine.on(begin(P0, D0))
    assert isinstance(prefill, CallPrefill)
    asked = json.loads(decode.body)
    assert asked["kv_transfer_params"]["pdx_early"] is True
    assert {k: v for k, v in asked.items() if k != "kv_transfer_params"} == body
    assert machine.on(SEED) == [ShowCached(Cached(2))]
    assert machine.on(DecodeAnswered(200, b"1", streaming=True)) == [PassOn(b"1")]
    assert machine.on(StreamFinished()) == [CloseStream()]
    assert (machine.way, machine.outcome) == ("paired", "ok")


@pytest.mark.parametrize("wish", ["seeded", "paired", "after"])
def test_a_handoff_that_never_began_is_ended_so_that_decode_need_not_wait_for_it(wish: JourneyName) -> None:
    machine = journey(wish=wish)
    ended, *rest = through(machine, begin(P0, D0), UNSENT)
    assert isinstance(ended, EndHandoff)
    assert ended.reason == "not_sent"
    assert kinds(rest) == [ShowCached if wish == "paired" else CallDecode]
    assert machine.outcome == "not_sent"


@pytest.mark.parametrize("wish", ["auto", "seeded", "paired", "after"])
def test_anthropics_messages_are_paired_since_no_ids_come_back(wish: JourneyName) -> None:
    body = {"model": "smol", "max_tokens": 9, "messages": [{"role": "user", "content": "x"}]}
    machine = journey(body, "/v1/messages", wish=wish)
    prefill, decode = through(machine, begin(P0, D0))
    assert (machine.state, machine.way) == ("both", "paired")
    asked, told = json.loads(prefill.body), json.loads(decode.body)
    assert (asked["max_tokens"], asked["stream"], told["max_tokens"]) == (1, False, 9)
    assert told["kv_transfer_params"]["pdx_early"] is True
    usage = {"input_tokens": 2, "cache_read_input_tokens": 2, "cache_creation_input_tokens": 6}
    reply = b'{"content":[],"usage":%b,%b}' % (json.dumps(usage).encode(), SENT)
    assert machine.on(PrefillAnswered(200, reply)) == [ShowCached(Cached(2, 6))]
    whole = b'{"usage":{"input_tokens":1,"cache_read_input_tokens":0,"cache_creation_input_tokens":9}}'
    (answer,) = machine.on(DecodeAnswered(200, whole))
    assert json.loads(answer.body)["usage"] == usage


def test_prefills_number_is_in_a_whole_paired_answer() -> None:
    machine = journey(wish="paired")
    answer = b'{"usage":{"prompt_tokens_details":{"cached_tokens":%d}}}'
    assert through(machine, begin(P0, D0), SEED, DecodeAnswered(200, answer % 9))[0].body == answer % 2


def test_decode_overtakes_prefill() -> None:
    machine = journey(wish="paired")
    assert kinds(through(machine, begin(P0, D0), DecodeAnswered(200, b"{}"))) == [DropPrefill, EndHandoff, Answer]
    machine = journey(wish="paired")
    first = DecodeAnswered(200, b"1", streaming=True)
    assert kinds(through(machine, begin(P0, D0), first)) == [PassOn]
    assert kinds(machine.on(StreamFinished())) == [DropPrefill, EndHandoff, CloseStream]
    assert machine.outcome == "not_needed"
    machine = journey(wish="paired")
    assert through(machine, begin(P0, D0), first, SEED) == [ShowCached(Cached(2))]
    assert machine.state == "streaming"
    machine = journey(wish="paired")
    assert kinds(through(machine, begin(P0, D0), first, PrefillFailed("timeout"))) == [EndHandoff]
    assert machine.on(StreamFinished()) == [CloseStream()]


@pytest.mark.parametrize(
    ("event", "reason"),
    [
        (PrefillAnswered(400, b""), "prefill_400"),
        (PrefillAnswered(500, b""), "prefill_500"),
        (PrefillFailed("timeout"), "prefill_timeout"),
        (HandoffBroke("peer lost"), "handoff_failed"),
    ],
)
def test_prefill_fails_beside_decode_which_goes_on(event: Event, reason: str) -> None:
    machine = journey(wish="paired")
    (ended,) = through(machine, begin(P0, D0, D1), event)
    assert (ended.reason, machine.state, machine.reason, machine.way) == (reason, "alone", reason, "alone")
    assert kinds(machine.on(DecodeAnswered(200, b"{}"))) == [Answer]
    assert machine.outcome == reason


def test_decode_fails_beside_prefill() -> None:
    machine = journey(wish="paired")
    dropped, ended, call = through(machine, begin(P0, D0, D1), DecodeFailed("broken"))
    assert (type(dropped), type(ended)) == (DropPrefill, EndHandoff)
    assert (call.engine, json.loads(call.body)) == (D1, BODY)
    actions = through(journey(wish="paired"), begin(P0, D0, D1), DecodeAnswered(400, b"bad"))
    assert kinds(actions) == [DropPrefill, EndHandoff, Answer]


# --- endings --------------------------------------------------------------------------------------------------

STAGES: dict[str, tuple[Journey, list[Event]]] = {
    "prefilling": (journey(), [begin(P0, D0)]),
    "decoding": (journey(), [begin(P0, D0), PREFILLED]),
    "seeding": (journey(wish="auto"), [begin(P0, D0), SEED]),
    "both": (journey(wish="paired"), [begin(P0, D0)]),
    "overtaking": (journey(wish="paired"), [begin(P0, D0), DecodeAnswered(200, b"1", streaming=True)]),
    "streaming": (journey(), [begin(P0, D0), PREFILLED, DecodeAnswered(200, b"1", streaming=True)]),
}


@pytest.mark.parametrize("stage", STAGES)
def test_a_client_that_leaves_ends_the_handoff(stage: str) -> None:
    machine = copy.copy(STAGES[stage][0])
    through(machine, *STAGES[stage][1])
    assert machine.state == stage
    *dropped, ended = machine.on(ClientGone())
    assert kinds(dropped) == ([DropPrefill] if stage in ("both", "overtaking") else [])
    assert (ended.reason, machine.state, machine.outcome) == ("client_gone", "ended", "client_gone")


@pytest.mark.parametrize("stage", ["prefilling", "decoding", "seeding", "both"])
def test_deadline(stage: str) -> None:
    machine = copy.copy(STAGES[stage][0])
    *dropped, ended, answer = through(machine, *STAGES[stage][1], DeadlinePassed())
    assert (kinds(dropped), type(ended)) == ([DropPrefill] if stage == "both" else [], EndHandoff)
    assert answer.status == 504


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
        PREFILLED, SEED, PrefillAnswered(400, b""), PrefillAnswered(500, b""), PrefillFailed("timeout"),
        HandoffBroke("peer lost"), DecodeFailed("broken"), StreamFinished(), DecodeAnswered(200, REST),
        DecodeAnswered(200, b"", streaming=True), DecodeAnswered(404, b""), DecodeAnswered(503, b""),
        DeadlinePassed(), ClientGone(), TurnedAway(why="queue_full", retry_after_s=1), begin(P0, D0),
    ]  # fmt: skip
    fleets: list[Snapshot] = [(P0, D0), (P0, D0, D1), (P0, D0, D1, D2, D3), (D0,), (P0,), (BUSY_P, BUSY_D), ()]
    wishes: list[JourneyName] = ["auto", "paired", "after"]
    seen = set()
    states = set()
    for _ in range(3000):
        machine = journey(chance.choice((BODY, STREAMED)), wish=chance.choice(wishes))
        actions = machine.on(begin(*chance.choice(fleets)))
        for _ in range(60):
            before = vars(machine).copy()
            try:
                actions += machine.on(chance.choice(events))
            except IllegalTransition:
                assert vars(machine) == before
            states.add(machine.state)
        calls = [a for a in actions if isinstance(a, CallDecode)]
        assert machine.state == "ended"
        assert len(calls) <= 4
        assert sum(isinstance(a, Answer | CloseStream) for a in actions) <= 1
        assert sum(isinstance(a, EndHandoff) for a in actions) <= 1
        paired = any(isinstance(a, CallPrefill) for a in actions)
        assert (machine.outcome != "none") == paired
        seen.add(machine.outcome)
    assert len(seen) >= 10
    assert states == set(MOVES.values())


def test_every_state_of_the_table_is_reached_and_left() -> None:
    sources, targets = {state for state, _ in MOVES}, set(MOVES.values())
    assert targets - sources == {"ended"}
    assert sources - targets == {"choosing"}

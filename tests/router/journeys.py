"""Journeys and engines for the tests of the router's machine."""

from __future__ import annotations

import json
from typing import Any

import msgspec
from engine_fakes import KEY, daemon_ref, engine_info

from pdx.router.choice.policy import Candidate
from pdx.router.request.actions import (
    Begin,
    DecodeFailed,
    Event,
    PrefillAnswered,
)
from pdx.router.request.journey import Journey
from pdx.router.request.request import Request
from pdx.router.request.settings import JourneyName, Settings
from pdx.wire import Budgets, Role

BODY: dict[str, Any] = {"model": "smol", "prompt": "x"}
SENT = b'"kv_transfer_params":{"pdx":{"handoff":"00","pages":1}}'
IDS = b'{"choices":[{"prompt_token_ids":[1,2,3]}],"usage":{"prompt_tokens_details":{"cached_tokens":2}},%b}' % SENT
CHAT_IDS = b'{"choices":[{"message":{}}],"prompt_token_ids":[1,2,3],%b}' % SENT
ID = bytes(range(16))
NOW_UNIX_S = 1_000_000.0


def candidate(engine_id: str, role: Role) -> Candidate:
    return Candidate(info=engine_info(engine_id, role), daemon=daemon_ref(f"host-{engine_id}"))


SEED = PrefillAnswered(
    200,
    b'{"id":"cmpl-r","created":5,"model":"smol","choices":[{"text":" a","finish_reason":"length","token_ids":[7],'
    b'"prompt_token_ids":[1,2,3]}],"usage":{"prompt_tokens":3,"completion_tokens":1,"total_tokens":4,'
    b'"prompt_tokens_details":{"cached_tokens":2}},%b}' % SENT,
)
UNSENT = PrefillAnswered(200, SEED.body.replace(b"pdx", b"nothing"))
REST = b'{"created":6,"choices":[{"text":" b"}],"usage":{"prompt_tokens":4,"completion_tokens":1,"total_tokens":5}}'
STREAMED = {**BODY, "stream": True}
UNSEEDABLE = {**BODY, "presence_penalty": 1}
P0, D0, D1 = candidate("p0", "prefill"), candidate("d0", "decode"), candidate("d1", "decode")


def begin(*engines: Candidate) -> Begin:
    return Begin(snapshot=tuple(engines), turn=0, handoff_id=ID, now_unix_s=NOW_UNIX_S)


def journey(body: dict[str, Any] = BODY, path: str = "/v1/completions", *, wish: JourneyName = "after") -> Journey:
    settings = Settings(cluster_key=KEY, journey=wish, budgets=Budgets(total_s=33.0))
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
REQUEST = Request(path="/v1/completions", model="smol", body=BODY, raw=json.dumps(BODY).encode())
BUSY_P, BUSY_D = msgspec.structs.replace(P0, in_line=32), msgspec.structs.replace(D0, waiting=32)
SINGLE = {**BODY, "n": 2}
D2, D3 = candidate("d2", "decode"), candidate("d3", "decode")
BROKEN = DecodeFailed("broken")

"""What the live page and `pdx top` are told: values, no behaviour. A `Live` each second, a `Journal` of one request.

Strings in it come from clients and engines: whoever shows them has to escape them. Everything has a bound.
"""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from pdx.router.choice.policy import Side
from pdx.verbs import DaemonView
from pdx.wire import Role

REQUESTS_MAX = 200  # in one answer: the next question gets the rest

StepName = Literal[
    "queued",
    "turned_away",
    "chosen",
    "prefill_sent",
    "prefill_answered",
    "prefill_failed",
    "handoff_broke",
    "decode_sent",
    "decode_answered",
    "decode_failed",
    "first_byte",
    "deadline",
    "client_gone",
    "finished",
]
# alone: its daemon is silent, so it pairs with nobody; joining: not well yet; lost: no longer well; ejected: it keeps
# failing, so its breaker is not closed
Health = Literal["ready", "alone", "joining", "lost", "drained", "ejected"]
Cursor = Annotated[int, Meta(ge=0)]


class Shape(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base: frozen, unknown fields refused."""


class Step(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """`at_us`: since the request's arrival, on the router's clock. `engine`: whose call it is."""

    what: StepName
    at_us: int
    engine: str = ""


class RequestRow(Shape, frozen=True, kw_only=True):
    """One request, as far as it has come. `changed` orders rows: a row that changes is told again."""

    serial: int  # of this router, counting up
    changed: int
    request_id: str
    path: str
    model: str
    began_unix_s: float
    way: str  # as in x-pdx-way
    outcome: str = ""  # what became of the handoff
    reason: str = ""  # why an engine answers alone
    unseeded: str = ""  # why decode makes the first token
    code: int = 0  # 0: under way; 499: the client left
    handoff: str = ""  # in hex; empty: none
    prefill: str = ""  # engine ids
    decode: str = ""
    steps: list[Step] = []


class EngineRow(Shape, frozen=True, kw_only=True):
    engine_id: str
    role: Role
    model: str
    url: str
    daemon: str
    health: Health
    waiting: int = 0  # in the engine, as its daemon says
    in_line: int = 0  # of this router, without an answer yet
    in_flight: int = 0  # of this router


class DaemonRow(Shape, frozen=True, kw_only=True):
    daemon: str
    lanes: list[str]  # endpoints, best first
    heard_s: float  # since its last announcement
    view: DaemonView | None = None  # the last one that it gave
    view_s: float = 0.0  # how old that is
    error: str = ""  # why there is no newer one


class Live(Shape, frozen=True, kw_only=True):
    """The router at one moment, and the requests that have changed since the cursor of the question."""

    run: str  # another one: the router has started anew, cursors begin at 0
    version: str
    began_unix_s: float
    now_unix_s: float
    engines: list[EngineRow]
    daemons: list[DaemonRow]
    requests: Annotated[list[RequestRow], Meta(max_length=REQUESTS_MAX)]
    next: Cursor  # the cursor for the next question
    more: bool  # there are more rows already
    keeps: int  # so many requests are remembered
    queued: int  # requests that wait for an engine
    reasons: list[str]  # why some engines, pairs or all of them are not asked


class PlacedMark(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    what: str
    at_us: int  # since the request's arrival, like all that is placed
    note: str = ""


class PlacedPages(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    at_us: int
    layer: int
    pages: int


class DaemonJournal(Shape, frozen=True, kw_only=True):
    """What one daemon remembers of a request's handoff, placed on the router's clock.

    The daemon says what its clock shows when it answers; that moment is taken for the middle between question and
    answer. So it may be wrong by half of the time between them, `within_us`, and by what the two clocks have drifted
    apart since: tens of microseconds a second at the worst.
    """

    daemon: str
    sides: list[Side]
    within_us: int = 0
    marks: list[PlacedMark] = []
    computed: list[PlacedPages] = []
    landed: list[PlacedPages] = []
    whole: bool = True  # False: there was more than it remembers
    error: str = ""


class Journal(Shape, frozen=True, kw_only=True):
    request: RequestRow
    daemons: list[DaemonJournal]

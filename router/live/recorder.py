"""Remembers the last requests and when each of their steps came, by what their journeys heard and did. Sans-IO.

A request is a row that changes until it has ended. Every change gets the next number, and rows are kept in the order of
their last change, so that who asks again gets what is new without a look at the rest.

One thread: the event loop's. Times are seconds of one monotonic clock.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Protocol

from pdx.router.choice.policy import Candidate, Side
from pdx.router.live.values import REQUESTS_MAX, RequestRow, Step, StepName
from pdx.router.request.actions import (
    Action,
    Answer,
    CallDecode,
    CallPrefill,
    ClientGone,
    DeadlinePassed,
    DecodeAnswered,
    DecodeFailed,
    Event,
    HandoffBroke,
    LineUp,
    PassOn,
    PrefillAnswered,
    PrefillFailed,
    TurnedAway,
    Write,
)
from pdx.wire import DaemonRef

RECORDS_MAX = 1000
STEPS_MAX = 24  # two calls, a retry and their ends are a dozen
TEXT_CHARS_MAX = 200  # of whatever a client or an engine has put into words

_HEARD: dict[type, StepName] = {
    TurnedAway: "turned_away",
    PrefillAnswered: "prefill_answered",
    PrefillFailed: "prefill_failed",
    HandoffBroke: "handoff_broke",
    DecodeAnswered: "decode_answered",
    DecodeFailed: "decode_failed",
    DeadlinePassed: "deadline",
    ClientGone: "client_gone",
}


class Course(Protocol):
    """What is read of a journey."""

    @property
    def way(self) -> str: ...

    outcome: str
    reason: str
    unseeded: str
    handoff_id: bytes
    prefill: Candidate | None
    decode: Candidate | None


class Recorder:
    """The last `keeps` requests."""

    def __init__(self, keeps: int = RECORDS_MAX) -> None:
        self.keeps = keeps
        self.changes = 0
        self._serial = 0
        self._records: OrderedDict[int, Record] = OrderedDict()  # by serial, the least recently changed first
        self._oldest = 1

    def __len__(self) -> int:
        return len(self._records)

    def begin(
        self, journey: Course, *, request_id: str, model: str, path: str, now: float, now_unix_s: float
    ) -> Record:
        """A request that has just arrived."""
        self._serial += 1
        if len(self._records) >= self.keeps:
            self._records.pop(self._oldest, None)
            self._oldest += 1
        record = Record(self, self._serial, journey, began_at=now, began_unix_s=now_unix_s)
        record.request_id, record.model, record.path = _cut(request_id), _cut(model), _cut(path)
        self._records[record.serial] = record
        record.changed = self.next_change(record.serial)
        return record

    def since(self, cursor: int, *, limit: int = REQUESTS_MAX) -> tuple[list[RequestRow], int, bool]:
        """Rows changed after `cursor`, the first changed first; the next cursor; whether there are more."""
        found: list[Record] = []
        for record in reversed(self._records.values()):
            if record.changed <= cursor:
                break
            found.append(record)
        told = found[::-1][:limit]
        return [record.row() for record in told], told[-1].changed if told else cursor, len(found) > limit

    def of_handoff(self, handoff_id: bytes) -> Record | None:
        return next((record for record in self._records.values() if record.handoff_id == handoff_id), None)

    def next_change(self, serial: int) -> int:
        if serial in self._records:
            self._records.move_to_end(serial)
        self.changes += 1
        return self.changes


class Record:
    """One request. What its conductor tells, in order: `saw`, `does`, and `end` once."""

    __slots__ = (
        "_journey", "_last", "_opened", "_recorder", "began_at", "began_unix_s", "changed", "code", "model", "path",
        "request_id", "serial", "steps",
    )  # fmt: skip

    def __init__(
        self, recorder: Recorder, serial: int, journey: Course, *, began_at: float, began_unix_s: float
    ) -> None:
        self.serial = serial
        self.began_at = began_at
        self.began_unix_s = began_unix_s
        self.request_id = self.model = self.path = ""
        self.changed = 0
        self.code = 0
        self.steps: list[Step] = []
        self._recorder = recorder
        self._journey: Course | None = journey  # until its end: it holds the request's body
        self._last: _Ended | None = None
        self._opened = False

    def saw(self, event: Event, now: float) -> None:
        what = _HEARD.get(type(event))
        if isinstance(event, PrefillAnswered) and event.status != 200:
            what = "prefill_failed"
        if isinstance(event, DecodeAnswered) and event.status >= 300:
            what = "decode_failed"
        if what is not None:
            side = "prefill" if what.startswith(("prefill", "handoff")) else "decode" if "decode" in what else ""
            self._step(what, now, self._engine(side))

    def does(self, action: Action, now: float) -> None:
        match action:
            case LineUp():
                if not self.steps:  # it stays in the line as often as its turn comes in vain
                    self._step("queued", now)
            case CallPrefill():
                self._choose(now)
                self._step("prefill_sent", now, action.engine.engine_id)
            case CallDecode():
                self._choose(now)
                self._step("decode_sent", now, action.engine.engine_id)
            case Answer() | Write() | PassOn() if not self._opened:
                self._opened = True
                self._step("first_byte", now)

    def end(self, code: int, now: float) -> None:
        """The connection is over; `code` is what the client got."""
        if self._journey is None:
            return
        self.code = code
        self._last, self._journey = _Ended(self._journey), None
        self._step("finished", now)

    @property
    def handoff_id(self) -> bytes:
        return self._course.handoff_id

    @property
    def daemons(self) -> dict[str, tuple[DaemonRef, list[Side]]]:
        """By id, with the sides that each serves."""
        found: dict[str, tuple[DaemonRef, list[Side]]] = {}
        engines: tuple[tuple[Side, Candidate | None], ...]
        engines = (("prefill", self._course.prefill), ("decode", self._course.decode))
        for side, engine in engines:
            if engine is not None:
                found.setdefault(engine.daemon.daemon_id, (engine.daemon, []))[1].append(side)
        return found

    def row(self) -> RequestRow:
        course = self._course
        return RequestRow(
            serial=self.serial,
            changed=self.changed,
            request_id=self.request_id,
            path=self.path,
            model=self.model,
            began_unix_s=self.began_unix_s,
            way=course.way,
            outcome=_cut(course.outcome),
            reason=_cut(course.reason),
            unseeded=_cut(course.unseeded),
            code=self.code,
            handoff=course.handoff_id.hex(),
            prefill=self._engine("prefill"),
            decode=self._engine("decode"),
            steps=list(self.steps),
        )

    @property
    def _course(self) -> Course:
        course = self._journey or self._last
        assert course is not None
        return course

    def _engine(self, side: str) -> str:
        engine = {"prefill": self._course.prefill, "decode": self._course.decode}.get(side)
        return _cut(engine.engine_id) if engine is not None else ""

    def _choose(self, now: float) -> None:
        if not self.steps or self.steps[-1].what == "queued":
            self._step("chosen", now)

    def _step(self, what: StepName, now: float, engine: str = "") -> None:
        if len(self.steps) < STEPS_MAX or what == "finished":
            self.steps.append(Step(what, round((now - self.began_at) * 1e6), _cut(engine)))
            self.changed = self._recorder.next_change(self.serial)


class _Ended:
    """What stays of a journey."""

    __slots__ = ("decode", "handoff_id", "outcome", "prefill", "reason", "unseeded", "way")

    def __init__(self, journey: Course) -> None:
        self.way = journey.way
        self.outcome = journey.outcome
        self.reason = journey.reason
        self.unseeded = journey.unseeded
        self.handoff_id = journey.handoff_id
        self.prefill = journey.prefill
        self.decode = journey.decode


def _cut(text: str) -> str:
    return text[:TEXT_CHARS_MAX]

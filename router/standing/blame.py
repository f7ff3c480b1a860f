"""What one request has to say about the engines and daemons that it used: how their calls and its handoff went.

An engine that answers with a failure (HTTP 500) may have met what no engine can serve. It is to blame if decode has an
answer from another one then. If others fail as well, and nobody answers, none is; if no other was asked, that proves
nothing. What may be the client's fault as well (HTTP 401) is the engine's only if another one serves the request.

A stream is judged at its end: also at its deadline, if the engine has said nothing for long while we waited for it. The
time in which a client takes what there is does not count.

Owned by the request's task; the tasks of its calls report here when they are done.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable
from contextlib import ExitStack

from pdx.router.choice.policy import Candidate, Pair
from pdx.router.outside import Outside
from pdx.router.request.actions import (
    DOUBTFUL_STATUSES,
    UNJUDGED_STATUSES,
    DecodeAnswered,
    DecodeFailed,
    Event,
    PrefillAnswered,
    PrefillFailed,
    StreamFinished,
)
from pdx.router.request.refusals import may_be_engines
from pdx.router.standing.standing import Ticket
from pdx.wire import ONE_REQUEST

STALL_S = 30.0  # without a token, or half of the deadline if that is shorter
PROBE_S = 1.0  # a stream that still goes on goes well: its first events may all be of one step


class Blame:
    """Tells `Standing`."""

    def __init__(self, outside: Outside, model: str) -> None:
        self._outside = outside
        self._model = model
        self._watching = ExitStack()
        self._handoff: tuple[Pair, Ticket, asyncio.Future[str]] | None = None
        self._stream: tuple[Candidate, Ticket] | None = None
        self._overdue = self._stalled = False
        self._goes_well_at = math.inf  # when a stream that is a probe has gone on for long enough
        self._silent_s = 0.0  # in which we have waited for the stream's next token, but for the present wait
        self._waits_since: float | None = None  # None: the client is to take what there is
        self._doubtful = False  # one of the failures told may be the client's fault
        self._told_failures: list[tuple[Candidate, Ticket]] | None = []  # None: whose fault they are is known

    def call_began(self, engine: Candidate) -> Callable[[asyncio.Task[Event]], None]:
        """To be called with the call's task when it is done."""
        ticket = self._outside.standing.call_began(engine.engine_id)

        def done(task: asyncio.Task[Event]) -> None:
            if _serves(task):
                self._told_failures_judged(ok=False)
            if _streams(task):
                self._stream, self._goes_well_at = (engine, ticket), time.monotonic() + PROBE_S
            elif _tells_failure(task) and self._told_failures is not None:
                self._told_failures.append((engine, ticket))
                self._doubtful |= _status(task) in DOUBTFUL_STATUSES
            else:
                self._judge(engine, ticket, False if self._overdue and task.cancelled() else _went_well(task))

        return done

    def waits(self, now: float) -> None:
        """For the engine to go on with its stream."""
        self._waits_since = now

    def heard(self, now: float, *, says: bool) -> None:
        """From the stream; the client is to take it now. `says`: more than comments."""
        waited_s = now - self._waits_since if self._waits_since is not None else 0.0
        self._waits_since = None
        self._silent_s = 0.0 if says else self._silent_s + waited_s
        if says and now >= self._goes_well_at and self._stream is not None:  # what a probe was to find out
            engine, ticket = self._stream
            self._stream = (engine, self._outside.standing.call_went(engine.engine_id, ticket, now))
            self._goes_well_at = math.inf

    def deadline_passed(self, timeout_s: float, now: float) -> None:
        """The request's, `timeout_s` after its start. Who is silent is to blame; in a stream, who is so for long."""
        self._overdue = True
        if self._waits_since is not None:
            self._stalled = self._silent_s + now - self._waits_since >= min(STALL_S, timeout_s / 2)

    def stream_ended(self, pump: asyncio.Task[Event] | None) -> None:
        """None: it was not heard to the end. Does nothing the second time."""
        stream, self._stream = self._stream, None
        if stream is not None:
            given_up = False if self._stalled else None
            self._judge(*stream, given_up if pump is None or pump.cancelled() else _went_well(pump))

    def handoff_began(self, pair: Pair, handoff_id: bytes) -> asyncio.Future[str]:
        """Its result is a daemon's word that the handoff has failed."""
        failure = self._watching.enter_context(self._outside.pending.watch(handoff_id))
        self._handoff = (pair, self._outside.standing.handoff_began(pair), failure)
        return failure

    def handoff_went(self) -> None:
        """Decode answers with what was handed over: the pair's daemons have done their part."""
        self._handoff_ended("ok")

    def request_ended(self, outcome: str) -> None:
        """`outcome`: of the journey's handoff. One that was given up for other reasons says nothing about daemons."""
        self.stream_ended(None)
        told = self._told_failures or ()
        self._told_failures_judged(ok=False if len(told) == 1 and not self._doubtful else None, proved=False)
        self._handoff_ended(outcome)

    def _handoff_ended(self, outcome: str) -> None:
        """Does nothing the second time."""
        handoff, self._handoff = self._handoff, None
        if handoff is None:
            return
        pair, ticket, failure = handoff
        ok = self._could_hand_over(pair, failure, outcome)
        self._outside.standing.handoff_ended(pair, ticket, ok=ok, now=time.monotonic())
        self._watching.close()

    def _could_hand_over(self, pair: Pair, failure: asyncio.Future[str], outcome: str) -> bool | None:
        """Whether the pair's daemons have done their part; None if this request does not tell."""
        if failure.done() and ONE_REQUEST in failure.result():
            return None
        match outcome:
            case "ok":
                return not failure.done()
            case "handoff_failed":
                return False
            case "not_sent":  # as it is with an adapter whose files have changed, whatever the daemons
                return None if self._model in pair.prefill.info.adapters else False
        return None

    def _told_failures_judged(self, *, ok: bool | None, proved: bool = True) -> None:
        told, self._told_failures = self._told_failures or (), None
        for engine, ticket in told:
            self._judge(engine, ticket, ok, proved=proved)

    def _judge(self, engine: Candidate, ticket: Ticket, ok: bool | None, *, proved: bool = True) -> None:
        self._outside.standing.call_ended(engine.engine_id, ticket, ok=ok, now=time.monotonic(), proved=proved)


def _went_well(task: asyncio.Task[Event]) -> bool | None:
    """Whether the engine did what engines are for; None if it was not waited for, or is not the one to blame."""
    if task.cancelled() or task.exception() is not None:
        return None
    match task.result():
        case PrefillAnswered() | DecodeAnswered() as answered:
            unjudged = answered.status in UNJUDGED_STATUSES or answered.status in DOUBTFUL_STATUSES
            return None if unjudged else not may_be_engines(answered.status)
        case StreamFinished():
            return True
        case PrefillFailed() | DecodeFailed() as failed:
            return False if failed.blames else None
        case _:
            return None


def _tells_failure(task: asyncio.Task[Event]) -> bool:
    """Whether the engine has answered, and that it has failed, or what may mean so."""
    status = _status(task)
    if status in DOUBTFUL_STATUSES:
        return status not in UNJUDGED_STATUSES
    return status > 0 and _went_well(task) is False


def _status(task: asyncio.Task[Event]) -> int:
    """What the engine has answered; 0 if it has not."""
    if task.cancelled() or task.exception() is not None:
        return 0
    match task.result():
        case PrefillAnswered() | DecodeAnswered() as answered:
            return answered.status
        case DecodeFailed() as failed:
            return failed.code
    return 0


def _serves(task: asyncio.Task[Event]) -> bool:
    """Whether it has ended with the client's answer, or its beginning. Prefill's says less: it is asked less."""
    return bool(_went_well(task)) and isinstance(task.result(), DecodeAnswered)


def answered(task: asyncio.Task[Event]) -> bool:
    """Whether it took the time that a first token takes."""
    if task.cancelled() or task.exception() is not None:
        return False
    event = task.result()
    whole = isinstance(event, DecodeAnswered) and not event.streaming
    return isinstance(event, PrefillAnswered | DecodeAnswered) and not whole and event.status == 200


def _streams(task: asyncio.Task[Event]) -> bool:
    """Whether it has ended with the beginning of a stream."""
    if task.cancelled() or task.exception() is not None:
        return False
    event = task.result()
    return isinstance(event, DecodeAnswered) and event.streaming

"""Plays journeys against real sockets: turns their actions into calls and what the calls say into events.

One `Conductor` a request; it lives in the task that serves the client's connection, with at most one task more for each
of the two engines. Only one of them writes to the client at any time. Decides nothing: see `journey`.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from contextlib import AsyncExitStack
from typing import Any

import msgspec
from aiohttp import web

from pdx.router.choice.policy import Candidate, Pair, Side, Snapshot
from pdx.router.engines.upstream import Call, Reply, UpstreamError
from pdx.router.front.replies import words_of
from pdx.router.line.admission import Wish
from pdx.router.line.gate import Place
from pdx.router.outside import Outside
from pdx.router.request.actions import (
    NEVER_STATUSES,
    UNJUDGED_STATUSES,
    Action,
    Answer,
    Begin,
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
    LineUp,
    PassOn,
    PrefillAnswered,
    PrefillFailed,
    ShowCached,
    StreamFinished,
    TurnedAway,
    Write,
)
from pdx.router.request.journey import Journey
from pdx.router.request.servable import CHAT, COMPLETIONS
from pdx.router.request.usage import EventStream, only_comments
from pdx.router.request_log import line_of
from pdx.router.standing.blame import Blame, answered

# Writing the last bytes to a client that no longer reads must end too.
CLOSE_S = 5.0
FAULT_CODE = 500
CLIENT_GONE_CODE = 499  # never sent: how the metrics show clients that left
STREAM_TYPE = "text/event-stream; charset=utf-8"  # as vLLM says it
RANK_HEADER = "X-data-parallel-rank"
SIDES: tuple[Side, Side] = ("prefill", "decode")  # prefill is heard first: it knows what decode's stream is to show


class Conductor:
    """Serves one POST of `client` as `journey` says."""

    def __init__(
        self,
        journey: Journey,
        outside: Outside,
        client: web.BaseRequest,
        *,
        model: str,
        headers: dict[str, str],
        shown: Mapping[str, str],
        begins: Callable[[], Awaitable[Begin]],
        wish: Wish,
    ) -> None:
        self._journey = journey
        self._outside = outside
        self._client = client
        self._model = outside.metrics.model(model)
        self._headers = headers  # for the engines
        self._shown = shown  # headers for the client, whatever the answer
        self._begins = begins
        self._wish = wish
        self._place: Place | None = None  # in the line
        self._blame = Blame(outside, model)
        self._handoff_failed: asyncio.Future[str] | None = None
        self._at_fault = False  # the router's own code, which the front answers for and counts
        self._started_at = self._prefilled_at = time.monotonic()
        self._calls: dict[Side, asyncio.Task[Event]] = {}
        self._heard: asyncio.Future[None] | None = None  # done when one of them is
        self._decode_call = AsyncExitStack()  # decode's connection, open as long as its stream
        self._reply: Reply | None = None  # decode's, of which the stream is passed on
        self._events = EventStream(None)
        self._content_type = "application/json"
        self._response: web.StreamResponse | None = None
        self._record = outside.recorder.begin(
            journey, request_id=headers["X-Request-Id"], model=model, path=client.path, now=self._started_at,
            now_unix_s=time.time(),
        )  # fmt: skip

    async def play(self, *, timeout_s: float) -> web.StreamResponse:
        """The finished response. Cancelled (the client left), it drops upstream calls and ends the handoff."""
        try:
            try:
                async with asyncio.timeout(timeout_s):
                    await self._run(await self._begins())
            except TimeoutError:
                self._blame.deadline_passed(timeout_s, time.monotonic())
                await self._drop_all()
                if self._journey.state == "ended":
                    raise  # all is said, but the client does not take it
                async with asyncio.timeout(CLOSE_S):
                    await self._run(DeadlinePassed())
        except (ConnectionResetError, TimeoutError):
            # The client is gone, or so slow that it does not even take the goodbye.
            if self._client.transport is not None:
                self._client.transport.abort()
        except Exception:
            self._at_fault = True
            raise
        finally:
            self._leave_line(went=False)
            try:
                await self._drop_all()
            finally:
                self._end()
        return self._response or web.Response(status=CLIENT_GONE_CODE)

    def _end(self) -> None:
        if self._journey.state not in ("choosing", "ended"):
            self._record.saw(ClientGone(), time.monotonic())
            for action in self._journey.on(ClientGone()):
                if isinstance(action, EndHandoff):
                    self._end_handoff(action)
        self._blame.request_ended(self._journey.outcome)
        self._count()

    async def _run(self, first: Event) -> None:
        event: Event | None = first
        while event is not None:
            self._record.saw(event, time.monotonic())
            actions = self._journey.on(event)
            if self._journey.state != "queued":
                self._leave_line(went=self._journey.state != "ended")
            for action in actions:
                self._record.does(action, time.monotonic())
                await self._perform(action)
            event = await self._next_event()

    async def _perform(self, action: Action) -> None:
        match action:
            case LineUp():
                self._place = self._outside.gate.line_up(action.need, self._wish, self._place)
            case CallPrefill():
                call = self._begun(action.engine, action.body)
                assert self._journey.decode is not None
                pair = Pair(action.engine, self._journey.decode)
                self._handoff_failed = self._blame.handoff_began(pair, self._journey.handoff_id)
                # Decode's place is taken now: else all requests in prefill's line would choose the same free engine.
                self._decode_call.callback(self._outside.in_flight_at(pair.decode))
                sent = self._outside.sent(action.engine, action.prompt, waits=False)
                self._start("prefill", action.engine, call, self._prefill(action, call), sent)
            case CallDecode():
                await self._drop("decode")
                call = self._begun(action.engine, action.body)
                # Counted before the first await: of requests that come together, each must see those before it.
                self._decode_call.callback(self._outside.in_flight_at(action.engine))
                whole = not self._journey.streams
                sent = self._outside.sent(action.engine, action.prompt, waits=action.waits, whole=whole)
                self._start("decode", action.engine, call, self._decode(action, call), sent)
            case DropPrefill():
                await self._drop("prefill")
            case ShowCached():
                self._events.cached = action.cached
            case EndHandoff():
                self._end_handoff(action)
            case Answer():
                await self._drop_all()  # engines have no part in how fast a client reads
                await self._answer(action)
            case Write():
                self._content_type = STREAM_TYPE
                await self._write(action.body)
            case PassOn():
                if self._journey.handed_over:
                    self._blame.handoff_went()
                    self._outside.metrics.handover_s.of(self._model).observe(time.monotonic() - self._prefilled_at)
                await self._write(action.body)
                self._calls["decode"] = pump = asyncio.create_task(self._pump())
                pump.add_done_callback(self._blame.stream_ended)
                pump.add_done_callback(self._wake)
            case CloseStream():
                assert self._response is not None
                if action.body:
                    await self._response.write(self._events.before_ours() + action.body)
                await self._response.write_eof()

    # --- the calls under way ----------------------------------------------------------------------------------

    def _start(
        self,
        side: Side,
        engine: Candidate,
        call: Call,
        hearing: Coroutine[Any, Any, Event],
        sent: Callable[[bool], None],
    ) -> None:
        counts = [self._outside.in_line_at(engine)]
        if side == "prefill":
            counts.append(self._outside.in_flight_at(engine))
        judge = self._blame.call_began(engine)

        # Not within the coroutine: of a task that is cancelled before it has begun, nothing runs.
        def ended(task: asyncio.Task[Event]) -> None:
            if task.cancelled() or task.exception() is not None:
                call.drop()
            self._wake(task)
            for over in counts:
                over()
            judge(task)
            sent(answered(task))

        self._calls[side] = task = asyncio.create_task(hearing)
        task.add_done_callback(ended)

    async def _next_event(self) -> Event | None:
        """What the line, or else the calls under way, say next; None when there are none."""
        if self._place is not None:
            return await self._turn(self._place)
        while self._calls:
            for side in SIDES:
                if side in self._calls and self._calls[side].done():
                    return self._calls.pop(side).result()
            self._heard = asyncio.get_running_loop().create_future()
            await self._heard
        return None

    def _wake(self, _: asyncio.Task[Event]) -> None:
        if self._heard is not None and not self._heard.done():
            self._heard.set_result(None)

    async def _drop(self, side: Side) -> None:
        task = self._calls.pop(side, None)
        try:
            if task is not None:
                task.cancel()
                await asyncio.wait({task})
                if not task.cancelled():
                    task.exception()  # seen: what a dropped call ended with is of no interest
        finally:  # we may be cancelled in here, by a client that leaves now
            if side == "decode":
                ended, self._decode_call = self._decode_call, AsyncExitStack()
                await ended.aclose()

    async def _drop_all(self) -> None:
        try:
            await self._drop("prefill")
        finally:
            await self._drop("decode")

    async def _prefill(self, action: CallPrefill, call: Call) -> Event:
        """Prefill's answer, or the daemons' word that it is of no use any more, whichever comes first."""
        failure, task = self._handoff_failed, asyncio.current_task()
        assert failure is not None
        assert task is not None

        def broke(failure: asyncio.Future[str]) -> None:
            if not failure.cancelled():
                task.cancel()

        failure.add_done_callback(broke)
        try:
            return await self._call_prefill(action, call)
        except asyncio.CancelledError:
            # By `broke`, unless somebody else wants this call to end, or does so too.
            if failure.done() and not failure.cancelled() and task.uncancel() == 0:
                return HandoffBroke(failure.result())
            raise
        finally:
            failure.remove_done_callback(broke)

    async def _call_prefill(self, action: CallPrefill, call: Call) -> Event:
        try:
            async with asyncio.timeout(action.timeout_s), call as reply:
                body = await reply.read()
                self._prefilled_at = time.monotonic()
                return PrefillAnswered(reply.status, body)
        except UpstreamError as error:
            self._note(action.engine, error)
            return PrefillFailed(str(error), blames=error.blames)
        except TimeoutError:
            return PrefillFailed("timeout")

    async def _decode(self, action: CallDecode, call: Call) -> Event:
        self._events = EventStream(action.cached, action.seed)
        try:
            reply = await self._decode_call.enter_async_context(call)
            if reply.status == 200 and reply.content_type.startswith("text/event-stream"):
                self._content_type = reply.content_type
                self._reply = reply
                first = await self._next_events()
                if first:
                    return DecodeAnswered(200, first, streaming=True)
                return DecodeFailed("empty_stream", self._outside.snapshot())
            body = await reply.read()
        except UpstreamError as error:
            self._note(action.engine, error)
            told = self._events.error
            if told is not None and (told.code < 500 or told.code in NEVER_STATUSES):
                return DecodeAnswered(told.code, told.body, snapshot=self._outside.snapshot())
            return self._failed(error, self._outside.snapshot())
        self._content_type = reply.content_type
        snapshot = self._outside.snapshot() if reply.status >= 300 else None
        return DecodeAnswered(reply.status, body, snapshot=snapshot, retry_after_s=reply.retry_after_s)

    async def _pump(self) -> Event:
        assert self._response is not None
        gaps, last = self._outside.metrics.itl_s.of(self._model), time.monotonic()
        try:
            self._blame.waits(last)
            while passed := await self._next_events():
                now = time.monotonic()
                self._blame.heard(now, says=not only_comments(passed))
                gaps.observe(now - last)
                last = now
                await self._response.write(passed)
                self._blame.waits(time.monotonic())
        except UpstreamError as error:
            return StreamFinished() if self._events.done else self._failed(error)
        cut = self._client.path in (CHAT, COMPLETIONS) and not self._events.done
        return DecodeFailed("unfinished") if cut else StreamFinished()

    async def _next_events(self) -> bytes:
        """The next whole events; empty at the stream's end."""
        assert self._reply is not None
        while self._events.error is None and (chunk := await self._reply.chunk()):
            if passed := self._events.feed(chunk):
                return passed
        told = self._events.error
        if told is not None:
            blames = told.code >= 500 and told.code not in UNJUDGED_STATUSES
            raise UpstreamError("error_in_stream", blames=blames)
        return self._events.finish()

    def _failed(self, error: UpstreamError, snapshot: Snapshot | None = None) -> DecodeFailed:
        told = self._events.error
        words, code = (words_of(told.body), told.code) if told else ("", 0)
        return DecodeFailed(str(error), snapshot, words=words, code=code, blames=error.blames)

    def _begun(self, engine: Candidate, body: bytes) -> Call:
        """On its way, if it can be, before it is counted: an engine can work while the router keeps its books."""
        url, headers = engine.info.url.rstrip("/") + self._client.path, self._headers
        if engine.info.data_parallel_rank is not None:  # its server would choose another: the handoff is for this one
            headers = {**headers, RANK_HEADER: str(engine.info.data_parallel_rank)}
        call = self._outside.upstream.call(url, body, headers)
        call.begin()
        return call

    # --- the line ---------------------------------------------------------------------------------------------

    async def _turn(self, place: Place) -> Event:
        why = await place.turn()
        if why is None:
            return msgspec.structs.replace(await self._begins(), behind=frozenset())
        return TurnedAway(why=why, retry_after_s=self._outside.gate.retry_after_s())

    def _leave_line(self, *, went: bool) -> None:
        place, self._place = self._place, None
        if place is not None:
            self._outside.metrics.queued_s.observe(time.monotonic() - place.since)
            self._outside.gate.done(place, went=went)

    # --- the client -------------------------------------------------------------------------------------------

    async def _write(self, events: bytes) -> None:
        if self._response is None:
            headers = {**self._pdx_headers(), "Content-Type": self._content_type, "Cache-Control": "no-cache"}
            self._response = web.StreamResponse(headers=headers)
            await self._response.prepare(self._client)
            self._observe_first_byte()
        await self._response.write(events)

    async def _answer(self, action: Answer) -> None:
        """Here, and not when we have returned it: within the request's deadline, however slowly the client reads."""
        content_type = self._content_type if action.status == 200 else "application/json"
        headers = {**self._pdx_headers(), "Content-Type": content_type}
        if action.retry_after_s:
            headers["Retry-After"] = str(action.retry_after_s)
        self._response = answer = web.Response(status=action.status, body=action.body, headers=headers)
        if action.status == 200:
            self._observe_first_byte()
        await answer.prepare(self._client)
        await answer.write_eof()

    def _note(self, engine: Candidate, error: UpstreamError) -> None:
        if error.unreachable:
            self._outside.directory.on_unreachable(engine.engine_id, time.monotonic())

    def _end_handoff(self, action: EndHandoff) -> None:
        daemons = {d.daemon_id: d for d in (action.pair.prefill.daemon, action.pair.decode.daemon)}
        for daemon in daemons.values():  # one, when both engines share a host
            self._outside.registry.cancel(daemon, handoff_id=action.handoff_id, reason=action.reason)

    def _pdx_headers(self) -> dict[str, str]:
        journey = self._journey
        headers = {**self._shown, "X-Request-Id": self._headers["X-Request-Id"], "x-pdx-handoff": "none"}
        headers["x-pdx-way"] = journey.way
        if journey.by_pair:
            headers["x-pdx-handoff"] = journey.handoff_id.hex()
            headers["x-pdx-prefill"] = journey.prefill.engine_id if journey.prefill else ""
        if journey.decode is not None:
            headers["x-pdx-decode"] = journey.decode.engine_id
        if journey.reason:
            headers["x-pdx-reason"] = journey.reason
        if journey.unseeded:
            headers["x-pdx-unseeded"] = journey.unseeded
        return headers

    def _observe_first_byte(self) -> None:
        self._outside.metrics.ttft_s.of(self._model).observe(time.monotonic() - self._started_at)

    def _count(self) -> None:
        metrics, journey = self._outside.metrics, self._journey
        if self._at_fault:
            self._record.end(FAULT_CODE, time.monotonic())
            return
        code = self._response.status if self._response is not None else CLIENT_GONE_CODE
        self._record.end(code, time.monotonic())
        metrics.requests.labels(model=self._model, code=str(code)).inc()
        if code == 200:  # what is soon refused is not soon answered
            metrics.e2e_s.of(self._model).observe(time.monotonic() - self._started_at)
        if journey.decode is not None:
            metrics.journeys.labels(way=journey.way).inc()
        if journey.reason:
            (metrics.alone if journey.decode is not None else metrics.refused).labels(reason=journey.reason).inc()
        if journey.unseeded:
            metrics.unseeded.labels(reason=journey.unseeded).inc()
        if journey.handoff_id:
            metrics.handoffs.labels(outcome=journey.outcome).inc()
        metrics.repeats.inc(journey.repeats)
        metrics.held_back.inc(journey.held_back)
        if self._outside.request_log is not None:
            self._outside.request_log.add(line_of(self._record.row(), journey.reply))

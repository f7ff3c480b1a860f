"""A simulated router: production journeys, played against simulated engines instead of sockets.

Plays what router.conductor and router.directory do. Its picture of the fleet is as old as the announcements in it.
"""

from __future__ import annotations

import itertools
from collections import Counter as Tally
from collections.abc import Callable, Iterable
from typing import Any

import msgspec

from benchmarks.simulate.engine import SimulatedEngine
from benchmarks.simulate.host import Host
from benchmarks.simulate.work import HTTP_S, Call
from benchmarks.simulate.world import Link, Process, World
from pdx.router.choice.policy import Candidate, Pair
from pdx.router.line.admission import Admission, TurnAway, Wish, Word
from pdx.router.line.retries import RetryBudget
from pdx.router.request.actions import (
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
    StreamFinished,
    TurnedAway,
    Write,
)
from pdx.router.request.journey import Journey
from pdx.router.request.request import Request
from pdx.router.request.seed import Continuation
from pdx.router.request.settings import Settings
from pdx.wire import CancelHandoff, DaemonRef, EngineInfo, HandoffFailed

CONTROL_S = 0.0005
SILENT_S = 0.3  # until a dead daemon is noticed
UNREACHABLE_S = 0.5  # for so long an engine that broke a call is not asked again
QUEUE_SIZE = 4
QUEUE_TIMEOUT_S = 2.0
TICK_S = 0.02


class SimulatedRouter(Process):
    """The directory and all journeys under way. A new life knows no old journey."""

    def __init__(self, world: World, hosts: dict[str, Host], engines: dict[str, SimulatedEngine]) -> None:
        super().__init__(world, "router")
        self.conductors: dict[int, Conductor] = {}
        self.engines = engines
        self._hosts = hosts
        self._known: dict[str, tuple[DaemonRef, list[EngineInfo], bool]] = {}  # host -> daemon, engines, answers
        self._unreachable: dict[str, float] = {}  # engine -> until when
        self._numbers = itertools.count()
        self._turn = 0
        self._links = {name: Link(world, self, self._hear, delay_s=CONTROL_S) for name in hosts}
        for host in hosts.values():
            host.to_router = self._told
        self._empty()

    def _empty(self) -> None:
        self.line = Admission(queue_size=QUEUE_SIZE, queue_timeout_s=QUEUE_TIMEOUT_S)
        self.budget = RetryBudget()
        self._in_line: dict[int, Conductor] = {}
        self._ticks = False

    # --- from daemons -----------------------------------------------------------------------------------------

    def _told(self, host: Host, message: Any) -> None:
        if isinstance(message, HandoffFailed):
            self._links[host.name].send(message)
        elif message is None:
            self.later(SILENT_S, self._daemon_silent, host.name, host.me)
        else:
            self._links[host.name].send((host.name, host.me, message))

    def _hear(self, message: Any) -> None:
        if isinstance(message, HandoffFailed):
            for conductor in list(self.conductors.values()):
                conductor.handoff_failed(message)
            return
        name, daemon, infos = message
        self._known[name] = (daemon, infos, True)

    def _daemon_silent(self, name: str, daemon: DaemonRef) -> None:
        known = self._known.get(name)
        if known is not None and known[0] == daemon:
            self._known[name] = (daemon, known[1], False)

    def snapshot(self) -> tuple[Candidate, ...]:
        now, flight = self.world.now, self._in_flight()
        return tuple(
            Candidate(info=info, daemon=daemon, pairable=answers, in_flight=flight[info.engine_id])
            for daemon, infos, answers in self._known.values()
            for info in infos
            if self._unreachable.get(info.engine_id, 0.0) <= now
        )

    # --- journeys ---------------------------------------------------------------------------------------------

    def serve(self, request: Request, settings: Settings, deadline_s: float, client: Any) -> Conductor:
        self._turn += 1
        self.budget.on_request()
        conductor = Conductor(self, next(self._numbers), Journey(request, settings, self.budget), client)
        self.conductors[conductor.number] = conductor
        self.later(deadline_s, conductor.deadline)
        conductor.on(self.begin(self.line.needs))
        return conductor

    def begin(self, behind: frozenset[str] = frozenset()) -> Begin:
        return Begin(
            snapshot=self.snapshot(),
            behind=behind,
            turn=self._turn,
            handoff_id=self.world.chance.randbytes(16),
            now_unix_s=self.world.now,
        )

    def _in_flight(self) -> Tally[str]:
        return Tally(engine_id for conductor in self.conductors.values() for engine_id in conductor.calls())

    # --- the line ---------------------------------------------------------------------------------------------

    def line_up(self, conductor: Conductor, need: str) -> None:
        if conductor.place is not None:
            self._say(self.line.stays(conductor.place))
            return
        conductor.place, words = self.line.arrive(need, Wish(), self.world.now)
        self._in_line[conductor.place] = conductor
        self.world.counts["requests that had to wait"] += 1
        self._say(words)
        if not self._ticks:
            self._ticks = True
            self.later(TICK_S, self._tick)

    def leave_line(self, conductor: Conductor, *, went: bool) -> None:
        place, conductor.place = conductor.place, None
        if place is not None:
            del self._in_line[place]
            self._say(self.line.went(place, self.world.now) if went else self.line.left(place))

    def _tick(self) -> None:
        self._say([*self.line.expire(self.world.now), *self.line.stir()])
        self.line.check_integrity()
        self._ticks = len(self.line) > 0
        if self._ticks:
            self.later(TICK_S, self._tick)

    def _say(self, words: Iterable[Word]) -> None:
        for word in words:
            self.later(0.0, self._heard, word)

    def _heard(self, word: Word) -> None:
        conductor = self._in_line.get(word.number)
        if conductor is not None and isinstance(word, TurnAway):
            conductor.on(TurnedAway(why=word.why, retry_after_s=1))
        elif conductor is not None:
            conductor.on(self.begin())

    def call(self, engine: Candidate, body: bytes, tell: Callable[[Call, str, Any], None]) -> Call:
        call = Call(self, tell, next(self._numbers))
        there = self.engines[engine.engine_id]
        if there.alive:
            there.later(HTTP_S, there.serve, call, body)
        else:
            call.reply("broke", "refused")
        return call

    def drop(self, engine: Candidate, call: Call) -> None:
        if not call.dropped:
            call.dropped = True
            there = self.engines[engine.engine_id]
            there.later(HTTP_S, there.abort, call)

    def unreachable(self, engine_id: str) -> None:
        self._unreachable[engine_id] = self.world.now + UNREACHABLE_S

    def end_handoff(self, pair: Pair, handoff_id: bytes, reason: str) -> None:
        message = CancelHandoff(handoff_id=handoff_id, attempt=0, reason=reason)
        for daemon in {d.daemon_id: d for d in (pair.prefill.daemon, pair.decode.daemon)}.values():
            host = self._hosts[daemon.control]
            if host.me == daemon:  # each has its own connection, and a dead daemon none
                self.world.later(CONTROL_S, self._deliver, host, daemon, message)

    def _deliver(self, host: Host, daemon: DaemonRef, message: CancelHandoff) -> None:
        if host.me == daemon:
            host.put_in(host.cancel, message)

    # --- lives ------------------------------------------------------------------------------------------------

    def die(self) -> None:
        """All connections break: engines abort, clients are told."""
        super().die()
        self.world.note(self.name, "router dies")
        for conductor in list(self.conductors.values()):
            conductor.hang_up()
            conductor.client.broke()
        self.conductors.clear()

    def restart(self) -> None:
        self.be_born()
        self._known.clear()
        self._unreachable.clear()
        self._empty()
        for host in self._hosts.values():
            host.announce()


class Conductor:
    """Plays one journey."""

    def __init__(self, router: SimulatedRouter, number: int, journey: Journey, client: Any) -> None:
        self.number = number
        self.journey = journey
        self.client = client
        self.place: int | None = None  # in the line
        self._router = router
        self._prefill: tuple[Candidate, Call] | None = None
        self._decode: tuple[Candidate, Call] | None = None
        self._continuation: Continuation | None = None

    # --- events -----------------------------------------------------------------------------------------------

    def on(self, event: Event) -> None:
        before = self.journey.state
        actions = self.journey.on(event)
        self._router.world.note("router", f"{self.number}: {before}, {type(event).__name__}: {self.journey!r}")
        if self.journey.state != "queued":
            self._router.leave_line(self, went=self.journey.state != "ended")
        for action in actions:
            self._perform(action)
        if self.journey.state == "ended":
            self.hang_up()
            self._router.conductors.pop(self.number, None)

    def calls(self) -> list[str]:
        """The engines that this journey has asked and not heard to the end."""
        return [call[0].engine_id for call in (self._prefill, self._decode) if call is not None]

    def deadline(self) -> None:
        if self.journey.state != "ended":
            self.hang_up()
            self.on(DeadlinePassed())

    def client_gone(self) -> None:
        if self.journey.state != "ended":
            self.hang_up()
            self.on(ClientGone())

    def handoff_failed(self, message: HandoffFailed) -> None:
        if self._prefill is not None and message.handoff_id == self.journey.handoff_id:
            self._drop_prefill()
            self.on(HandoffBroke(message.reason))

    def _prefill_said(self, call: Call, kind: str, body: Any) -> None:
        if self._prefill is None or self._prefill[1] is not call:
            return
        engine, self._prefill = self._prefill[0], None
        if kind == "answer":
            self.on(PrefillAnswered(200, body))
        else:
            self._router.unreachable(engine.engine_id)
            self.on(PrefillFailed("broke"))

    def _prefill_timeout(self, call: Call) -> None:
        if self._prefill is not None and self._prefill[1] is call:
            self._drop_prefill()
            self.on(PrefillFailed("timeout"))

    def _decode_said(self, call: Call, kind: str, body: Any) -> None:
        if self._decode is None or self._decode[1] is not call:
            return
        engine = self._decode[0]
        if kind == "broke":
            self._decode = None
            self._router.unreachable(engine.engine_id)
            self.on(DecodeFailed("broke", self._router.snapshot()))
        elif kind == "answer":
            self._decode = None
            self.on(DecodeAnswered(200, body))
        else:
            self._streamed(kind, self._continuation.events(body) if self._continuation else body)

    def _streamed(self, kind: str, body: bytes) -> None:
        if kind == "stream":
            self.on(DecodeAnswered(200, body, streaming=True))
            return
        self._decode = None
        self.client.write(body)
        self.on(StreamFinished())

    # --- actions ----------------------------------------------------------------------------------------------

    def _perform(self, action: Action) -> None:
        match action:
            case LineUp():
                self._router.line_up(self, action.need)
            case CallPrefill():
                call = self._router.call(action.engine, action.body, self._prefill_said)
                self._prefill = (action.engine, call)
                self._router.later(action.timeout_s, self._prefill_timeout, call)
            case CallDecode():
                self._drop_decode()
                self._continuation = Continuation(action.seed) if action.seed else None
                self._decode = (action.engine, self._router.call(action.engine, action.body, self._decode_said))
            case DropPrefill():
                self._drop_prefill()
            case EndHandoff():
                self._router.end_handoff(action.pair, action.handoff_id, action.reason)
            case Write() | PassOn():
                self.client.write(action.body)
            case Answer():
                self.client.answered(action.status, action.body)
            case CloseStream():
                self.client.write(action.body)
                self.client.closed()

    def hang_up(self) -> None:
        self._drop_prefill()
        self._drop_decode()

    def _drop_prefill(self) -> None:
        if self._prefill is not None:
            self._router.drop(*self._prefill)
            self._prefill = None

    def _drop_decode(self) -> None:
        if self._decode is not None:
            self._router.drop(*self._decode)
            self._decode = None


def request_of(tokens: tuple[int, ...], *, model: str, wanted: int, stream: bool, extra: dict[str, Any]) -> Request:
    body = {"model": model, "prompt": list(tokens), "max_tokens": wanted, "stream": stream, **extra}
    return Request(path="/v1/completions", model=model, body=body, raw=msgspec.json.encode(body))

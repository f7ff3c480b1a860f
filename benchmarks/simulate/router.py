"""A simulated router: production journeys, played against simulated engines instead of sockets.

Plays what router.conductor and router.directory do. Its picture of the fleet is as old as the announcements in it.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import msgspec

from benchmarks.simulate.engine import SimulatedEngine
from benchmarks.simulate.host import Host
from benchmarks.simulate.work import HTTP_S, Call
from benchmarks.simulate.world import Link, Process, World
from pdx.router.actions import (
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
    PassOn,
    PrefillAnswered,
    PrefillFailed,
    StreamFinished,
    Write,
)
from pdx.router.journey import Journey, Request, Settings
from pdx.router.policy import Candidate, Pair
from pdx.router.seed import Continuation
from pdx.wire import CancelHandoff, DaemonRef, EngineInfo, HandoffFailed

CONTROL_S = 0.0005
SILENT_S = 0.3  # until a dead daemon is noticed
UNREACHABLE_S = 0.5  # for so long an engine that broke a call is not asked again


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
        now = self.world.now
        return tuple(
            Candidate(info=info, daemon=daemon, pairable=answers)
            for daemon, infos, answers in self._known.values()
            for info in infos
            if self._unreachable.get(info.engine_id, 0.0) <= now
        )

    # --- journeys ---------------------------------------------------------------------------------------------

    def serve(self, request: Request, settings: Settings, deadline_s: float, client: Any) -> Conductor:
        self._turn += 1
        conductor = Conductor(self, next(self._numbers), Journey(request, settings), client)
        self.conductors[conductor.number] = conductor
        begin = Begin(
            snapshot=self.snapshot(),
            turn=self._turn,
            handoff_id=self.world.chance.randbytes(16),
            now_unix_s=self.world.now,
        )
        self.later(deadline_s, conductor.deadline)
        conductor.on(begin)
        return conductor

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
        for host in self._hosts.values():
            host.announce()


class Conductor:
    """Plays one journey."""

    def __init__(self, router: SimulatedRouter, number: int, journey: Journey, client: Any) -> None:
        self.number = number
        self.journey = journey
        self.client = client
        self._router = router
        self._prefill: tuple[Candidate, Call] | None = None
        self._decode: tuple[Candidate, Call] | None = None
        self._continuation: Continuation | None = None

    # --- events -----------------------------------------------------------------------------------------------

    def on(self, event: Event) -> None:
        before = self.journey.state
        actions = self.journey.on(event)
        self._router.world.note("router", f"{self.number}: {before}, {type(event).__name__}: {self.journey!r}")
        for action in actions:
            self._perform(action)
        if self.journey.state == "ended":
            self.hang_up()
            self._router.conductors.pop(self.number, None)

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
            self.on(DecodeFailed("broke"))
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

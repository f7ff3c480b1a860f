"""A simulated host: the production handoffs, store and sessions of one pdxd, without sockets.

Plays what daemon.service does: takes what has arrived, in its order, then lets the handoffs look at the clock. Checks
every access that anybody makes to the arena: the slot must be the one that was meant, and somebody must hold it.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, Literal, cast

from benchmarks.simulate.lane import SCHEMES, Network, SimulatedLane
from benchmarks.simulate.prompts import PAGES
from benchmarks.simulate.world import Link, Process, Violation, World
from pdx.buffer.headers import Headers
from pdx.buffer.slots import Slot, SlotState
from pdx.daemon.lanes import Lanes
from pdx.daemon.ports import Ports
from pdx.daemon.sessions import Session
from pdx.daemon.trace import Tracer
from pdx.handoff.handle import HANDOFF_ID_BYTES
from pdx.layout import CONTROL_BYTES, Place
from pdx.wire import (
    ENGINE,
    PEER,
    TO_ENGINE,
    Attach,
    CancelHandoff,
    DaemonRef,
    Filled,
    Finished,
    Keep,
    LaneOffer,
    LetGo,
    LoadOpened,
    Message,
    OpenLoad,
    OpenSend,
    Renew,
    SendEnded,
    decoder_of,
)

if TYPE_CHECKING:
    from benchmarks.simulate.breaks import Parts
    from benchmarks.simulate.lives import Engine

KEY = b"k" * 32
EXTENT_BYTES = 64 << 10  # 14 blocks
LEASES_S = (0.4, 2.0)  # short ones run out at many a stop
TICK_S, FENCE_TICK_S = 0.1, 0.002  # as the service has them
LOOP_S = 0.0002  # from the first message to the turn of the loop that takes it, and others with it
PEER_S, IPC_S = 0.0006, 0.0002  # how long messages travel

decode_engine, decode_to_engine, decode_peer = decoder_of(ENGINE), decoder_of(TO_ENGINE), decoder_of(PEER)


class SilentTracer(Tracer):
    """Keeps nothing: a million handoffs have no timelines."""

    def note(self, handoff_id: bytes, what: str, at_ns: int, **details: Any) -> None:
        pass


class SimulatedArena(Headers):
    """Memory with headers. Knows who may touch which block, and objects when it gets a new life all the same."""

    def __init__(self, extents: int) -> None:
        self.memory_bytes = CONTROL_BYTES + extents * EXTENT_BYTES
        super().__init__(memoryview(bytearray(self.memory_bytes)))
        self.touchers: Counter[tuple[int, int]] = Counter()  # (header offset, generation) -> engines that may touch it
        self.trusting = False  # broken variants that are to be caught by what they serve, not by what they touch

    def may_touch(self, places: Iterable[Place | None]) -> None:
        for place in places:
            if place is not None:
                self.touchers[place.header_offset, place.generation] += 1

    def touches_no_more(self, places: Iterable[Place | None]) -> None:
        for place in places:
            if place is not None:
                key = place.header_offset, place.generation
                self.touchers[key] -= 1
                if not self.touchers[key]:
                    del self.touchers[key]

    def reset(self, header_offset: int, pages: Any, generation: int) -> None:
        old = self.generation(header_offset)
        if not self.trusting and (header_offset, old) in self.touchers:
            raise Violation("unsafe", f"block at {header_offset:#x} is used again while an engine may touch it")
        super().reset(header_offset, pages, generation)


class Host(Process):
    """One host's daemon over all its lives, and the ways to it."""

    def __init__(self, world: World, network: Network, parts: Parts, name: str, *, extents: int) -> None:
        super().__init__(world, name)
        self.peers: dict[str, Host] = {}
        self.to_peers: dict[str, Link] = {}
        self.to_router: Callable[[Host, Any], None] = lambda host, message: None
        self.totals: Counter[str] = Counter()  # of the daemon's counters, over its lives
        self._network = network
        self._parts = parts
        self._extents = extents
        self._lease_s = world.chance.choice(LEASES_S)
        self._incarnation = 0
        self._start()

    # --- lives ------------------------------------------------------------------------------------------------

    def _start(self) -> None:
        """A new incarnation over a new arena. Engines of the old one keep the old memory until they notice."""
        world = self.world
        self._incarnation += 1
        daemon_id = f"{self.name}{self._incarnation}"
        self.counters: Counter[str] = Counter()
        self.arena = SimulatedArena(self._extents)
        self.arena.trusting = self._parts.trusting
        self.store = self._parts.store(cast(Any, self.arena), extent_bytes=EXTENT_BYTES, handoff_share=0.9, poison=True)
        self.lanes = [
            SimulatedLane(
                self, self._network, daemon_id, scheme=scheme, touch=self.touched, ring=self._ring,
                region=self._parts.region,
            )
            for scheme in SCHEMES
        ]  # fmt: skip
        self.me = DaemonRef(
            daemon_id=daemon_id,
            incarnation=self._incarnation,
            control=self.name,
            lanes=[LaneOffer(endpoint=lane.endpoint) for lane in self.lanes],
        )
        self.sessions = self._parts.sessions(self._incarnation)
        self._engines: dict[int, Engine] = {}  # by session number
        self._inbox: deque[tuple[Callable[..., None], tuple[Any, ...]]] = deque()
        self._to_self: list[Message] = []
        self._ringing = self._fence_awaited = False
        self.handoffs = self._parts.handoffs(self.store, self._ports())
        world.note(self.name, f"daemon {daemon_id} starts")
        self.later(TICK_S, self._tick)

    def crash(self) -> None:
        self.totals.update(self.counters)
        self.world.note(self.name, "daemon dies")
        self.die()
        for lane in self.lanes:
            lane.abort()
        for link in self.to_peers.values():
            link.lose()
        for peer in self.peers.values():
            peer.to_peers[self.name].lose()
            peer.put_in(peer._peer_lost, self.name)
        for engine in list(self._engines.values()):
            engine.daemon_died(self)
        self.to_router(self, None)

    def restart(self) -> None:
        self.be_born()
        self._start()

    def meet(self, other: Host) -> None:
        self.peers[other.name] = other
        self.to_peers[other.name] = Link(
            self.world, other, other._hear_peer, delay_s=PEER_S, decode=decode_peer, lossy=True
        )

    def break_link(self, name: str) -> None:
        """Our connection to a peer's control socket breaks: what is under way is lost, and we are told."""
        self.to_peers[name].lose()
        self.put_in(self._peer_lost, name)

    # --- sessions ---------------------------------------------------------------------------------------------

    def attach(self, hello: Attach, engine: Engine) -> Session:
        """Raises Refused."""
        session = self.sessions.attach(hello, cast(Any, None))
        self._engines[session.number] = engine
        if session.kind == "worker":
            self.arena.set_fence(session.fence_offset, 0)
        self.announce()
        return session

    def ended(self, session: Session) -> None:
        """The end of a session's socket."""
        self._engines.pop(session.number, None)
        engine = self.sessions.detach(session)
        if engine is None:
            return
        if not engine.workers:
            self.handoffs.engine_gone(session.engine_id, self.world.now)
        else:
            self.handoffs.engine_failing(session.engine_id, self.world.now)
        self.announce()

    def from_client(self, session: Session, message: Message) -> None:
        """As Service._from_client."""
        if self.sessions.by_identity.get(session.identity) is not session:
            return
        handoffs, now = self.handoffs, self.world.now
        engine = self.sessions.engines.get(session.engine_id)
        match message:
            case Filled():
                handoffs.filled(session.engine_id, message, now)
            case LetGo():
                handoffs.let_go(session.engine_id, message, now, rank=session.rank)
            case Renew() if engine is not None and engine.scheduler is session:
                handoffs.renew(session.engine_id, message.handoff_ids, now)
            case OpenSend() if engine is not None and engine.complete:
                handoffs.open_send(engine, message, now)
            case OpenLoad() if engine is not None and engine.complete:
                handoffs.open_load(engine, message, now)
            case Keep() if engine is not None and engine.complete:
                handoffs.keep(engine, message, now)
            case Finished():
                handoffs.finished(session.engine_id, message)
            case OpenSend() | Keep():
                ended = SendEnded(request_id=message.request_id, handoff_id=b"", reason="not attached")
                self._to_engine(session.engine_id, ended)
            case OpenLoad():
                absent = LoadOpened(request_id=message.request_id, handoff_id=b"", status="absent")
                self._to_engine(session.engine_id, absent)

    # --- the loop ---------------------------------------------------------------------------------------------

    def put_in(self, act: Callable[..., None], *details: Any) -> None:
        """Something has arrived. The loop takes it at its next turn."""
        if self.alive:
            self._inbox.append((act, details))
            self._ring()

    def cancel(self, message: CancelHandoff) -> None:
        self.handoffs.cancel(message.handoff_id, message.attempt, message.reason, self.world.now)

    def _ring(self) -> None:
        if not self._ringing:
            self._ringing = True
            self.later(LOOP_S, self._loop)

    def _tick(self) -> None:
        if not self._ringing:
            self._loop()
        self.later(TICK_S, self._tick)

    def _loop(self) -> None:
        now = self.world.now
        self._ringing = False
        looped, self._to_self = self._to_self, []
        for message in looped:
            self.handoffs.peer_message(cast(Any, message), now)
        for lane in self.lanes:
            self.handoffs.lane_events(lane.scheme, lane.take_events(), now)
        while self._inbox:
            act, details = self._inbox.popleft()
            act(*details)
        self.handoffs.tick(now)
        if self._to_self:
            self._ring()
        if self.handoffs.fences_pending and not self._fence_awaited:
            self._fence_awaited = True
            self.later(FENCE_TICK_S, self._look_at_fences)

    def _look_at_fences(self) -> None:
        self._fence_awaited = False
        self._ring()

    def _hear_peer(self, message: Message) -> None:
        self.put_in(self._take_peer, message)

    def _take_peer(self, message: Message) -> None:
        self.handoffs.peer_message(cast(Any, message), self.world.now)

    def _peer_lost(self, name: str) -> None:
        self.handoffs.peer_lost(name, self.world.now)

    def announce(self) -> None:
        self.to_router(self, [engine.info for engine in self.sessions.engines.values() if engine.complete])

    # --- the ports of its handoffs ------------------------------------------------------------------------------------

    def _ports(self) -> Ports:
        world = self.world
        return Ports(
            me=self.me,
            cluster_key=KEY,
            to_engine=self._to_engine,
            to_peer=self._to_peer,
            to_routers=lambda message: self.to_router(self, message),
            engine=self.sessions.engines.get,
            fence_passed=self._parts.fence_passed(self._fence_passed),
            lanes=Lanes(
                [(lane, lane.register(self.arena.memory)) for lane in self.lanes],
                me=self.me.daemon_id,
                counters=self.counters,
                transport=SCHEMES[0],
            ),
            tracer=SilentTracer(),
            counters=self.counters,
            lease_s=self._lease_s,
            digest_mode=False,
            new_id=lambda: world.chance.randbytes(HANDOFF_ID_BYTES),
            wall_clock=lambda: world.now,
            trace_clock_ns=lambda: 0,
        )

    def _to_engine(self, engine_id: str, message: Message) -> None:
        engine = self.sessions.engines.get(engine_id)
        if engine is not None and engine.scheduler is not None:
            self.world.note(self.name, f"to {engine_id}: {type(message).__name__}")
            self._engines[engine.scheduler.number].from_daemon.send(message)

    def _to_peer(self, peer: DaemonRef, message: Message) -> None:
        self.world.note(self.name, f"to {peer.daemon_id}: {type(message).__name__}")
        if peer.daemon_id == self.me.daemon_id:
            self._to_self.append(message)
        else:
            self.to_peers[peer.control].send(message)

    def _fence_passed(self, engine_id: str, step: int) -> bool:
        engine = self.sessions.engines.get(engine_id)
        workers = engine.workers.values() if engine is not None else ()  # those that have left touch nothing
        return all(self.arena.fence(worker.fence_offset) >= step for worker in workers)

    # --- checks -----------------------------------------------------------------------------------------------

    def slot_at(self, offset: int) -> Slot | None:
        """The slot that covers this byte."""
        unit_bytes = PAGES.unit_bytes
        first = offset - (offset - CONTROL_BYTES) % unit_bytes
        for back in range(PAGES.chunk_blocks):
            slot = self.store.slots.get(first - back * unit_bytes)
            if slot is not None:
                return slot if slot.blocks > back else None
        return None

    def touched(self, offset: int, length: int, how: Literal["read", "write"]) -> None:
        """A put reads or writes here."""
        slot = self.slot_at(offset)
        if self.arena.trusting:
            return
        if slot is None or not slot.holds:
            raise Violation("unsafe", f"a put's {how} at {offset:#x} of {self.name} meets {slot or 'a free slot'}")
        if how == "write" and slot.state is SlotState.READY:
            raise Violation("unsafe", f"a put writes into {slot}, which is whole already")

    def engine_touches(self, place: Place, how: Literal["read", "write"], arena: SimulatedArena) -> None:
        """An engine reads or writes this block. In the arena of a dead daemon it may do what it likes."""
        if arena is not self.arena or arena.trusting:
            return
        slot = self.store.slots.get(place.slot_offset)
        if slot is None or slot.generation != place.generation or not slot.holds:
            raise Violation("unsafe", f"an engine's {how} of {place} meets {slot or 'a free slot'}")
        if how == "write" and slot.state is SlotState.READY:
            raise Violation("unsafe", f"an engine writes into {slot}, which is whole already")

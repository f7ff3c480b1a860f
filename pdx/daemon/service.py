"""The control thread of pdxd: one loop over all sockets, which owns every piece of state.

It only receives, decodes and dispatches. What a message means is the business of `handoffs`, `sessions` (who is
attached) or `verbs` (questions).
"""

from __future__ import annotations

import logging
import secrets
import socket
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import zmq

from pdx.buffer.store import Store
from pdx.buffer.water import Waterline
from pdx.config import KINDS_NAME, Config
from pdx.curve import AllowList
from pdx.daemon.announcer import Announcer
from pdx.daemon.door import Door
from pdx.daemon.flush import flush
from pdx.daemon.handoffs import Handoffs
from pdx.daemon.holdings import HoldingsTeller
from pdx.daemon.lanes import Lanes
from pdx.daemon.lanewatch import LaneWatch
from pdx.daemon.listening import BURST, listening, new_context
from pdx.daemon.name import daemon_name
from pdx.daemon.peers import Peers
from pdx.daemon.ports import Ports
from pdx.daemon.sessions import Engine, Session, Sessions
from pdx.daemon.trace import Tracer
from pdx.daemon.verbs import answer
from pdx.errors import Refused, WireError
from pdx.tiers.spill import WriteMode
from pdx.tiers.tier import Tier
from pdx.transport.api import Lane
from pdx.transport.registry import offer_of
from pdx.wire import (
    ENGINE,
    PEER,
    Ask,
    Attached,
    AttachRefused,
    DaemonRef,
    Filled,
    Finished,
    Keep,
    LetGo,
    LoadOpened,
    LookUp,
    Message,
    OpenLoad,
    OpenSend,
    Renew,
    Reset,
    SendEnded,
    WeightEpoch,
    decoder_of,
    encode,
)

TICK_S = 0.1
FENCE_TICK_S = 0.002  # while an engine's fence is awaited
HALF_ATTACHED = "not all workers of the engine are attached here"
HELLOS_MAX = 64  # connections that have not spoken yet; each holds a descriptor
HELLO_S = 10.0  # for so long such a one may be an engine's, for which the daemon stays
IPC_NAME = "pdxd.ipc"

log = logging.getLogger("pdxd")

_decode_engine = decoder_of(ENGINE)
_decode_peer = decoder_of(PEER)


class Service:
    """Everything of a running daemon, wired. `run` returns when told to stop or when nobody needs it any more."""

    def __init__(
        self,
        config: Config,
        store: Store,
        lanes: Sequence[Lane],
        *,
        why_no_better: Sequence[str] = (),
        run_dir: Path,
        key: bytes,
        tier: Tier | None = None,
    ) -> None:
        """`lanes`: best first; `why_no_better`: what this host lacks for better ones."""
        self._config = config
        self._store = store
        self._lanes = lanes
        self._poller = zmq.Poller()
        self._watch = LaneWatch(lanes, self._poller)
        self._tier = tier
        self._context = new_context()
        self._counters: Counter[str] = Counter()
        self._tracer = Tracer()
        self._hellos: dict[int, socket.socket] = {}  # connections that have not said hello yet
        self._connections: dict[int, Session] = {}
        self._to_self: list[Message] = []
        self._ipc = f"ipc://{run_dir / IPC_NAME}"
        self._door = Door(run_dir)
        self._clients = listening(self._context, self._ipc)
        self._allow = AllowList(self._context, key)
        self._peer_socket = listening(self._context, config.control_endpoint, cluster_key=key)
        self.me = DaemonRef(
            daemon_id=daemon_name(run_dir),
            incarnation=secrets.randbits(63),
            control=self._peer_socket.getsockopt_string(zmq.LAST_ENDPOINT),
            lanes=[offer_of(lane) for lane in lanes],
        )
        self._sessions = Sessions(self.me.incarnation)
        self._peers = Peers(self._context, self._poller, self._counters, cluster_key=key)
        self._announcer = Announcer(
            self._context, self._poller, self.me, self._counters, cluster_key=key,
            holdings=HoldingsTeller(self.me, store.index, tier),
        )  # fmt: skip
        for bound in (self._clients, self._peer_socket, self._allow.socket):
            self._poller.register(bound, zmq.POLLIN)
        if tier is not None:
            self._poller.register(tier.fileno(), zmq.POLLIN)
        self._poller.register(self._door.listener, zmq.POLLIN)
        self._handoffs = Handoffs(store, self._ports(key, why_no_better))
        self._alone_since = self._knocked_at = time.monotonic()
        self._stops = 0
        self._has_left = False

    def stop(self) -> None:
        """Ends `run` soon, and `flush` if it is called then. Safe from a signal handler."""
        self._stops += 1

    def run(self) -> str:
        """Returns why it has ended."""
        while not self._stops:
            pending = self._handoffs.fences_pending or self._handoffs.has_more or self._to_self
            self._step(0.0 if self._to_self else FENCE_TICK_S if pending else TICK_S)
            if self._lingered_out():
                return f"no engine for {self._config.linger_s:g} s"
        return "told to stop"

    def leave(self) -> None:
        """Says goodbye to routers and engines, which serve without this daemon from now on. Idempotent."""
        if self._has_left:
            return
        self._has_left = True
        self._announcer.close()
        self._peers.close()
        self._door.close()
        for connection in [*self._hellos.values(), *(s.connection for s in self._sessions.by_identity.values())]:
            connection.close()

    def flush(self) -> None:
        """After `leave`: writes what only the arena has, for `disk_flush_s` at most or until `stop` is called again."""
        stops = self._stops
        if self._tier is not None and self._config.disk_flush_s:
            left = flush(
                lambda: self._handoffs.flush_step(time.monotonic()), self._tier.fileno(),
                deadline_s=self._config.disk_flush_s, hurried=lambda: self._stops > stops,
            )  # fmt: skip
            if left:
                log.warning("%d blocks of the arena were not written in %g s", left, self._config.disk_flush_s)

    def close(self) -> None:
        """Leaves, and closes every socket. The caller closes lanes and arena."""
        self.leave()
        for bound in (self._clients, self._peer_socket, self._allow.socket):
            bound.close(0)
        self._context.term()
        Path(self._ipc.removeprefix("ipc://")).unlink(missing_ok=True)

    # --- the loop ---------------------------------------------------------------------------------------------

    def _step(self, timeout_s: float) -> None:
        timeout_s = self._watch.begin(self._handoffs, timeout_s)
        ready = dict(self._poller.poll(round(timeout_s * 1000)))
        now = time.monotonic()
        looped, self._to_self = self._to_self, []
        for message in looped:
            self._handoffs.peer_message(message, now)  # type: ignore[arg-type]
        for scheme, events in self._watch.take(ready):
            self._handoffs.lane_events(scheme, events, now)
        if self._clients in ready:
            self._take_clients(now)
        if self._allow.socket in ready:
            self._allow.answer()
        if self._peer_socket in ready:
            self._take_peers(now)
        self._peers.handle_ready(ready, lambda control: self._handoffs.peer_lost(control, now))
        self._peers.tick(lambda control: self._handoffs.peer_lost(control, now), now)
        self._announcer.handle_ready(
            ready,
            cancel=lambda gone: self._handoffs.cancel(gone.handoff_id, gone.attempt, gone.reason, now),
            share=lambda wish: self._handoffs.share(wish, now),
            answer=lambda message: answer(message, service=self),
        )
        # Ends first, then hellos, then new connections: each step may reuse a descriptor that the one before closed.
        for descriptor in [d for d in ready if d in self._connections]:
            self._take_connection(descriptor, now)
        for descriptor in [d for d in ready if d in self._hellos]:
            self._hello(self._hellos.pop(descriptor))
        if self._door.listener.fileno() in ready:
            self._welcome()
        self._handoffs.tick(now)
        self._announcer.tick(
            self._sessions.engines.values(), reservations_waiting=self._handoffs.reservations_waiting,
            links=self._handoffs.link_rates, now=now,
        )  # fmt: skip

    def _take_clients(self, now: float) -> None:
        for _ in range(BURST):
            try:
                identity, frame = self._clients.recv_multipart(zmq.DONTWAIT)
                message = _decode_engine(frame)
            except zmq.Again:
                return
            except (WireError, ValueError):
                self._counters["bad_frames"] += 1
                continue
            session = self._sessions.by_identity.get(identity)
            if session is None:
                self._counters["frames_of_strangers"] += 1
                continue
            self._from_client(session, message, now)

    def _take_connection(self, descriptor: int, now: float) -> None:
        """What a worker says, up to its end."""
        session = self._connections[descriptor]
        for _ in range(BURST):
            try:
                frame = Door.read(session.connection)
                if not frame:
                    self._ended(self._connections.pop(descriptor), now)
                    return
                message = _decode_engine(frame)
            except BlockingIOError:
                return
            except WireError:
                self._counters["bad_frames"] += 1
                continue
            self._from_client(session, message, now)

    def _from_client(self, session: Session, message: ENGINE, now: float) -> None:
        engine = self._sessions.engines.get(session.engine_id)
        match message:
            case Ask():
                reply = answer(message, service=self)
                self._clients.send_multipart([session.identity, encode(reply)], zmq.DONTWAIT)
            case Filled():
                self._handoffs.filled(session.engine_id, message, now)
            case LetGo():
                self._handoffs.let_go(session.engine_id, message, now, rank=session.rank)
            case Renew() if engine is not None and engine.scheduler is session:
                engine.running, engine.waiting = message.running, message.waiting
                engine.tokens_per_s = message.tokens_per_s or engine.tokens_per_s
                self._handoffs.renew(session.engine_id, message.handoff_ids, now)
            case WeightEpoch() if engine is not None and engine.scheduler is session:
                self._meet_again()  # before a new kind takes the place of one that is here
                self._handoffs.weights_changed(engine, message.epoch, now)
                self._announcer.changed()
            case Reset() if engine is not None and engine.scheduler is session:
                self._handoffs.reset(engine, message.epoch, now)
            case OpenSend() if engine is not None and engine.complete:
                self._handoffs.open_send(engine, message, now)
            case OpenLoad() if engine is not None and engine.complete:
                self._handoffs.open_load(engine, message, now)
            case LookUp() if engine is not None and engine.complete:
                self._handoffs.look_up(engine, message, now)
            case Keep() if engine is not None and engine.complete:
                self._handoffs.keep(engine, message, now)
            case Finished():
                self._handoffs.finished(session.engine_id, message)
            case OpenSend() | Keep() if engine is not None:
                self._counters["messages_before_attach"] += 1
                ended = SendEnded(request_id=message.request_id, handoff_id=b"", reason=HALF_ATTACHED)
                self._to_engine(session.engine_id, ended)
            case OpenLoad() | LookUp() if engine is not None:
                self._counters["messages_before_attach"] += 1
                absent = LoadOpened(
                    request_id=message.request_id, handoff_id=b"", status="absent", reason=HALF_ATTACHED
                )
                self._to_engine(session.engine_id, absent)
            case _:
                self._counters["messages_of_tools"] += 1

    def _take_peers(self, now: float) -> None:
        for _ in range(BURST):
            try:
                frames = self._peer_socket.recv_multipart(zmq.DONTWAIT)
                self._handoffs.peer_message(_decode_peer(frames[-1]), now)
            except zmq.Again:
                return
            except WireError:
                self._counters["bad_frames"] += 1

    # --- attaching --------------------------------------------------------------------------------------------

    def _welcome(self) -> None:
        connection = self._door.accept()
        if connection is not None:
            if not self._hellos:
                self._knocked_at = time.monotonic()
            if len(self._hellos) >= HELLOS_MAX:
                silent = self._hellos.pop(next(iter(self._hellos)))
                self._turn_away(silent, "too many clients attach at once")
            self._hellos[connection.fileno()] = connection
            self._poller.register(connection.fileno(), zmq.POLLIN)

    def _hello(self, connection: socket.socket) -> None:
        try:
            hello = Door.read_hello(connection)
            if hello is None:
                raise WireError("left without a word")
            session = self._sessions.attach(hello, connection)
        except BlockingIOError:
            self._hellos[connection.fileno()] = connection
            return
        except Refused as error:
            self._turn_away(connection, str(error))
            return
        except WireError as error:
            self._counters["bad_frames"] += 1
            self._turn_away(connection, str(error))
            return
        attached = Attached(
            daemon=self.me,
            session=session.number,
            socket=self._ipc,
            arena_bytes=len(self._store.arena.memory),
            fence_offset=session.fence_offset,
            digest_mode=self._config.digest_mode,
            lease_s=self._config.lease_s,
        )
        if session.kind == "worker":
            self._store.arena.set_fence(session.fence_offset, 0)
        self._meet_again()
        self._connections[connection.fileno()] = session
        try:
            Door.answer(connection, attached, self._store.arena.fd if session.kind == "worker" else None)
        except WireError:
            self._counters["bad_frames"] += 1  # its EOF comes next
        self._announcer.changed()

    def _meet_again(self) -> None:
        """Kinds of blocks whose engines are here are not forgotten before others."""
        for engine in self._sessions.engines.values():
            if engine.complete:  # its weights' epoch is its scheduler's to tell, its layout its workers'
                self._handoffs.spaces.met(engine)

    def _turn_away(self, connection: socket.socket, reason: str) -> None:
        self._poller.unregister(connection.fileno())
        try:
            Door.answer(connection, AttachRefused(reason=reason))
        except WireError:
            self._counters["bad_frames"] += 1
        connection.close()

    def _ended(self, session: Session, now: float) -> None:
        self._poller.unregister(session.connection.fileno())
        session.connection.close()
        engine = self._sessions.detach(session)
        if engine is not None:
            if not engine.workers:
                self._handoffs.engine_gone(session.engine_id, now)
            else:
                self._handoffs.engine_failing(session.engine_id, now)
            self._announcer.changed()
            if not self._sessions.engines:
                self._alone_since = now

    def _lingered_out(self) -> bool:
        """Whether no engine is here, or is about to be, for so long. Tools come for those, and wait for none."""
        now = time.monotonic()
        if self._sessions.engines or (self._hellos and now - self._knocked_at < HELLO_S):
            return False
        return now - self._alone_since > self._config.linger_s

    # --- the handoffs' ports -------------------------------------------------------------------------------------

    def _ports(self, key: bytes, why_no_better: Sequence[str]) -> Ports:
        return Ports(
            me=self.me,
            cluster_key=key,
            to_engine=self._to_engine,
            to_peer=self._to_peer,
            to_routers=self._announcer.tell,
            engine=self._sessions.engines.get,
            fence_passed=self._fence_passed,
            lanes=Lanes(
                [(lane, lane.register(self._store.arena.memory)) for lane in self._lanes],
                me=self.me.daemon_id,
                counters=self._counters,
                transport=self._config.transport,
                require_rdma=self._config.require_rdma,
                absent=why_no_better,
            ),
            tracer=self._tracer, counters=self._counters,
            lease_s=self._config.lease_s, digest_mode=self._config.digest_mode,
            tier=self._tier, write_mode=WriteMode(self._config.disk_write),
            kinds_file=None if self._tier is None else self._config.run_path / KINDS_NAME,
            waterline=Waterline(low=self._config.low_water_share, high=self._config.high_water),
            pin_share=self._config.pin_share, return_answers=self._config.return_answers,
        )  # fmt: skip

    def _to_engine(self, engine_id: str, message: Message) -> None:
        engine: Engine | None = self._sessions.engines.get(engine_id)
        if engine is None or engine.scheduler is None:
            return
        try:
            self._clients.send_multipart([engine.scheduler.identity, encode(message)], zmq.DONTWAIT)
        except zmq.Again:
            self._counters["engine_messages_dropped"] += 1

    def _to_peer(self, peer: DaemonRef, message: Message) -> None:
        if peer.daemon_id == self.me.daemon_id:
            self._to_self.append(message)
        else:
            self._peers.send(peer, message)

    def _fence_passed(self, engine_id: str, step: int) -> bool:
        engine = self._sessions.engines.get(engine_id)
        workers = engine.workers.values() if engine is not None else ()  # those that have left touch nothing
        return all(self._store.arena.fence(worker.fence_offset) >= step for worker in workers)

    # --- for the verbs ----------------------------------------------------------------------------------------

    @property
    def counters(self) -> Counter[str]:
        return self._counters

    @property
    def store(self) -> Store:
        return self._store

    @property
    def handoffs(self) -> Handoffs:
        return self._handoffs

    @property
    def sessions(self) -> Sessions:
        return self._sessions

    @property
    def tracer(self) -> Tracer:
        return self._tracer

"""All handoffs of a daemon: takes events from engines, peers, lanes, router and clock to the right half.

Owned by the control thread. It decides nothing about a handoff's course; that is the machines' job in pdx.handoff.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any

from msgspec import to_builtins

from pdx.buffer.lease import Lease
from pdx.buffer.selection import Selection
from pdx.buffer.store import Store
from pdx.daemon.chains import Chains
from pdx.daemon.costs import Costs
from pdx.daemon.grips import Grip, Grips
from pdx.daemon.lowwater import LowWater
from pdx.daemon.pins import Pins
from pdx.daemon.ports import ROUTER_SAYS, Desk, Ports
from pdx.daemon.prefixes import Prefixes
from pdx.daemon.questions import Questions
from pdx.daemon.receiving import Incoming, ReceivingHalves
from pdx.daemon.returning import Returns
from pdx.daemon.sending import Outgoing, SendingHalves
from pdx.daemon.sessions import Engine
from pdx.daemon.sharing import Sharing
from pdx.daemon.spaces import KnownSpaces
from pdx.daemon.steering import Steering
from pdx.daemon.tiering import Tiering
from pdx.errors import TransportError
from pdx.handoff import actions as do
from pdx.keys import space_of
from pdx.transport.api import Arrived, Event, LaneFailed, PeerLost, PutDone, PutFailed, WindowClosed
from pdx.verbs import Result, Steer
from pdx.wire import (
    ONE_REQUEST,
    Cancel,
    Committed,
    Filled,
    Finished,
    Grant,
    Keep,
    LetGo,
    LinkRate,
    LoadEnded,
    LookUp,
    OpenLoad,
    OpenSend,
    PeerMessage,
    Refuse,
    Reserve,
    SendEnded,
    Share,
    Wait,
)

LOOK_S = 0.05  # between two looks at everybody's budget and lease: far less than any of them


class Handoffs:
    """The front of both halves, and the queue of those who wait for room."""

    def __init__(self, store: Store, ports: Ports) -> None:
        self._desk = Desk(store, ports)
        self._grips = Grips(self._desk)
        self._receiving = ReceivingHalves(self._desk, self._grips, ports.lanes)
        self._questions = Questions(self._desk, self._grips, self._receiving)
        self._tiering = Tiering(self._desk, ports.tier, mode=ports.write_mode) if ports.tier else None
        self._chains = Chains(store, self._tiering)
        self._low_water = LowWater(store, ports.waterline, self._tiering)
        self._costs = Costs(ports.counters, self._tiering)
        self._prefixes = Prefixes(self._desk, self._grips, self._tiering, self._costs)
        self.spaces = KnownSpaces(ports.kinds_file)
        self._pins = Pins(self._desk, self._prefixes, self.spaces)
        self._steering = Steering(
            self._desk, self._prefixes, self._tiering, self._pins, self.spaces, clear_under_way=self._clear_under_way
        )
        self._sending = SendingHalves(self._desk, self._grips, ports.lanes, self._land_here)
        self._returns = Returns(self._desk, self._sending)
        self._sharing = Sharing(self._desk, self._sending, self.spaces)
        self._waiting: deque[Outgoing | Incoming] = deque()
        self._without_room: tuple[Outgoing | Incoming, int, int] | None = None  # the head, and how the store was then
        self._next_look = 0.0

    # --- from engines ---

    def open_send(self, engine: Engine, message: OpenSend, now: float) -> None:
        record = self._sending.open(engine, message, now)
        if record is not None:
            self._waiting.append(record)
            self._serve_waiting(now)

    def filled(self, engine_id: str, message: Filled, now: float) -> None:
        self._sending.filled(engine_id, message, now)

    def open_load(self, engine: Engine, message: OpenLoad, now: float) -> None:
        handle = self._questions.ask(engine, message, now)
        if handle is not None:
            self._returns.came(engine, message, handle, now)

    def look_up(self, engine: Engine, message: LookUp, now: float) -> None:
        self._prefixes.look_up(engine, message, now, room=not self._waiting)

    def keep(self, engine: Engine, message: Keep, now: float) -> None:
        kept = self._prefixes.keep(engine, message, now, room=not self._waiting)
        if message.origin:
            self._returns.named(engine, message, now, kept=kept)

    def finished(self, engine_id: str, message: Finished) -> None:
        self._returns.finished(engine_id, message.handoff_id)

    def let_go(self, engine_id: str, message: LetGo, now: float, *, rank: int | None = None) -> None:
        """The engine is done with a handoff's slots once its fence has passed. Only the holder can say so.

        `rank`: of the worker that speaks for itself; None: the scheduler speaks.
        """
        grip = self._grips.get(message.handoff_id, message.side)
        if grip is not None:
            if grip.engine_id == engine_id:
                promise = self._grips.let_go(grip, message, rank=rank)
                if promise is not None:
                    self._end_grip(grip, promise, now)
            return
        if message.side == "load":
            self._questions.withdrawn(engine_id, message, now)
            return
        record = self._sending.waiting_for_room(message.handoff_id, engine_id)
        if record is not None:
            reason = f"{ONE_REQUEST}prefill engine: {message.reason}"
            self._sending.act(record, record.sender.fail(reason, tell_peer=False), now)

    def renew(self, engine_id: str, handoff_ids: Sequence[bytes], now: float) -> None:
        self._grips.renew(engine_id, handoff_ids, now)
        self._sending.renewed(engine_id, handoff_ids, now)

    def weights_changed(self, engine: Engine, epoch: str, now: float) -> None:
        """From now on the engine's blocks have other names. What it had begun with the weights of before ends."""
        if epoch == engine.info.content.weight_epoch:
            return  # it has found a new daemon, and what it has begun here since goes on
        engine_id = engine.info.engine_id
        self._desk.ports.counters["weight_changes"] += 1
        self._end_handoffs(engine_id, "engine's weights have changed", now)
        for grip in self._grips.of_engine(engine_id):
            self._desk.store.revoke(grip.lease)  # it has let go, or its workers will with their next step
        engine.info = engine.info.at(epoch)
        self.spaces.met(engine)

    def reset(self, engine: Engine, epoch: str, now: float) -> None:
        """Clears the engine's blocks of this epoch, and so everybody's whose blocks can stand for them."""
        info = engine.info.at(epoch)
        self._desk.ports.counters["resets"] += 1
        self._steering.clear_what_can_be(space_of(info.content, info.layout), now)

    def engine_failing(self, engine_id: str, now: float) -> None:
        """One of the engine's processes is gone: its handoffs fail. Others may still write: holds stay."""
        self._end_handoffs(engine_id, "engine died", now)

    def engine_gone(self, engine_id: str, now: float) -> None:
        """No process of this engine maps the arena any more: everything it held is harmless."""
        self.engine_failing(engine_id, now)
        for grip in self._grips.of_engine(engine_id):
            self._grips.remove(grip)
            gone = LetGo(handoff_id=grip.handoff_id, side=grip.side, fence=0, ok=False, reason="engine died")
            self._end_grip(grip, gone, now)
        self._costs.forget(engine_id)
        self._chains.engine_gone(engine_id)

    # --- from other daemons and the router ---

    def peer_message(self, message: PeerMessage, now: float) -> None:
        """Any message between daemons. Unknown ids and foreign incarnations are dropped and counted."""
        key = (message.handoff_id, message.attempt)
        if isinstance(message, Reserve):
            self._reserve(message, now)
        elif isinstance(message, Grant | Wait | Refuse | Committed | Cancel):
            outgoing = self._sending.records.get(key)
            if outgoing is None or message.incarnation != outgoing.sender.handle.decode_daemon.incarnation:
                self._desk.stale(message)
            else:
                self._sending.message(outgoing, message, now)
        else:
            incoming = self._receiving.records.get(key)
            if incoming is None or message.incarnation != incoming.receiver.handle.prefill_daemon.incarnation:
                self._desk.stale(message)
            else:
                self._receiving.message(incoming, message, now)

    def cancel(self, handoff_id: bytes, attempt: int, reason: str, now: float) -> None:
        """The router ends a handoff. It tells both daemons."""
        key = (handoff_id, attempt)
        self._desk.bury(key, "cancelled")
        outgoing, incoming = self._sending.records.get(key), self._receiving.records.get(key)
        if outgoing is not None:
            self._sending.act(outgoing, outgoing.sender.fail(f"{ROUTER_SAYS}{reason}", tell_peer=True), now)
        if incoming is not None:
            self._receiving.act(incoming, incoming.receiver.fail(f"{ROUTER_SAYS}{reason}", tell_peer=True), now)

    def share(self, wish: Share, now: float) -> None:
        """A router wants a peer to have these blocks."""
        self._sharing.ask(wish, now)

    def peer_lost(self, control: str, now: float) -> None:
        """The connection to a peer daemon broke: its handoffs with us are over, but for those that have landed here."""
        self._returns.peer_lost(control)
        self._desk.ports.lanes.forget(control)
        for record in list(self._sending.records.values()):
            if record.sender.handle.decode_daemon.control == control:
                self._sending.act(record, record.sender.fail("decode daemon is gone", tell_peer=True), now)
        for incoming in list(self._receiving.records.values()):
            if incoming.receiver.handle.prefill_daemon.control == control:
                self._receiving.act(incoming, incoming.receiver.peer_lost(), now)

    # --- from lanes and the clock ---

    def lane_events(self, scheme: str, events: Sequence[Event], now: float) -> None:
        for event in events:
            match event:
                case PutDone(ticket, at_ns):
                    self._sending.put_ended(scheme, ticket, now, at_ns=at_ns, ok=True)
                case PutFailed(ticket, reason):
                    self._sending.put_ended(scheme, ticket, now, ok=False, reason=reason)
                case Arrived(window, notice, at_ns):
                    self._receiving.arrived(window, notice, now, at_ns=at_ns)
                case WindowClosed(window):
                    self._receiving.window_closed(window, now)
                case PeerLost(channel, endpoint, reason):
                    self._desk.ports.lanes.lost(scheme, endpoint, reason, now)
                    self._sending.channel_lost(scheme, channel, reason, now)
                case LaneFailed(reason):  # its windows will never close: only a new daemon gets their slots back
                    raise TransportError(f"lane {scheme} failed: {reason}")

    def tick(self, now: float) -> None:
        """Fences, those who wait for room or an answer, and the clock. Call it often: every loop of the service."""
        if now >= self._next_look:
            self._next_look = now + LOOK_S
            self._look_at_clock(now)
        for grip, promise in self._grips.passed():
            self._end_grip(grip, promise, now)
        if self._tiering is not None:
            self._tiering.tick(now)
        self._pins.tick(now, room=not self._waiting)
        self._chains.tick()
        self._desk.store.drop_cleared()
        self._low_water.tick()
        self._serve_waiting(now)
        self._questions.tick(now)
        self._returns.tick(now, room=not self._waiting)
        self._sharing.tick(now, room=not self._waiting)

    def flush_step(self, now: float) -> int:
        """A turn of a daemon that stops: how many blocks have yet to go down."""
        return self._tiering.flush_step(now) if self._tiering is not None else 0

    # --- for the service and the verbs ---

    @property
    def fences_pending(self) -> bool:
        return self._grips.pending

    @property
    def has_more(self) -> bool:
        """Whether the next turn has something to do that this one has left, though nothing comes."""
        return self._chains.pending or bool(self._desk.store.cleared)

    def steer(self, what: Steer, now: float) -> Result:
        """A verb of an operator. Raises Refused, changing nothing."""
        return self._steering.steer(what, now, room=not self._waiting)

    def kept(self, now: float) -> dict[str, Any]:
        """Pins, the tier below, what loading costs, and lanes, for people and metrics."""
        pins = {
            "used_bytes": self._pins.used_bytes,
            "budget_bytes": self._pins.budget_bytes,
            "pins": [to_builtins(pin) for pin in self._pins.describe(now)],
        }
        return {"pinned": pins, "disk": self.disk(), "costs": self._costs.stats(), "lanes": self.lanes(now)}

    def lanes(self, now: float) -> dict[str, Any]:
        """How each peer is reached."""
        return self._desk.ports.lanes.describe(now)

    @property
    def reservations_waiting(self) -> int:
        return len(self._waiting)

    def link_rates(self) -> list[LinkRate]:
        """How fast our puts reach our peers."""
        return self._sending.links.rates()

    @property
    def halves(self) -> tuple[list[Outgoing], list[Incoming]]:
        """Those under way, the oldest first."""
        return list(self._sending.records.values()), list(self._receiving.records.values())

    @property
    def pinned_bytes(self) -> int:
        return self._pins.used_bytes

    def disk(self) -> dict[str, Any] | None:
        """Numbers of the tier below, if there is one."""
        return self._tiering.stats() if self._tiering is not None else None

    def describe(self) -> list[str]:
        """Every half under way."""
        senders = [repr(record.sender) for record in self._sending.records.values()]
        return senders + [repr(record.receiver) for record in self._receiving.records.values()]

    # --- steps ---

    def _reserve(self, message: Reserve, now: float) -> None:
        key = (message.handoff_id, message.attempt)
        twin = self._sending.records.get(key)
        record = self._receiving.reserve(message, twin, now)
        if record is None:
            return
        if message.spare:
            if self._waiting or not self._receiving.claim(record, now):
                self._receiving.act(record, record.receiver.refuse("no room to spare"), now)
            return
        self._waiting.append(record)
        self._serve_waiting(now)
        if record in self._waiting:
            ids = self._desk.ids(record.receiver.handle, lease_epoch=0)
            wait = Wait(**ids, ahead=self._waiting.index(record))
            self._desk.ports.to_peer(record.receiver.handle.prefill_daemon, wait)

    def _clear_under_way(self, which: Selection, now: float) -> None:
        """Who waits for room has no slots yet, and the bytes that come may be older than this. What goes to a peer as
        cache would be found there, though the peer has been cleared too, perhaps before us."""
        for record in self._waiting:
            if isinstance(record, Incoming):
                record.unfound.append(which)
        self._sending.withdraw(which, now)

    def _end_handoffs(self, engine_id: str, why: str, now: float) -> None:
        for record in list(self._sending.records.values()):
            if record.of(engine_id):
                self._sending.act(record, record.sender.fail(f"prefill {why}", tell_peer=True), now)
        self._questions.forget(engine_id)
        for incoming in list(self._receiving.records.values()):
            if incoming.receiver.handle.decode_engine == engine_id:
                self._receiving.act(incoming, incoming.receiver.fail(f"decode {why}", tell_peer=True), now)

    def _land_here(self, record: Outgoing, action: do.Put, now: float) -> bool:
        twin = self._receiving.records.get(record.key)
        if twin is None or twin.paired is not record:
            return False
        self._receiving.pages_landed(twin, action.layer, action.blocks, now)
        return True

    def _look_at_clock(self, now: float) -> None:
        """Budgets and expiries: work for each half, lease and question, so not in every turn of a busy loop."""
        for record in list(self._sending.records.values()):
            self._sending.act(record, record.sender.tick(now=now), now)
        self._receiving.tick(now)
        self._chains.look(now)
        self._questions.look(now)
        for lease in self._desk.store.expire(now):
            self._lease_expired(lease, now)
        for grip in self._grips.unanswered(now):
            self._ask_to_let_go(grip)
        if self._waiting:
            self._give_way(now)  # look-ups go on finding what they hold

    def _serve_waiting(self, now: float) -> None:
        """Whole-prompt claims, strictly first in, first out: a large one is never starved by small ones.

        Who has found no room looks again when there may be some: a claim looks at all of its blocks.
        """
        store = self._desk.store
        while self._waiting:
            record = self._waiting[0]
            if isinstance(record, Outgoing):
                is_over = record.key not in self._sending.records
            else:
                is_over = record.key not in self._receiving.records
            if not is_over and self._without_room == (record, store.freed, store.index.changes):
                return
            if is_over or self._claim(record, now):
                self._waiting.popleft()
            else:
                self._without_room = record, store.freed, store.index.changes
                self._give_way(now)

    def _claim(self, record: Outgoing | Incoming, now: float) -> bool:
        """Whether it need not wait any more."""
        if isinstance(record, Outgoing):
            return self._sending.claim(record, now)
        return self._receiving.claim(record, now)

    def _give_way(self, now: float) -> None:
        self._sending.give_way(now)
        self._receiving.give_way(now)
        for grip in self._grips.give_way():
            self._ask_to_let_go(grip, "others wait for room")

    def _end_grip(self, grip: Grip, message: LetGo, now: float) -> None:
        """The engine touches these slots no more."""
        counters = self._desk.ports.counters
        if grip.side == "load":
            counters["pages_verified"] += message.pages
            counters["loads_ok" if message.ok else "loads_failed"] += 1
            if message.done_ns and grip.key is not None:
                self._desk.ports.tracer.note(grip.handoff_id, "loaded", message.done_ns, pages=message.pages)
            spoilt = [grip.places[n] for n in message.spoilt if 0 <= n < len(grip.places)]
            forgotten = self._desk.store.forget(grip.lease, spoilt)
            counters["blocks_spoilt"] += len(forgotten)
            if self._tiering is not None:
                self._tiering.forget(forgotten)
        kept = self._prefixes.ended(grip, message, now)
        self._returns.lot_ended(grip.handoff_id, kept=kept)
        self._desk.end_lease(grip.lease)
        self._chains.ended(grip, now)
        if grip.key is None:
            return
        outgoing, incoming = self._sending.records.get(grip.key), self._receiving.records.get(grip.key)
        if grip.side == "send" and outgoing is not None:
            self._sending.act(outgoing, outgoing.sender.engine_let_go(ok=message.ok, reason=message.reason), now)
        if grip.side == "load" and incoming is not None:
            self._receiving.act(incoming, incoming.receiver.engine_let_go(ok=message.ok, reason=message.reason), now)

    def _lease_expired(self, lease: Lease, now: float) -> None:
        if self._pins.expired(lease):
            self._desk.ports.counters["pins_expired"] += 1
            return
        grip = self._grips.of_lease(lease)
        if grip is None:
            return
        self._desk.ports.counters["leases_expired"] += 1
        self._ask_to_let_go(grip)
        if grip.key is None:
            return
        outgoing, incoming = self._sending.records.get(grip.key), self._receiving.records.get(grip.key)
        if grip.side == "send" and outgoing is not None:
            self._sending.act(outgoing, outgoing.sender.fail("engine lease expired", tell_peer=True), now)
        if grip.side == "load" and incoming is not None:
            self._receiving.act(incoming, incoming.receiver.fail("engine lease expired", tell_peer=True), now)

    def _ask_to_let_go(self, grip: Grip, reason: str = "engine lease expired") -> None:
        """Whatever has become of the handoff: a LET_GO that was lost would keep the slots for ever."""
        ended: SendEnded | LoadEnded
        if grip.side == "send":
            ended = SendEnded(request_id="", handoff_id=grip.handoff_id, reason=reason)
        else:
            ended = LoadEnded(handoff_id=grip.handoff_id, reason=reason)
        self._desk.ports.to_engine(grip.engine_id, ended)

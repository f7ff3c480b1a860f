"""Drives handoffs: feeds events to the machines in pdx.handoff and carries out their actions.

Owned by the control thread. It reaches the world through the `Ports` it is given, so the same code runs in pdxd and
in a simulation. It decides nothing about a handoff's course; that is the machines' job.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import singledispatchmethod

import xxhash

from pdx.buffer.lease import Lease, Owner
from pdx.buffer.store import Claim, Store
from pdx.daemon.records import EngineHold, HandoffKey, Incoming, Outgoing
from pdx.daemon.sessions import Engine
from pdx.daemon.trace import Tracer
from pdx.errors import HandleError, Refused, WireError
from pdx.handoff import actions as do
from pdx.handoff.handle import SeenHandles, TransferHandle, verify
from pdx.handoff.receiver import Receiver
from pdx.handoff.sender import Sender
from pdx.keys import layout_id, namespace_of
from pdx.layout import CHECKSUM_BYTES, DIGEST_BYTES, PageLayout, Place
from pdx.transport.api import Arrived, Copy, Event, Lane, PeerLost, PutDone, PutFailed, Region, Span, WindowClosed
from pdx.wire import (
    NOTICE,
    PEER,
    Cancel,
    Commit,
    Committed,
    DaemonRef,
    Drained,
    Fail,
    Filled,
    Grant,
    Landed,
    LetGo,
    LoadOpened,
    Message,
    OpenLoad,
    OpenSend,
    Refuse,
    Reserve,
    SendEnded,
    Wait,
    decoder_of,
    encode,
)

# A decode request may overtake RESERVE by a connection's set-up; after this long an unknown handoff is absent.
UNKNOWN_HANDOFF_WAIT_S = 0.5
TOMBSTONES_MAX = 65_536

_decode_notice = decoder_of(NOTICE)


@dataclass(frozen=True)
class Ports:
    """The mover's way out."""

    me: DaemonRef
    cluster_key: bytes
    to_engine: Callable[[str, Message], None]  # engine id, message
    to_peer: Callable[[DaemonRef, Message], None]
    engine: Callable[[str], Engine | None]
    fence_passed: Callable[[str, int], bool]  # engine id, step
    lanes: dict[str, tuple[Lane, Region]]  # by URL scheme
    tracer: Tracer
    counters: Counter[str]
    lease_s: float
    digest_mode: bool
    wall_clock: Callable[[], float] = time.time


class Mover:
    """All handoffs of this daemon."""

    def __init__(self, store: Store, ports: Ports) -> None:
        self._store = store
        self._ports = ports
        self._seen = SeenHandles()
        self._outgoing: dict[HandoffKey, Outgoing] = {}
        self._incoming: dict[HandoffKey, Incoming] = {}
        self._holds: dict[tuple[bytes, str], EngineHold] = {}  # handoff id, side
        self._letting_go: list[tuple[EngineHold, LetGo]] = []  # waiting for their fence
        self._waiting: deque[Outgoing | Incoming] = deque()  # for room, first in, first out
        self._puts: dict[int, Outgoing] = {}  # lane ticket -> sender
        self._windows: dict[int, Incoming] = {}
        self._first_asked: dict[bytes, float] = {}
        self._tombstones: dict[HandoffKey, str] = {}
        self._epochs = 0

    # --- from engines -----------------------------------------------------------------------------------------

    def open_send(self, engine: Engine, message: OpenSend, now: float) -> None:
        """Verifies the handle and claims the whole prompt, or says at once why not."""
        try:
            handle = self._verified(message.handle, side="send", daemon="prefill_daemon")
        except HandleError as error:
            self._ports.counters["handles_refused"] += 1
            self._ports.to_engine(
                engine.info.engine_id,
                SendEnded(request_id=message.request_id, handoff_id=b"", reason=f"handle refused: {error}"),
            )
            return
        assert engine.pages is not None
        blocks = len(message.block_hashes) + bool(message.tail_hash)
        key = (handle.handoff_id, handle.attempt)
        sender = Sender(
            handle,
            request_id=message.request_id,
            blocks=blocks,
            layers=engine.pages.layers,
            incarnation=self._ports.me.incarnation,
            now=now,
        )
        record = Outgoing(
            key=key,
            sender=sender,
            request=message,
            engine_id=engine.info.engine_id,
            namespace=namespace_of(engine.info.content),
            layout_id=layout_id(engine.info.layout),
            pages=engine.pages,
        )
        self._outgoing[key] = record
        self._trace(key, "open_send", blocks=blocks, prompt_tokens=message.prompt_tokens)
        self._waiting.append(record)
        self._serve_waiting(now)

    def filled(self, message: Filled, now: float) -> None:
        for entry in message.entries:
            record = self._sender_of(entry.handoff_id)
            if record is None:
                self._ports.counters["stale_filled"] += 1
                continue
            self._ports.tracer.note(
                entry.handoff_id,
                "filled",
                message.filled_ns,
                step=message.step,
                step_started_ns=message.step_started_ns,
                layer=message.layer,
                pages=len(entry.blocks),
            )
            hold = self._holds.get((entry.handoff_id, "send"))
            if hold is not None:
                self._store.renew(hold.lease, now=now, ttl_s=self._ports.lease_s)
            self._act(record, record.sender.filled(message.layer, entry.blocks, now=now), now)

    def open_load(self, engine: Engine, message: OpenLoad, now: float) -> None:
        """Answers what of the prompt is in the arena, or will be; "wait" asks the engine to come again."""
        engine_id = engine.info.engine_id
        try:
            handle = verify(message.handle, self._ports.cluster_key, now_unix_s=self._ports.wall_clock())
            self._check_daemon(handle.decode_daemon)
            if handle.decode_engine != engine_id:
                raise HandleError(f"handle is for engine {handle.decode_engine!r}")
        except HandleError as error:
            self._ports.counters["handles_refused"] += 1
            self._answer_load(engine_id, message, b"", "absent", reason=f"handle refused: {error}")
            return
        key = (handle.handoff_id, handle.attempt)
        incoming = self._incoming.get(key)
        if incoming is None:
            self._open_unknown_load(engine, message, key, now)
            return
        self._first_asked.pop(handle.handoff_id, None)
        if incoming.receiver.state.value == "waiting":
            self._answer_load(engine_id, message, handle.handoff_id, "wait", reason="the arena is full")
            return
        self._open_known_load(engine_id, message, incoming, handle.handoff_id, now)

    def let_go(self, message: LetGo, now: float) -> None:
        """The engine is done with a handoff's slots, once its fence has passed."""
        hold = self._holds.get((message.handoff_id, message.side))
        if hold is None:
            self._withdraw_unclaimed(message, now)
            return
        if self._ports.fence_passed(hold.engine_id, message.fence):
            self._end_hold(hold, message, now)
        else:
            self._letting_go.append((hold, message))

    def renew(self, handoff_ids: Sequence[bytes], now: float) -> None:
        for handoff_id in handoff_ids:
            for side in ("send", "load"):
                hold = self._holds.get((handoff_id, side))
                if hold is not None:
                    self._store.renew(hold.lease, now=now, ttl_s=self._ports.lease_s)

    def engine_failing(self, engine_id: str, now: float) -> None:
        """One of the engine's processes is gone: its handoffs fail; its holds stay while a worker may still write."""
        for record in [r for r in self._outgoing.values() if r.engine_id == engine_id]:
            self._act(record, record.sender.fail("prefill engine died", tell_peer=True), now)
        for hold in [h for h in self._holds.values() if h.engine_id == engine_id and h.incoming is not None]:
            assert hold.incoming is not None
            self._act(hold.incoming, hold.incoming.receiver.fail("decode engine died", tell_peer=True), now)

    def engine_gone(self, engine_id: str, now: float) -> None:
        """No process of this engine maps the arena any more: everything it held is harmless."""
        self.engine_failing(engine_id, now)
        for hold in [h for h in self._holds.values() if h.engine_id == engine_id]:
            gone = LetGo(handoff_id=hold.handoff_id, side=hold.side, fence=0, ok=False, reason="engine died")
            self._end_hold(hold, gone, now)
        self._letting_go = [(h, m) for h, m in self._letting_go if h.engine_id != engine_id]

    # --- from other daemons and the router --------------------------------------------------------------------

    def peer_message(self, message: PEER, now: float) -> None:
        """Any message between daemons. Unknown ids, old epochs and foreign incarnations are dropped and counted."""
        key = (message.handoff_id, message.attempt)
        match message:
            case Reserve():
                self._reserve(message, key, now)
            case Grant() | Wait() | Refuse() | Committed() | Cancel():
                outgoing = self._outgoing.get(key)
                if outgoing is None or message.incarnation != outgoing.sender.handle.decode_daemon.incarnation:
                    self._stale(message)
                    return
                self._to_sender(outgoing, message, now)
            case Commit() | Fail() | Drained():
                incoming = self._incoming.get(key)
                if incoming is None or message.incarnation != incoming.receiver.handle.prefill_daemon.incarnation:
                    self._stale(message)
                    return
                self._to_receiver(incoming, message, now)

    def cancel(self, handoff_id: bytes, attempt: int, reason: str, now: float) -> None:
        """The router ends a handoff. It tells both daemons, so the peer is not told again by us."""
        key = (handoff_id, attempt)
        if key in self._outgoing:
            record = self._outgoing[key]
            self._act(record, record.sender.fail(f"router: {reason}", tell_peer=False), now)
        if key in self._incoming:
            incoming = self._incoming[key]
            self._act(incoming, incoming.receiver.fail(f"router: {reason}", tell_peer=False), now)
        self._bury(key, "cancelled")

    def peer_lost(self, control: str, now: float) -> None:
        """The connection to a peer daemon's control socket broke: its handoffs with us are over."""
        for record in list(self._outgoing.values()):
            if record.sender.handle.decode_daemon.control == control:
                self._act(record, record.sender.fail("decode daemon is gone", tell_peer=False), now)
        for incoming in list(self._incoming.values()):
            if incoming.receiver.handle.prefill_daemon.control == control and incoming.paired is None:
                self._act(incoming, incoming.receiver.fail("prefill daemon is gone", tell_peer=False), now)

    # --- from lanes and the clock -----------------------------------------------------------------------------

    def lane_events(self, events: Sequence[Event], now: float) -> None:
        for event in events:
            match event:
                case PutDone(ticket):
                    self._put_ended(ticket, True, "", now)
                case PutFailed(ticket, reason):
                    self._put_ended(ticket, False, reason, now)
                case Arrived(window, notice):
                    self._arrived(window, notice, now)
                case WindowClosed(window):
                    incoming = self._windows.pop(window, None)
                    if incoming is not None:
                        self._act(incoming, incoming.receiver.window_closed(), now)
                case PeerLost(channel, _, reason):
                    for record in [r for r in self._outgoing.values() if r.channel == channel]:
                        self._act(record, record.sender.fail(f"lane lost: {reason}", tell_peer=True), now)

    def tick(self, now: float) -> None:
        """Budgets, expiries, fences, and those who wait for room. Call it a few times a second, and on fences."""
        for record in list(self._outgoing.values()):
            self._act(record, record.sender.tick(now=now), now)
        for incoming in list(self._incoming.values()):
            self._act(incoming, incoming.receiver.tick(now=now), now)
        for lease in self._store.expire(now):
            self._lease_expired(lease, now)
        still = []
        for hold, message in self._letting_go:
            if self._ports.fence_passed(hold.engine_id, message.fence):
                self._end_hold(hold, message, now)
            else:
                still.append((hold, message))
        self._letting_go = still
        self._first_asked = {k: t for k, t in self._first_asked.items() if now - t < 10.0}
        self._serve_waiting(now)

    @property
    def fences_pending(self) -> bool:
        return bool(self._letting_go)

    @property
    def reservations_waiting(self) -> int:
        return len(self._waiting)

    def describe(self) -> list[str]:
        """Every half under way, for `stats`."""
        return [repr(r.sender) for r in self._outgoing.values()] + [repr(i.receiver) for i in self._incoming.values()]

    # --- sending half -----------------------------------------------------------------------------------------

    def _claim_outgoing(self, record: Outgoing, now: float) -> bool:
        """True if this record needs no further wait: claimed, or refused for good."""
        message = record.request
        try:
            claim = self._store.claim(
                Owner("session", record.engine_id),
                record.namespace,
                record.pages,
                message.block_hashes,
                tail=bool(message.tail_hash),
                now=now,
                ttl_s=self._ports.lease_s,
            )
        except Refused as error:
            self._act(record, record.sender.fail(str(error), tell_peer=False), now)
            return True
        if claim is None:
            return False
        record.claim = claim
        handoff_id = record.key[0]
        record.wire = self._store.lease(claim, Owner("wire", handoff_id.hex()), now=now, ttl_s=float("inf"))
        self._holds[handoff_id, "send"] = EngineHold(
            handoff_id, "send", record.engine_id, claim.lease, outgoing=record
        )
        self._trace(record.key, "claimed", fresh=len(claim.fresh))
        reserve = Reserve(
            **self._ids(record.sender.handle, lease_epoch=0),
            handle=message.handle,
            namespace=record.namespace,
            layout_id=record.layout_id,
            pages=record.pages,
            block_hashes=message.block_hashes,
            tail_hash=message.tail_hash,
        )
        self._act(record, record.sender.claimed(claim.places, claim.fresh, reserve, now=now), now)
        return True

    def _to_sender(self, record: Outgoing, message: PEER, now: float) -> None:
        sender = record.sender
        match message:
            case Grant():
                record.window = message.window
                record.targets = dict(zip(message.wanted, message.places, strict=False))
                self._trace(record.key, "granted", has=len(message.has), wanted=len(message.wanted))
                self._act(
                    record,
                    sender.granted(
                        has=message.has, wanted=message.wanted, lease_epoch=message.lease_epoch, now=now
                    ),
                    now,
                )
            case Wait():
                self._act(record, sender.waiting(now=now), now)
            case Refuse():
                self._act(record, sender.fail(f"refused by decode: {message.reason}", tell_peer=False), now)
            case Cancel():
                self._act(record, sender.cancelled_by_peer(message), now)
            case Committed():
                self._act(record, sender.committed(), now)

    def _put(self, record: Outgoing, action: do.Put, now: float) -> None:
        assert record.claim is not None
        self._trace(record.key, "put", layer=action.layer, pages=len(action.blocks))
        twin = self._incoming.get(record.key)
        if twin is not None and twin.paired is record:
            self._pages_landed(twin, action.layer, action.blocks, now)
            self._act(record, record.sender.put_ended(ok=True, reason="", now=now), now)
            return
        scheme = self._lane_for(record)
        lane, region = self._ports.lanes[scheme]
        notice = self._notice(record, action)
        copies = self._copies(record, action)
        ticket = lane.put(
            record.channel,
            region=region,
            window=record.window,
            copies=copies,
            notice=notice,
            queue=record.key[0],
            urgency=float(action.layer),
        )
        self._puts[ticket] = record
        self._ports.counters["pages_put"] += len(action.blocks)
        self._ports.counters["bytes_put"] += len(action.blocks) * record.pages.page_bytes

    def _lane_for(self, record: Outgoing) -> str:
        """Picks the lane of a pair at its first put: the first of the peer's that we have too."""
        for endpoint in record.sender.handle.decode_daemon.lanes:
            scheme = endpoint.partition("://")[0]
            if scheme in self._ports.lanes:
                if record.channel < 0:
                    record.channel = self._ports.lanes[scheme][0].connect(endpoint)
                    self._trace(record.key, "lane", endpoint=endpoint)
                return scheme
        raise Refused(f"no common lane: peer offers {record.sender.handle.decode_daemon.lanes}")

    def _copies(self, record: Outgoing, action: do.Put) -> list[Copy]:
        """Pages that lie side by side on both sides travel as one span."""
        assert record.claim is not None
        copies: list[Copy] = []
        size = record.pages.page_bytes
        for block in action.blocks:
            source = record.claim.places[block].page_offset(record.pages, action.layer)
            target = record.targets[block].page_offset(record.pages, action.layer)
            last = copies[-1] if copies else None
            if last and last.source_offset + last.length == source and last.target_offset + last.length == target:
                copies[-1] = Copy(last.source_offset, last.target_offset, last.length + size)
            else:
                copies.append(Copy(source, target, size))
        return copies

    def _notice(self, record: Outgoing, action: do.Put) -> bytes:
        assert record.claim is not None
        memory, layer = self._store.arena.memory, action.layer
        places = [record.claim.places[block] for block in action.blocks]
        checksums = b"".join(
            bytes(memory[start : start + CHECKSUM_BYTES]) for start in (p.checksum_offset(layer) for p in places)
        )
        digests = b""
        if self._ports.digest_mode:
            starts = (p.digest_offset(record.pages, layer) for p in places)
            digests = b"".join(bytes(memory[start : start + DIGEST_BYTES]) for start in starts)
        return encode(
            Landed(
                handoff_id=record.key[0],
                attempt=record.key[1],
                lease_epoch=record.sender.lease_epoch,
                layer=layer,
                blocks=list(action.blocks),
                checksums=checksums,
                digests=digests,
            )
        )

    def _put_ended(self, ticket: int, ok: bool, reason: str, now: float) -> None:
        record = self._puts.pop(ticket, None)
        if record is None:
            return
        self._trace(record.key, "sent" if ok else "put_failed")
        self._act(record, record.sender.put_ended(ok=ok, reason=reason, now=now), now)

    # --- receiving half ---------------------------------------------------------------------------------------

    def _reserve(self, message: Reserve, key: HandoffKey, now: float) -> None:
        if key in self._tombstones or key in self._incoming:
            self._stale(message)
            return
        try:
            handle = self._verified(message.handle, side="receive", daemon="decode_daemon")
            if message.incarnation != handle.prefill_daemon.incarnation or message.handoff_id != handle.handoff_id:
                raise HandleError("RESERVE does not match its handle")
        except HandleError:
            self._ports.counters["handles_refused"] += 1
            return
        self._epochs += 1
        incoming = Incoming(
            key=key,
            receiver=Receiver(
                handle,
                blocks=len(message.block_hashes) + bool(message.tail_hash),
                layers=message.pages.layers,
                lease_epoch=self._epochs,
                incarnation=self._ports.me.incarnation,
                now=now,
            ),
            reserve=message,
            paired=self._outgoing.get(key) if handle.prefill_daemon == self._ports.me else None,
        )
        self._incoming[key] = incoming
        self._trace(key, "reserve", blocks=incoming.receiver.blocks)
        mismatch = self._mismatch(message, handle.decode_engine)
        if mismatch:
            self._act(incoming, incoming.receiver.refuse(mismatch), now)
        elif incoming.paired is not None:
            self._grant_paired(incoming, now)
        else:
            self._waiting.append(incoming)
            self._serve_waiting(now)
            if incoming.receiver.state.value == "waiting":
                ahead = self._waiting.index(incoming)
                self._ports.to_peer(handle.prefill_daemon, Wait(**self._ids(handle, lease_epoch=0), ahead=ahead))

    def _mismatch(self, message: Reserve, decode_engine: str) -> str:
        engine = self._ports.engine(decode_engine)
        if engine is None or engine.pages is None:
            return f"engine {decode_engine!r} is not attached here"
        if message.namespace != namespace_of(engine.info.content):
            return "model contents differ"
        if message.layout_id != layout_id(engine.info.layout) or message.pages != engine.pages:
            return "KV layouts differ"
        return ""

    def _claim_incoming(self, incoming: Incoming, now: float) -> bool:
        """True if this half needs no further wait: granted, or refused for good."""
        message, handle = incoming.reserve, incoming.receiver.handle
        try:
            claim = self._store.claim(
                Owner("wire", handle.handoff_id.hex()),
                message.namespace,
                message.pages,
                message.block_hashes,
                tail=bool(message.tail_hash),
                now=now,
                ttl_s=float("inf"),  # the machine's budgets end it
            )
        except Refused as error:
            self._act(incoming, incoming.receiver.refuse(str(error)), now)
            return True
        if claim is None:
            return False
        incoming.claim, incoming.wire = claim, claim.lease
        wanted = sorted(claim.fresh)
        places = [claim.places[block] for block in wanted]
        incoming.window = self._open_window(incoming, places, message.pages)
        grant = Grant(
            **self._ids(handle, lease_epoch=incoming.receiver.lease_epoch),
            has=[block for block in range(incoming.receiver.blocks) if block not in claim.fresh],
            wanted=wanted,
            places=places,
            window=incoming.window,
        )
        self._trace(incoming.key, "grant", wanted=len(wanted))
        self._act(incoming, incoming.receiver.claimed(wanted, grant, windowed=True, now=now), now)
        return True

    def _open_window(self, incoming: Incoming, places: list[Place], pages: PageLayout) -> int:
        spans = []
        for place in places:
            for layer in range(pages.layers):
                spans.append(Span(place.page_offset(pages, layer), pages.page_bytes))
        _, region = next(iter(self._ports.lanes.values()))
        window = region.open_window(spans)
        self._windows[window] = incoming
        return window

    def _grant_paired(self, incoming: Incoming, now: float) -> None:
        """Both engines share this daemon: the receiver reads the very slots that the sender fills."""
        assert incoming.paired is not None and incoming.paired.claim is not None
        claim, handle = incoming.paired.claim, incoming.receiver.handle
        incoming.wire = self._store.lease(
            claim, Owner("wire", handle.handoff_id.hex()), now=now, ttl_s=float("inf")
        )
        wanted = sorted(claim.fresh)
        grant = Grant(
            **self._ids(handle, lease_epoch=incoming.receiver.lease_epoch),
            has=[block for block in range(incoming.receiver.blocks) if block not in claim.fresh],
            wanted=wanted,
            places=[claim.places[block] for block in wanted],
            window=0,
        )
        self._act(incoming, incoming.receiver.claimed(wanted, grant, windowed=False, now=now), now)

    def _to_receiver(self, incoming: Incoming, message: PEER, now: float) -> None:
        match message:
            case Commit():
                if message.lease_epoch != incoming.receiver.lease_epoch:
                    self._stale(message)
                    return
                self._trace(incoming.key, "commit")
                self._act(incoming, incoming.receiver.commit(message), now)
            case Fail():
                self._act(incoming, incoming.receiver.failed_by_peer(message), now)
            case Drained():
                pass  # receiver-checked lanes close their window without it

    def _arrived(self, window: int, notice: bytes, now: float) -> None:
        incoming = self._windows.get(window)
        try:
            landed = _decode_notice(notice)
        except WireError:
            self._ports.counters["bad_notices"] += 1
            return
        if (
            incoming is None
            or incoming.claim is None
            or incoming.key != (landed.handoff_id, landed.attempt)
            or landed.lease_epoch != incoming.receiver.lease_epoch
            or not 0 <= landed.layer < incoming.reserve.pages.layers
            or len(landed.checksums) != len(landed.blocks) * CHECKSUM_BYTES
            or len(landed.digests) not in (0, len(landed.blocks) * DIGEST_BYTES)
            or not incoming.receiver.wanted.issuperset(landed.blocks)
        ):
            self._ports.counters["stale_notices"] += 1
            return
        memory, pages = self._store.arena.memory, incoming.reserve.pages
        for n, block in enumerate(landed.blocks):
            place = incoming.claim.places[block]
            start = place.checksum_offset(landed.layer)
            memory[start : start + CHECKSUM_BYTES] = landed.checksums[n * CHECKSUM_BYTES :][:CHECKSUM_BYTES]
            if landed.digests:
                start = place.digest_offset(pages, landed.layer)
                memory[start : start + DIGEST_BYTES] = landed.digests[n * DIGEST_BYTES :][:DIGEST_BYTES]
        self._pages_landed(incoming, landed.layer, landed.blocks, now)

    def _pages_landed(self, incoming: Incoming, layer: int, blocks: Sequence[int], now: float) -> None:
        self._trace(incoming.key, "landed", layer=layer, pages=len(blocks))
        for block, layers in incoming.receiver.landed(layer, blocks, now=now):
            self._store.arena.set_watermark(incoming.places[block].header_offset, layers)
        self._ports.counters["pages_landed"] += len(blocks)
        self._act(incoming, incoming.receiver.check(), now)

    # --- loads ------------------------------------------------------------------------------------------------

    def _open_known_load(
        self, engine_id: str, message: OpenLoad, incoming: Incoming, handoff_id: bytes, now: float
    ) -> None:
        reserve = incoming.reserve
        count = 0
        for ours, theirs in zip(reserve.block_hashes, message.block_hashes, strict=False):
            if ours != theirs:
                break
            count += 1
        same = message.block_hashes == reserve.block_hashes and message.tail_hash == reserve.tail_hash
        places = incoming.places[: incoming.receiver.blocks if same else count]
        if not places or not incoming.receiver.engine_opened():
            self._answer_load(engine_id, message, handoff_id, "absent", reason="over, or another prompt")
            return
        source = incoming.paired.claim if incoming.paired else incoming.claim
        assert source is not None
        lease = self._store.lease(source, Owner("session", engine_id), now=now, ttl_s=self._ports.lease_s)
        self._holds[handoff_id, "load"] = EngineHold(handoff_id, "load", engine_id, lease, incoming=incoming)
        self._trace(incoming.key, "open_load", places=len(places))
        self._answer_load(engine_id, message, handoff_id, "granted", places=places)

    def _open_unknown_load(self, engine: Engine, message: OpenLoad, key: HandoffKey, now: float) -> None:
        """No such handoff here: wait a moment for its RESERVE, then serve what the cache has of the prompt."""
        engine_id, handoff_id = engine.info.engine_id, key[0]
        asked = self._first_asked.setdefault(handoff_id, now)
        if key not in self._tombstones and now - asked < UNKNOWN_HANDOFF_WAIT_S:
            self._answer_load(engine_id, message, handoff_id, "wait", reason="not reserved yet")
            return
        self._first_asked.pop(handoff_id, None)
        self._bury(key, "never reserved")
        read = self._store.read(
            Owner("session", engine_id),
            namespace_of(engine.info.content),
            message.block_hashes,
            now=now,
            ttl_s=self._ports.lease_s,
        )
        if read is None or (handoff_id, "load") in self._holds:
            self._answer_load(engine_id, message, handoff_id, "absent", reason=self._tombstones.get(key, ""))
            return
        self._holds[handoff_id, "load"] = EngineHold(handoff_id, "load", engine_id, read.lease)
        self._answer_load(engine_id, message, handoff_id, "granted", places=read.places)

    def _answer_load(
        self,
        engine_id: str,
        message: OpenLoad,
        handoff_id: bytes,
        status: str,
        *,
        places: Sequence[Place] = (),
        reason: str = "",
    ) -> None:
        self._ports.to_engine(
            engine_id,
            LoadOpened(
                request_id=message.request_id,
                handoff_id=handoff_id,
                status=status,  # type: ignore[arg-type]
                places=list(places),
                reason=reason,
            ),
        )

    def _end_hold(self, hold: EngineHold, message: LetGo, now: float) -> None:
        self._holds.pop((hold.handoff_id, hold.side), None)
        if hold.side == "load":
            self._ports.counters["pages_verified"] += message.pages
            self._ports.counters["loads_ok" if message.ok else "loads_failed"] += 1
            if message.done_ns:
                self._ports.tracer.note(hold.handoff_id, "loaded", message.done_ns, pages=message.pages)
        if hold.incoming is not None:
            self._act(hold.incoming, hold.incoming.receiver.engine_let_go(ok=message.ok, reason=message.reason), now)
        if hold.outgoing is not None:
            self._act(hold.outgoing, hold.outgoing.sender.engine_let_go(ok=message.ok, reason=message.reason), now)
        self._end_lease(hold.lease)
        self._serve_waiting(now)

    def _withdraw_unclaimed(self, message: LetGo, now: float) -> None:
        """The engine gave up a send whose claim still waited for room."""
        record = self._sender_of(message.handoff_id) if message.side == "send" else None
        if record is not None and record.claim is None:
            self._act(record, record.sender.fail(f"prefill engine: {message.reason}", tell_peer=False), now)
        else:
            self._ports.counters["stale_let_go"] += 1

    def _lease_expired(self, lease: Lease, now: float) -> None:
        for hold in list(self._holds.values()):
            if hold.lease is not lease:
                continue
            self._ports.counters["leases_expired"] += 1
            if hold.outgoing is not None:
                self._act(hold.outgoing, hold.outgoing.sender.fail("engine lease expired", tell_peer=True), now)
            if hold.incoming is not None:
                self._act(hold.incoming, hold.incoming.receiver.fail("engine lease expired", tell_peer=True), now)

    # --- carrying out actions ---------------------------------------------------------------------------------

    def _act(self, record: Outgoing | Incoming, actions: Sequence[do.Action], now: float) -> None:
        for action in actions:
            self._carry_out(action, record, now)

    @singledispatchmethod
    def _carry_out(self, action: do.Action, record: Outgoing | Incoming, now: float) -> None:
        raise NotImplementedError(type(action).__name__)

    @_carry_out.register
    def _(self, action: do.ToPeer, record: Outgoing | Incoming, now: float) -> None:
        if isinstance(record, Outgoing):
            self._ports.to_peer(record.sender.handle.decode_daemon, action.message)
        else:
            self._ports.to_peer(record.receiver.handle.prefill_daemon, action.message)

    @_carry_out.register
    def _(self, action: do.ToEngine, record: Outgoing | Incoming, now: float) -> None:
        if isinstance(record, Outgoing):
            self._ports.to_engine(record.engine_id, action.message)
        else:
            hold = self._holds.get((record.key[0], "load"))
            if hold is not None:
                self._ports.to_engine(hold.engine_id, action.message)

    @_carry_out.register
    def _(self, action: do.Put, record: Outgoing, now: float) -> None:
        self._put(record, action, now)

    @_carry_out.register
    def _(self, action: do.StopPuts, record: Outgoing, now: float) -> None:
        for lane, _ in self._ports.lanes.values():
            lane.cancel(record.key[0])

    @_carry_out.register
    def _(self, action: do.Publish, record: Outgoing | Incoming, now: float) -> None:
        if record.claim is not None:
            self._store.commit(record.claim)

    @_carry_out.register
    def _(self, action: do.Abandon, record: Outgoing | Incoming, now: float) -> None:
        if record.claim is not None:
            self._store.abandon(record.claim)

    @_carry_out.register
    def _(self, action: do.RevokeEngine, record: Outgoing | Incoming, now: float) -> None:
        hold = self._holds.get((record.key[0], "send" if isinstance(record, Outgoing) else "load"))
        if hold is not None:
            self._store.revoke(hold.lease)

    @_carry_out.register
    def _(self, action: do.SendCommit, record: Outgoing, now: float) -> None:
        assert record.claim is not None
        checksum = self._checksum(record.claim, record.sender.wanted, record.pages)
        self._trace(record.key, "commit")
        self._ports.to_peer(
            record.sender.handle.decode_daemon,
            Commit(
                **self._ids(record.sender.handle, lease_epoch=record.sender.lease_epoch),
                pages=action.pages,
                checksum=checksum,
            ),
        )

    @_carry_out.register
    def _(self, action: do.CheckCommit, record: Incoming, now: float) -> None:
        source = record.paired.claim if record.paired else record.claim
        assert source is not None
        ok = self._checksum(source, record.receiver.wanted, record.reserve.pages) == action.expected
        if not ok:
            self._ports.counters["commit_mismatches"] += 1
        self._act(record, record.receiver.checked(ok=ok, now=now), now)

    @_carry_out.register
    def _(self, action: do.CloseWindow, record: Incoming, now: float) -> None:
        for _, region in self._ports.lanes.values():
            region.close_window(record.window)

    @_carry_out.register
    def _(self, action: do.Ended, record: Outgoing | Incoming, now: float) -> None:
        side = "send" if isinstance(record, Outgoing) else "receive"
        self._trace(record.key, f"{side}_ended", reason=action.reason)
        self._ports.counters[f"{side}s_{'failed' if action.reason else 'settled'}"] += 1
        if isinstance(record, Outgoing):
            self._outgoing.pop(record.key, None)
        else:
            self._incoming.pop(record.key, None)
        self._bury(record.key, action.reason)
        if record.wire is not None:
            self._end_lease(record.wire)
        if record in self._waiting:
            self._waiting.remove(record)

    # --- helpers ----------------------------------------------------------------------------------------------

    def _serve_waiting(self, now: float) -> None:
        """Whole-prompt claims, strictly first in, first out, so that a large one is never starved by small ones."""
        while self._waiting:
            record = self._waiting[0]
            claim = self._claim_outgoing if isinstance(record, Outgoing) else self._claim_incoming
            if not claim(record, now):  # type: ignore[arg-type]
                return
            if self._waiting and self._waiting[0] is record:
                self._waiting.popleft()

    def _end_lease(self, lease: Lease) -> None:
        if lease.state.value == "quarantined":
            self._store.quiesce(lease)
        else:
            self._store.release(lease)

    def _verified(self, text: str, *, side: str, daemon: str) -> TransferHandle:
        now_unix_s = self._ports.wall_clock()
        handle = verify(text, self._ports.cluster_key, now_unix_s=now_unix_s)
        self._check_daemon(getattr(handle, daemon))
        if (handle.handoff_id, handle.attempt) in self._tombstones:
            raise HandleError("this handoff has ended already")
        self._seen.use(handle, side, now_unix_s=now_unix_s)
        return handle

    def _check_daemon(self, named: DaemonRef) -> None:
        me = self._ports.me
        if (named.daemon_id, named.incarnation) != (me.daemon_id, me.incarnation):
            raise HandleError("handle names another daemon, or an earlier life of this one")

    def _checksum(self, claim: Claim, blocks: frozenset[int], pages: PageLayout) -> int:
        digest = xxhash.xxh3_64()
        memory = self._store.arena.memory
        for block in sorted(blocks):
            start = claim.places[block].checksum_offset(0)
            digest.update(memory[start : start + pages.layers * CHECKSUM_BYTES])
        return digest.intdigest()

    def _sender_of(self, handoff_id: bytes) -> Outgoing | None:
        hold = self._holds.get((handoff_id, "send"))
        if hold is not None and hold.outgoing is not None and hold.outgoing.key in self._outgoing:
            return hold.outgoing
        return next((r for key, r in self._outgoing.items() if key[0] == handoff_id), None)

    def _ids(self, handle: TransferHandle, *, lease_epoch: int) -> dict[str, object]:
        return {
            "handoff_id": handle.handoff_id,
            "attempt": handle.attempt,
            "lease_epoch": lease_epoch,
            "incarnation": self._ports.me.incarnation,
        }

    def _stale(self, message: Message) -> None:
        self._ports.counters["stale_messages"] += 1
        self._ports.counters[f"stale_{type(message).__name__.lower()}"] += 1

    def _bury(self, key: HandoffKey, reason: str) -> None:
        self._tombstones[key] = reason
        while len(self._tombstones) > TOMBSTONES_MAX:
            del self._tombstones[next(iter(self._tombstones))]

    def _trace(self, key: HandoffKey, what: str, **details: object) -> None:
        self._ports.tracer.note(key[0], what, time.monotonic_ns(), **details)

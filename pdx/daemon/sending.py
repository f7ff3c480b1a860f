"""Drives the sending halves: claims, puts, messages. What comes next is decided in handoff.sender, not here."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import xxhash

from pdx.buffer.claim import Claim, ReadClaim
from pdx.buffer.lease import Lease, Owner
from pdx.buffer.selection import Selection
from pdx.daemon.grips import Grip, Grips
from pdx.daemon.lanes import Lanes, Route
from pdx.daemon.links import Links, Underway
from pdx.daemon.ports import Desk, HandoffKey, namespace_for
from pdx.daemon.sessions import Engine
from pdx.daemon.spaces import Kind, kind_of
from pdx.errors import HandleError, PdxError, Refused, UnknownTransport
from pdx.handoff import actions as do
from pdx.handoff.handle import TransferHandle, mint
from pdx.handoff.sender import Sender
from pdx.handoff.states import Sending
from pdx.keys import layout_id, namespace_of
from pdx.layout import CHECKSUM_BYTES, DIGEST_BYTES, PageLayout, Place
from pdx.transport.api import Copy
from pdx.wire import (
    ONE_REQUEST,
    Cancel,
    Commit,
    Committed,
    Filled,
    Grant,
    Landed,
    OpenSend,
    PeerMessage,
    Refuse,
    Reserve,
    SendEnded,
    Wait,
    encode,
)

Errand = Literal["returns", "shares"]  # answers on their way back, and what a router wants brought


@dataclass(eq=False)
class Outgoing:
    """One sending half: our slots, and where their pages go."""

    key: HandoffKey
    sender: Sender
    pages: PageLayout
    engine: Engine | None = None  # None: what goes out is in the store already, and no request waits for it
    request: OpenSend | None = None  # the engine's
    what: Errand = "returns"  # where there is no engine
    claim: Claim | None = None
    wire: Lease | None = None  # holds the slots while puts may read them
    route: Route | None = None  # chosen with the claim
    window: int = 0
    targets: dict[int, Place] = field(default_factory=dict)  # block -> place in the receiver's arena

    def of(self, engine_id: str) -> bool:
        return self.engine is not None and self.engine.info.engine_id == engine_id


class SendingHalves:
    """All sending halves of this daemon. Owned by the control thread."""

    def __init__(
        self, desk: Desk, grips: Grips, lanes: Lanes, land_here: Callable[[Outgoing, do.Put, float], bool]
    ) -> None:
        """`land_here` takes a put whose receiver is this very daemon; it returns False if it is another one."""
        self._desk = desk
        self._grips = grips
        self._lanes = lanes
        self._land_here = land_here
        self.records: dict[HandoffKey, Outgoing] = {}
        self._by_handoff: dict[bytes, Outgoing] = {}  # engines know no attempts: one at a time per handoff
        self._puts: dict[tuple[str, int], tuple[Outgoing, Underway]] = {}  # by lane's scheme and its ticket
        self.links = Links()

    # --- from the engine ---

    def open(self, engine: Engine, message: OpenSend, now: float) -> Outgoing | None:
        """A new half that waits for room; None if the handle is no good, which the engine is told at once."""
        assert engine.pages is not None
        ports = self._desk.ports
        try:
            handle = self._desk.verified(message.handle, daemon="prefill_daemon")
            if handle.prefill_engine != engine.info.engine_id:  # which is to be able to use it yet
                raise HandleError(f"handle is for engine {handle.prefill_engine!r}")
            self._desk.use(handle, "send")
            if self._grips.get(handle.handoff_id, "send") or handle.handoff_id in self._by_handoff:
                raise HandleError("its handoff is under way")
        except HandleError as error:
            ports.counters["handles_refused"] += 1
            reason = f"handle refused: {error}"
            ports.to_engine(
                engine.info.engine_id, SendEnded(request_id=message.request_id, handoff_id=b"", reason=reason)
            )
            return None
        key = (handle.handoff_id, handle.attempt)
        sender = Sender(
            handle,
            request_id=message.request_id,
            blocks=len(message.block_hashes) + bool(message.tail_hash),
            layers=engine.pages.layers,
            page_bytes=engine.pages.page_bytes,
            incarnation=ports.me.incarnation,
            now=now,
        )
        record = Outgoing(key, sender, engine.pages, engine, message)
        self.records[key] = self._by_handoff[handle.handoff_id] = record
        context: dict[str, Any] = {"traceparent": handle.traceparent} if handle.traceparent else {}
        self._desk.trace(key, "open_send", blocks=sender.blocks, prompt_tokens=message.prompt_tokens, **context)
        return record

    def claim(self, record: Outgoing, now: float) -> bool:
        """Tries to claim the whole prompt. True if this half need not wait (any more): claimed, or over."""
        message, engine, store = record.request, record.engine, self._desk.store
        assert message is not None
        assert engine is not None
        engine_id = engine.info.engine_id
        try:
            record.route = self._lanes.route(record.sender.handle.decode_daemon, now, before=record.route)
            claim = store.claim(
                Owner("session", engine_id),
                namespace_for(engine, message.tenant),
                record.pages,
                message.block_hashes,
                tail=bool(message.tail_hash),
                now=now,
                ttl_s=self._desk.ports.lease_s,
            )
        except (Refused, UnknownTransport) as error:
            whose = ONE_REQUEST if isinstance(error, Refused) else ""
            self.act(record, record.sender.fail(f"{whose}{error}", tell_peer=False), now)
            return True
        if claim is None:
            return False
        handoff_id = record.key[0]
        record.claim = claim
        record.wire = store.lease(claim, Owner("wire", handoff_id.hex()), now=now, ttl_s=float("inf"))
        ranks = engine.info.layout.ranks
        request_id = message.request_id
        self._grips.add(
            Grip(handoff_id, "send", engine_id, claim.lease, record.key, request_id=request_id, ranks=ranks)
        )
        self._desk.trace(record.key, "claimed", fresh=len(claim.fresh))
        reserve = self._reserve(
            record, kind_of(engine), message.handle, message.block_hashes, tail_hash=message.tail_hash,
            tenant=message.tenant,
        )  # fmt: skip
        self.act(record, record.sender.claimed(claim.places, claim.fresh, reserve, now=now), now)
        return True

    def hand_over(
        self,
        handle: TransferHandle,
        kind: Kind,
        tenant: bytes,
        chain: list[bytes],
        found: ReadClaim,
        now: float,
        *,
        what: Errand,
    ) -> HandoffKey:
        """A half of this daemon's own, for blocks of the store that `found` holds: they go to a peer as cache.

        `handle` is not minted yet. Raises UnknownTransport, and gives up what is held, if no lane leads there.
        """
        ports, key = self._desk.ports, (handle.handoff_id, handle.attempt)
        try:
            route = self._lanes.route(handle.decode_daemon, now)
        except UnknownTransport:
            self._desk.store.release(found.lease)
            raise
        sender = Sender(
            handle, request_id="", blocks=len(chain), layers=kind.pages.layers, page_bytes=kind.pages.page_bytes,
            incarnation=ports.me.incarnation, now=now,
        )  # fmt: skip
        claim = Claim(found.lease, found.places, frozenset(), False, ())
        record = Outgoing(key, sender, kind.pages, what=what, claim=claim, wire=found.lease, route=route)
        self.records[key] = record
        self._desk.trace(key, "hand_over", blocks=len(chain))
        reserve = self._reserve(record, kind, mint(handle, ports.cluster_key), chain, tenant=tenant, spare=True)
        self.act(record, sender.held(reserve, now=now), now)
        return key

    def give_way(self, now: float) -> None:
        """A handoff waits for room: what no request waits for ends, and holds no slots any more."""
        for record in [r for r in self.records.values() if r.engine is None]:
            self.act(record, record.sender.fail("a handoff waits for room", tell_peer=True), now)

    def withdraw(self, which: Selection, now: float) -> None:
        """What goes out as cache and has any of these blocks. Ended once too often, it costs a hit, perhaps."""
        for record in [r for r in self.records.values() if r.engine is None]:
            assert record.wire is not None
            keys = (key for slot in record.wire.slots for key in slot.keys if key is not None)
            if any(which.takes(key, age_s=float("inf")) for key in keys):
                self.act(record, record.sender.fail("cleared", tell_peer=True), now)

    def filled(self, engine_id: str, message: Filled, now: float) -> None:
        for entry in message.entries:
            record = self._by_handoff.get(entry.handoff_id)
            if record is None or not record.of(engine_id):
                self._desk.ports.counters["stale_filled"] += 1
                continue
            self._desk.ports.tracer.note(
                entry.handoff_id,
                "filled",
                message.filled_ns,
                step=message.step,
                step_started_ns=message.step_started_ns,
                layer=message.layer,
                pages=len(entry.blocks),
                block=min(entry.blocks, default=-1),
            )
            self._grips.renew(engine_id, [entry.handoff_id], now)
            self.act(record, record.sender.filled(message.layer, entry.blocks, now=now), now)

    def renewed(self, engine_id: str, handoff_ids: Iterable[bytes], now: float) -> None:
        for handoff_id in handoff_ids:
            record = self._by_handoff.get(handoff_id)
            if record is not None and record.of(engine_id):
                self.act(record, record.sender.renewed(now=now), now)

    def waiting_for_room(self, handoff_id: bytes, engine_id: str) -> Outgoing | None:
        """This engine's half if it has no claim yet."""
        record = self._by_handoff.get(handoff_id)
        return record if record is not None and record.claim is None and record.of(engine_id) else None

    # --- from the receiving daemon and the lanes ---

    def message(self, record: Outgoing, message: PeerMessage, now: float) -> None:
        sender = record.sender
        match message:
            case Grant() if sender.state is not Sending.RESERVING:
                self._desk.stale(message)  # it must not move the window of puts under way
                actions = []
            case Grant() if len(message.places) != len(message.wanted):
                actions = sender.fail("GRANT names a place too many or too few", tell_peer=True)
            case Grant():
                record.window = message.window
                record.targets = dict(zip(message.wanted, message.places, strict=True))
                self._desk.trace(record.key, "granted", has=len(message.has), wanted=len(message.wanted))
                actions = sender.granted(
                    has=message.has, wanted=message.wanted, lease_epoch=message.lease_epoch, now=now
                )
            case Refuse():
                actions = sender.fail(f"refused by decode: {message.reason}", tell_peer=False)
            case Cancel():
                actions = sender.fail(f"peer: {message.reason}", tell_peer=False)
            case Committed():
                actions = sender.committed()
            case Wait():
                self._desk.trace(record.key, "wait", ahead=message.ahead)
                actions = []
            case _:
                self._desk.stale(message)
                actions = []
        self.act(record, actions, now)

    def put_ended(self, scheme: str, ticket: int, now: float, *, ok: bool, reason: str = "", at_ns: int = 0) -> None:
        """`at_ns`: see PutDone."""
        record, put = self._puts.pop((scheme, ticket), (None, None))
        if record is not None and put is not None:
            self.links.ended(put, at_ns / 1e9 if at_ns else now, ok=ok)
            self._desk.trace(record.key, "sent" if ok else "put_failed", at_ns=at_ns)
            self.act(record, record.sender.put_ended(ok=ok, reason=reason, now=now), now)

    def channel_lost(self, scheme: str, channel: int, reason: str, now: float) -> None:
        for record in list(self.records.values()):
            if record.route is not None and (record.route.scheme, record.route.channel) == (scheme, channel):
                self.act(record, record.sender.fail(f"lane {scheme} lost: {reason}", tell_peer=True), now)

    # --- carrying out actions ---

    def _reserve(
        self,
        record: Outgoing,
        kind: Kind,
        handle: str,
        block_hashes: list[bytes],
        *,
        tail_hash: bytes = b"",
        tenant: bytes,
        spare: bool = False,
    ) -> Reserve:
        """`kind`: of these blocks. `handle`: as text."""
        assert record.route is not None
        self._lanes.taken(record.route)
        return Reserve(
            **self._desk.ids(record.sender.handle, lease_epoch=0),
            handle=handle,
            namespace=namespace_of(kind.content),
            layout_id=layout_id(kind.layout),
            pages=record.pages,
            block_hashes=block_hashes,
            tail_hash=tail_hash,
            tenant=tenant,
            lane=record.route.scheme,
            spare=spare,
        )

    def act(self, record: Outgoing, actions: Sequence[do.Action], now: float) -> None:
        # In one queue, since a put that ends at once brings the next: within one another they would nest too deep.
        todo = deque(actions)
        while todo:
            todo += self._carry_out(record, todo.popleft(), now)

    def _carry_out(self, record: Outgoing, action: do.Action, now: float) -> Sequence[do.Action]:
        """Returns what comes of it at once."""
        ports, handle = self._desk.ports, record.sender.handle
        match action:
            case do.ToPeer(message):
                ports.to_peer(handle.decode_daemon, message)
            case do.ToEngine(message):
                assert record.engine is not None
                ports.to_engine(record.engine.info.engine_id, message)
            case do.Put():
                return self._put(record, action, now)
            case do.StopPuts():
                if record.route is not None and record.route.lane is not None:
                    record.route.lane.cancel(record.key[0])
            case do.Publish():
                assert record.claim is not None
                self._desk.store.commit(record.claim)
            case do.Abandon():
                assert record.claim is not None
                self._desk.store.abandon(record.claim)
            case do.RevokeEngine():
                grip = self._grips.get(record.key[0], "send")
                if grip is not None:
                    self._desk.store.revoke(grip.lease)
            case do.SendCommit(pages):
                self._send_commit(record, pages)
            case do.Ended(reason):
                self._forget(record, reason)
            case _:
                raise AssertionError(f"not a sender's action: {action}")
        return ()

    def _put(self, record: Outgoing, action: do.Put, now: float) -> Sequence[do.Action]:
        self._desk.trace(record.key, "put", layer=action.layer, pages=len(action.blocks), block=action.blocks[0])
        if self._land_here(record, action, now):
            return record.sender.put_ended(ok=True, reason="", now=now)
        ports, route = self._desk.ports, record.route
        assert route is not None
        try:
            if route.lane is None or route.region is None:
                raise UnknownTransport("the receiving half in this daemon is over")
            if route.channel < 0:
                route.channel = route.lane.connect(route.choice.endpoint)
                self._desk.trace(record.key, "lane", endpoint=route.choice.endpoint)
            ticket = route.lane.put(
                route.channel,
                region=route.region,
                window=record.window,
                copies=self._copies(record, action),
                notice=self._notice(record, action),
                queue=record.key[0],
                # Shards side by side, and what nobody waits for behind all that somebody does.
                urgency=float(action.layer % record.pages.shard_layers) if record.engine is not None else -1.0,
            )
        except (PdxError, ValueError) as error:  # the peer's endpoint or places are impossible
            return record.sender.put_ended(ok=False, reason=str(error), now=now)
        size_bytes = len(action.blocks) * record.pages.page_bytes
        underway = Underway(record.sender.handle.decode_daemon.daemon_id, size_bytes, now)
        self._puts[route.scheme, ticket] = record, underway
        ports.counters["pages_put"] += len(action.blocks)
        ports.counters["bytes_put"] += size_bytes
        return ()

    def _copies(self, record: Outgoing, action: do.Put) -> list[Copy]:
        """Pages that lie side by side on both sides travel as one span."""
        assert record.claim is not None
        places, targets, pages, layer = record.claim.places, record.targets, record.pages, action.layer
        copies: list[Copy] = []
        source = target = length = 0  # of the span that grows: no object for each page
        for block in action.blocks:
            start, target_start = places[block].page_offset(pages, layer), targets[block].page_offset(pages, layer)
            if start != source + length or target_start != target + length:
                if length:
                    copies.append(Copy(source, target, length))
                source, target, length = start, target_start, 0
            length += pages.page_bytes
        copies.append(Copy(source, target, length))
        return copies

    def _notice(self, record: Outgoing, action: do.Put) -> bytes:
        assert record.claim is not None
        memory, layer = self._desk.store.arena.memory, action.layer
        places = [record.claim.places[block] for block in action.blocks]
        checksums = [memory[(o := p.checksum_offset(layer)) : o + CHECKSUM_BYTES] for p in places]
        digests = []
        if self._desk.ports.digest_mode:
            digests = [memory[(o := p.digest_offset(record.pages, layer)) : o + DIGEST_BYTES] for p in places]
        return encode(
            Landed(
                handoff_id=record.key[0],
                attempt=record.key[1],
                lease_epoch=record.sender.lease_epoch,
                layer=layer,
                blocks=list(action.blocks),
                checksums=b"".join(checksums),
                digests=b"".join(digests),
            )
        )

    def _send_commit(self, record: Outgoing, pages: int) -> None:
        assert record.claim is not None
        self._desk.trace(record.key, "commit")
        checksum = checksum_of_checksums(
            self._desk.store.arena.memory, record.claim.places, record.sender.wanted, record.pages.layers
        )
        ids = self._desk.ids(record.sender.handle, lease_epoch=record.sender.lease_epoch)
        self._desk.ports.to_peer(record.sender.handle.decode_daemon, Commit(**ids, pages=pages, checksum=checksum))

    def _forget(self, record: Outgoing, reason: str) -> None:
        counters = self._desk.ports.counters
        self._desk.trace(record.key, "send_ended", reason=reason)
        self.records.pop(record.key, None)
        if self._by_handoff.get(record.key[0]) is record:
            del self._by_handoff[record.key[0]]
        self._desk.bury(record.key, reason)
        if record.route is not None:
            self._lanes.ended(record.route, proved=not reason and record.route.channel >= 0)
        if record.engine is not None:
            counters["sends_failed" if reason else "sends_settled"] += 1
            self._desk.tell_routers(record.key, reason)
        else:
            counters[f"{record.what}_failed" if reason else f"{record.what}_settled"] += 1
            counters["blocks_returned" if record.what == "returns" else "blocks_shared"] += (
                0 if reason else len(record.sender.wanted)
            )
        if record.wire is not None:
            self._desk.end_lease(record.wire)


def checksum_of_checksums(memory: memoryview, places: Sequence[Place], blocks: frozenset[int], layers: int) -> int:
    """xxh3-64 over the checksums of these blocks' pages, by block, then layer. Both daemons compute it."""
    digest = xxhash.xxh3_64()
    for block in sorted(blocks):
        start = places[block].checksum_offset(0)
        digest.update(memory[start : start + layers * CHECKSUM_BYTES])
    return digest.intdigest()

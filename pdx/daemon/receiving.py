"""Drives the receiving halves. The course of a half is decided in handoff.receiver; engines ask in `questions`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from pdx.buffer.claim import Claim
from pdx.buffer.lease import Lease, Owner
from pdx.buffer.selection import Selection
from pdx.daemon.grips import Grips
from pdx.daemon.lanes import Lanes
from pdx.daemon.ports import Desk, HandoffKey, namespace_for
from pdx.daemon.sending import Outgoing, checksum_of_checksums
from pdx.daemon.sessions import Engine
from pdx.errors import HandleError, Refused, WireError
from pdx.handoff import actions as do
from pdx.handoff.receiver import Receiver
from pdx.keys import layout_id, namespace_of
from pdx.layout import CHECKSUM_BYTES, DIGEST_BYTES, Place
from pdx.transport.api import Span
from pdx.wire import (
    NOTICE,
    ONE_REQUEST,
    Alive,
    Commit,
    Fail,
    Grant,
    Landed,
    PeerMessage,
    Reserve,
    decoder_of,
)

_decode_notice = decoder_of(NOTICE)


@dataclass(eq=False)
class Incoming:
    """One receiving half. With `paired`, both halves live in this daemon and share the sender's slots."""

    key: HandoffKey
    receiver: Receiver
    reserve: Reserve
    paired: Outgoing | None = None
    namespace: bytes = b""  # of its blocks, as its engine was when it was reserved; empty if it was not here
    own_claim: Claim | None = None
    wire: Lease | None = None  # holds the slots while puts may write them, and until the engine came or won't
    window: int = 0
    unfound: list[Selection] = field(default_factory=list)  # cleared while it waited for room: no lookup finds them

    @property
    def claim(self) -> Claim | None:
        return self.paired.claim if self.paired else self.own_claim

    @property
    def places(self) -> Sequence[Place]:
        return self.claim.places if self.claim else ()


class ReceivingHalves:
    """All receiving halves of this daemon. Owned by the control thread."""

    def __init__(self, desk: Desk, grips: Grips, lanes: Lanes) -> None:
        self._desk = desk
        self._grips = grips
        self._lanes = lanes
        self.records: dict[HandoffKey, Incoming] = {}
        self._windows: dict[int, Incoming] = {}
        self._epochs = 0

    # --- from the sending daemon ---

    def reserve(self, message: Reserve, paired: Outgoing | None, now: float) -> Incoming | None:
        """A new half that waits for room; None if it needs none: refused, or sharing the slots of `paired`."""
        ports = self._desk.ports
        try:
            handle = self._desk.verified(message.handle, daemon="decode_daemon")
            self._desk.use(handle, "receive")
            named = (handle.handoff_id, handle.attempt, handle.prefill_daemon.incarnation)
            if named != (message.handoff_id, message.attempt, message.incarnation):
                raise HandleError("RESERVE does not match its handle")
        except HandleError:
            ports.counters["handles_refused"] += 1
            return None
        self._epochs += 1
        receiver = Receiver(
            handle,
            blocks=len(message.block_hashes) + bool(message.tail_hash),
            layers=message.pages.layers,
            shards=message.pages.shards,
            lease_epoch=self._epochs,
            incarnation=ports.me.incarnation,
            now=now,
            spare=message.spare,
        )
        engine = ports.engine(handle.decode_engine)
        namespace = namespace_for(engine, message.tenant) if engine is not None else b""
        record = Incoming((handle.handoff_id, handle.attempt), receiver, message, paired, namespace)
        self.records[record.key] = record
        context: dict[str, Any] = {"traceparent": handle.traceparent} if handle.traceparent else {}
        self._desk.trace(record.key, "reserve", blocks=receiver.blocks, **context)
        mismatch = self._mismatch(message, handle.decode_engine, engine)
        if not mismatch and paired is None and self._lanes.region(message.lane) is None:
            mismatch = f"no lane {message.lane!r} ends here"
        if mismatch:
            self.act(record, receiver.refuse(mismatch), now)
            return None
        if paired is not None:
            self._share(record, paired, now)
            return None
        return record

    def claim(self, record: Incoming, now: float) -> bool:
        """Tries to claim the whole prompt. True if this half need not wait (any more): granted, or over."""
        message, handle = record.reserve, record.receiver.handle
        if self._desk.ports.engine(handle.decode_engine) is None:
            self.act(record, record.receiver.refuse("the decode engine has left"), now)
            return True
        try:
            claim = self._desk.store.claim(
                Owner("wire", handle.handoff_id.hex()),
                record.namespace,
                message.pages,
                message.block_hashes,
                tail=bool(message.tail_hash),
                now=now,
                ttl_s=float("inf"),  # the machine's budgets end it
            )
        except Refused as error:
            self.act(record, record.receiver.refuse(f"{ONE_REQUEST}{error}"), now)
            return True
        if claim is None:
            return False
        record.own_claim, record.wire = claim, claim.lease
        for which in record.unfound:
            self._desk.store.hide(claim, which)
        try:
            window = self._open_window(record, claim)
        except ValueError as error:  # more pieces than the lane can grant
            self._desk.store.abandon(claim)
            self.act(record, record.receiver.refuse(f"lane {message.lane}: {error}"), now)
            return True
        self._grant(record, claim, window=window, now=now)
        return True

    def give_way(self, now: float) -> None:
        """A handoff waits for room: what no request waits for ends, its slots are free when its window is closed."""
        for record in [r for r in self.records.values() if r.reserve.spare]:
            self.act(record, record.receiver.fail("a handoff waits for room", tell_peer=True), now)

    def message(self, record: Incoming, message: PeerMessage, now: float) -> None:
        match message:
            case Commit() if message.lease_epoch == record.receiver.lease_epoch:
                self._desk.trace(record.key, "commit")
                self.act(record, record.receiver.commit(message), now)
            case Alive():
                self.act(record, record.receiver.alive(now=now), now)
            case Fail():
                self.act(record, record.receiver.failed_by_peer(message), now)
            case _:
                self._desk.stale(message)

    # --- from the lanes ---

    def arrived(self, window: int, notice: bytes, now: float, *, at_ns: int = 0) -> None:
        """`at_ns`: see Arrived."""
        record = self._windows.get(window)
        try:
            landed = _decode_notice(notice)
        except WireError:
            self._desk.ports.counters["bad_notices"] += 1
            return
        if record is None or not _fits(landed, record):
            self._desk.ports.counters["stale_notices"] += 1
            return
        memory, pages = self._desk.store.arena.memory, record.reserve.pages
        for n, block in enumerate(landed.blocks):
            place = record.places[block]
            start = place.checksum_offset(landed.layer)
            memory[start : start + CHECKSUM_BYTES] = landed.checksums[n * CHECKSUM_BYTES :][:CHECKSUM_BYTES]
            if landed.digests:
                start = place.digest_offset(pages, landed.layer)
                memory[start : start + DIGEST_BYTES] = landed.digests[n * DIGEST_BYTES :][:DIGEST_BYTES]
        self.pages_landed(record, landed.layer, landed.blocks, now, at_ns=at_ns)

    def pages_landed(self, record: Incoming, layer: int, blocks: Sequence[int], now: float, *, at_ns: int = 0) -> None:
        """Bytes and checksums of these pages are in the slots: let the engine see them, and count."""
        block = min(blocks, default=-1)
        self._desk.trace(record.key, "landed", at_ns=at_ns, layer=layer, pages=len(blocks), block=block)
        shard = layer // record.reserve.pages.shard_layers
        for block, layers in record.receiver.landed(layer, blocks, now=now):
            if record.paired is None:  # in shared slots the prefill workers raise it, and may be further already
                self._desk.store.arena.set_watermark(record.places[block].header_offset, layers, shard)
        self._desk.ports.counters["pages_landed"] += len(blocks)
        self._desk.stirred[record.key] = None
        self.act(record, record.receiver.check(), now)

    def window_closed(self, window: int, now: float) -> None:
        record = self._windows.pop(window, None)
        if record is not None:
            self.act(record, record.receiver.window_closed(), now)

    def tick(self, now: float) -> None:
        for record in list(self.records.values()):
            self.act(record, record.receiver.tick(now=now), now)

    # --- carrying out actions ---

    def act(self, record: Incoming, actions: Sequence[do.Action], now: float) -> None:
        if actions:
            self._desk.stirred[record.key] = None
        for action in actions:
            self._carry_out(record, action, now)

    def _carry_out(self, record: Incoming, action: do.Action, now: float) -> None:
        ports, handle = self._desk.ports, record.receiver.handle
        match action:
            case do.ToPeer(message):
                ports.to_peer(handle.prefill_daemon, message)
            case do.ToEngine(message):
                ports.to_engine(handle.decode_engine, message)
            case do.Publish():
                if record.own_claim is not None:
                    self._desk.store.commit(record.own_claim)
            case do.Abandon():
                if record.own_claim is not None:
                    self._desk.store.abandon(record.own_claim)
            case do.RevokeEngine():
                grip = self._grips.get(record.key[0], "load")
                if grip is not None:
                    self._desk.store.revoke(grip.lease)
            case do.CheckCommit(expected):
                self._check_commit(record, expected, now)
            case do.CloseWindow():
                region = self._lanes.region(record.reserve.lane)
                assert region is not None
                region.close_window(record.window)
            case do.Ended(reason):
                self._forget(record, reason)
            case _:
                raise AssertionError(f"not a receiver's action: {action}")

    def _check_commit(self, record: Incoming, expected: int, now: float) -> None:
        found = checksum_of_checksums(
            self._desk.store.arena.memory, record.places, record.receiver.wanted, record.reserve.pages.layers
        )
        if found != expected:
            self._desk.ports.counters["commit_mismatches"] += 1
        self.act(record, record.receiver.checked(ok=found == expected, now=now), now)

    def _forget(self, record: Incoming, reason: str) -> None:
        self._desk.trace(record.key, "receive_ended", reason=reason)
        spare, counters = record.reserve.spare, self._desk.ports.counters
        counters[f"{'spares' if spare else 'receives'}_{'failed' if reason else 'settled'}"] += 1
        self.records.pop(record.key, None)
        self._desk.bury(record.key, reason)
        if not spare:
            self._desk.tell_routers(record.key, reason)
        if record.wire is not None:
            self._desk.end_lease(record.wire)

    # --- steps ---

    def _mismatch(self, message: Reserve, decode_engine: str, engine: Engine | None) -> str:
        if message.spare and not self._desk.ports.return_answers:
            return "no answers are taken back here"
        if engine is None or engine.pages is None or not engine.complete:  # its scheduler tells of its weights' epoch
            return f"engine {decode_engine!r} is not attached here"
        if message.namespace != namespace_of(engine.info.content):
            return "model contents differ"
        if message.pages.shards != engine.pages.shards:
            return f"tensor parallelism differs: {message.pages.shards} ranks there, {engine.pages.shards} here"
        if message.layout_id != layout_id(engine.info.layout) or message.pages != engine.pages:
            return "KV layouts differ"
        return ""

    def _share(self, record: Incoming, paired: Outgoing, now: float) -> None:
        """Both engines use this daemon: the receiver reads the very slots that the sender fills."""
        if paired.claim is None:  # a RESERVE that no half of ours has sent
            self.act(record, record.receiver.refuse("the prefill engine's claim does not stand"), now)
            return
        owner = Owner("wire", record.key[0].hex() + "/receive")
        record.wire = self._desk.store.lease(paired.claim, owner, now=now, ttl_s=float("inf"))
        self._grant(record, paired.claim, window=0, now=now)

    def _grant(self, record: Incoming, claim: Claim, *, window: int, now: float) -> None:
        receiver = record.receiver
        record.window = window
        wanted = sorted(claim.fresh)
        grant = Grant(
            **self._desk.ids(receiver.handle, lease_epoch=receiver.lease_epoch),
            has=[block for block in range(receiver.blocks) if block not in claim.fresh],
            wanted=wanted,
            places=[claim.places[block] for block in wanted],
            window=window,
        )
        self._desk.trace(record.key, "grant", wanted=len(wanted))
        self.act(record, receiver.claimed(wanted, grant, windowed=record.paired is None, now=now), now)

    def _open_window(self, record: Incoming, claim: Claim) -> int:
        region = self._lanes.region(record.reserve.lane)
        assert region is not None
        window = region.open_window(spans_of(claim))
        self._windows[window] = record
        return window


def spans_of(claim: Claim) -> list[Span]:
    """Every byte of the fresh blocks' pages, and no other: they lie side by side in slots that have no other blocks."""
    return [Span(slot.run.offset, slot.blocks * slot.layout.block_bytes) for slot in claim.fresh_slots]


def _fits(landed: Landed, record: Incoming) -> bool:
    return (
        record.key == (landed.handoff_id, landed.attempt)
        and landed.lease_epoch == record.receiver.lease_epoch
        and record.receiver.awaits(landed.layer, landed.blocks)
        and len(landed.checksums) == len(landed.blocks) * CHECKSUM_BYTES
        and len(landed.digests) in (0, len(landed.blocks) * DIGEST_BYTES)
    )

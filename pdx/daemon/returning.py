"""Hands answers back: what a decode engine keeps goes to the host whose prefill engine had the prompt, as cache.

So the next turn of a chat finds the whole conversation where it will be computed. A request's *origin* is the handoff
by which it came; its chain is the blocks that its OPEN_LOAD named, and behind them those of each lot that its engine
keeps. A chunk's worth that is new, if that is an eighth of the chain, makes a return due, and all that is new when the
request is over: a handoff of the whole chain that this daemon opens by itself, with a handle of its own. The receiver
has the prompt's blocks and says so, so only the others travel. Nobody waits for a return: it begins when no handoff
wants room here, and where it fails nothing is said; the next one of its chain brings what is missing.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

import msgspec

from pdx.buffer.lease import Owner
from pdx.daemon.ports import Desk, HandoffKey, namespace_for
from pdx.daemon.sending import SendingHalves
from pdx.daemon.sessions import Engine
from pdx.daemon.spaces import kind_of
from pdx.errors import UnknownTransport
from pdx.handoff.handle import TransferHandle
from pdx.wire import Keep, OpenLoad

# As many hashes of 32 bytes, in all chains together, take some 20 MB; the oldest chains are forgotten first.
CHAIN_BLOCKS_MAX = 1 << 18
ORIGINS_MAX = 4096  # one for each request that decode engines have in flight
ORIGIN_S = 600.0  # without a lot: longer than a request waits, or takes for one block
GROWN_BY = 8  # a part of a chain that is new: both daemons go through all of it for each return
UNDER_WAY_MAX = 2  # to one peer: one has its pages on the lane while the next is being granted
DUE_MAX = 64  # to one peer


@dataclass(eq=False)
class Origin:
    """One request that came from another daemon, and what is known of its chain."""

    engine: Engine
    handle: TransferHandle  # of the handoff by which it came
    tenant: bytes
    chain: list[bytes]
    kept: int  # leading blocks that are, or were, in the store
    returned: int  # leading blocks that the peer has been offered
    used_at: float
    lots_open: int = 0
    over: bool = False  # no lot will follow

    @property
    def peer(self) -> str:
        return self.handle.prefill_daemon.control

    @property
    def due(self) -> bool:
        assert self.engine.pages is not None
        new = self.kept - self.returned
        if self.over and not self.lots_open:
            return new > 0
        return new >= self.engine.pages.chunk_blocks and new * GROWN_BY >= self.kept


class Returns:
    """All origins of this daemon, and what it is about to hand back. Owned by the control thread."""

    def __init__(self, desk: Desk, sending: SendingHalves) -> None:
        self._desk = desk
        self._sending = sending
        self._origins: OrderedDict[bytes, Origin] = OrderedDict()  # the one used last comes last
        self._chain_blocks = 0
        self._lots: dict[bytes, tuple[Origin, int]] = {}  # open ones: origin, and blocks of its chain up to their end
        self._due: dict[str, dict[Origin, None]] = {}  # by peer, in the order in which they became due
        self._under_way: dict[HandoffKey, Origin] = {}

    # --- what engines do --------------------------------------------------------------------------------------

    def came(self, engine: Engine, message: OpenLoad, handle: TransferHandle, now: float) -> None:
        """A request asks for its handoff's pages. `handle` has been verified."""
        ports = self._desk.ports
        here = handle.prefill_daemon.daemon_id == ports.me.daemon_id
        if here or not ports.return_answers or handle.handoff_id in self._origins:
            return
        blocks = len(message.block_hashes)
        origin = Origin(engine, handle, message.tenant, list(message.block_hashes), blocks, blocks, now)
        self._origins[handle.handoff_id] = origin
        self._chain_blocks += blocks
        self._forget_oldest(now)

    def named(self, engine: Engine, message: Keep, now: float, *, kept: bool) -> None:
        """The engine names the next blocks of a chain: there is room for them, or the chain ends before them."""
        origin = self._origins.get(message.origin)
        if origin is None or origin.over or (origin.engine, origin.tenant) != (engine, message.tenant):
            return
        origin.used_at = now
        self._origins.move_to_end(message.origin)
        if not kept:
            self._end(origin)
            return
        origin.chain += message.block_hashes
        origin.lots_open += 1
        self._chain_blocks += len(message.block_hashes)
        self._lots[message.handoff_id] = origin, len(origin.chain)
        self._forget_oldest(now)

    def lot_ended(self, handoff_id: bytes, *, kept: bool) -> None:
        """No-op for what is no lot of an origin. One that is not kept ends its chain."""
        lot = self._lots.pop(handoff_id, None)
        if lot is None:
            return
        origin, end = lot
        origin.lots_open -= 1
        if kept:
            origin.kept = max(origin.kept, end)
        if origin.over or not kept:
            self._end(origin)
        else:
            self._queue_if_due(origin)

    def finished(self, engine_id: str, handoff_id: bytes) -> None:
        """The request is over; its last lot may still be open."""
        origin = self._origins.get(handoff_id)
        if origin is not None and origin.engine.info.engine_id == engine_id:
            self._end(origin)

    # --- the peers and the clock ------------------------------------------------------------------------------

    def peer_lost(self, control: str) -> None:
        """Whoever answers there again is another incarnation, and has nothing."""
        for handoff_id in [name for name, origin in self._origins.items() if origin.peer == control]:
            self._forget(handoff_id)
        self._lots = {name: lot for name, lot in self._lots.items() if lot[0].peer != control}
        self._under_way = {key: origin for key, origin in self._under_way.items() if origin.peer != control}
        self._due.pop(control, None)

    def tick(self, now: float, *, room: bool) -> None:
        """`room`: nobody more important waits for some."""
        for key in [key for key in self._under_way if key not in self._sending.records]:
            self._queue_if_due(self._under_way.pop(key))
        self._forget_oldest(now)
        for peer, due in list(self._due.items()) if room else ():
            busy = [origin for origin in self._under_way.values() if origin.peer == peer]
            for origin in [one for one in due if one not in busy][: UNDER_WAY_MAX - len(busy)]:
                del due[origin]
                self._begin(origin, now)
            if not due:
                del self._due[peer]

    # --- steps ------------------------------------------------------------------------------------------------

    def _end(self, origin: Origin) -> None:
        origin.over = True
        self._queue_if_due(origin)
        if not origin.lots_open:  # the queue knows it, if anything of it is new
            self._forget(origin.handle.handoff_id)

    def _queue_if_due(self, origin: Origin) -> None:
        if not origin.due:
            return
        due = self._due.setdefault(origin.peer, {})
        due[origin] = None  # its place in the queue stays, if it has one: its chain is whatever there is by then
        if len(due) > DUE_MAX:
            del due[next(iter(due))]
            self._desk.ports.counters["returns_dropped"] += 1

    def _begin(self, origin: Origin, now: float) -> None:
        ports, engine, handle = self._desk.ports, origin.engine, origin.handle
        chain, origin.returned = origin.chain[: origin.kept], origin.kept
        back = msgspec.structs.replace(
            handle, handoff_id=ports.new_id(), attempt=0, prefill_engine=handle.decode_engine,
            decode_engine=handle.prefill_engine, prefill_daemon=ports.me, decode_daemon=handle.prefill_daemon,
            issued_unix_s=ports.wall_clock(),
        )  # fmt: skip
        found = self._desk.store.read(
            Owner("wire", back.handoff_id.hex()), namespace_for(engine, origin.tenant), chain, now=now,
            ttl_s=float("inf"),
        )  # fmt: skip
        if found is None or len(found.places) < len(chain):  # behind a gap no block is of use
            if found is not None:
                self._desk.store.release(found.lease)
            ports.counters["returns_evicted"] += 1
            return
        try:
            key = self._sending.hand_over(back, kind_of(engine), origin.tenant, chain, found, now, what="returns")
        except UnknownTransport:
            ports.counters["returns_dropped"] += 1
            return
        self._under_way[key] = origin

    def _forget_oldest(self, now: float) -> None:
        while self._origins:
            handoff_id, oldest = next(iter(self._origins.items()))
            late = now - oldest.used_at > ORIGIN_S
            if not late and len(self._origins) <= ORIGINS_MAX and self._chain_blocks <= CHAIN_BLOCKS_MAX:
                return
            self._forget(handoff_id)

    def _forget(self, handoff_id: bytes) -> None:
        origin = self._origins.pop(handoff_id, None)
        if origin is not None:
            self._chain_blocks -= len(origin.chain)

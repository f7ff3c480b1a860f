"""Puts blocks of this daemon's arena into a peer's, because a router says that a request there is about to need them.

It goes as an answer is handed back: a handoff without engines, *spare* at the peer, behind all that somebody waits for.
Who asked is told nothing: the peer's HOLDINGS say what has come. A wish that can't begin soon is of no use any more.
"""

from __future__ import annotations

from collections import deque

from pdx.buffer.lease import Owner
from pdx.daemon.ports import Desk, HandoffKey
from pdx.daemon.sending import SendingHalves
from pdx.daemon.spaces import KnownSpaces
from pdx.errors import Refused, UnknownTransport
from pdx.handoff.handle import TransferHandle
from pdx.wire import Budgets, Share

WAIT_S = 1.0  # until it has begun: whoever waits for it computes by then
WISHES_MAX = 256
UNDER_WAY_MAX = 4  # to one peer
BUDGETS = Budgets(grant_s=1.0, slab_s=5.0, total_s=10.0, claim_s=1.0)


class Sharing:
    """Owned by the control thread."""

    def __init__(self, desk: Desk, sending: SendingHalves, spaces: KnownSpaces) -> None:
        self._desk = desk
        self._sending = sending
        self._spaces = spaces
        self._wishes: deque[tuple[float, Share]] = deque(maxlen=WISHES_MAX)
        self._under_way: dict[HandoffKey, str] = {}  # peer's daemon id

    def ask(self, wish: Share, now: float) -> None:
        self._wishes.append((now, wish))

    def tick(self, now: float, *, room: bool) -> None:
        """`room`: nobody more important waits for some."""
        self._under_way = {key: peer for key, peer in self._under_way.items() if key in self._sending.records}
        for _ in range(len(self._wishes)):
            asked_at, wish = self._wishes.popleft()
            if now - asked_at > WAIT_S:
                self._desk.ports.counters["shares_late"] += 1
            elif not room or list(self._under_way.values()).count(wish.to.daemon_id) >= UNDER_WAY_MAX:
                self._wishes.append((asked_at, wish))
            else:
                self._begin(wish, now)

    def _begin(self, wish: Share, now: float) -> None:
        ports, store = self._desk.ports, self._desk.store
        handle = TransferHandle(
            handoff_id=ports.new_id(), attempt=0, prefill_engine="", decode_engine=wish.engine,
            prefill_daemon=ports.me, decode_daemon=wish.to, budgets=BUDGETS, issued_unix_s=ports.wall_clock(),
        )  # fmt: skip
        owner, namespace = Owner("wire", handle.handoff_id.hex()), wish.space + wish.tenant
        try:
            kind = self._spaces.get(wish.space)
        except Refused:
            ports.counters["shares_absent"] += 1
            return
        found = store.read(owner, namespace, wish.block_hashes, now=now, ttl_s=float("inf"))
        if found is None or wish.to.daemon_id == ports.me.daemon_id:
            if found is not None:
                store.release(found.lease)
            ports.counters["shares_absent"] += 1
            return
        chain = wish.block_hashes[: len(found.places)]
        try:
            key = self._sending.hand_over(handle, kind, wish.tenant, chain, found, now, what="shares")
        except UnknownTransport:
            ports.counters["shares_absent"] += 1
            return
        self._under_way[key] = wish.to.daemon_id
        ports.counters["shares_begun"] += 1

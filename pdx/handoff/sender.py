"""The sending half of a handoff: events in, actions out. No sockets, no store, no clock of its own.

It knows which pages exist (filled by the engine, or held by the store from the start), which ones the receiver wants,
and which puts are under way. It never decides where pages lie: the driver knows the places.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from typing import Any

from pdx.handoff.actions import (
    Abandon,
    Action,
    Ended,
    Publish,
    Put,
    RevokeEngine,
    SendCommit,
    StopPuts,
    ToEngine,
    ToPeer,
)
from pdx.handoff.handle import TransferHandle
from pdx.handoff.states import SENDING, Sending, after
from pdx.layout import Place
from pdx.wire import ONE_REQUEST, Alive, Fail, PeerMessage, SendEnded, SendOpened, shortened

# A lane's notice holds 64 KiB, and a page takes up to 45 bytes of it (number, checksum, digest).
PUT_BLOCKS_MAX = 1024
# What may be under way at once, in PUTS_OPEN puts or more. Each page costs the driver's thread some microseconds, in
# which nobody else's last slab goes out; and a fast lane sends as much while that thread has something else to do.
OPEN_BYTES, PUTS_OPEN = 64 << 20, 4


class Sender:
    """One handoff, sending side. Every method returns the actions to take, in order."""

    def __init__(
        self,
        handle: TransferHandle,
        *,
        request_id: str,
        blocks: int,
        layers: int,
        page_bytes: int,
        incarnation: int,
        now: float,
    ) -> None:
        self.handle = handle
        self.request_id = request_id
        self.state = Sending.CLAIMING
        self.reason = ""  # why it failed; empty while it has not
        self.lease_epoch = 0
        self.blocks = blocks
        self._layers = layers
        self._incarnation = incarnation
        self._filled = [0] * blocks  # bit l: layer l of this block is in its slot
        self._whole = (1 << layers) - 1
        self._unfilled = blocks  # how many are not whole
        self._wanted: frozenset[int] = frozenset()
        self._published = False
        self._has_engine = self._engine_holds = True
        self._put_blocks = min(PUT_BLOCKS_MAX, max(1, OPEN_BYTES // PUTS_OPEN // page_bytes))
        self._ready: deque[Put] = deque()  # filled and wanted, and no room for them among those under way
        self._open: deque[int] = deque()  # pages of each put under way; lanes end those of a handoff in their order
        self._pages_open = 0
        self.pages_put = 0
        self.started_at = now
        self._progress_at = now

    # --- events from this host ---

    def claimed(
        self, places: Sequence[Place], fresh: frozenset[int], reserve: PeerMessage, *, now: float
    ) -> list[Action]:
        """One claim for all blocks stands; those not in `fresh` are whole already. `reserve` is the message to send."""
        self.state = after(SENDING, self.state, "claimed")
        for block in range(self.blocks):
            if block not in fresh:
                self._filled[block] = self._whole
        self._unfilled = self.blocks - self._filled.count(self._whole)
        self._progress_at = now
        opened = SendOpened(
            request_id=self.request_id,
            handoff_id=self.handle.handoff_id,
            places=[place if block in fresh else None for block, place in enumerate(places)],
        )
        return [ToEngine(opened), ToPeer(reserve), *self._publish_if_whole()]

    def held(self, reserve: PeerMessage, *, now: float) -> list[Action]:
        """Instead of `claimed`, for blocks that are all in the store already: there is no engine to tell or await."""
        self.state = after(SENDING, self.state, "claimed")
        self._filled, self._unfilled = [self._whole] * self.blocks, 0
        self._published = True
        self._has_engine = self._engine_holds = False
        self._progress_at = now
        return [ToPeer(reserve)]

    def filled(self, layer: int, blocks: Iterable[int], *, now: float) -> list[Action]:
        """The engine has copied this layer of these blocks into their slots."""
        if self.state in (Sending.CLAIMING, Sending.DRAINING, Sending.ENDED) or not 0 <= layer < self._layers:
            return []
        bit = 1 << layer
        ready = [b for b in dict.fromkeys(blocks) if 0 <= b < self.blocks and not self._filled[b] & bit]
        for block in ready:
            self._filled[block] |= bit
            self._unfilled -= self._filled[block] == self._whole
        self._progress_at = now
        actions = self._publish_if_whole()
        if self.state is Sending.SENDING:
            self._queue(layer, [b for b in ready if b in self._wanted])
            actions += self._go_on()
        return actions

    def renewed(self, *, now: float) -> list[Action]:
        """The engine says that the request lives, computing or still in its queue."""
        if self.state is not Sending.SENDING or self._open:
            return []
        self._progress_at = now
        return [ToPeer(Alive(**self._ids()))]

    def put_ended(self, *, ok: bool, reason: str, now: float) -> list[Action]:
        """One Put action has come to its end: its slots are no longer read by it."""
        self._pages_open -= self._open.popleft()
        self._progress_at = now
        if self.state is Sending.DRAINING:
            return self._drained_if_quiet()
        if not ok:
            return self.fail(f"put failed: {reason}", tell_peer=True)
        return self._go_on()

    def engine_let_go(self, *, ok: bool, reason: str) -> list[Action]:
        """The engine's steps no longer touch the slots. Not ok: it won't fill the rest either.

        With ok, its last bells may still be on their way (scheduler and worker ring on different sockets); should
        one be lost, the slab budget ends the handoff.
        """
        self._engine_holds = False
        if self.state is Sending.SETTLED:
            return self._end()
        if ok or self._published:
            return []
        return self.fail(f"{ONE_REQUEST}prefill engine: {reason}", tell_peer=True)

    # --- messages from the receiving daemon ---

    def granted(self, *, has: Iterable[int], wanted: Iterable[int], lease_epoch: int, now: float) -> list[Action]:
        if self.state is not Sending.RESERVING:
            return []
        has_set, wanted_set = frozenset(has), frozenset(wanted)
        if has_set & wanted_set or has_set | wanted_set != frozenset(range(self.blocks)):
            return self.fail("GRANT does not cover the prompt", tell_peer=True)
        self.state = after(SENDING, self.state, "granted")
        self.lease_epoch = lease_epoch
        self._wanted = wanted_set
        self._progress_at = now
        begun = sorted(block for block in wanted_set if self._filled[block])
        are_whole = all(self._filled[block] == self._whole for block in begun)
        for layer in range(self._layers):
            self._queue(layer, begun if are_whole else [b for b in begun if self._filled[b] >> layer & 1])
        return self._go_on()

    def committed(self) -> list[Action]:
        if self.state is not Sending.COMMITTING:
            return []
        self.state = after(SENDING, self.state, "committed")
        return [] if self._engine_holds else self._end()

    # --- ends ---

    def fail(self, reason: str, *, tell_peer: bool) -> list[Action]:
        """Any failure of either side, the network, a budget or the router. Idempotent."""
        if self.state in (Sending.SETTLED, Sending.DRAINING, Sending.ENDED):
            return []
        self.reason = reason = shortened(reason)
        was_claiming = self.state is Sending.CLAIMING
        self.state = after(SENDING, self.state, "fail")
        ended = SendEnded(request_id=self.request_id, handoff_id=self.handle.handoff_id, reason=reason)
        actions: list[Action] = [ToEngine(ended)] if self._has_engine else []
        if was_claiming:
            return [*actions, Ended(reason)]
        if tell_peer:
            actions.append(ToPeer(Fail(**self._ids(), reason=reason)))
        actions.append(StopPuts())
        if not self._published:
            actions.append(Abandon())
            if self._engine_holds:
                actions.append(RevokeEngine())
        return actions + self._drained_if_quiet()

    def tick(self, *, now: float) -> list[Action]:
        """Budgets. Call it a few times a second."""
        budgets = self.handle.budgets
        waited, silent = now - self.started_at, now - self._progress_at
        if self.state in (Sending.CLAIMING, Sending.RESERVING) and waited > budgets.grant_s:
            return self.fail(f"no GRANT within {budgets.grant_s:g} s ({self.state.value})", tell_peer=True)
        if self.state in (Sending.SENDING, Sending.COMMITTING):
            if silent > budgets.slab_s:
                return self.fail(f"no progress for {budgets.slab_s:g} s ({self.state.value})", tell_peer=True)
            if waited > budgets.total_s:
                return self.fail(f"not finished within {budgets.total_s:g} s", tell_peer=True)
        return []

    @property
    def hurried(self) -> bool:
        """Whether the end of a put under way is waited for: others have no room, COMMIT follows, or all is to end."""
        if self.state is Sending.DRAINING:
            return True
        return bool(self._open) and (bool(self._ready) or self.pages_put == len(self._wanted) * self._layers)

    @property
    def wanted(self) -> frozenset[int]:
        return self._wanted

    def __repr__(self) -> str:
        filled = sum(bits.bit_count() for bits in self._filled)
        reason = f", {self.reason}" if self.reason else ""
        return (
            f"<Sender {self.handle.handoff_id.hex()[:8]} {self.state.value}: {filled}/{self.blocks * self._layers} "
            f"pages filled, {self.pages_put} put, {len(self._open)} puts open{reason}>"
        )

    # --- steps ---

    def _queue(self, layer: int, blocks: list[int]) -> None:
        size = self._put_blocks
        self._ready += [Put(layer, tuple(blocks[start : start + size])) for start in range(0, len(blocks), size)]

    def _go_on(self) -> list[Action]:
        """As many puts as there is room for, in the order in which they became ready; COMMIT behind the last one."""
        actions: list[Action] = []
        room = self._put_blocks * PUTS_OPEN
        while self._ready and self._pages_open + len(self._ready[0].blocks) <= room:
            put = self._ready.popleft()
            self._open.append(len(put.blocks))
            self._pages_open += len(put.blocks)
            self.pages_put += len(put.blocks)
            actions.append(put)
        return actions or self._commit_if_all_sent()

    def _publish_if_whole(self) -> list[Action]:
        if self._published or self._unfilled:
            return []
        self._published = True
        return [Publish()]

    def _commit_if_all_sent(self) -> list[Action]:
        if self.state is not Sending.SENDING or self._open or not self._published:
            return []
        if self.pages_put < len(self._wanted) * self._layers:
            return []
        self.state = after(SENDING, self.state, "all_sent")
        return [SendCommit(pages=self.pages_put)]

    def _drained_if_quiet(self) -> list[Action]:
        if self.state is not Sending.DRAINING or self._open:
            return []
        self.state = after(SENDING, self.state, "drained")
        return [Ended(self.reason)]

    def _end(self) -> list[Action]:
        self.state = after(SENDING, self.state, "let_go")
        return [Ended("")]

    def _ids(self) -> dict[str, Any]:
        return {
            "handoff_id": self.handle.handoff_id,
            "attempt": self.handle.attempt,
            "lease_epoch": self.lease_epoch,
            "incarnation": self._incarnation,
        }

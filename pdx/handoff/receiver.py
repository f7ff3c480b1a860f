"""The receiving half of a handoff: events in, actions out. No sockets, no store, no clock of its own.

It knows which pages have landed and whether the decode engine has come for them. The engine may open its load at any
time after GRANT and reads along; nothing here waits for it except the claim budget after the last byte.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from pdx.handoff.actions import (
    Abandon,
    Action,
    CheckCommit,
    CloseWindow,
    Ended,
    Publish,
    RevokeEngine,
    ToEngine,
    ToPeer,
)
from pdx.handoff.handle import TransferHandle
from pdx.handoff.states import RECEIVING, Receiving, after
from pdx.wire import Cancel, Commit, Committed, Fail, LoadEnded, PeerMessage, Refuse, shortened


class Receiver:
    """One handoff, receiving side. Every method returns the actions to take, in order."""

    def __init__(
        self,
        handle: TransferHandle,
        *,
        blocks: int,
        layers: int,
        shards: int = 1,
        lease_epoch: int,
        incarnation: int,
        now: float,
        spare: bool = False,
    ) -> None:
        """`spare`: no engine will come for it."""
        self.handle = handle
        self.state = Receiving.WAITING
        self.reason = ""
        self.blocks = blocks
        self.lease_epoch = lease_epoch
        self._layers = layers
        self._shard_layers = layers // shards
        self._incarnation = incarnation
        self._whole = (1 << layers) - 1
        self._landed: dict[int, int] = {}  # wanted block -> bitmap of layers
        self._pages_missing = 0
        self.begun = False  # the first page is here, or none is to come
        self._commit: Commit | None = None
        self._checking = False
        self._window_open = False
        self._engine = "gone" if spare else "absent"  # -> "loading" -> "gone"
        self.started_at = now
        self._progress_at = now

    # --- events from this host ---

    def claimed(self, wanted: Iterable[int], grant: PeerMessage, *, windowed: bool, now: float) -> list[Action]:
        """One claim for all blocks stands; `wanted` are to come. Not `windowed`: the sender fills our slots itself."""
        self.state = after(RECEIVING, self.state, "claimed")
        self._landed = {block: 0 for block in wanted}
        self._pages_missing = len(self._landed) * self._layers
        self.begun = not self._landed
        self._window_open = windowed
        self._progress_at = now
        return [ToPeer(grant)]

    def refuse(self, reason: str) -> list[Action]:
        """The claim can never be had: the prompt is too large, or the layouts differ."""
        self.reason = reason = shortened(reason)
        self.state = after(RECEIVING, self.state, "fail")
        return [ToPeer(Refuse(**self._ids(), reason=reason)), Ended(reason)]

    def awaits(self, layer: int, blocks: Iterable[int]) -> bool:
        """Whether every one of these pages is still to come. None lands twice: what was checked must stay as it is."""
        if self.state is not Receiving.GRANTED or not 0 <= layer < self._layers:
            return False
        return all(not self._landed.get(block, self._whole) >> layer & 1 for block in blocks)

    def landed(self, layer: int, blocks: Iterable[int], *, now: float) -> list[tuple[int, int]]:
        """Bytes of these pages are in place. Returns (block, leading layers landed of this layer's shard)."""
        if self.state is not Receiving.GRANTED or not 0 <= layer < self._layers:
            return []
        self._progress_at = now
        first = layer - layer % self._shard_layers
        watermarks = []
        for block in blocks:
            if block not in self._landed:
                continue
            self.begun = True
            self._pages_missing -= not self._landed[block] >> layer & 1
            bits = self._landed[block] = self._landed[block] | 1 << layer
            missing = ~bits >> first
            leading = (missing & -missing).bit_length() - 1
            watermarks.append((block, min(leading, self._shard_layers)))
        return watermarks

    def check(self) -> list[Action]:
        """Asks for the final comparison once COMMIT and every page are in. Call after landed(); commit() does it."""
        if self.state is not Receiving.GRANTED or self._commit is None or self._checking:
            return []
        if self._pages_missing:
            return []
        self._checking = True
        return [CheckCommit(self._commit.checksum)]

    def checked(self, *, ok: bool, now: float) -> list[Action]:
        if self.state is not Receiving.GRANTED:
            return []
        if not ok:
            return self.fail("COMMIT does not match the pages that landed", tell_peer=True)
        self.state = after(RECEIVING, self.state, "all_landed")
        self._progress_at = now
        actions: list[Action] = [Publish(), ToPeer(Committed(**self._ids()))]
        if self._window_open:
            actions.append(CloseWindow())
        return actions if self._engine != "gone" else [*actions, *self._end_if_quiet()]

    def engine_opened(self) -> bool:
        """The decode engine asks for the pages. True: it may have them, and holds a lease from now on."""
        if self.state not in (Receiving.GRANTED, Receiving.LANDED) or self._engine != "absent":
            return False
        self._engine = "loading"
        return True

    def engine_let_go(self, *, ok: bool, reason: str) -> list[Action]:
        """The engine touches the slots no more: it has loaded, given up, or died."""
        if self._engine == "gone":
            return []
        self._engine = "gone"
        if self.state is Receiving.GRANTED and not ok:
            return self.fail(f"decode engine: {reason}", tell_peer=True)
        return self._end_if_quiet()

    def window_closed(self) -> list[Action]:
        self._window_open = False
        return self._end_if_quiet()

    # --- messages from the sending daemon ---

    def commit(self, message: Commit) -> list[Action]:
        if self.state is not Receiving.GRANTED or self._commit is not None:
            return []
        if message.pages != len(self._landed) * self._layers:
            return self.fail(
                f"COMMIT of {message.pages} pages where {len(self._landed) * self._layers} were wanted", tell_peer=True
            )
        self._commit = message
        return self.check()

    def alive(self, *, now: float) -> list[Action]:
        """Nothing to land yet, but the sender's engine has not forgotten us. The whole budget goes on."""
        if self.state is Receiving.GRANTED:
            self._progress_at = now
        return []

    # --- ends ---

    def fail(self, reason: str, *, tell_peer: bool) -> list[Action]:
        """Any failure of either side, the network, a budget or the router. Idempotent."""
        if self.state in (Receiving.FAILING, Receiving.ENDED):
            return []
        self.reason = reason = shortened(reason)
        was = self.state
        self.state = after(RECEIVING, self.state, "fail")
        actions: list[Action] = []
        if tell_peer and was is not Receiving.LANDED:
            actions.append(ToPeer(Cancel(**self._ids(), reason=reason)))
        if was is Receiving.WAITING:
            return [*actions, Ended(reason)]
        if was is Receiving.GRANTED:
            actions.append(Abandon())
        if self._window_open:
            actions.append(CloseWindow())
        if self._engine == "loading":
            actions += [ToEngine(LoadEnded(handoff_id=self.handle.handoff_id, reason=reason)), RevokeEngine()]
        return actions + self._end_if_quiet()

    def failed_by_peer(self, message: Fail) -> list[Action]:
        return self._sender_failed(f"prefill: {message.reason}", tell_peer=False)

    def peer_lost(self) -> list[Action]:
        """The connection to the sending daemon broke. It is told of the end, for it may live."""
        return self._sender_failed("prefill daemon is gone", tell_peer=True)

    def _sender_failed(self, reason: str, *, tell_peer: bool) -> list[Action]:
        # Once landed, that matters no longer: every page is here and checked, and an open window the lane's to close.
        return [] if self.state is Receiving.LANDED else self.fail(reason, tell_peer=tell_peer)

    def tick(self, *, now: float) -> list[Action]:
        """Budgets. Call it a few times a second."""
        budgets = self.handle.budgets
        waited, silent = now - self.started_at, now - self._progress_at
        if self.state is Receiving.WAITING and waited > budgets.grant_s:
            return self.fail(f"no room within {budgets.grant_s:g} s", tell_peer=True)
        if self.state is Receiving.GRANTED:
            if silent > budgets.slab_s:
                return self.fail(f"nothing landed for {budgets.slab_s:g} s", tell_peer=True)
            if waited > budgets.total_s:
                return self.fail(f"not finished within {budgets.total_s:g} s", tell_peer=True)
        if self.state is Receiving.LANDED and self._engine == "absent" and silent > budgets.claim_s:
            self._engine = "gone"
            return self._end_if_quiet()
        return []

    @property
    def hurried(self) -> bool:
        """Whether the next page is waited for: by an engine that asks early, or that loads; to compare with COMMIT; or
        it may be one of the last. Or a window's end is."""
        if self.state is Receiving.GRANTED:
            is_last = self._pages_missing <= len(self._landed)
            return not self.begun or self._engine == "loading" or self._commit is not None or is_last
        return self._window_open

    @property
    def wanted(self) -> frozenset[int]:
        return frozenset(self._landed)

    @property
    def pages_landed(self) -> int:
        return len(self._landed) * self._layers - self._pages_missing

    def __repr__(self) -> str:
        return (
            f"<Receiver {self.handle.handoff_id.hex()[:8]} {self.state.value}: {self.pages_landed}/"
            f"{len(self._landed) * self._layers} pages landed, engine {self._engine}"
            f"{', ' + self.reason if self.reason else ''}>"
        )

    # --- steps ---

    def _end_if_quiet(self) -> list[Action]:
        if self._window_open or self._engine == "loading":
            return []
        if self.state is Receiving.LANDED and self._engine == "gone":
            self.state = after(RECEIVING, self.state, "let_go")
            return [Ended("")]
        if self.state is Receiving.FAILING:
            self.state = after(RECEIVING, self.state, "quiet")
            return [Ended(self.reason)]
        return []

    def _ids(self) -> dict[str, Any]:
        return {
            "handoff_id": self.handle.handoff_id,
            "attempt": self.handle.attempt,
            "lease_epoch": self.lease_epoch,
            "incarnation": self._incarnation,
        }

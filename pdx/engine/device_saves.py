"""Saves from device memory: blocks → staging → arena, and what is told when a page is there.

Theory of operation. Three streams: the engine's, one that gathers, one that copies out. A layer's pages are cut into
*lots* that fit a staging buffer. In each hook the gathering stream is put behind the engine's, then every lot is
gathered and, behind that, copied out; a buffer is gathered into again only behind the copy that empties it. At the end
of the step the engine's stream is put behind the step's last gather, so the blocks may change at once; from staging to
the arena the lots go on by themselves. The host waits for none of this, but where LOTS_MAX lots are under way already:
once, for at most STALL_S; then the step's pages are given up. `Completions` writes headers and speaks, lot by lot in
the order in which they began.
"""

from __future__ import annotations

import logging
import threading
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import msgspec
from blake3 import blake3
from xxhash import xxh3_64_intdigest

from pdx.engine.completions import Completions
from pdx.engine.mover import Saving
from pdx.engine.runs import Run, runs
from pdx.engine.session import Session
from pdx.engine.staging_ring import StagingRing
from pdx.engine.streams import BlockList, Device, Digests, Event, Stream
from pdx.engine.tally import Tally
from pdx.errors import DeviceShort
from pdx.layout import PageLayout

log = logging.getLogger("pdx.engine")

LOTS_MAX = 4096  # under way; more is no speed, only memory for their digests
STALL_S = 10.0  # a device on which no lot ends for so long, with that many under way, gets none of this step's pages
FINISH_S = 0.5  # for messages that the daemon has no room for: nobody waits for this thread


@dataclass(frozen=True)
class _Lot:
    """Pages [first, first + count) of a step's, in one layer or another."""

    first: int
    count: int
    runs: list[Run]


@dataclass(eq=False)
class _Step:
    """What is under way for one step. Shared with the thread of completions."""

    saving: Saving
    session: Session
    lots: list[_Lot]
    blocks: list[BlockList]  # by KV group; none where there is nothing to save
    layers_begun: set[int]
    gathered: Event | None = None  # the last gather enqueued
    failed: bool = False  # not all of its pages will be in their slots


class DeviceSaves:
    """Owned by the model's thread, but for the methods that `Completions` calls."""

    def __init__(
        self,
        device: Device,
        layout: PageLayout,
        completions: Completions,
        tally: Tally,
        ring: StagingRing,
        *,
        shard: int = 0,
        lots_max: int = LOTS_MAX,
        stall_s: float = STALL_S,
    ) -> None:
        self._device = device
        self._layout = layout
        self._shard = shard
        self._completions = completions
        self._tally = tally
        self._ring = ring
        self._gathering: Stream = device.new_stream()
        self._copying: Stream = device.new_stream()
        self._room = threading.BoundedSemaphore(lots_max)
        self._stall_s = stall_s
        self._step: _Step | None = None
        self._failed: set[bytes] = set()  # handoffs with a page that was not saved
        # What a launch reads and writes until somebody waits for its event. If that can't be recorded, nobody ever
        # knows when it is done with them: they stay here.
        self._launched: list[object] = []

    def begin(self) -> None:
        """A step, or the end of all: nothing of the last one is known any more."""
        self._step = None

    def save(self, saving: Saving, session: Session, layer: int) -> None:
        """Raises DeviceLost."""
        if self._step is not None and layer in self._step.layers_begun:
            return
        self._follow_compute()
        self._begin_layer(self._step or self._open(saving, session), layer)

    def end(self, saving: Saving, session: Session) -> None:
        """Raises DeviceLost."""
        if session.arena is None:
            self._completions.put(None, partial(self._ended, _Step(saving, session, [], [], set(), failed=True)))
            return
        step = self._step or self._open(saving, session)
        missing = [layer for layer in range(self._layout.shard_layers) if layer not in step.layers_begun]
        if missing:
            self._follow_compute()
        for layer in missing:
            self._begin_layer(step, layer)
        if step.gathered is not None:
            self._device.wait(self._device.compute_stream(), step.gathered)
        self._completions.put(None, partial(self._ended, step))

    # --- in the thread that runs the model --------------------------------------------------------------------

    def _open(self, saving: Saving, session: Session) -> _Step:
        step = self._step = _Step(saving, session, self._cut(saving), [], set())
        try:
            for block_ids in saving.tables if saving.places else ():
                step.blocks.append(self._device.block_list(self._gathering, block_ids))
        except DeviceShort as error:
            log.warning("the pages of step %d are not saved: %s", saving.step, error)
            step.failed = True
        return step

    def _cut(self, saving: Saving) -> list[_Lot]:
        lots = []
        for first in range(0, len(saving.places), self._ring.pages_max):
            places = saving.places[first : first + self._ring.pages_max]
            lots.append(_Lot(first, len(places), runs(places)))
        return lots

    def _follow_compute(self) -> None:
        """What is gathered from now on is read behind all that the engine has enqueued so far."""
        self._device.wait(self._gathering, self._device.record(self._device.compute_stream()))

    def _begin_layer(self, step: _Step, layer: int) -> None:
        step.layers_begun.add(layer)
        for lot in step.lots:
            if not step.failed and not self._room.acquire(timeout=self._stall_s):
                step.failed = True
            if step.failed:
                return
            self._begin_lot(step, layer, lot)

    def _begin_lot(self, step: _Step, layer: int, lot: _Lot) -> None:
        device, arena = self._device, step.session.arena
        assert arena is not None
        blocks = step.blocks[step.saving.group_of[layer]]
        step.session.fence.hold(step.saving.step)
        buffer = self._ring.take(self._gathering)
        digests = device.gather(self._gathering, layer, blocks, lot.first, lot.count, buffer.staging)
        self._launched.append((blocks, digests))
        step.gathered = device.record(self._gathering)
        device.wait(self._copying, step.gathered)
        slot_layer = self._layout.slot_layer(self._shard, layer)
        device.copy_out(self._copying, buffer.staging, arena, [run.copy(self._layout, slot_layer) for run in lot.runs])
        buffer.emptied = device.record(self._copying)
        self._launched.pop()
        self._completions.put(buffer.emptied, partial(self._copied, step, slot_layer, lot, digests))

    # --- in the thread of completions: layers as the slots count them -----------------------------------------

    def _copied(self, step: _Step, layer: int, lot: _Lot, digests: Digests) -> None:
        """This lot is in the arena, or lost."""
        self._room.release()
        session, saving = step.session, step.saving
        if self._completions.lost or session.left:
            return  # with the fence as it is: nobody knows what a lost device still does
        self._publish(step, layer, lot, digests)
        whole = lot.first + lot.count == len(saving.places)
        for message in saving.filled(layer) if whole and not step.failed else ():
            self._told(session.tell(message))
        session.fence.release(saving.step)

    def _publish(self, step: _Step, layer: int, lot: _Lot, digests: Digests) -> None:
        places = step.saving.places[lot.first : lot.first + lot.count]
        values = digests.read()
        if step.session.digest_mode and not self._digest(step, layer, lot, values):
            step.failed = True
            return
        step.session.words.filled(places, layer, values, self._layout)
        self._tally.add(Counter(pages_saved=len(places), bytes_saved=len(places) * self._layout.page_bytes))

    def _digest(self, step: _Step, layer: int, lot: _Lot, values: Sequence[int]) -> bool:
        """Reads the pages back. False if one is not what was gathered."""
        headers = step.session.headers
        for n, place in enumerate(step.saving.places[lot.first : lot.first + lot.count]):
            start = place.page_offset(self._layout, layer)
            page = headers.memory[start : start + self._layout.page_bytes]
            if xxh3_64_intdigest(page) != int(values[n]):
                self._tally.add(Counter(checksum_mismatches=1))
                return False
            headers.set_digest(place, self._layout, layer, blake3(page).digest())
        return True

    def _ended(self, step: _Step) -> None:
        """All of the step's lots are done."""
        if self._completions.lost or step.session.left:
            return
        if step.failed:
            self._failed.update(step.saving.handoffs)
        for let_go in step.saving.let_gos:
            if let_go.handoff_id in self._failed:
                self._failed.discard(let_go.handoff_id)
                let_go = msgspec.structs.replace(let_go, ok=False, reason="not all of its pages could be saved")
            self._told(step.session.tell(let_go))
        step.session.finish_telling(timeout_s=FINISH_S)

    def _told(self, heard: bool) -> None:
        if not heard:
            # Its handoffs are gone with the daemon; the scheduler's half notices by itself.
            self._tally.add(Counter(messages_lost=1))

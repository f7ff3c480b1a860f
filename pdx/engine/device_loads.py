"""Loads into device memory: arena → staging → blocks, and what of it may be used.

Theory of operation. Two streams: one copies into staging, one scatters from there into blocks (or, *straight*, copies
into them and looks at what it has written). What has landed is enqueued batch by batch and seen again
in a later call, once its event has been reached; only then, behind the last access, generation and checksum are looked
at. A load is settled when none of its batches is under way, whatever became of it: till then its blocks are not the
engine's.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass

from blake3 import blake3

from pdx.engine.copier import Fault
from pdx.engine.mover import Loading
from pdx.engine.runs import runs
from pdx.engine.session import Session
from pdx.engine.staging_ring import StagingRing
from pdx.engine.streams import BlockList, Device, Digests, Event, Stream
from pdx.engine.tally import Tally
from pdx.errors import DeviceShort
from pdx.layout import PageLayout, Place

# Under way at once: a step of 30 ms lets a bus of 50 GB/s run dry below 1.5 GB, but a load that is dropped in the
# middle keeps its blocks for as long as all of this takes.
IN_FLIGHT_BYTES = 1 << 30
# To begin one takes the host some 40 us while the device is in its forward pass: a share of the time that the host took
# to enqueue that pass would be a few batches, and a prompt has one for each layer.
BATCHES_A_STEP = 64


@dataclass(eq=False)
class _Batch:
    """Pages of one layer under way."""

    loading: Loading
    session: Session
    step: int
    layer: int
    positions: list[int]
    blocks: BlockList  # kept for the device
    digests: Digests
    scattered: Event


class DeviceLoads:
    """Owned by the model's thread."""

    def __init__(
        self,
        device: Device,
        layout: PageLayout,
        tally: Tally,
        ring: StagingRing | None,
        *,
        shard: int,
        batch_pages: int,
    ) -> None:
        """`ring`: None to load straight, each page by a copy of its own. `batch_pages` fit one of its buffers."""
        self._device = device
        self._layout = layout
        self._shard = shard
        self._tally = tally
        self._ring = ring
        self._batch_pages = batch_pages
        self._copying: Stream = device.new_stream()
        self._scattering: Stream = device.new_stream()
        self._under_way: deque[_Batch] = deque()
        self._launched: list[object] = []  # without an event that could be waited for: see DeviceSaves
        self._pages_under_way = 0
        self._pages_max = max(1, IN_FLIGHT_BYTES // layout.page_bytes)
        self._batches_left = 0

    def begin(self) -> None:
        """A step."""
        self._batches_left = BATCHES_A_STEP

    def blocks_change_hands(self) -> None:
        """Blocks that are loaded from now on were others' until now: what the engine has enqueued may touch them.

        Raises DeviceLost.
        """
        self._device.wait(self._scattering, self._device.record(self._device.compute_stream()))

    def load(self, loading: Loading, session: Session, step: int) -> bool:
        """Begins what has landed. True if there is no more, and all is done. Raises DeviceLost."""
        self._look()
        if loading.reason or not self._batches_left:
            return False

        def watermark(place: Place) -> int:
            return session.headers.watermark(place.header_offset, self._shard)

        for layer, positions in loading.plan.batches(watermark, pages_max=self._batch_pages):
            full = self._under_way and self._pages_under_way + len(positions) > self._pages_max
            if full or not self._batches_left:
                return False
            self._batches_left -= 1
            self._begin(loading, session, step, layer, positions)
            if loading.reason:
                return False
        return not loading.in_flight

    def settled(self, loading: Loading) -> bool:
        """Raises DeviceLost."""
        self._look()
        return not loading.in_flight

    def forget(self) -> None:
        """The device is lost: nothing is under way any more, and nothing has arrived."""
        for batch in self._under_way:
            batch.loading.in_flight = 0
        self._under_way.clear()
        self._pages_under_way = 0

    def last(self) -> Event:
        """Behind all that is under way. Raises DeviceLost."""
        return self._device.record(self._scattering)

    def _begin(self, loading: Loading, session: Session, step: int, layer: int, positions: list[int]) -> None:
        device, arena, plan = self._device, session.arena, loading.plan
        assert arena is not None
        slot_layer = self._layout.slot_layer(self._shard, layer)
        copies = [run.copy(self._layout, slot_layer) for run in runs([plan.places[n] for n in positions])]
        try:
            blocks = device.block_list(self._scattering, plan.block_ids(layer, positions))
        except DeviceShort as error:
            loading.reason = str(error)
            return
        session.fence.hold(step)
        if self._ring is None:
            device.copy_straight(self._scattering, arena, layer, blocks, copies)
            digests = device.look(self._scattering, layer, blocks, 0, len(positions))
            self._launched.append((blocks, digests))
            scattered = device.record(self._scattering)
        else:
            buffer = self._ring.take(self._copying)
            device.copy_in(self._copying, arena, buffer.staging, copies)
            device.wait(self._scattering, device.record(self._copying))
            digests = device.scatter(self._scattering, layer, blocks, 0, len(positions), buffer.staging)
            self._launched.append((blocks, digests))
            scattered = buffer.emptied = device.record(self._scattering)
        self._launched.pop()
        plan.issue(layer, positions)
        loading.in_flight += 1
        self._pages_under_way += len(positions)
        self._under_way.append(_Batch(loading, session, step, layer, positions, blocks, digests, scattered))

    def _look(self) -> None:
        """Takes off what is done. Batches end in the order in which they began: they share their streams."""
        while self._under_way and self._device.reached(self._under_way[0].scattered):
            batch = self._under_way.popleft()
            loading, positions = batch.loading, batch.positions
            loading.in_flight -= 1
            self._pages_under_way -= len(positions)
            if batch.session.left:
                continue
            if not loading.reason:  # what comes behind a fault counts for nothing
                counts: Counter[str] = Counter()
                loading.arrived(batch.layer, positions, self._faults(batch), counts)
                counts["bytes_loaded"] = counts["pages_verified"] * self._layout.page_bytes
                self._tally.add(counts)
            batch.session.fence.release(batch.step)

    def _faults(self, batch: _Batch) -> Sequence[tuple[int, Fault]]:
        plan, session = batch.loading.plan, batch.session
        slot_layer = self._layout.slot_layer(self._shard, batch.layer)
        places = [plan.places[n] for n in batch.positions]
        if not session.digest_mode:
            return session.words.faults(places, slot_layer, batch.digests.read())
        expected = [session.headers.digest(place, self._layout, slot_layer) for place in places]
        faults = dict(session.words.faults(places, slot_layer, batch.digests.read()))
        for n, block_id in enumerate(plan.block_ids(batch.layer, batch.positions)):
            page = self._device.page(batch.layer, block_id)
            if blake3(page).digest() != expected[n]:
                faults.setdefault(n, Fault.DIGEST)
        return list(faults.items())

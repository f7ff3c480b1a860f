"""Pages in device memory: copied by the device, beside the engine's work, while the host goes on.

Puts together what saves, what loads, the attachment of now, and the thread that finishes what is copied. Engine-neutral
and device-neutral: knows `streams.Device`, headers, layout and places. In the order of the calls:

    begin   a new daemon's arena is pinned, an old one's is let go behind its last copy
    save    enqueues; `end` enqueues the rest, and puts the engine's stream behind the gathers
    load    sees what has arrived, enqueues what has landed

A device that is lost ends everything: nothing under way is published, no LET_GO says ok, loads fail. The slots stay the
engine's until its process is gone.
"""

from __future__ import annotations

import logging
from collections import Counter
from functools import partial

from pdx.client import DaemonClient
from pdx.engine.completions import Completions
from pdx.engine.device_loads import DeviceLoads
from pdx.engine.device_saves import LOTS_MAX, STALL_S, DeviceSaves
from pdx.engine.mover import Budget, Loading, Saving
from pdx.engine.session import Session
from pdx.engine.staging_ring import StagingRing
from pdx.engine.streams import Device, Event
from pdx.engine.tally import Tally
from pdx.errors import DeviceLost
from pdx.layout import PageLayout

log = logging.getLogger("pdx.engine")

# Each buffer is large enough to be copied at the bus's speed; the engine could hold some tokens more in this memory.
STAGING_BYTES = 32 << 20
BUFFERS = 2  # each way: one is filled while the other is emptied
CLOSE_S = 4.0  # vLLM kills a worker that takes more than 5 s to shut down


class DeviceMover:
    """One engine's. See `Mover`."""

    copies_ahead = True

    def __init__(
        self,
        device: Device,
        layout: PageLayout,
        client: DaemonClient | None = None,
        *,
        shard: int = 0,
        staging_bytes: int = STAGING_BYTES,
        lots_max: int = LOTS_MAX,
        stall_s: float = STALL_S,
        loads_straight: bool = False,
        threaded: bool = True,
    ) -> None:
        """`client`: whose arena is pinned before this returns. `loads_straight`: they need no staging on this device.

        Without `threaded` the owner calls `work`.
        """
        self._device = device
        self._completions = Completions(device)
        self._tally = Tally()
        pages_max = max(1, staging_bytes // layout.page_bytes)
        out = StagingRing(device, buffers=BUFFERS, pages_max=pages_max)
        back = None if loads_straight else StagingRing(device, buffers=BUFFERS, pages_max=pages_max)
        self._saves = DeviceSaves(
            device, layout, self._completions, self._tally, out, shard=shard, lots_max=lots_max, stall_s=stall_s
        )
        self._loads = DeviceLoads(device, layout, self._tally, back, shard=shard, batch_pages=pages_max)
        self._client: DaemonClient | None = None
        self._session: Session | None = None
        self._step = 0
        self._attach(client)
        if self._session is not None:
            self.work()
        if threaded:
            self._completions.start()

    def begin(self, client: DaemonClient | None, step: int, *, loads: bool) -> None:
        if client is not self._client:
            self._attach(client)
        self._step = step
        self._saves.begin()
        self._loads.begin()
        if loads and not self._completions.lost:
            try:
                self._loads.blocks_change_hands()
            except DeviceLost as error:
                self._completions.lose(error)

    @property
    def lost(self) -> bool:
        return self._completions.lost

    def usable(self, incarnation: int) -> bool:
        session = self._session
        return session is not None and session.incarnation == incarnation and not self._completions.lost

    def save(self, saving: Saving, layer: int) -> None:
        session = self._session
        if session is None or session.arena is None or self._completions.lost:
            return  # an arena that is pinned by the step's end still gets all layers
        try:
            self._saves.save(saving, session, layer)
        except DeviceLost as error:
            self._completions.lose(error)

    def end(self, saving: Saving | None) -> None:
        if self._session is None or self._completions.lost:
            return
        try:
            if saving is not None:
                self._saves.end(saving, self._session)
        except DeviceLost as error:
            self._completions.lose(error)
            return
        self._session.fence.ended(self._step)

    def load(self, loading: Loading, budget: Budget) -> bool:
        assert self._session is not None
        if self._session.arena is None:
            if self._session.refused:
                loading.reason = "the arena can't be pinned"
            return False
        try:
            return self._loads.load(loading, self._session, self._step)
        except DeviceLost as error:
            self._completions.lose(error)
            return False

    def settled(self, loading: Loading) -> bool:
        try:
            return self._loads.settled(loading)
        except DeviceLost as error:
            self._completions.lose(error)
            self._loads.forget()
            return True

    def take_counts(self) -> Counter[str]:
        return self._tally.take()

    def close(self) -> None:
        """Ends copies within CLOSE_S. If the device does not, its thread and the session's voice stay: then only the
        end of this process tells the daemon that nobody touches its slots."""
        self._release()
        if not self._completions.close(timeout_s=CLOSE_S):
            log.error("the device has not finished its copies within %g s", CLOSE_S)

    def work(self) -> None:
        """Finishes the next piece of copied work, waiting for it. Only without a thread."""
        self._completions.work()

    def _attach(self, client: DaemonClient | None) -> None:
        if self._session is not None:
            self._session.left = True
            self._release()
        self._client = client
        self._session = Session(client) if client is not None and client.arena is not None else None
        if self._session is not None:
            # By the other thread, since it takes seconds for a large arena. Till then loads wait, and sends fail.
            self._completions.put(None, partial(self._session.pin, self._device))

    def _release(self) -> None:
        """Lets go of the session's arena behind the last copy that touches it."""
        session, self._session = self._session, None
        self._saves.begin()
        if session is None:
            return
        last: Event | None = None  # saves' copies are waited for one by one; this is of loads'
        try:
            if not self._completions.lost:
                last = self._loads.last()
        except DeviceLost as error:
            self._completions.lose(error)
        self._completions.put(last, partial(session.release, self._device))

"""Pages in host memory: copied by the thread that runs the model, within the call that asks for it.

So no copy can run while the engine reuses a block, every load is settled when its call returns, and a step is over with
its last call.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from pdx.buffer.headers import Headers
from pdx.client import DaemonClient
from pdx.engine.copier import Copier, Pages, Rows
from pdx.engine.mover import Budget, Loading, Saving
from pdx.errors import DaemonGone
from pdx.layout import PageLayout, Place
from pdx.wire import Filled, LetGo

# Copied and verified between two looks at the clock: some 100 us. Page by page the bookkeeping cost a quarter more;
# where nobody decodes meanwhile, less of it is worth a millisecond.
BATCH_BYTES, IDLE_BATCH_BYTES = 512 << 10, 8 << 20
FINISH_S = 0.02  # for messages that the daemon had no room for; more than that it may lose to its next step


class HostMover:
    """One engine's, over its layers' pages. See `Mover`."""

    copies_ahead = False

    def __init__(self, pages: Sequence[Pages], layout: PageLayout, *, shard: int = 0) -> None:
        self._rows = [Rows(layer) for layer in pages]
        self._layout = layout
        self._shard = shard
        self._batch_pages = max(1, BATCH_BYTES // layout.page_bytes)
        self._idle_batch_pages = max(1, IDLE_BATCH_BYTES // layout.page_bytes)
        self._client: DaemonClient | None = None  # one for the whole step: no arena is unmapped in the middle of it
        self._copier = Copier(layout, shard=shard, digest_mode=False)
        self._step = 0
        self._layers_saved: set[int] = set()
        self._counts: Counter[str] = Counter()

    def begin(self, client: DaemonClient | None, step: int, *, loads: bool) -> None:
        self._client = client
        digest_mode = client is not None and client.attached.digest_mode
        self._copier = Copier(self._layout, shard=self._shard, digest_mode=digest_mode)
        self._step = step
        self._layers_saved = set()

    @property
    def lost(self) -> bool:
        return False

    def usable(self, incarnation: int) -> bool:
        client = self._client
        return client is not None and client.arena is not None and client.attached.daemon.incarnation == incarnation

    def save(self, saving: Saving, layer: int) -> None:
        if layer in self._layers_saved:
            return
        self._layers_saved.add(layer)
        self._copier.gather(self._rows[layer], saving.block_ids(layer), self._arena, saving.places, layer)
        self._counts["pages_saved"] += len(saving.places)
        self._counts["bytes_saved"] += len(saving.places) * self._layout.page_bytes
        for message in saving.filled(self._layout.slot_layer(self._shard, layer)):
            self._tell(message)

    def end(self, saving: Saving | None) -> None:
        if saving is not None:
            for layer in range(self._layout.shard_layers):
                self.save(saving, layer)
        if self._client is None:
            return
        if self._client.arena is not None:
            self._client.publish_fence(self._step)
        if saving is not None:
            for let_go in saving.let_gos:  # on the connection that carried FILLED, and behind it
                self._tell(let_go)
        self._client.finish_sending(timeout_s=FINISH_S)  # what an earlier step has left, too

    def load(self, loading: Loading, budget: Budget) -> bool:
        if budget.spent:
            return False
        arena, plan = self._arena, loading.plan

        def watermark(place: Place) -> int:
            return arena.watermark(place.header_offset, self._shard)

        pages_max = self._batch_pages if budget.hurries else self._idle_batch_pages
        for layer, positions in plan.batches(watermark, pages_max=pages_max):
            if budget.spent:
                return False
            block_ids = plan.block_ids(layer, positions)
            places = [plan.places[n] for n in positions]
            faults = self._copier.scatter(self._rows[layer], block_ids, arena, places, layer)
            loading.arrived(layer, positions, faults, self._counts)
            if faults:
                return False
            budget.batch_done()
        return True

    def settled(self, loading: Loading) -> bool:
        return True

    def take_counts(self) -> Counter[str]:
        counts, self._counts = self._counts, Counter()
        counts["bytes_loaded"] = counts["pages_verified"] * self._layout.page_bytes
        return +counts

    def close(self) -> None:
        self._client = None

    def _tell(self, message: Filled | LetGo) -> None:
        assert self._client is not None
        try:
            self._client.send(message)
        except DaemonGone:
            # Its handoffs are gone with it; the scheduler's half notices by itself.
            self._counts["messages_lost"] += 1

    @property
    def _arena(self) -> Headers:
        assert self._client is not None
        assert self._client.arena is not None
        return self._client.arena

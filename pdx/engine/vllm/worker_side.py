"""The connector's half in vLLM's worker process: moves pages, in the thread that runs the model.

Theory of operation. A step is `begin`, any number of `save_layer` (one per layer, from the attention hooks), `load`,
`end`. Saves are complete when the step is, so vLLM may reuse its blocks at once. Loads run between forward passes and
follow the watermarks; each ends exactly once, in a report. After its last access to any slot the step publishes its
number as the fence. Places count only with the daemon incarnation they came from: with another one, nothing is touched.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from pdx.buffer.headers import Headers
from pdx.client import DaemonClient
from pdx.engine.copier import Copier, Fault, Rows
from pdx.engine.link import Link
from pdx.engine.plan import LoadPlan
from pdx.engine.vllm.budget import LoadBudget
from pdx.engine.vllm.caches import Caches
from pdx.engine.vllm.steps import Load, LoadResult, Report, Save, Step
from pdx.errors import DaemonGone, Refused
from pdx.layout import PageLayout, Place
from pdx.wire import Filled, FilledEntry, LetGo

# Copied and verified between two looks at the clock: some 100 us. Page by page the bookkeeping cost a quarter more.
BATCH_BYTES = 512 << 10
FINISH_S = 0.02  # for messages that the daemon had no room for; more than that it may lose to its next step
FILLED_BLOCKS_MAX = 2000  # of one message: a frame of 64 KiB has room for as many, each of another request


@dataclass(eq=False)
class _Saving:
    """The pages that the present step saves, in each of its layers."""

    saves: list[Save]
    started_ns: int
    layers_done: set[int] = field(default_factory=set)

    def __post_init__(self) -> None:
        # By KV group: of each block its id.
        self.tables = list(zip(*(block_ids for save in self.saves for _, block_ids, _ in save.blocks), strict=True))
        self.places = [place for save in self.saves for _, _, place in save.blocks]
        self.lots = list(_lots([save for save in self.saves if save.streamed]))


def _lots(saves: Sequence[Save]) -> Iterator[list[FilledEntry]]:
    """What one message after the other says of them: no more than its frame may hold. One, almost always."""
    lot: list[FilledEntry] = []
    room = FILLED_BLOCKS_MAX
    for save in saves:
        blocks = [index for index, _, _ in save.blocks]
        while blocks:
            taken, blocks = blocks[:room], blocks[room:]
            lot.append(FilledEntry(save.handoff_id, taken))
            room -= len(taken)
            if not room:
                yield lot
                lot, room = [], FILLED_BLOCKS_MAX
    if lot:
        yield lot


@dataclass(eq=False)
class _Loading:
    plan: LoadPlan
    deadline: float
    incarnation: int
    finishing: bool = False  # no more will land
    dropped: bool = False
    spoilt: list[int] = field(default_factory=list)


class WorkerSide:
    """Owned by the model's thread."""

    def __init__(
        self, link: Link, caches: Caches, layout: PageLayout, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._link = link
        self._rows = [Rows(pages) for pages in caches.pages]
        self._layer_of = caches.layer_of
        self._group_of = caches.group_of
        self._layout = layout
        self._batch_pages = max(1, BATCH_BYTES // layout.page_bytes)
        self._clock = clock
        self._loading: dict[str, _Loading] = {}
        self._ended: dict[str, LoadResult] = {}
        self._invalid: set[int] = set()
        self._counts: Counter[str] = Counter()
        self._step: Step | None = None
        self._client: DaemonClient | None = None  # one for the whole step: no arena is unmapped in the middle of it
        self._copier = Copier(layout, digest_mode=False)
        self._saving = _Saving([], 0)
        self._began_at = 0.0

    # --- one step ---------------------------------------------------------------------------------------------

    def begin(self, step: Step) -> None:
        """Before the forward pass: takes over the step's work."""
        client = self._client = self._link.client()
        self._copier = Copier(self._layout, digest_mode=client is not None and client.attached.digest_mode)
        self._step = step
        self._saving = _Saving(step.saves if self._usable(step.incarnation) else [], time.monotonic_ns())
        for load in step.loads:
            self._take_load(load, step.incarnation)
        for request_id in step.finishing:
            if request_id in self._loading:
                self._loading[request_id].finishing = True
        for request_id in step.dropping:
            if request_id in self._loading:
                self._loading[request_id].dropped = True
        self._began_at = self._clock()

    def save_layer(self, layer_name: str) -> None:
        """In the forward pass, after the attention of this layer: its KV of every request in the step is written."""
        layer = self._layer_of.get(layer_name)
        if layer is not None and self._saving.saves:
            self._save(layer)

    def load(self) -> None:
        """After the forward pass: scatters what has landed, within the step's budget. Oldest request first."""
        assert self._step is not None
        if not self._loading:
            return
        forward_s = self._clock() - self._began_at if self._step.tokens else None
        budget = LoadBudget(forward_s=forward_s, clock=self._clock)
        for request_id, loading in list(self._loading.items()):
            reason = self._advance(loading, budget)
            if reason or loading.plan.complete:
                self._end_load(request_id, loading, reason)

    def end(self) -> None:
        """After the forward pass: saves layers that had no hook, publishes the fence, ends what is saved."""
        if self._step is None:
            return
        if self._saving.saves:
            for layer in range(self._layout.layers):
                self._save(layer)
        if self._client is not None and self._client.arena is not None:
            self._client.publish_fence(self._step.number)
        # On the connection that carried FILLED, and behind it.
        for save in self._saving.saves:
            if save.last:
                self._tell(
                    LetGo(handoff_id=save.handoff_id, side="send", fence=self._step.number, ok=True, pages=save.pages)
                )
        if self._client is not None and self._saving.saves:
            self._client.finish_sending(timeout_s=FINISH_S)
        self._saving = _Saving([], 0)

    # --- what vLLM collects after each step -------------------------------------------------------------------

    def take_ended(self) -> Report | None:
        """Loads that ended since the last call, each reported once."""
        if not self._ended or self._step is None:
            return None
        report, self._ended = Report(self._step.number, self._ended), {}
        return report

    def take_invalid(self) -> set[int]:
        """Engine blocks of those loads that must not be used."""
        invalid, self._invalid = self._invalid, set()
        return invalid

    def take_counts(self) -> dict[str, int]:
        counts, self._counts = dict(self._counts), Counter()
        return counts

    def close(self) -> None:
        self._client = None
        self._link.close()

    # --- saving -----------------------------------------------------------------------------------------------

    def _save(self, layer: int) -> None:
        saving = self._saving
        if layer in saving.layers_done:
            return
        assert self._step is not None
        saving.layers_done.add(layer)
        block_ids = saving.tables[self._group_of[layer]]
        self._copier.gather(self._rows[layer], block_ids, self._arena, saving.places, layer)
        self._counts["pages_saved"] += len(block_ids)
        self._counts["bytes_saved"] += len(block_ids) * self._layout.page_bytes
        filled_ns = time.monotonic_ns()
        for entries in saving.lots:
            self._tell(
                Filled(
                    step=self._step.number,
                    step_started_ns=saving.started_ns,
                    layer=layer,
                    filled_ns=filled_ns,
                    entries=entries,
                )
            )

    def _tell(self, message: Filled | LetGo) -> None:
        assert self._client is not None
        try:
            self._client.send(message)
        except DaemonGone:
            # Its handoffs are gone with it; the scheduler's half notices by itself.
            self._counts["messages_lost"] += 1

    # --- loading ----------------------------------------------------------------------------------------------

    def _take_load(self, load: Load, incarnation: int) -> None:
        try:
            plan = LoadPlan(load.places, load.tables, group_of=self._group_of)
        except Refused as error:
            self._refuse_load(load, str(error))
            return
        if not self._usable(incarnation):
            self._refuse_load(load, "pdxd is gone")
            return
        self._loading[load.request_id] = _Loading(plan, self._clock() + load.budget_s, incarnation)

    def _advance(self, loading: _Loading, budget: LoadBudget) -> str:
        """Scatters pages until the budget is spent. Returns why this load cannot go on, or nothing."""
        if not self._usable(loading.incarnation):
            return "pdxd is gone"
        if loading.dropped:
            return "dropped"
        arena, plan = self._arena, loading.plan

        def watermark(place: Place) -> int:
            return arena.watermark(place.header_offset)

        for layer, positions in plan.batches(watermark, pages_max=self._batch_pages):
            if budget.spent:
                break
            faults = self._scatter(loading, layer, positions)
            if faults:
                return f"{len(faults)} pages of layer {layer} differ in {faults[0].value}"
            budget.batch_done()
        else:
            if loading.finishing and not plan.complete:
                return "the rest does not come"
        return "" if plan.complete or self._clock() < loading.deadline else "out of time"

    def _scatter(self, loading: _Loading, layer: int, positions: list[int]) -> list[Fault]:
        plan = loading.plan
        table = plan.tables[self._group_of[layer]]
        block_ids = [table[n] for n in positions]
        places = [plan.places[n] for n in positions]
        faults = dict(self._copier.scatter(self._rows[layer], block_ids, self._arena, places, layer))
        good = [position for n, position in enumerate(positions) if n not in faults]
        plan.done(layer, good)
        self._counts["pages_verified"] += len(good)
        self._counts["bytes_loaded"] += len(good) * self._layout.page_bytes
        for n, fault in faults.items():
            self._counts[f"{fault.value}_mismatches"] += 1
            # A slot that changed hands says nothing of the block that it holds now.
            if fault is not Fault.GENERATION:
                loading.spoilt.append(positions[n])
        return list(faults.values())

    def _end_load(self, request_id: str, loading: _Loading, reason: str) -> None:
        del self._loading[request_id]
        plan = loading.plan
        self._invalid |= plan.unverified_block_ids
        now_ns = time.monotonic_ns()
        self._ended[request_id] = LoadResult(plan.complete, plan.pages_done, now_ns, reason, loading.spoilt)
        self._counts["loads_ok" if plan.complete else "loads_failed"] += 1

    def _refuse_load(self, load: Load, reason: str) -> None:
        self._invalid.update(*load.tables)
        self._ended[load.request_id] = LoadResult(False, 0, time.monotonic_ns(), reason)
        self._counts["loads_failed"] += 1

    @property
    def _arena(self) -> Headers:
        assert self._client is not None
        assert self._client.arena is not None
        return self._client.arena

    def _usable(self, incarnation: int) -> bool:
        client = self._client
        return client is not None and client.arena is not None and client.attached.daemon.incarnation == incarnation

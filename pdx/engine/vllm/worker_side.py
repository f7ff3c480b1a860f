"""The connector's half in vLLM's worker process: which pages move in which step, in the thread that runs the model.

Theory of operation. A step is `begin`, any number of `save_layer` (one per layer, from the attention hooks), `load`,
`end`. A *mover* copies: when `end` returns vLLM may reuse the blocks that were saved. Loads follow the watermarks; each
ends exactly once, in a report, when none of its copies is under way. When the last copy of a step is done its number is
published as the fence. Places count only with the daemon incarnation they came from: with another one, nothing is
touched. The same holds for a step that was planned for weights in another state (see `watch`): nothing is saved, no
load begins, and what loads have brought of the old state is void.

Of several ranks each moves its own shard of every page, and each says LET_GO. KV that is the same on all ranks has one
shard: the first rank writes it, all read it.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence

from pdx.engine.link import Link
from pdx.engine.mover import Loading, Mover, Saving
from pdx.engine.plan import LoadPlan
from pdx.engine.vllm.budget import LoadBudget
from pdx.engine.vllm.caches import Layers
from pdx.engine.vllm.steps import Load, LoadResult, Report, Save, Seen, Step
from pdx.engine.vllm.watch import Watch
from pdx.errors import DeviceLost, Refused
from pdx.layout import PageLayout
from pdx.rates import Busy
from pdx.wire import FilledEntry, LetGo

OTHER_WEIGHTS = "the weights have changed"
GONE = "pdxd is gone"
FILLED_BLOCKS_MAX = 2000  # of one message: a frame of 64 KiB has room for as many, each of another request


class WorkerSide:
    """Owned by the model's thread."""

    def __init__(
        self,
        link: Link,
        layers: Layers,
        layout: PageLayout,
        mover: Mover,
        *,
        watch: Watch,
        rank: int = 0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`mover`: of this rank's pages; `watch`: over its weights."""
        self._link = link
        self._mover = mover
        self._watch = watch
        self._rank = rank
        self._writes = rank < layout.shards
        self._layers = layers
        self._clock = clock
        self._loading: dict[str, Loading] = {}
        self._busy = Busy()  # with loads
        self._ended: dict[str, LoadResult] = {}
        self._invalid: set[int] = set()
        self._seen: Seen | None = None  # not told yet
        self._timed = False  # this step's end is to be told
        self._counts: Counter[str] = Counter()
        self._step: Step | None = None
        self._saving: Saving | None = None
        self._gaps: set[bytes] = set()  # handoffs with pages that were not saved: this rank had no arena in time
        self._began_at = 0.0
        self._incarnation = 0  # of the daemon of this step, or of the last one
        self._is_attached = False  # in this step
        self._left = 0  # lines that the scheduler had lost, as far as we have followed: see `Step`
        self._unsaid: dict[int, list[LetGo]] = {}  # by the incarnation to which this rank is yet to be attached

    # --- one step ---------------------------------------------------------------------------------------------

    def begin(self, step: Step) -> None:
        """Before the forward pass: takes over the step's work. Looks at the weights first if they may have changed.

        Raises DeviceLost in the step after the one in which a copy failed. vLLM ends with that, and so do this engine's
        rights to slots; were it to go on, no fence of it would ever pass, and what it is granted would be gone for all.
        """
        if self._mover.lost:
            raise DeviceLost("a copy of KV has failed on the device, see above: this engine has to be started anew")
        self._link.hold()
        self._look(step)
        current = step.epoch is not None and step.epoch.get(self._rank, "") == self._watch.state
        left = self._follow(*step.left)
        client = self._link.client()
        self._is_attached = client is not None
        if client is not None:
            self._incarnation = client.attached.daemon.incarnation
            for let_go in self._unsaid.pop(self._incarnation, []) if self._unsaid else ():
                self._link.send(let_go)
        self._mover.begin(client, step.number, loads=bool(step.loads))
        self._step, self._timed = step, step.timed
        self._saving = None
        if step.saves and self._mover.usable(step.incarnation):
            if not current:
                self._gaps.update(save.handoff_id for save in step.saves)
            written = step.saves if self._writes and current else []
            self._saving = _saving(step, written, self._layers.group_of, self._gaps)
            self._gaps.difference_update(save.handoff_id for save in step.saves if save.last)
        elif step.saves:
            self._miss(step)
        for load in step.loads:
            if load.incarnation == left:
                self._refuse_load(load, GONE)
            elif current:
                self._take_load(load)
            else:
                self._refuse_load(load, OTHER_WEIGHTS)
        for request_id in step.finishing:
            if request_id in self._loading:
                self._loading[request_id].finishing = True
        for request_id in step.dropping:
            if request_id in self._loading:
                self._loading[request_id].reason = "dropped"
        self._began_at = self._clock()

    @property
    def saves(self) -> bool:
        """Whether this step does."""
        return self._saving is not None

    def save_layer(self, layer_name: str) -> None:
        """In the forward pass, after the attention of this layer: its KV of every request in the step is written."""
        layer = self._layers.number_of.get(layer_name)
        if layer is not None and self._saving is not None:
            self._mover.save(self._saving, layer)

    def load(self) -> None:
        """After the forward pass: scatters what has landed, within the step's budget. Oldest request first."""
        assert self._step is not None
        if not self._loading:
            return
        forward_s = self._clock() - self._began_at if self._step.tokens else None
        budget = LoadBudget(forward_s=forward_s, clock=self._clock)
        for request_id, loading in list(self._loading.items()):
            self._advance(loading, budget)
            if (loading.reason or loading.plan.complete) and self._mover.settled(loading):
                self._end_load(request_id, loading)

    def end(self) -> None:
        """After the forward pass: saves layers that had no hook, publishes the fence, ends what is saved."""
        if self._step is None:
            return
        self._mover.end(self._saving)
        self._saving = None

    # --- what vLLM collects after each step -------------------------------------------------------------------

    def take_ended(self) -> Report | None:
        """Loads that ended since the last call, each reported once; and what was seen of the weights. Ends the step.

        None if there is nothing to tell, and nobody waits for the end of this step.
        """
        if not self._mover.copies_ahead:
            self._link.let_go()
        if self._step is None or not (self._ended or self._seen or self._timed):
            return None
        seen = {self._rank: self._seen} if self._seen else {}
        report, self._ended, self._seen = Report(self._step.number, self._ended, seen), {}, None
        self._timed = False
        return report

    def take_invalid(self) -> set[int]:
        """Engine blocks of those loads that must not be used."""
        invalid, self._invalid = self._invalid, set()
        return invalid

    def take_counts(self) -> dict[str, int]:
        counts, self._counts = self._counts + self._mover.take_counts(), Counter()
        return dict(counts)

    def close(self) -> None:
        self._mover.close()
        self._link.close()

    # --- the daemon -------------------------------------------------------------------------------------------

    def _follow(self, lost: int, incarnation: int) -> int | None:
        """Leaves the daemon that the scheduler has lost, and says its incarnation: what was granted there before this
        step has gone, whoever comes back to it."""
        if lost <= self._left:
            return None
        self._left = lost
        client = self._link.client()
        if client is None or client.attached.daemon.incarnation != incarnation:
            return None
        for loading in self._loading.values():
            loading.reason = loading.reason or GONE
        self._link.leave()
        self._incarnation = 0
        return incarnation

    def _miss(self, step: Step) -> None:
        """This rank can't touch the arena. It lets go all the same as soon as it is attached: nobody else would."""
        self._gaps.update(save.handoff_id for save in step.saves if not save.last)
        ended = [save for save in step.saves if save.last]
        self._gaps.difference_update(save.handoff_id for save in ended)
        if ended and not self._gone(step.incarnation):
            unsaid = self._unsaid.get(step.incarnation, [])
            self._unsaid = {step.incarnation: unsaid + [_let_go(save, step.number, whole=False) for save in ended]}

    # --- weights ----------------------------------------------------------------------------------------------

    def _look(self, step: Step) -> None:
        before = self._watch.state
        seen = self._watch.look(step.asked)
        if seen is not None:
            self._seen = seen
        if self._watch.state != before:
            for loading in self._loading.values():
                loading.reason, loading.void = OTHER_WEIGHTS, True

    # --- loading ----------------------------------------------------------------------------------------------

    def _take_load(self, load: Load) -> None:
        try:
            plan = LoadPlan(load.places, load.tables, group_of=self._layers.group_of, ahead=self._mover.copies_ahead)
        except Refused as error:
            self._refuse_load(load, str(error))
            return
        if not self._mover.usable(load.incarnation) and self._gone(load.incarnation):
            self._refuse_load(load, GONE)
            return
        self._loading[load.request_id] = Loading(plan, self._clock() + load.budget_s, load.incarnation)

    def _advance(self, loading: Loading, budget: LoadBudget) -> None:
        """Scatters pages until the budget is spent, and says why this load cannot go on if it can't."""
        if loading.reason or loading.plan.complete:
            return
        if loading.began_at is None:
            loading.began_at = budget.began_at
        usable = self._mover.usable(loading.incarnation)
        if not usable and self._gone(loading.incarnation):
            loading.reason = GONE
            return
        taken = usable and self._mover.load(loading, budget)
        if loading.reason or loading.plan.complete:
            return
        if taken and loading.finishing:
            loading.reason = "the rest does not come"
        elif self._clock() >= loading.deadline:
            loading.reason = "out of time"

    def _gone(self, incarnation: int) -> bool:
        """Of a daemon that can't be used: it was here, and is no more. One that is still to come is no reason to give
        up: the scheduler has no arena to map, and is attached sooner."""
        return self._is_attached or self._incarnation == incarnation

    def _end_load(self, request_id: str, loading: Loading) -> None:
        del self._loading[request_id]
        plan, ok = loading.plan, loading.plan.complete and not loading.void
        self._invalid |= plan.block_ids_of_all if loading.void else plan.unverified_block_ids
        now_ns = time.monotonic_ns()
        seconds = 0.0
        if loading.began_at is not None:
            seconds = self._busy.ended(began_at=loading.began_at, now=self._clock())
        self._ended[request_id] = LoadResult(
            ok, plan.pages_done, now_ns, loading.reason, loading.spoilt, seconds=seconds
        )
        self._counts["loads_ok" if ok else "loads_failed"] += 1

    def _refuse_load(self, load: Load, reason: str) -> None:
        self._invalid.update(*load.tables)
        self._ended[load.request_id] = LoadResult(False, 0, time.monotonic_ns(), reason)
        self._counts["loads_failed"] += 1


def _saving(step: Step, written: Sequence[Save], group_of: Sequence[int], gaps: set[bytes]) -> Saving:
    """`written`: those of the step's saves whose pages this rank writes. It lets go of all.

    `gaps`: handoffs with pages that an earlier step should have saved.
    """
    return Saving(
        step.number,
        time.monotonic_ns(),
        # A rank that writes nothing has no block in any group.
        list(zip(*(block_ids for save in written for _, block_ids, _ in save.blocks), strict=True))
        or [()] * (max(group_of) + 1),
        group_of,
        [place for save in written for _, _, place in save.blocks],
        list(_entries([save for save in written if save.streamed])),
        [save.handoff_id for save in step.saves],
        [_let_go(save, step.number, whole=save.handoff_id not in gaps) for save in step.saves if save.last],
    )


def _let_go(save: Save, step: int, *, whole: bool) -> LetGo:
    reason = "" if whole else "not all of its pages could be saved"
    return LetGo(handoff_id=save.handoff_id, side="send", fence=step, ok=whole, pages=save.pages, reason=reason)


def _entries(saves: Sequence[Save]) -> Iterator[list[FilledEntry]]:
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

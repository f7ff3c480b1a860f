"""How a worker's pages move between the engine's blocks and the arena: the contract, and what a step asks for.

Layers are counted as the engine's rank has them; a mover knows which of the slots' layers those of its *shard* are.

Two ways: `HostMover` copies within the call that asks for it, `DeviceMover` only enqueues and sees later what is done.
Whoever plans the steps (for vLLM, `worker_side`) knows which requests load and why a load ends; a mover knows copies.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from pdx.client import DaemonClient
from pdx.engine.copier import Fault
from pdx.engine.plan import LoadPlan
from pdx.layout import Place
from pdx.wire import Filled, FilledEntry, LetGo


@dataclass(eq=False)
class Saving:
    """The pages that one step saves, in each of its layers."""

    step: int
    started_ns: int
    tables: Sequence[Sequence[int]]  # by KV group, the engine's id of each block
    group_of: Sequence[int]  # each layer's
    places: list[Place]  # of those blocks
    entries: list[list[FilledEntry]]  # of one FILLED after the other; the same in each layer
    handoffs: list[bytes]  # whose pages they are
    let_gos: list[LetGo]  # for what is saved whole with this step: told behind its last FILLED

    def block_ids(self, layer: int) -> Sequence[int]:
        """Where the engine keeps this layer's pages, in the order of `places`."""
        return self.tables[self.group_of[layer]]

    def filled(self, layer: int) -> Iterator[Filled]:
        """What to tell now that this layer is in its slots. `layer`: as the slots count them."""
        filled_ns = time.monotonic_ns()
        for entries in self.entries:
            yield Filled(
                step=self.step, step_started_ns=self.started_ns, layer=layer, filled_ns=filled_ns, entries=entries
            )


@dataclass(eq=False)
class Loading:
    """A request whose blocks are being filled."""

    plan: LoadPlan
    deadline: float
    incarnation: int
    finishing: bool = False  # no more will land
    reason: str = ""  # why it ends before it is complete; once set, no more copies begin
    spoilt: list[int] = field(default_factory=list)  # which of its places held a wrong page
    in_flight: int = 0  # lots of pages under way
    void: bool = False  # whatever came must not be used: it was computed with other weights
    began_at: float | None = None  # when it had its first turn

    def arrived(
        self, layer: int, positions: Sequence[int], faults: Sequence[tuple[int, Fault]], counts: Counter[str]
    ) -> None:
        """These pages are in the engine's blocks, but for `faults`: (index in `positions`, why)."""
        bad = dict(faults)
        good = [position for n, position in enumerate(positions) if n not in bad]
        self.plan.done(layer, good)
        counts["pages_verified"] += len(good)
        for n, fault in faults:
            counts[f"{fault.value}_mismatches"] += 1
            # A slot that changed hands says nothing of the block that it holds now.
            if fault is not Fault.GENERATION:
                self.spoilt.append(positions[n])
        if faults:
            self.reason = f"{len(faults)} pages of layer {layer} differ in {faults[0][1].value}"


class Budget(Protocol):
    """How long the loads of one step may go on."""

    spent: bool
    hurries: bool  # requests that decode wait for the end of this step

    def batch_done(self) -> None: ...


class Mover(Protocol):
    """Called by the thread that runs the model only. No call raises for what a daemon or a device does."""

    @property
    def lost(self) -> bool:
        """A copy has failed on the device, and nobody knows what it still does: the engine must end."""

    copies_ahead: bool  # whether LoadPlans are to allow for copies that begin before others are done

    def begin(self, client: DaemonClient | None, step: int, *, loads: bool) -> None:
        """Before the forward pass. `loads`: new ones come with this step, whose blocks other requests had until now."""

    def usable(self, incarnation: int) -> bool:
        """Whether places in the arena of that daemon can be touched in this step."""

    def save(self, saving: Saving, layer: int) -> None:
        """The engine has enqueued all of its work on this layer. The second time in a step it does nothing."""

    def end(self, saving: Saving | None) -> None:
        """After the forward pass: saves the layers not saved yet. Once it returns, the engine's next work may
        overwrite the saved blocks. The fence and LET_GO follow when the last copy is done."""

    def load(self, loading: Loading, budget: Budget) -> bool:
        """Moves on with a load; finds faults. True if all that has landed is done. `budget` is of time in this call:
        a mover whose copies take none has bounds of its own."""

    def settled(self, loading: Loading) -> bool:
        """Whether none of its copies is under way: the engine may have its blocks back."""

    def take_counts(self) -> Counter[str]:
        """Since the last call."""

    def close(self) -> None:
        """Ends copies, within seconds. The client must still be open."""

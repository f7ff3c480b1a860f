"""What the two halves of the connector tell each other: plain values, one object per step each way.

vLLM carries them between its processes (see `metadata`). Nothing here needs vLLM.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from pdx.layout import Place


@dataclass(frozen=True)
class Save:
    """Blocks of one handoff (or kept ones) that become whole in this step: (block index, block ids by group, place)."""

    handoff_id: bytes
    blocks: list[tuple[int, tuple[int, ...], Place]]
    last: bool  # no page of this handoff is missing after this step
    pages: int  # of the whole handoff, for LetGo
    streamed: bool = True  # the daemon wants to know of every layer, to push it on at once


@dataclass(frozen=True)
class Load:
    """A request whose blocks the worker fills from the arena, until all are verified or `budget_s` is over."""

    request_id: str
    places: list[Place]
    tables: list[list[int]]  # engine block ids of these places, by KV group
    budget_s: float
    incarnation: int  # of the pdxd whose arena the places mean: a step may tell of the next one already


@dataclass(frozen=True)
class Step:
    """Scheduler to worker."""

    number: int
    incarnation: int  # of the pdxd whose arena the places of `saves` mean; 0: none
    tokens: int  # scheduled in this step; 0: no forward pass
    saves: list[Save] = field(default_factory=list)
    loads: list[Load] = field(default_factory=list)
    finishing: list[str] = field(default_factory=list)  # requests whose load takes what has landed, then ends
    dropping: list[str] = field(default_factory=list)  # requests whose load ends now, as far as it got
    # By rank, the state of its weights that all this was planned for; "" if left out. None: not known, nothing moves.
    epoch: dict[int, str] | None = field(default_factory=dict)
    asked: int = 0  # how often the scheduler has asked so far: a worker that sees a new number looks at its weights
    # How many lines to a pdxd the scheduler has lost, and the incarnation of the last. A worker that is attached there
    # leaves, too, once for each: pdxd takes an engine's processes back together.
    left: tuple[int, int] = (0, 0)
    timed: bool = False  # the scheduler wants to hear when this step is over, whatever ends in it


@dataclass(frozen=True)
class LoadResult:
    ok: bool
    pages: int  # verified
    done_ns: int  # CLOCK_MONOTONIC, which the processes of a host share
    reason: str = ""
    spoilt: list[int] = field(default_factory=list)  # which of the load's places held a wrong page
    ranks: int = 1  # whose results these are
    seconds: float = 0.0  # from its first page to its last, those in which it waited for other loads not counted

    def joined(self, other: LoadResult) -> LoadResult:
        """The result of more ranks: as good as the worst of them, as late as the last."""
        return LoadResult(
            ok=self.ok and other.ok,
            pages=self.pages + other.pages,
            done_ns=max(self.done_ns, other.done_ns),
            reason=self.reason or other.reason,
            spoilt=sorted({*self.spoilt, *other.spoilt}),
            ranks=self.ranks + other.ranks,
            seconds=max(self.seconds, other.seconds),
        )


class Seen(NamedTuple):
    """What a rank has found when it looked at its weights."""

    asked: int  # as it stood in the step: see `Step`
    state: str  # see `watch`


@dataclass(frozen=True)
class Report:
    """Worker to scheduler: this step is over, the loads that ended in it, and by rank what those found that looked."""

    step: int
    loads: dict[str, LoadResult] = field(default_factory=dict)
    seen: dict[int, Seen] = field(default_factory=dict)

    def joined(self, other: Report) -> Report:
        """What two ranks say of one step."""
        loads = self.loads | other.loads
        loads |= {name: self.loads[name].joined(other.loads[name]) for name in self.loads.keys() & other.loads.keys()}
        return Report(max(self.step, other.step), loads, self.seen | other.seen)

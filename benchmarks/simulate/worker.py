"""A simulated model worker: writes pages layer by layer, reads them as they land, verifies what it has read.

A step is cut into events: begin, one per layer, end. It may be stopped or die between any two, and a page that is
read in one event is verified in a later one, so that whatever can happen to a slot in between does happen.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import xxhash

from benchmarks.simulate.host import Host, SimulatedArena
from benchmarks.simulate.prompts import PAGES, pages_of
from benchmarks.simulate.world import Process, Violation, World
from pdx.buffer.headers import Headers
from pdx.layout import Place
from pdx.wire import Filled, FilledEntry, LetGo, Message

if TYPE_CHECKING:
    from benchmarks.simulate.breaks import Parts
    from benchmarks.simulate.work import Tie

LAYER_S = 0.004  # to compute one layer of a step, give or take


@dataclass(eq=False)
class Load:
    """One request's pages on their way in. Layers of a block are taken in order."""

    handoff_id: bytes
    places: list[Place]
    names: list[bytes]
    deadline: float
    incarnation: int
    arena: SimulatedArena
    done: list[int] = field(init=False)  # leading layers verified, by block
    stopping: bool = False
    reason: str = ""
    spoilt: list[int] = field(default_factory=list)  # blocks whose checksum is wrong
    copied: list[tuple[int, int, bytes]] = field(default_factory=list)  # block, layer, what was read: not verified yet

    def __post_init__(self) -> None:
        self.done = [0] * len(self.places)

    @property
    def complete(self) -> bool:
        return all(layers == PAGES.layers for layers in self.done)


@dataclass(eq=False)
class Save:
    """What one step writes for one handoff."""

    handoff_id: bytes
    names: list[bytes]
    blocks: list[int]
    places: list[Place]
    last: bool


@dataclass(eq=False)
class Step:
    number: int
    saves: list[Save]
    loads: list[Load]
    incarnation: int


class SimulatedWorker(Process):
    """The second process of an engine. `report` is told of each step's end, and of the loads that ended in it."""

    def __init__(self, world: World, parts: Parts, name: str, report: Callable[[int, list[Load]], None]) -> None:
        super().__init__(world, name)
        self.tie: Tie | None = None
        self.host: Host | None = None
        self.slowness = 1.0
        self._parts = parts
        self._report = report
        self._loads: list[Load] = []

    def die(self) -> None:
        super().die()
        self._loads.clear()

    def begin(self, step: Step) -> None:
        self._loads += step.loads
        if step.saves:
            self.later(self._layer_s(), self._layer, step, 0)
        else:
            self.later(self._layer_s(), self._end, step)
        self._copy_landed()

    def _layer_s(self) -> float:
        return LAYER_S * self.slowness * (0.5 + self.world.chance.random())

    def _layer(self, step: Step, layer: int) -> None:
        tie = self._usable(step.incarnation)
        if tie is not None:
            for save in step.saves:
                for block, place in zip(save.blocks, save.places, strict=True):
                    self._write(tie, place, layer, save.names[block])
            entries = [FilledEntry(save.handoff_id, save.blocks) for save in step.saves]
            self._say(Filled(step=step.number, step_started_ns=0, layer=layer, filled_ns=0, entries=entries))
        if layer + 1 < PAGES.layers:
            self.later(self._layer_s(), self._layer, step, layer + 1)
        else:
            self.later(self._layer_s() / 4, self._end, step)

    def _end(self, step: Step) -> None:
        ended = self._verify()
        tie = self.tie
        if tie is not None:
            tie.arena.set_fence(tie.session.fence_offset, step.number)
        if self._usable(step.incarnation) is not None:
            for save in step.saves:
                if save.last:
                    self._say(LetGo(handoff_id=save.handoff_id, side="send", fence=step.number, ok=True))
        self._report(step.number, ended)

    def _say(self, message: Message) -> None:
        if self.tie is not None:
            self.tie.out.send(message)

    def _usable(self, incarnation: int) -> Tie | None:
        return self.tie if self.tie is not None and self.tie.incarnation == incarnation else None

    # --- pages ------------------------------------------------------------------------------------------------

    def _write(self, tie: Tie, place: Place, layer: int, name: bytes) -> None:
        arena = tie.arena
        tie.host.engine_touches(place, "write", arena)
        page, checksum = pages_of(name)[layer]
        start = place.page_offset(PAGES, layer)
        arena.memory[start : start + PAGES.page_bytes] = page
        arena.set_checksum(place, layer, checksum)
        _raise_watermark(arena, place)

    def _copy_landed(self) -> None:
        """Reads what has landed; it is verified at the end of the step."""
        for load in self._loads:
            if self._usable(load.incarnation) is None:
                load.reason = "pdxd is gone"
                continue
            for block, place in enumerate(load.places):
                landed = min(load.arena.watermark(place.header_offset), PAGES.layers)
                for layer in range(load.done[block], landed):
                    assert self.tie is not None
                    self.tie.host.engine_touches(place, "read", load.arena)
                    start = place.page_offset(PAGES, layer)
                    load.copied.append((block, layer, bytes(load.arena.memory[start : start + PAGES.page_bytes])))

    def _verify(self) -> list[Load]:
        """Checks each copy as the real worker does, and against the truth. Returns loads that have ended."""
        for load in self._loads:
            copied, load.copied = load.copied, []
            for block, layer, page in copied:
                if load.reason:
                    break
                place = load.places[block]
                load.reason = self._parts.fault(page, load.arena, place, layer)
                if not load.reason:
                    self._must_be_right(load, block, layer, page)
                    load.done[block] = layer + 1
                else:
                    self.world.counts[f"pages refused for their {load.reason}"] += 1
                    load.spoilt = [block] if load.reason == "checksum" else []
            if not load.reason and not load.complete:
                load.reason = "stopped" if load.stopping else "out of time" if self.world.now > load.deadline else ""
        ended = [load for load in self._loads if load.reason or load.complete]
        self._loads = [load for load in self._loads if not load.reason and not load.complete]
        return ended

    def _must_be_right(self, load: Load, block: int, layer: int, page: bytes) -> None:
        self.world.counts["pages verified"] += 1
        if page != pages_of(load.names[block])[layer][0]:
            whose = f"block {block} of handoff {load.handoff_id.hex()}"
            raise Violation("wrong", f"a page that is not its own passed all checks as {whose}")


def fault_of(page: bytes, arena: Headers, place: Place, layer: int) -> str:
    """What is wrong with a copy, as pdx.engine.copier looks at it: the generation last."""
    expected = arena.checksum(place, layer)
    if arena.generation(place.header_offset) != place.generation:
        return "generation"
    if xxhash.xxh3_64_intdigest(page) != expected:
        return "checksum"
    return ""


def _raise_watermark(arena: Headers, place: Place) -> None:
    before = after = arena.watermark(place.header_offset)
    while after < PAGES.layers and arena.checksum(place, after):
        after += 1
    if after > before:
        arena.set_watermark(place.header_offset, after)

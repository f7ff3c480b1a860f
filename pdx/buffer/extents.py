"""Room: which units of the arena are taken. Knows layouts and numbers; nothing of slots, keys or leases.

The arena after its control page is cut into equal *extents*. An extent belongs to one layout as long as any of its
units is taken; after that it is anybody's. All extents of one layout form a `Pool`, a buddy allocator whose pieces are
powers of two up to a chunk. Any mix of pieces makes a run of blocks, so fragmentation costs locality, never a refusal.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import msgspec

from pdx.layout import CONTROL_BYTES, ExtentPlan, PageLayout, slot_sizes


@dataclass(eq=False, slots=True)
class Extent:
    start: int  # bytes from the arena's start
    used_units: int = 0
    idle_units: int = 0  # of the used ones: could be freed at any time


class Run(msgspec.Struct, frozen=True):
    """Consecutive units of one extent, taken together and given back together."""

    extent: Extent
    layout: PageLayout
    first_unit: int
    blocks: int
    offset: int  # of the first unit, in bytes from the arena's start
    header_offset: int  # of the first unit's header

    def singles(self) -> list[Run]:
        """Its units as runs of their own, each to be given back by itself."""
        extent, layout, first = self.extent, self.layout, self.first_unit
        offsets = range(self.offset, self.offset + self.blocks * layout.unit_bytes, layout.unit_bytes)
        headers = range(self.header_offset, self.header_offset + self.blocks * layout.header_bytes, layout.header_bytes)
        units = zip(range(first, first + self.blocks), offsets, headers, strict=True)
        return [Run(extent, layout, unit, 1, offset, header) for unit, offset, header in units]


class Extents:
    """All extents of one arena. One thread."""

    def __init__(self, *, arena_bytes: int, extent_bytes: int) -> None:
        self.extent_bytes = extent_bytes
        starts = range(CONTROL_BYTES, arena_bytes - extent_bytes + 1, extent_bytes)
        self.total = len(starts)
        self.pools: dict[PageLayout, Pool] = {}
        self.untaken = [Extent(start) for start in reversed(starts)]

    def capacity(self, layout: PageLayout) -> int:
        """Blocks of this layout that the whole arena could hold."""
        return self.total * self.units(layout)

    def free(self, layout: PageLayout) -> int:
        """Blocks of this layout that `take` can find room for now."""
        pool = self.pools.get(layout)
        return (pool.free_units if pool else 0) + len(self.untaken) * self.units(layout)

    @property
    def free_share(self) -> float:
        """What is free of the arena, each taken extent counted in the units of its layout."""
        free = len(self.untaken) + sum(pool.free_units / pool.units for pool in self.pools.values())
        return free / self.total if self.total else 1.0

    @property
    def used_bytes(self) -> int:
        """Of all units that are taken."""
        pools = self.pools.items()
        return sum((len(pool.extents) * pool.units - pool.free_units) * layout.unit_bytes for layout, pool in pools)

    @property
    def idle_bytes(self) -> int:
        """Of these, what could be freed at any time."""
        return sum(pool.idle_units * layout.unit_bytes for layout, pool in self.pools.items())

    def share(self, run: Run) -> float:
        """What giving this run back adds to `free_share`."""
        return run.blocks / self.pools[run.layout].units / self.total

    def reachable(self, layout: PageLayout) -> int:
        """What `free` would say if all idle units were given back: those of other layouts count by whole extents."""
        units = self.free(layout)
        for other, pool in self.pools.items():
            units += pool.idle_units if other == layout else self.units(layout) * pool.clearable
        return units

    def rest(self, run: Run) -> None:
        """Its units are idle from now on: they could be freed at any time."""
        self.pools[run.layout].count_idle(run.extent, run.blocks)

    def wake(self, run: Run) -> None:
        """They are idle no longer."""
        self.pools[run.layout].count_idle(run.extent, -run.blocks)

    def offsets(self, run: Run) -> range:
        """Where runs may begin in the extent of this one."""
        first = run.offset - run.first_unit * run.layout.unit_bytes
        return range(first, first + self.units(run.layout) * run.layout.unit_bytes, run.layout.unit_bytes)

    def take(self, layout: PageLayout, blocks: int) -> list[Run]:
        """Runs that together hold `blocks` blocks, the largest pieces first. `blocks` is at most free(layout)."""
        assert blocks <= self.free(layout), "take() without room"
        if not blocks:
            return []
        pool = self.pools.get(layout) or self.pools.setdefault(layout, Pool(self._plan(layout)))
        wanted = slot_sizes(blocks, layout.chunk_blocks)[::-1]
        runs = []
        while wanted:
            size = wanted.pop()
            run = pool.take(size)
            if run is None and self.untaken and size <= pool.largest_piece:
                pool.adopt(self.untaken.pop())
                run = pool.take(size)
            if run is None:
                wanted += [size // 2, size // 2]
            else:
                runs.append(run)
        return runs

    def give(self, run: Run) -> None:
        """Makes the run's units free. An extent that is wholly free leaves its layout."""
        pool = self.pools[run.layout]
        pool.give(run)
        if run.extent.used_units == 0:
            pool.dismiss(run.extent)
            self.untaken.append(run.extent)
            if not pool.extents:
                del self.pools[run.layout]

    def units(self, layout: PageLayout) -> int:
        """Of an extent that is cut for this layout."""
        pool = self.pools.get(layout)
        return pool.units if pool else self._plan(layout).units

    def _plan(self, layout: PageLayout) -> ExtentPlan:
        return ExtentPlan(layout, self.extent_bytes)


def is_clearable(extent: Extent) -> bool:
    """Nothing in it is held or being filled: evicting frees all of it."""
    return extent.used_units == extent.idle_units


class Pool:
    """A buddy allocator over the extents of one layout. Free pieces are kept by size, as (extent, first unit)."""

    def __init__(self, plan: ExtentPlan) -> None:
        self.plan = plan
        self.units = plan.units
        self.free_units = 0
        self.idle_units = 0
        self.clearable = 0  # extents of which that is true
        self.extents: dict[Extent, None] = {}
        self._whole = slot_sizes(self.units, plan.layout.chunk_blocks)  # how a wholly free extent is cut
        self.largest_piece = max(self._whole, default=0)
        # Dicts for their order: the same calls give the same places in every run.
        sizes = plan.layout.chunk_blocks.bit_length()
        self._free: dict[int, dict[tuple[Extent, int], None]] = {1 << order: {} for order in range(sizes)}

    def adopt(self, extent: Extent) -> None:
        # The last piece entered is the first taken: enter them backwards, so that runs follow one another in memory.
        for first_unit, size in reversed(self._whole_pieces()):
            self._free[size][extent, first_unit] = None
        self.extents[extent] = None
        self.free_units += self.units
        self.clearable += is_clearable(extent)

    def dismiss(self, extent: Extent) -> None:
        """Forgets a wholly free extent."""
        for first_unit, size in self._whole_pieces():
            del self._free[size][extent, first_unit]
        del self.extents[extent]
        self.free_units -= self.units
        self.clearable -= is_clearable(extent)

    def take(self, size: int) -> Run | None:
        """A piece of exactly `size` units, split off the smallest that will do; None if there is none."""
        found = next((larger for larger, pieces in self._free.items() if larger >= size and pieces), None)
        if found is None:
            return None
        (extent, first_unit), _ = self._free[found].popitem()
        while found > size:
            found //= 2
            self._free[found][extent, first_unit + found] = None
        self._count_used(extent, size)
        layout, start = self.plan.layout, extent.start
        offset, header_offset = self.plan.unit_offset(start, first_unit), self.plan.header_offset(start, first_unit)
        return Run(extent, layout, first_unit, size, offset, header_offset)

    def give(self, run: Run) -> None:
        extent, first_unit, size = run.extent, run.first_unit, run.blocks
        self._count_used(extent, -size)
        while size < self.plan.layout.chunk_blocks and (extent, first_unit ^ size) in self._free[size]:
            del self._free[size][extent, first_unit ^ size]
            first_unit &= ~size
            size *= 2
        self._free[size][extent, first_unit] = None

    def count_idle(self, extent: Extent, units: int) -> None:
        self.clearable -= is_clearable(extent)
        extent.idle_units += units
        self.idle_units += units
        self.clearable += is_clearable(extent)

    def pieces(self) -> Iterator[tuple[Extent, int, int]]:
        """Every free piece: extent, first unit, units."""
        for size, pieces in self._free.items():
            for extent, first_unit in pieces:
                yield extent, first_unit, size

    def _count_used(self, extent: Extent, units: int) -> None:
        self.clearable -= is_clearable(extent)
        extent.used_units += units
        self.free_units -= units
        self.clearable += is_clearable(extent)

    def _whole_pieces(self) -> list[tuple[int, int]]:
        pieces, first_unit = [], 0
        for size in self._whole:
            pieces.append((first_unit, size))
            first_unit += size
        return pieces

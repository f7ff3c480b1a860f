"""S3-FIFO (Yang et al., SOSP 2023): a scan of prompts that nobody asks for again can't wash out the shared ones.

New items enter a small queue and leave it soon; what was used meanwhile moves to the main queue, which gives used items
second chances. Names of items that left the small queue stay for a while as ghosts: whoever comes back goes to main at
once. An item in use keeps its place in its queue, so that using it is a mark and never a move.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Generic

from pdx.buffer.evict import Item

SMALL_SHARE = 0.1  # of all items; the paper's choice, flat between 5 and 20 %
USES_MAX = 3  # second chances that an item can have saved up
# The paper promotes at two uses. One is enough here: a block is only ever asked for by a prompt that begins with it.
PROMOTED_AT = 1
GHOSTS_MIN = 256  # a nearly empty policy still remembers this many; otherwise as many as there are items


@dataclass(slots=True)
class _Record:
    is_idle: bool = False  # else it is in use
    uses: int = 0


class S3Fifo(Generic[Item]):
    """See Policy. `name_of` is what a ghost is known by: equal for items of equal content (for slots: their keys)."""

    def __init__(self, name_of: Callable[[Item], Hashable]) -> None:
        self._name_of = name_of
        self._small: OrderedDict[Item, _Record] = OrderedDict()
        self._main: OrderedDict[Item, _Record] = OrderedDict()
        self._ghosts: OrderedDict[Hashable, None] = OrderedDict()
        self._idle = 0

    def touched(self, chain: Sequence[Item]) -> None:
        for item in reversed(chain):
            record = self._find(item)
            if record is None:
                record = _Record()
                name = self._name_of(item)
                queue = self._main if name in self._ghosts else self._small
                queue[item] = record
                self._ghosts.pop(name, None)
            else:
                record.uses = min(record.uses + 1, USES_MAX)
            self._idle += not record.is_idle
            record.is_idle = True

    def grown(self, chain: Sequence[Item]) -> None:
        for item in reversed(chain):
            queue = self._small if item in self._small else self._main
            if item in queue:
                queue.move_to_end(item)

    def removed(self, item: Item) -> None:
        record = self._find(item)
        if record is not None:
            self._idle -= record.is_idle
            record.is_idle = False

    def forgotten(self, item: Item) -> None:
        self.removed(item)
        self._small.pop(item, None)
        self._main.pop(item, None)

    def evicted(self, item: Item) -> None:
        self._age()
        self.removed(item)
        if self._small.pop(item, None) is not None:
            self._remember(item)
        self._main.pop(item, None)

    def victims(self) -> Iterator[Item]:
        """What eviction after eviction would choose. Walks the queues only as far as it is asked.

        Up to the first of them the queues move on: who wants room and gets none yet asks again, and what is in its way
        may have chances left for as many walks.
        """
        self._age()
        small, main = iter(self._small.items()), iter(self._main.items())
        small_left, main_left = len(self._small), len(self._main)
        moved: deque[tuple[Item, _Record, int]] = deque()  # behind main's end, with the chances they have left
        while small_left or main_left or moved:
            if small_left and self._small_is_next(small_left, main_left + len(moved)):
                (item, record), small_left = next(small), small_left - 1
                if record.uses >= PROMOTED_AT:
                    moved.append((item, record, 0))
                    continue
            else:
                if main_left:
                    (item, record), main_left = next(main), main_left - 1
                    uses = record.uses
                else:
                    item, record, uses = moved.popleft()
                if uses:
                    moved.append((item, record, uses - 1))
                    continue
            if record.is_idle:
                yield item

    def __iter__(self) -> Iterator[Item]:
        return (item for queue in (self._small, self._main) for item, record in queue.items() if record.is_idle)

    def another(self) -> S3Fifo[Item]:
        return S3Fifo(self._name_of)

    def __len__(self) -> int:
        return self._idle

    def __repr__(self) -> str:
        return (
            f"<S3Fifo {self._idle} idle: {len(self._small)} small, {len(self._main)} main, {len(self._ghosts)} ghosts>"
        )

    def _find(self, item: Item) -> _Record | None:
        return self._small.get(item) or self._main.get(item)

    def _small_is_next(self, small: int, main: int) -> bool:
        return not main or small >= SMALL_SHARE * (small + main)

    def _age(self) -> None:
        """Moves the queues' heads on until one of them is a victim, or nothing is left to move."""
        while self._small or self._main:
            if self._small and self._small_is_next(len(self._small), len(self._main)):
                item, record = next(iter(self._small.items()))
                if record.uses < PROMOTED_AT and record.is_idle:
                    return
                del self._small[item]
                if record.uses >= PROMOTED_AT:
                    record.uses = 0
                    self._main[item] = record
                else:
                    self._remember(item)  # in use: it will come back as one that was asked for again
            else:
                item, record = next(iter(self._main.items()))
                if not record.uses and record.is_idle:
                    return
                del self._main[item]
                if record.uses:
                    record.uses -= 1
                    self._main[item] = record
                else:
                    self._remember(item)

    def _remember(self, item: Item) -> None:
        self._ghosts[self._name_of(item)] = None
        while len(self._ghosts) > max(GHOSTS_MIN, len(self._small) + len(self._main)):
            self._ghosts.popitem(last=False)

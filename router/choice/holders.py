"""Which daemons keep a block: block names of 64 bits -> sets of holders. Knows nothing of messages or time.

Compact, for fleets keep many millions of blocks: open addressing in arrays of 12 bytes an entry, cut into shards by the
first bits of the name, so that no growth moves more than a shard. Sets of holders are few and shared: an entry has the
number of its set. So a holder leaves by leaving the sets, whatever it held; entries of the empty set go with the next
growth of their shard. One thread.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator
from typing import NamedTuple

SHARDS = 1024
SLOTS_MIN = 8  # of a shard
SWEEP_SHARE = 0.1  # of all entries
LOAD_MAX = 0.7  # probes stay short: names are digests, so their bits are even


class Held(NamedTuple):
    """Who has a block, a bit for each holder."""

    arena: int = 0
    disk: int = 0


NOBODY = Held()


class Holders:
    """`names_max` bounds the entries; what comes beyond is not remembered, which costs a hint and nothing else."""

    def __init__(self, *, names_max: int) -> None:
        self.names_max = names_max
        self._shards = [_Shard() for _ in range(SHARDS)]
        self._used = 0  # entries, those of the empty set among them
        self._sets: list[Held] = [NOBODY]
        self._uses: list[int] = [0]
        self._numbers: dict[Held, int] = {NOBODY: 0}
        self._unused: list[int] = []  # numbers of sets
        self._changes: dict[
            tuple[int, int, bool, bool], int
        ] = {}  # of a set, by a put: what comes out, once worked out

    def __len__(self) -> int:
        """Entries of sets that are not empty."""
        return sum(uses for held, uses in zip(self._sets, self._uses, strict=True) if held != NOBODY)

    def __repr__(self) -> str:
        return f"<Holders of {len(self)} blocks, {len(self._numbers)} sets>"

    def put(self, name: int, holder: int, *, arena: bool, disk: bool) -> bool:
        """From now on, `holder` has the block in these tiers, or nowhere. False: there is no room to remember it."""
        shard = self._shards[name % SHARDS]
        slot = shard.find(name)
        before = shard.sets[slot]  # 0 where the name is new
        change = (before, holder, arena, disk)
        after = self._changes.get(change)
        if after is None:
            after = self._changes[change] = self._changed(*change)
        if after == before:
            return True
        if not shard.names[slot]:
            if self._used >= self.names_max and not self._sweep():
                return False
            if shard.is_full:
                self._clean(shard)
            slot = shard.find(name)
            shard.add(slot, name)
            self._used += 1
        else:
            self._uses[before] -= 1
        shard.sets[slot] = after
        self._uses[after] += 1
        if before and not self._uses[before]:
            self._drop(before)
        return True

    def of(self, names: Iterable[int]) -> Iterator[Held]:
        """Who has each of these blocks."""
        sets, shards = self._sets, self._shards
        for name in names:
            shard = shards[name % SHARDS]
            if not shard.used:
                yield NOBODY
                continue
            slot = shard.find(name)
            yield sets[shard.sets[slot]] if shard.names[slot] else NOBODY

    def leave(self, holder: int) -> None:
        """It has nothing any more, and its number may be another's."""
        bit = ~(1 << holder)
        self._changes.clear()
        numbers: dict[Held, int] = {}
        for number, held in enumerate(self._sets):
            self._sets[number] = without = Held(held.arena & bit, held.disk & bit)
            numbers.setdefault(without, number)
        self._numbers = numbers  # two sets may be one now: both numbers are good, and the first is given out

    def check_integrity(self) -> None:
        """Raises AssertionError unless uses are counted right. Takes time linear in all entries."""
        uses = [0] * len(self._sets)
        for shard in self._shards:
            taken = [slot for slot, name in enumerate(shard.names) if name]
            assert len(taken) == shard.used
            for slot in taken:
                uses[shard.sets[slot]] += 1
                assert shard.find(shard.names[slot]) == slot
        assert uses == self._uses
        assert sum(uses) == self._used

    def _changed(self, before: int, holder: int, arena: bool, disk: bool) -> int:
        """The number of the set that this one becomes."""
        held, bit = self._sets[before], 1 << holder
        after = Held(held.arena | bit if arena else held.arena & ~bit, held.disk | bit if disk else held.disk & ~bit)
        if after == held:
            return before
        number = self._numbers.get(after)
        if number is None:
            if self._unused:
                number = self._unused.pop()
                self._sets[number] = after
            else:
                number = len(self._sets)
                self._sets.append(after)
                self._uses.append(0)
            self._numbers[after] = number
        return number

    def _drop(self, number: int) -> None:
        """A set that no entry has. The empty one stays."""
        self._changes.clear()
        if self._numbers.get(self._sets[number]) == number:
            del self._numbers[self._sets[number]]
        self._sets[number] = NOBODY
        self._unused.append(number)

    def _sweep(self) -> bool:
        """Forgets what nobody has, if that is worth its time. Whether there is room now."""
        empty = self._used - len(self)
        if empty < self.names_max * SWEEP_SHARE:
            return False
        for shard in self._shards:
            self._clean(shard)
        return True

    def _clean(self, shard: _Shard) -> None:
        """Forgets what nobody has, and makes room for more."""
        held = []
        for slot, name in enumerate(shard.names):
            if not name:
                continue
            number = shard.sets[slot]
            if self._sets[number] != NOBODY:
                held.append((name, number))
                continue
            self._used -= 1
            self._uses[number] -= 1
            if number and not self._uses[number]:
                self._drop(number)
        shard.refill(held)


class _Shard:
    """Linear probing. A name of 0 would be a free slot: it is taken for 1."""

    __slots__ = ("most", "names", "sets", "used")

    def __init__(self) -> None:
        self.refill([])

    @property
    def is_full(self) -> bool:
        return self.used >= self.most

    def find(self, name: int) -> int:
        """The slot of this name, or the free one where it would be."""
        names = self.names
        mask = len(names) - 1
        name = name or 1
        slot = (name >> 10) & mask
        while (there := names[slot]) and there != name:
            slot = (slot + 1) & mask
        return slot

    def add(self, slot: int, name: int) -> None:
        self.names[slot] = name or 1
        self.used += 1

    def refill(self, entries: list[tuple[int, int]]) -> None:
        slots = SLOTS_MIN
        while len(entries) + 1 > LOAD_MAX * slots * 0.75:  # not full again at once
            slots *= 2
        names, sets, mask = array("Q", bytes(8 * slots)), array("I", bytes(4 * slots)), slots - 1
        for name, number in entries:  # as `find`, of names that are all different
            slot = (name >> 10) & mask
            while names[slot]:
                slot = (slot + 1) & mask
            names[slot], sets[slot] = name, number
        self.names, self.sets, self.used, self.most = names, sets, len(entries), int(LOAD_MAX * slots)

"""Which blocks go down to a tier, and when. Sans-IO: keys in, keys out; holds no slot and writes nothing.

Write-through writes a block when it is committed: it survives the daemon, and eviction never waits. Write-back writes
it when its slot is about to be evicted: what nobody asks for twice may never touch the disk, but a claim that is in a
hurry evicts blocks that are nowhere else. Either way writing is a favour: past its bound a wish is dropped. But one
that the medium could not grant now waits until it can: a disk that is full for a minute must not cost a chain's middle.
One that fails again though others were written since has failed by itself, and is refused: each try pauses the medium.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Iterable
from enum import StrEnum

from pdx.tiers.tier import End, Failed, Key, Written

BACKLOG_MAX = 4096  # blocks: some seconds of a disk's writing; who waits longer is evicted before


class WriteMode(StrEnum):
    THROUGH = "through"
    BACK = "back"


class Spill:
    """The driver submits `wanted()`, as many as the tier takes, and holds a block's slot from then to its end."""

    def __init__(self, mode: WriteMode, *, backlog_max: int = BACKLOG_MAX) -> None:
        self.mode = mode
        self.dropped = 0
        self.written_back = 0  # because they were pressed
        self._backlog_max = backlog_max
        self._waiting: OrderedDict[Key, None] = OrderedDict()
        self._open: dict[int, Key] = {}
        self._writing: set[Key] = set()
        self._pressed: set[Key] = set()  # of those that wait or are being written
        self._refused: set[Key] = set()
        self._written = 0
        self._failed: dict[Key, int] = {}  # their writes failed; how many had been written before the first time
        self._unwritable: set[Key] = set()  # of these, refused, whatever becomes of the medium

    def committed(self, keys: Iterable[Key]) -> None:
        """These blocks are whole and found in memory from now on."""
        for key in keys:
            self._refused.discard(key)
            if self.mode is WriteMode.THROUGH:
                self._add(key)

    def pressed(self, keys: Iterable[Key]) -> None:
        """These will be evicted next and are not in the tier: they go first, in this order."""
        for key in reversed(list(keys)):
            if key in self._writing:
                continue
            self._waiting[key] = None
            self._waiting.move_to_end(key, last=False)
            self._pressed.add(key)
        while len(self._waiting) > self._backlog_max:
            self._drop()

    def gone(self, key: Key) -> None:
        """The block has left memory: there is nothing to write any more."""
        self._forget(key)
        self._refused.discard(key)
        self._failed.pop(key, None)
        self._unwritable.discard(key)

    def refused(self, key: Key) -> None:
        """The tier does not take this block."""
        self._forget(key)
        self._note_refusal(key)

    def well(self) -> None:
        """The tier takes again what it did not; but not what failed by itself."""
        self._refused.clear()

    def wanted(self) -> list[Key]:
        """What to write, the most urgent first."""
        return list(self._waiting)

    def submitted(self, key: Key, ticket: int) -> None:
        del self._waiting[key]
        self._writing.add(key)
        self._open[ticket] = key

    @property
    def writing(self) -> Collection[Key]:
        """Blocks that were submitted and have not ended."""
        return self._writing

    def on(self, end: End) -> tuple[Key, bool]:
        """The block whose slot is free of this write now, and whether the tier has it."""
        key = self._open.pop(end.ticket)
        self._writing.remove(key)
        if isinstance(end, Failed) and end.again and not (end.errno and self._fails_by_itself(key)):
            self._put_back(key, last=end.errno != 0)
            return key, False
        is_written = isinstance(end, Written)
        if is_written:
            self._written += 1
            self._failed.pop(key, None)
        self.written_back += is_written and key in self._pressed
        self._pressed.discard(key)
        if not is_written:
            self._note_refusal(key)
        return key, is_written

    def is_coming(self, key: Key) -> bool:
        """It waits or is being written."""
        return key in self._waiting or key in self._writing

    def is_refused(self, key: Key) -> bool:
        """The tier did not take it, since it came into memory or the tier was sick: waiting for it is of no use."""
        return key in self._refused or key in self._unwritable

    def __len__(self) -> int:
        """Blocks that wait or are being written."""
        return len(self._waiting) + len(self._open)

    def __repr__(self) -> str:
        return f"<Spill {self.mode}: {len(self._waiting)} waiting, {len(self._open)} open, {self.dropped} dropped>"

    def _add(self, key: Key) -> None:
        if self.is_coming(key) or key in self._unwritable:
            return
        self._waiting[key] = None
        if len(self._waiting) > self._backlog_max:
            self._drop()

    def _put_back(self, key: Key, *, last: bool) -> None:
        """Where it was; but behind all others if it has failed itself: what is wrong may be one folder of the disk."""
        self._waiting[key] = None
        self._waiting.move_to_end(key, last=last)
        if len(self._waiting) > self._backlog_max:
            self._drop()

    def _fails_by_itself(self, key: Key) -> bool:
        """A medium that takes nothing at all says nothing of this key, however often it is tried."""
        if len(self._failed) >= self._backlog_max:  # as with those that are refused
            self._failed.clear()
            self._unwritable.clear()
        if self._failed.setdefault(key, self._written) < self._written:
            self._unwritable.add(key)
        return key in self._unwritable

    def _note_refusal(self, key: Key) -> None:
        if len(self._refused) >= self._backlog_max:
            self._refused.clear()  # each is asked once more: cheaper than to know all that left memory meanwhile
        self._refused.add(key)

    def _drop(self) -> None:
        """The oldest wish; but while those in front are pressed, the last."""
        key, _ = self._waiting.popitem(last=next(iter(self._waiting)) in self._pressed)
        self._pressed.discard(key)
        self.dropped += 1

    def _forget(self, key: Key) -> None:
        if key in self._waiting:
            del self._waiting[key]
            self._pressed.discard(key)

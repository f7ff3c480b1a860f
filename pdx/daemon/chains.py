"""Which blocks are one chain, however they came: so that a head outlives its tail, in the arena and in the tier below.

Either evicts first what came, or was used, first. A lease over a whole prompt is one use of all of it, in the arena;
the tier hears of it from here. But an answer is kept in lots, each a claim of its own, and what comes before them would
be older, and go first. So what the leases of one request held is remembered, by the request's name, and all of it
counts as new when it has grown by an eighth, for it must not be gone through for every block; or when it has been quiet
for a while, and its last lot is down in the tier.

A chain may have a hundred thousand blocks, and an engine that dies many chains: what is to count as used, or as new,
stands in a line, and some blocks of it are gone through in each turn.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Iterable
from dataclasses import dataclass, field

from pdx.buffer.slots import Slot
from pdx.buffer.store import Store
from pdx.daemon.grips import Grip
from pdx.daemon.tiering import Tiering

GROWN_BY = 8  # a part of it that is new: so each new block costs eight old ones a look
QUIET_S = 5.0  # without a lot: an engine that is slower makes few
CHAINS_MAX = 4096  # as many requests as engines have in flight
BLOCKS_MAX = 1 << 17  # in all chains together: their slots take 50 MB if they have left the arena
BLOCKS_A_TURN = 512  # 2 us each of the control thread
SLOTS_IN_LINE_MAX = BLOCKS_MAX  # what comes when there are more stays as old as it is

_Name = tuple[str, str]  # engine id, request id


@dataclass(eq=False)
class _Chain:
    slots: dict[Slot, None] = field(default_factory=dict)  # the head first
    blocks: int = 0
    new_blocks: int = 0  # since all of it counted as new
    last_lot: tuple[Slot, ...] = ()
    looked_at: float = 0.0


@dataclass(eq=False)
class _Use:
    """One of a chain."""

    slots: list[Slot]  # the head first: those that have yet to count
    has_grown: bool  # all of it counts as new in the arena, too


class Chains:
    """Owned by the control thread."""

    def __init__(self, store: Store, tiering: Tiering | None) -> None:
        self._store = store
        self._tiering = tiering
        self._chains: OrderedDict[_Name, _Chain] = OrderedDict()  # the one that grew last comes last
        self._grown: OrderedDict[_Name, _Chain] = OrderedDict()  # of these; the one looked at last comes last
        self._blocks = 0
        self._line: deque[_Use] = deque()
        self._slots_in_line = 0

    def ended(self, grip: Grip, now: float) -> None:
        """A lease of an engine has ended, and what it held has just become idle in the arena, in chain order."""
        slots, name = grip.lease.slots, (grip.engine_id, grip.request_id)
        if not slots:
            return  # somebody has asked for nothing
        chain = self._chains.get(name)
        is_whole = grip.side == "load" or chain is None or slots[0] is next(iter(chain.slots))
        if is_whole:
            self._enqueue(slots, has_grown=False)
        if not grip.request_id:
            return
        chain = self._chains.setdefault(name, _Chain())
        self._chains.move_to_end(name)
        self._grow(chain, slots, is_head=is_whole)
        if not is_whole and chain.new_blocks * GROWN_BY >= chain.blocks:
            self._renew(chain)
        if chain.new_blocks:
            chain.looked_at = now
            self._grown[name] = chain
            self._grown.move_to_end(name)
        while len(self._chains) > CHAINS_MAX or self._blocks > BLOCKS_MAX:
            self._forget(next(iter(self._chains)))

    def tick(self) -> None:
        """Some of what stands in line. The end of a chain first: its head counts last, as if all had come at once."""
        room = BLOCKS_A_TURN
        while self._line and room > 0:
            use, lot = self._line[0], deque[Slot]()
            while use.slots and room > 0:
                lot.appendleft(use.slots.pop())
                room -= lot[0].blocks
            self._slots_in_line -= len(lot)
            if not use.slots:
                self._line.popleft()
            if use.has_grown:  # which is no use: nobody has asked for it again
                self._store.policy.grown([slot for slot in lot if slot.unused and slot.indexed])
            if self._tiering is not None:
                self._tiering.used(lot)

    @property
    def pending(self) -> bool:
        """Whether anything stands in line."""
        return bool(self._line)

    def look(self, now: float) -> None:
        """All of a chain that has been quiet: but not before its last lot is below, which would be newer there."""
        while self._grown:
            name, chain = next(iter(self._grown.items()))
            if now - chain.looked_at < QUIET_S:
                return
            if self._tiering is not None and self._tiering.is_coming(chain.last_lot):
                chain.looked_at = now
                self._grown.move_to_end(name)
                continue
            self._renew(chain)
            del self._grown[name]

    def engine_gone(self, engine_id: str) -> None:
        """Whoever takes its name may use the names of its requests again."""
        for name in [name for name in self._chains if name[0] == engine_id]:
            self._forget(name)

    def _grow(self, chain: _Chain, slots: tuple[Slot, ...], *, is_head: bool) -> None:
        if is_head:
            before = chain.slots
            chain.slots = dict.fromkeys(slots) | before
            added = [slot for slot in slots if slot not in before]
        else:
            added = [slot for slot in slots if slot not in chain.slots]
            chain.slots.update(dict.fromkeys(added))
        new_blocks = sum(slot.blocks for slot in added)
        chain.last_lot = slots
        chain.blocks += new_blocks
        chain.new_blocks += new_blocks
        self._blocks += new_blocks

    def _renew(self, chain: _Chain) -> None:
        """All of it is to count as new."""
        self._enqueue(chain.slots, has_grown=True)
        chain.new_blocks = 0

    def _enqueue(self, slots: Iterable[Slot], *, has_grown: bool) -> None:
        if (has_grown or self._tiering is not None) and self._slots_in_line < SLOTS_IN_LINE_MAX:
            self._line.append(_Use(list(slots), has_grown))
            self._slots_in_line += len(self._line[-1].slots)

    def _forget(self, name: _Name) -> None:
        chain = self._chains.pop(name)
        if self._grown.pop(name, None) is not None:
            self._renew(chain)
        self._blocks -= chain.blocks

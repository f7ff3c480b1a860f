"""Between the arena and the tier below it: blocks go down as `tiers.spill` says, and come up for those who ask.

A block that comes up is a claim of one block that the tier fills; whoever asked follows its watermark as it follows a
handoff's, and is told if it does not come. Blocks come up once for all who wait for them, and stay as cache. Every
buffer that the tier has is held by a lease of ours until the tier has given it back.
"""

from __future__ import annotations

import logging
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from itertools import islice
from typing import Any

from pdx.buffer.claim import Claim
from pdx.buffer.lease import Lease, Owner
from pdx.buffer.selection import Selection
from pdx.buffer.slots import Slot
from pdx.daemon.ports import Desk
from pdx.errors import BadBlock, Refused
from pdx.layout import PageLayout, Place
from pdx.rates import Busy
from pdx.tiers.cost import CostModel
from pdx.tiers.pages import meta_of, pages_of, restore
from pdx.tiers.spill import Spill, WriteMode
from pdx.tiers.sweep import Sweeper, Swept
from pdx.tiers.tier import End, Failed, Key, Loaded, Ordered, Read, StateChanged, Tier, Write
from pdx.verbs import TierCleared
from pdx.wire import LoadEnded

OWNER = Owner("wire", "tier")
# Blocks that have left the arena are looked for below a few at a time, and not while a claim waits for its answer.
COUNTED_PER_TICK = 256
UNCOUNTED_MAX = 1 << 16
RESTING = ("paused", "hung")  # states of a tier that takes no writes now, and may again
WRITABLE = ("well", "trying")
FIRST_LOT = 8  # blocks that a tier is asked for at once, and twice as many each time it has them all
# Of one look-up, which has to be answered in 20 ms: a block on its way up is 15 to 45 us of the control thread, and
# nobody is answered meanwhile. What a prompt has below these is computed.
PROMISED_MAX = 256

# Who waits for blocks: an engine, and the name that it has chosen for this load. Without an engine: a pin of ours.
Load = tuple[str, bytes]

log = logging.getLogger("pdxd")


@dataclass(eq=False)
class _Promotion:
    """One block on its way up."""

    key: Key
    claim: Claim
    pages: PageLayout
    asked_by: dict[Load, None] = field(default_factory=dict)  # those who wait for it
    began_at: float = 0.0  # once the tier has it

    @property
    def is_wanted(self) -> bool:
        """Whether lookups will find it."""
        return self.claim.fresh_slots[0].keys[0] is not None

    @property
    def place(self) -> Place:
        return self.claim.places[0]


class Tiering:
    """Owned by the control thread."""

    def __init__(self, desk: Desk, tier: Tier, *, mode: WriteMode) -> None:
        self._desk = desk
        self._tier = tier
        self._spill = Spill(mode)
        self._writes: dict[int, Lease] = {}  # ticket -> holds the block
        self._writes_refused = False  # since the last end of one
        self._spoilt: set[Key] = set()  # being written, and found wrong meanwhile
        self._promotions: dict[Key, _Promotion] = {}  # the latest of each block
        self._by_load: dict[Load, dict[_Promotion, None]] = {}  # of these, what each waits for
        self.queued_bytes = 0  # of these: blocks on their way up
        self._queue: OrderedDict[_Promotion, None] = OrderedDict()  # of all of them, not submitted yet
        self._reads: dict[int, _Promotion] = {}  # by ticket
        self._left: deque[Key] = deque(maxlen=UNCOUNTED_MAX)  # evicted, and perhaps nowhere else
        self._lost = 0
        self._busy = Busy()  # with reads
        self.reads = CostModel()  # what they cost
        self.missed: Callable[[Load, Place], None] = lambda load, place: None  # hears of what a pin does not get
        desk.store.on_commit = self._committed
        desk.store.on_evict = self._evicted

    def promote(
        self, namespace: bytes, pages: PageLayout, hashes: Sequence[bytes], *, load: Load, now: float
    ) -> tuple[list[Place], list[Lease]]:
        """Places of these blocks, each of which the tier has, and which are filled one after the other from now on.

        Fewer where the arena has no room. If one does not come, the engine hears LOAD_ENDED. The leases
        keep what has come already: release them once the places are under a lease of your own.
        """
        places, ready = [], []
        for number, block_hash in enumerate(hashes):
            key = (namespace, block_hash)
            if self._coming(key) is None:
                # Memory may have it, behind one that it had not, and may have lost it to one that has just got room.
                read = self._desk.store.read(OWNER, namespace, [block_hash], now=now, ttl_s=float("inf"))
                if read is not None:
                    places.append(read.places[0])
                    ready.append(read.lease)
                    continue
                self._begin(namespace, pages, hashes, number, now)
            promotion = self._coming(key)
            if promotion is None:
                break
            promotion.asked_by[load] = None
            self._by_load.setdefault(load, {})[promotion] = None
            places.append(promotion.place)
        self._submit_reads(now)
        if load[0]:  # of lookups' hits, those that come from below
            self._desk.ports.counters["blocks_promoted"] += len(places) - len(ready)
        return places, ready

    def leading(self, namespace: bytes, hashes: Sequence[bytes]) -> int:
        """How many of the first of these blocks the tier has. A disk that hangs has nothing, on its way or not.

        Asked in growing lots: a tier names each block that it is asked for, and of most long prompts it has nothing.
        """
        blocks, lot = 0, FIRST_LOT
        while blocks < len(hashes):
            found = self._tier.contains([(namespace, block_hash) for block_hash in hashes[blocks : blocks + lot]])
            if False in found:
                return blocks + found.index(False)
            blocks += len(found)
            lot *= 2
        return blocks

    def to_read(self, namespace: bytes, hashes: Sequence[bytes]) -> int:
        """How many of these blocks are neither in the arena nor on their way up."""
        spots = zip(hashes, self._desk.store.index.find(namespace, hashes), strict=True)
        return sum(spot is None and self._coming((namespace, block_hash)) is None for block_hash, spot in spots)

    @property
    def changes(self) -> int:
        """Grows with all that may make `leading` say something else."""
        return self._tier.stats().changes

    def check_clearable(self, *, wholly: bool) -> None:
        """Raises Refused if this tier can't be cleared.

        `wholly`: nor if it can't tell all that its medium has, so that a later daemon may find more.
        """
        unseen = self._sweeper().unseen
        if unseen and not wholly:
            log.warning("when this daemon started, %s: only what it found is cleared", unseen)
        elif unseen:
            raise Refused(
                f"when this daemon started, {unseen}: blocks there may be found again. Start it anew when the disk is "
                "well, or on an empty folder, and clear again; --tier arena clears the arena alone"
            )

    def survey(self, which: Selection) -> TierCleared:
        """What `clear` would take now. Raises Refused if this tier can't be cleared at all."""
        return _counted(self._sweeper().survey(which), len(self._spoilt))

    def clear(self, which: Selection) -> TierCleared:
        """No lookup finds these blocks below any more, nor those that are being written or wait for it."""
        sweeper = self._sweeper()
        for key in self._spill.wanted():
            if which.takes(key, age_s=0.0):
                self._spill.gone(key)
        self._spoilt.update(key for key in self._spill.writing if which.takes(key, age_s=0.0))
        return _counted(sweeper.sweep(which), len(self._spoilt))

    def stats(self) -> dict[str, Any]:
        """Numbers for people and metrics; values are plain data."""
        spill = self._spill
        return {
            **asdict(self._tier.stats()), "write_mode": spill.mode.value, "waiting_writes": len(spill),
            "dropped_writes": spill.dropped, "written_back_blocks": spill.written_back, "lost_blocks": self._lost,
        }  # fmt: skip

    @property
    def _state(self) -> str:
        return self._tier.stats().state

    def _sweeper(self) -> Sweeper:
        if not isinstance(self._tier, Sweeper):
            raise Refused("this daemon's tier can't be cleared")
        return self._tier

    def waits(self, load: Load) -> bool:
        """Whether blocks are on their way up for this load."""
        return load in self._by_load

    def withdrawn(self, load: Load) -> None:
        """Nobody waits for this load's blocks any more. What nobody else wants, and has not begun, never does."""
        for promotion in self._by_load.pop(load, ()):
            del promotion.asked_by[load]
            if not promotion.asked_by and promotion in self._queue:
                del self._queue[promotion]
                self._end(promotion, ok=False, reason="nobody waits for it")

    def send_down(self, slots: Sequence[Slot]) -> list[Slot]:
        """Of these, which are to be evicted next, those that may go: the tier has their blocks, or refuses them.

        What is only in the others is written before all else. A sick tier holds up nobody.
        """
        if self._state not in WRITABLE:
            return list(slots)
        index, spill = self._desk.store.index, self._spill
        may_go, pressed = [], []
        for slot in slots:
            keys = index.keys_of(slot)
            if any(map(spill.is_coming, keys)):
                continue
            missing = self._missing_below(keys)
            pressed += missing
            if not missing:
                may_go.append(slot)
        spill.pressed(pressed)
        self._submit_writes()
        return may_go

    def flush_step(self, now: float) -> int:
        """A turn of a daemon that stops: how many blocks wait or are being written; 0 when all is below that can be.

        With write-back that is all that is ready, what would be evicted last first.
        """
        if not len(self._spill) and self._spill.mode is WriteMode.BACK and self._state in WRITABLE:
            self._spill.pressed(self._only_here())
        self.tick(now)
        return len(self._spill.writing) if self._state in RESTING else len(self._spill)

    def forget(self, keys: Sequence[Key]) -> None:
        """Their bytes were wrong in the arena: what was written from there may be too."""
        for key in keys:
            self._spill.gone(key)
            self._tier.remove(key)
            if key in self._spill.writing:
                self._spoilt.add(key)

    def tick(self, now: float) -> None:
        """Takes what the tier has to say, and gives it more to do."""
        for event in self._tier.take_events():
            if isinstance(event, StateChanged):
                log.warning("disk tier is %s: %s", event.state, event.reason)
                self._desk.ports.counters[f"disk_{event.state}"] += 1
                if event.state == "well":
                    self._spill.well()
                if event.state in ("hung", "off"):
                    for promotion in list(self._reads.values()):
                        self._tell(promotion, event.reason)
            elif event.ticket in self._writes:
                self._written(event)
            else:
                self._read(event, now)
        self._submit_reads(now)
        self._submit_writes()
        self._count_lost()

    def used(self, slots: Iterable[Slot]) -> None:
        """Their blocks are one chain, which was used here, or has grown. Below that is to count as well."""
        stats = self._tier.stats()
        if isinstance(self._tier, Ordered) and stats.blocks and stats.state != "off":
            self._tier.used([key for slot in slots for key in slot.keys if key is not None])

    def is_coming(self, slots: Iterable[Slot]) -> bool:
        """Whether these blocks of a chain have yet to be written. Looks at the first, which goes down last."""
        key = next((key for slot in slots for key in slot.keys if key is not None), None)
        return key is not None and self._spill.is_coming(key)

    # --- up ---

    def _coming(self, key: Key) -> _Promotion | None:
        """This block on its way up. Not one that was cleared on it, which neither lookups nor pins will ever find."""
        promotion = self._promotions.get(key)
        return promotion if promotion is not None and promotion.is_wanted else None

    def _begin(self, namespace: bytes, pages: PageLayout, hashes: Sequence[bytes], start: int, now: float) -> None:
        """Of the blocks from `start` on, up to one that memory has or is to have: as many as there is room for."""
        store, run = self._desk.store, dict[bytes, None]()
        here = store.index.within(namespace)
        for block_hash in islice(hashes, start, None):
            if block_hash in here or block_hash in run or self._coming((namespace, block_hash)) is not None:
                break
            run[block_hash] = None
        for claim in store.claim_each(OWNER, namespace, pages, list(run), now=now, ttl_s=float("inf")):
            (key,) = claim.fresh_slots[0].keys
            assert key is not None
            self._promotions[key] = promotion = _Promotion(key, claim, pages)
            self._queue[promotion] = None
            self.queued_bytes += pages.block_bytes

    def _submit_reads(self, now: float) -> None:
        arena = self._desk.store.arena
        while self._queue:
            promotion = next(iter(self._queue))
            ticket = self._tier.submit(Read(promotion.key, pages_of(arena, promotion.place, promotion.pages)))
            if ticket is None:
                return
            del self._queue[promotion]
            promotion.began_at = now
            self._reads[ticket] = promotion

    def _read(self, end: End, now: float) -> None:
        promotion = self._reads.pop(end.ticket)
        seconds = self._busy.ended(began_at=promotion.began_at, now=now)
        if not isinstance(end, Loaded):
            self._end(promotion, ok=False, reason=getattr(end, "reason", "not there"))
            return
        try:
            self.reads.loaded(promotion.pages.block_bytes, seconds=seconds, now=now)
            restore(self._desk.store.arena, promotion.place, promotion.pages, end.meta)
        except BadBlock as error:
            self._tier.remove(promotion.key)
            self._end(promotion, ok=False, reason=str(error))
            return
        self._end(promotion, ok=True, reason="")

    def _end(self, promotion: _Promotion, *, ok: bool, reason: str) -> None:
        store, counters = self._desk.store, self._desk.ports.counters
        if ok:
            store.commit(promotion.claim)  # still known here as on its way up: it need not go down again
        else:
            store.abandon(promotion.claim)
            counters["promotions_failed"] += 1
            self._tell(promotion, reason)
        if self._promotions.get(promotion.key) is promotion:
            del self._promotions[promotion.key]
            (spot,) = store.index.find(promotion.key[0], [promotion.key[1]])
            if spot is not None and spot[0] not in promotion.claim.fresh_slots:
                self._spill.committed([promotion.key])  # by somebody else meanwhile, and may be nowhere below
        self.queued_bytes -= promotion.pages.block_bytes
        for load in promotion.asked_by:
            waits_for = self._by_load[load]
            del waits_for[promotion]
            if not waits_for:
                del self._by_load[load]
        store.release(promotion.claim.lease)

    def _tell(self, promotion: _Promotion, reason: str) -> None:
        """Everybody who waits, once: of what a load had yet to get, it takes no more then. A pin takes what it gets."""
        for load in list(promotion.asked_by):
            engine_id, handoff_id = load
            if not engine_id:
                self.missed(load, promotion.place)
                continue
            self._desk.ports.to_engine(engine_id, LoadEnded(handoff_id=handoff_id, reason=f"disk: {reason}"))
            self.withdrawn(load)

    # --- down ---

    def _committed(self, slots: Sequence[Slot]) -> None:
        # The end of a chain first: what the tier gets last counts as used last there, and heads must outlive tails.
        for slot in reversed(slots):
            keys = [key for key in slot.keys if key is not None and key not in self._promotions]
            self._spill.committed(reversed(keys))
        self._writes_refused = False

    def _submit_writes(self) -> None:
        wanted = [] if self._writes_refused else self._spill.wanted()
        if not wanted or self._state in RESTING:
            return  # what waits is written when the tier is well again
        store = self._desk.store
        for key in wanted:
            spot = store.index.find(key[0], [key[1]])[0]
            if spot is None:
                self._spill.gone(key)
                continue
            slot, position = spot
            place = slot.places[position]
            lease = store.lease_to_copy([place], OWNER, now=0.0, ttl_s=float("inf"))
            pages, meta = pages_of(store.arena, place, slot.layout), meta_of(store.arena, place, slot.layout)
            try:
                ticket = self._tier.submit(Write(key, pages, meta))
            except ValueError as error:  # no tier could keep it
                log.warning("a block is not written: %s", error)
                store.release(lease)
                self._spill.refused(key)
                continue
            if ticket is None:
                store.release(lease)
                self._writes_refused = True
                return
            self._spill.submitted(key, ticket)
            self._writes[ticket] = lease

    def _written(self, end: End) -> None:
        key, ok = self._spill.on(end)
        self._writes_refused = False
        if key in self._spoilt:
            self._spoilt.remove(key)
            self._spill.gone(key)
            self._tier.remove(key)
        self._desk.store.release(self._writes.pop(end.ticket))
        if ok or not (isinstance(end, Failed) and end.again and not end.errno):  # what has not begun has not failed
            self._desk.ports.counters["blocks_written" if ok else "writes_failed"] += 1

    def _only_here(self) -> list[Key]:
        """What the tier has not and would take, the most valuable first; no more than it can hold."""
        store, room = self._desk.store, self._tier.stats().cap_bytes
        in_use = [slot for slot in store.slots.values() if slot.indexed and not slot.unused]
        found: list[Key] = []
        for slot in [*in_use, *reversed(list(store.policy.victims()))]:
            room -= slot.size_bytes
            if room < 0:
                break
            found += self._missing_below(store.index.keys_of(slot))
        return found

    def _missing_below(self, keys: Sequence[Key]) -> list[Key]:
        """What the tier has not, and has not refused."""
        found = zip(keys, self._tier.contains(keys), strict=True)
        return [key for key, is_there in found if not (is_there or self._spill.is_refused(key))]

    def _evicted(self, slot: Slot) -> None:
        keys = self._desk.store.index.keys_of(slot)
        for key in keys:
            self._spill.gone(key)
        self._left.extend(keys)

    def _count_lost(self) -> None:
        if not self._left or self._state == "hung":
            return  # it says of all that it has not got it
        left = [self._left.popleft() for _ in range(min(COUNTED_PER_TICK, len(self._left)))]
        self._lost += self._tier.contains(left).count(False)


def _counted(swept: Swept, spoilt: int) -> TierCleared:
    """`spoilt`: what is being written, to be deleted then."""
    return TierCleared(blocks=swept.blocks, size_bytes=swept.size_bytes, leaving=swept.leaving + spoilt)

"""Pins: an operator's leases on what the arena has of a prompt. Nothing evicts them; a deadline and a budget end them.

A pin has leases like an engine's, owned by a name. What is only on the disk comes up first, as for a request, and is
held from then on: a lot at a time, for each block is work of the control thread, and other reads wait behind it. Pins
live as long as this daemon. Nobody writes or reads by a pin, so when its time is over it is quiet at once.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field

from pdx.buffer.index import places_of
from pdx.buffer.lease import Lease, Owner
from pdx.buffer.selected import Selected
from pdx.buffer.slots import Slot, SlotState
from pdx.daemon.ports import Desk
from pdx.daemon.prefixes import Prefixes
from pdx.daemon.spaces import KnownSpaces
from pdx.daemon.tiering import PROMISED_MAX, Load
from pdx.errors import Refused
from pdx.keys import split_namespace
from pdx.layout import PageLayout, Place
from pdx.verbs import Pin, Pinned, Unpin, Unpinned

log = logging.getLogger("pdxd")

PINS_MAX = 4096
# Blocks of all pins together, each counted by every pin that holds it. `stats` looks at them all, which keeps the
# control thread for a quarter of a second at the worst.
PLACES_MAX = 1 << 18
PinKey = tuple[bytes, str]  # (namespace, name): one tenant can't unpin what another has pinned
_HERE: Load = "", b""  # stands for what the arena had


@dataclass(eq=False)
class _Pin:
    key: PinKey
    pages: PageLayout
    expires_at: float
    load: Load  # under which its last lot was asked for from below
    rest: list[bytes]  # of its blocks, those that have yet to be asked for
    # By load: what the arena had, and each lot of the others.
    parts: dict[Load, tuple[Lease, tuple[Place, ...]]] = field(default_factory=dict)
    positions: dict[Slot, list[int]] = field(default_factory=dict)  # of all parts, once it is entered

    @property
    def blocks(self) -> int:
        return sum(len(places) for _, places in self.parts.values()) + len(self.rest)


class Pins:
    """Owned by the control thread."""

    def __init__(self, desk: Desk, prefixes: Prefixes, spaces: KnownSpaces) -> None:
        self._desk = desk
        self._prefixes = prefixes
        self._spaces = spaces
        self._pins: dict[PinKey, _Pin] = {}
        self._by_lease: dict[Lease, PinKey] = {}
        self._by_slot: dict[Slot, set[PinKey]] = {}
        self._coming: dict[PinKey, None] = {}  # those with a rest: the first of them is served
        self._coming_bytes = 0  # of all rests
        self._places = 0  # of all pins, and blocks of their rests
        self.used_bytes = 0  # by the slots of all pins
        self._numbers = 0
        self._short: tuple[int, int] | None = None  # how the store stood when there was no room for all of a lot
        self._missed: dict[Load, set[int]] = {}  # load -> slots whose blocks did not come from below
        prefixes.hear_missed(lambda load, place: self._missed.setdefault(load, set()).add(place.slot_offset))

    @property
    def budget_bytes(self) -> int:
        return int(len(self._desk.store.arena.memory) * self._desk.ports.pin_share)

    def pin(self, what: Pin, now: float, *, room: bool) -> Pinned:
        """Raises Refused, changing nothing: over the budget, too much pinned, a space that no engine has had."""
        namespace = what.space + what.tenant
        key, kind = (namespace, what.name), self._spaces.get(what.space)
        former = self._pins.get(key)
        if former is None and len(self._pins) >= PINS_MAX:
            raise Refused(f"a daemon keeps at most {PINS_MAX} pins")
        kept = self._check_budget(what, kind.pages.unit_bytes, former=former, room=room)
        load = self._new_load()
        pin = self._hold(key, kind.pages, kept, load, now, ttl_s=what.ttl_s, room=room)
        if former is not None:  # let go after that, for it may have some of its blocks again
            self._end(former)
            if self._short or pin.blocks < len(kept):  # what it gave up has made room
                less, pin = pin, self._hold(key, kind.pages, kept, load, now, ttl_s=what.ttl_s, room=room)
                for lease, _ in less.parts.values():
                    self._desk.store.release(lease)
        if not pin.parts:
            return Pinned(name=what.name, blocks=0, used_bytes=self.used_bytes, budget_bytes=self.budget_bytes)
        self._pins[key] = pin
        self._expect(pin, len(pin.rest))
        if pin.rest:
            self._coming[key] = None
        for part in pin.parts.values():
            self._count(pin, *part)
        return self._described(pin, now)

    def unpin(self, what: Unpin) -> Unpinned:
        """Whatever the space: two models may have pins of one name."""
        blocks = 0
        for key, pin in list(self._pins.items()):
            if (split_namespace(key[0])[1], key[1]) == (what.tenant, what.name):
                blocks += pin.blocks
                self._end(pin)
        return Unpinned(name=what.name, blocks=blocks)

    def expired(self, lease: Lease) -> bool:
        """Whether this lease, whose time is over, was a pin's."""
        key = self._by_lease.get(lease)
        if key is None:
            return False
        self._end(self._pins[key])
        return True

    def tick(self, now: float, *, room: bool) -> None:
        """Lets go of the slots into which nothing has come: they would count, and be of use to nobody.

        Asks for the next lot of a pin whose last one has come. `room`: nobody more important waits for some.
        """
        missed, self._missed = self._missed, {}
        for pin in list(self._pins.values()) if missed else ():
            for load in missed.keys() & pin.parts.keys():
                self._shrink(pin, load, missed[load], now)
            if pin.load in missed and pin.rest:  # no lookup gets past what is missing
                self._give_up(pin)
            if not pin.parts:
                self._end(pin)
        if self._coming and room and self._short != self._store_stands:
            pin = self._pins[next(iter(self._coming))]
            if not self._prefixes.waits(pin.load):
                self._go_on(pin, now)

    def end_cleared(self, cleared: Selected) -> int:
        """Of the pins of these blocks, ends those of which nothing is found any more, here or below. How many."""
        touched = {key for slot, _ in (*cleared.blocks, *cleared.filling) for key in self._by_slot.get(slot, ())}
        ended = [key for key in touched if not self._is_of_use(self._pins[key])]
        for key in ended:
            self._end(self._pins[key])
        return len(ended)

    def describe(self, now: float) -> list[Pinned]:
        return [self._described(pin, now) for pin in self._pins.values()]

    def _check_budget(self, what: Pin, unit_bytes: int, *, former: _Pin | None, room: bool) -> list[bytes]:
        """The leading blocks that are kept somewhere; without room, of those only as many as the arena has."""
        store, namespace = self._desk.store, what.space + what.tenant
        found = self._prefixes.leading(namespace, what.block_hashes, block_tokens=0)
        hashes = what.block_hashes[: found.blocks if room else found.arena_blocks]
        held = {spot[0] for spot in store.index.find(namespace, hashes) if spot}
        left = {slot for slot in former.positions if len(self._by_slot[slot]) == 1} - held if former else set()
        wanted_bytes = self.used_bytes + _size_bytes(held - self._by_slot.keys()) - _size_bytes(left)
        wanted_bytes += self._coming_bytes - (len(former.rest) * former.pages.unit_bytes if former else 0)
        wanted_bytes += found.disk_blocks * unit_bytes if room else 0
        if wanted_bytes > self.budget_bytes:
            raise Refused(
                f"pins would take {wanted_bytes} bytes of the arena, and may take {self.budget_bytes}: unpin others, "
                "or raise pin_share"
            )
        if self._places - (former.blocks if former else 0) + len(hashes) > PLACES_MAX:
            raise Refused(f"pins hold at most {PLACES_MAX} blocks together, each counted by every pin that holds it")
        return hashes

    def _hold(
        self, key: PinKey, pages: PageLayout, kept: list[bytes], load: Load, now: float, *, ttl_s: float, room: bool
    ) -> _Pin:
        """All that the arena has of these, and the first lot of the others. Nothing is counted yet."""
        spots = self._desk.store.index.find(key[0], kept)
        below = [block_hash for block_hash, spot in zip(kept, spots, strict=True) if spot is None] if room else []
        pin = _Pin(key, pages, now + ttl_s, load, below)
        here = places_of(spot for spot in spots if spot is not None)
        if here:
            lease = self._desk.store.lease(here, Owner("verb", key[1]), now=now, ttl_s=ttl_s)
            pin.parts[_HERE] = lease, here
        self._ask_below(pin, now)
        return pin

    def _ask_below(self, pin: _Pin, now: float) -> None:
        """For the next of its rest. Without room for all of them it goes on when there is; without one, it ends."""
        (namespace, name), lot = pin.key, pin.rest[:PROMISED_MAX]
        found = self._prefixes.leading(namespace, lot, block_tokens=0).blocks
        leased = self._prefixes.lease_leading(
            Owner("verb", name), namespace, pin.pages, lot[:found], load=pin.load, now=now,
            ttl_s=pin.expires_at - now, room=True,
        )  # fmt: skip
        if leased is not None:
            pin.parts[pin.load] = leased
        got = len(leased[1]) if leased is not None else 0
        self._short = self._store_stands if got < found else None
        if found < len(lot):
            log.info("the last %d blocks of pin %r do not come: the next is kept no more", len(pin.rest) - found, name)
            pin.rest = pin.rest[got:found]
        else:
            pin.rest = pin.rest[got:]

    @property
    def _store_stands(self) -> tuple[int, int]:
        """Another value when a claim that found no room may find some."""
        return self._desk.store.freed, self._desk.store.index.changes

    def _go_on(self, pin: _Pin, now: float) -> None:
        self._expect(pin, -len(pin.rest))
        pin.load = self._new_load()
        self._ask_below(pin, now)
        self._expect(pin, len(pin.rest))
        if pin.load in pin.parts:
            self._count(pin, *pin.parts[pin.load])
        if not pin.rest:
            self._give_up(pin)
            if not self._is_of_use(pin):
                self._end(pin)

    def _give_up(self, pin: _Pin) -> None:
        """Nothing more of it is to come."""
        self._expect(pin, -len(pin.rest))
        pin.rest = []
        self._coming.pop(pin.key, None)
        self._short = None

    def _is_of_use(self, pin: _Pin) -> bool:
        """Whether lookups find, or will find, any of it."""
        return any(self._found(pin)) or self._prefixes.leading(pin.key[0], pin.rest[:1], block_tokens=0).blocks > 0

    def _new_load(self) -> Load:
        self._numbers += 1
        return "", b"pin %d" % self._numbers

    def _described(self, pin: _Pin, now: float) -> Pinned:
        ready, coming = self._found(pin)
        return Pinned(
            name=pin.key[1], blocks=ready + coming + len(pin.rest), coming_blocks=coming + len(pin.rest),
            size_bytes=_size_bytes(pin.positions), ttl_s=max(0.0, pin.expires_at - now),
            used_bytes=self.used_bytes, budget_bytes=self.budget_bytes,
        )  # fmt: skip

    def _found(self, pin: _Pin) -> tuple[int, int]:
        """How many of its blocks lookups find, and how many they will find."""
        ready = coming = 0
        for slot, positions in pin.positions.items():
            if slot.state is SlotState.FILLING:
                coming += sum(slot.keys[position] is not None for position in positions)
            elif slot.indexed == slot.blocks:  # as a rule
                ready += len(positions)
            elif slot.indexed:
                ready += sum(self._is_found(slot, position) for position in positions)
        return ready, coming

    def _is_found(self, slot: Slot, position: int) -> bool:
        key = slot.keys[position]
        return key is not None and self._desk.store.index.find(key[0], [key[1]])[0] == (slot, position)

    def _end(self, pin: _Pin) -> None:
        del self._pins[pin.key]
        self._coming.pop(pin.key, None)
        self._expect(pin, -len(pin.rest))
        for slot in pin.positions:
            self._uncount(pin, slot)
        for load, (lease, places) in reversed(pin.parts.items()):  # the head of a prompt is to count as used last
            self._prefixes.withdrawn(load)
            del self._by_lease[lease]
            self._places -= len(places)
            self._desk.end_lease(lease)

    def _shrink(self, pin: _Pin, load: Load, missed: Collection[int], now: float) -> None:
        """This part lets go of the slots at these offsets, which no other has: each lot comes after the one before."""
        lease, places = pin.parts[load]
        for slot in lease.slots:
            if slot.run.offset in missed:
                del pin.positions[slot]
                self._uncount(pin, slot)
        left = tuple(place for place in places if place.slot_offset not in missed)
        del self._by_lease[lease], pin.parts[load]
        self._places -= len(places) - len(left)
        if left:
            ttl_s = max(0.0, pin.expires_at - now)
            again = self._desk.store.lease(left, lease.owner, now=now, ttl_s=ttl_s)
            self._by_lease[again] = pin.key
            pin.parts[load] = again, left
        else:
            self._prefixes.withdrawn(load)
        self._desk.end_lease(lease)

    def _expect(self, pin: _Pin, blocks: int) -> None:
        """So many more are to come, whose room counts as used."""
        self._places += blocks
        self._coming_bytes += blocks * pin.pages.unit_bytes

    def _count(self, pin: _Pin, lease: Lease, places: Sequence[Place]) -> None:
        """One more part."""
        self._by_lease[lease] = pin.key
        self._places += len(places)
        slots = {slot.run.offset: slot for slot in lease.slots}
        for slot in lease.slots:
            if slot not in self._by_slot:
                self.used_bytes += slot.size_bytes
            self._by_slot.setdefault(slot, set()).add(pin.key)
        for place in places:
            pin.positions.setdefault(slots[place.slot_offset], []).append(place.position)

    def _uncount(self, pin: _Pin, slot: Slot) -> None:
        self._by_slot[slot].remove(pin.key)
        if not self._by_slot[slot]:
            del self._by_slot[slot]
            self.used_bytes -= slot.size_bytes


def _size_bytes(slots: Iterable[Slot]) -> int:
    """They are distinct."""
    return sum(slot.size_bytes for slot in slots)

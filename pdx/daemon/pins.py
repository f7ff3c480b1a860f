"""Pins: an operator's leases on what the arena has of a prompt. Nothing evicts them; a deadline and a budget end them.

A pin is a lease like an engine's, owned by a name. What is only on the disk comes up first, as for a request, and is
held from then on. Pins live as long as this daemon. Nobody writes or reads by a pin, so when its time is over it is
quiet at once.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial

from pdx.buffer.lease import Lease, Owner
from pdx.buffer.selected import Selected
from pdx.buffer.slots import Slot, SlotState
from pdx.daemon.ports import Desk
from pdx.daemon.prefixes import Prefixes
from pdx.daemon.spaces import KnownSpaces
from pdx.errors import Refused
from pdx.keys import split_namespace
from pdx.layout import Place
from pdx.verbs import Pin, Pinned, Unpin, Unpinned

PINS_MAX = 4096
# Blocks of all pins together, each counted by every pin that holds it. `stats` looks at them all, which keeps the
# control thread for a quarter of a second at the worst.
PLACES_MAX = 1 << 18
PinKey = tuple[bytes, str]  # (namespace, name): one tenant can't unpin what another has pinned


@dataclass(frozen=True, eq=False)
class _Pin:
    name: str
    load: bytes  # under which blocks were asked for from below
    lease: Lease
    places: tuple[Place, ...]
    positions: dict[Slot, list[int]]  # the same, by slot


class Pins:
    """Owned by the control thread."""

    def __init__(self, desk: Desk, prefixes: Prefixes, spaces: KnownSpaces) -> None:
        self._desk = desk
        self._prefixes = prefixes
        self._spaces = spaces
        self._pins: dict[PinKey, _Pin] = {}
        self._by_lease: dict[Lease, PinKey] = {}
        self._by_slot: dict[Slot, set[PinKey]] = {}
        self._places = 0  # of all pins
        self.used_bytes = 0  # by the slots of all pins
        self._numbers = 0
        self._missed: dict[bytes, set[int]] = {}  # load -> slots whose blocks did not come from below
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
        self._numbers += 1
        load = b"pin %d" % self._numbers
        lease = partial(
            self._prefixes.lease_leading, Owner("verb", what.name), namespace, kind.pages, kept, load=load,
            engine_id="", now=now, ttl_s=what.ttl_s, room=room,
        )  # fmt: skip
        leased = lease()  # before its former blocks are let go, of which it may have some again
        if former is not None:
            self._end(key)
            if leased is None or len(leased[1]) < len(kept):
                less, leased = leased, lease()  # what it gave up has made room
                if less is not None:
                    self._desk.store.release(less[0])
        if leased is None:
            return Pinned(name=what.name, blocks=0, used_bytes=self.used_bytes, budget_bytes=self.budget_bytes)
        self._enter(key, load, *leased)
        return self._described(self._pins[key], now)

    def unpin(self, what: Unpin) -> Unpinned:
        """Whatever the space: two models may have pins of one name."""
        blocks = 0
        for key, pin in list(self._pins.items()):
            if (split_namespace(key[0])[1], key[1]) == (what.tenant, what.name):
                blocks += len(pin.places)
                self._end(key)
        return Unpinned(name=what.name, blocks=blocks)

    def expired(self, lease: Lease) -> bool:
        """Whether this lease, whose time is over, was a pin's."""
        key = self._by_lease.get(lease)
        if key is None:
            return False
        self._end(key)
        return True

    def tick(self, now: float) -> None:
        """Lets go of the slots into which nothing has come: they would count, and be of use to nobody."""
        missed, self._missed = self._missed, {}
        for key, pin in list(self._pins.items()) if missed else ():
            if pin.load not in missed:
                continue
            places = tuple(place for place in pin.places if place.slot_offset not in missed[pin.load])
            if not places:
                self._end(key)
                continue
            ttl_s = max(0.0, pin.lease.expires_at - now)
            lease = self._desk.store.lease(places, pin.lease.owner, now=now, ttl_s=ttl_s)
            self._leave(key)
            self._enter(key, pin.load, lease, places)

    def end_cleared(self, cleared: Selected) -> int:
        """Of the pins of these blocks, ends those of which lookups find nothing any more. How many there were."""
        touched = {key for slot, _ in (*cleared.blocks, *cleared.filling) for key in self._by_slot.get(slot, ())}
        ended = [key for key in touched if not any(self._found(self._pins[key]))]
        for key in ended:
            self._end(key)
        return len(ended)

    def describe(self, now: float) -> list[Pinned]:
        return [self._described(pin, now) for pin in self._pins.values()]

    def _check_budget(self, what: Pin, unit_bytes: int, *, former: _Pin | None, room: bool) -> list[bytes]:
        """The leading blocks that are kept somewhere."""
        store, namespace = self._desk.store, what.space + what.tenant
        found = self._prefixes.leading(namespace, what.block_hashes, block_tokens=0)
        hashes = what.block_hashes[: found.blocks if room else found.arena_blocks]
        held = {spot[0] for spot in store.index.find(namespace, hashes) if spot}
        left = {slot for slot in former.lease.slots if len(self._by_slot[slot]) == 1} - held if former else set()
        wanted_bytes = self.used_bytes + _size_bytes(held - self._by_slot.keys()) - _size_bytes(left)
        wanted_bytes += found.disk_blocks * unit_bytes if room else 0
        if wanted_bytes > self.budget_bytes:
            raise Refused(
                f"pins would take {wanted_bytes} bytes of the arena, and may take {self.budget_bytes}: unpin others, "
                "or raise pin_share"
            )
        if self._places - (len(former.places) if former else 0) + found.blocks > PLACES_MAX:
            raise Refused(f"pins hold at most {PLACES_MAX} blocks together, each counted by every pin that holds it")
        return what.block_hashes[: found.blocks]

    def _described(self, pin: _Pin, now: float) -> Pinned:
        ready, coming = self._found(pin)
        return Pinned(
            name=pin.name, blocks=ready + coming, coming_blocks=coming,
            size_bytes=_size_bytes(pin.lease.slots), ttl_s=max(0.0, pin.lease.expires_at - now),
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

    def _end(self, key: PinKey) -> None:
        self._prefixes.withdrawn(self._pins[key].load)
        self._leave(key)

    def _enter(self, key: PinKey, load: bytes, lease: Lease, places: tuple[Place, ...]) -> None:
        slots = {slot.run.offset: slot for slot in lease.slots}
        positions: dict[Slot, list[int]] = {slot: [] for slot in lease.slots}
        for place in places:
            positions[slots[place.slot_offset]].append(place.position)
        self._pins[key] = _Pin(key[1], load, lease, places, positions)
        self._by_lease[lease] = key
        self._places += len(places)
        self.used_bytes += _size_bytes(positions.keys() - self._by_slot.keys())
        for slot in lease.slots:
            self._by_slot.setdefault(slot, set()).add(key)

    def _leave(self, key: PinKey) -> None:
        pin = self._pins.pop(key)
        del self._by_lease[pin.lease]
        self._places -= len(pin.places)
        for slot in pin.lease.slots:
            self._by_slot[slot].remove(key)
            if not self._by_slot[slot]:
                del self._by_slot[slot]
                self.used_bytes -= slot.size_bytes
        self._desk.end_lease(pin.lease)


def _size_bytes(slots: Iterable[Slot]) -> int:
    """They are distinct."""
    return sum(slot.size_bytes for slot in slots)

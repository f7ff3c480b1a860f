"""Pins: an operator's leases on what the arena has of a prompt. Nothing evicts them; a deadline and a budget end them.

A pin is a lease like an engine's, owned by a name. What is only on the disk comes up first, as for a request, and is
held from then on. Pins live as long as this daemon. Nobody writes or reads by a pin, so when its time is over it is
quiet at once.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import partial

from pdx.buffer.lease import Lease, Owner
from pdx.buffer.slots import Slot, SlotState
from pdx.daemon.ports import Desk
from pdx.daemon.prefixes import Prefixes
from pdx.daemon.spaces import KnownSpaces
from pdx.errors import Refused
from pdx.keys import split_namespace
from pdx.layout import Place
from pdx.verbs import Pin, Pinned, Unpin, Unpinned

PINS_MAX = 4096
PinKey = tuple[bytes, str]  # (namespace, name): one tenant can't unpin what another has pinned


@dataclass(frozen=True, eq=False)
class _Pin:
    name: str
    load: bytes  # under which blocks were asked for from below
    lease: Lease
    places: tuple[Place, ...]


class Pins:
    """Owned by the control thread."""

    def __init__(self, desk: Desk, prefixes: Prefixes, spaces: KnownSpaces) -> None:
        self._desk = desk
        self._prefixes = prefixes
        self._spaces = spaces
        self._pins: dict[PinKey, _Pin] = {}
        self._by_lease: dict[Lease, PinKey] = {}
        self._numbers = 0
        self._missed: dict[bytes, set[int]] = {}  # load -> slots whose blocks did not come from below
        prefixes.hear_missed(lambda load, place: self._missed.setdefault(load, set()).add(place.slot_offset))

    @property
    def budget_bytes(self) -> int:
        return int(len(self._desk.store.arena.memory) * self._desk.ports.pin_share)

    def pin(self, what: Pin, now: float, *, room: bool) -> Pinned:
        """Raises Refused, changing nothing: over the budget, too many pins, a space that no engine has had."""
        namespace = what.space + what.tenant
        key, kind = (namespace, what.name), self._spaces.get(what.space)
        former = self._pins.get(key)
        if former is None and len(self._pins) >= PINS_MAX:
            raise Refused(f"a daemon keeps at most {PINS_MAX} pins")
        others = [pin for pin in self._pins.values() if pin is not former]
        kept = self._check_budget(what, kind.pages.unit_bytes, others=others, room=room)
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
        self._enter(key, _Pin(what.name, load, *leased))
        return self._described(self._pins[key], now, self.used_bytes)

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
            self._enter(key, replace(pin, lease=lease, places=places))

    def end_cleared(self) -> int:
        """Ends the pins of which lookups find nothing any more. How many there were."""
        cleared = [key for key, pin in self._pins.items() if not self._found_of(pin)]
        for key in cleared:
            self._end(key)
        return len(cleared)

    @property
    def used_bytes(self) -> int:
        return _size_bytes(slot for pin in self._pins.values() for slot in pin.lease.slots)

    def describe(self, now: float) -> list[Pinned]:
        used_bytes = self.used_bytes
        return [self._described(pin, now, used_bytes) for pin in self._pins.values()]

    def _check_budget(self, what: Pin, unit_bytes: int, *, others: Iterable[_Pin], room: bool) -> list[bytes]:
        """The leading blocks that are kept somewhere."""
        store, namespace = self._desk.store, what.space + what.tenant
        found = self._prefixes.leading(namespace, what.block_hashes, block_tokens=0)
        hashes = what.block_hashes[: found.blocks if room else found.arena_blocks]
        held = [spot[0] for spot in store.index.find(namespace, hashes) if spot]
        held += [slot for pin in others for slot in pin.lease.slots]
        wanted_bytes = _size_bytes(held) + (found.disk_blocks * unit_bytes if room else 0)
        if wanted_bytes > self.budget_bytes:
            raise Refused(
                f"pins would take {wanted_bytes} bytes of the arena, and may take {self.budget_bytes}: unpin others, "
                "or raise pin_share"
            )
        return what.block_hashes[: found.blocks]

    def _described(self, pin: _Pin, now: float, used_bytes: int) -> Pinned:
        states = [slot.state for slot in self._found_of(pin)]
        coming = states.count(SlotState.FILLING)
        return Pinned(
            name=pin.name, blocks=states.count(SlotState.READY) + coming, coming_blocks=coming,
            size_bytes=_size_bytes(pin.lease.slots), ttl_s=max(0.0, pin.lease.expires_at - now),
            used_bytes=used_bytes, budget_bytes=self.budget_bytes,
        )  # fmt: skip

    def _found_of(self, pin: _Pin) -> list[Slot]:
        """Of each of its blocks that lookups find, or will find, the slot."""
        slots = {slot.run.offset: slot for slot in pin.lease.slots}
        places = [(slots[place.slot_offset], place.position) for place in pin.places]
        return [slot for slot, position in places if self._may_be_found(slot, position)]

    def _may_be_found(self, slot: Slot, position: int) -> bool:
        key = slot.keys[position]
        if key is None:
            return False
        if slot.state is SlotState.FILLING:
            return True
        return self._desk.store.index.find(key[0], [key[1]])[0] == (slot, position)

    def _end(self, key: PinKey) -> None:
        self._prefixes.withdrawn(self._pins[key].load)
        self._leave(key)

    def _enter(self, key: PinKey, pin: _Pin) -> None:
        self._pins[key] = pin
        self._by_lease[pin.lease] = key

    def _leave(self, key: PinKey) -> None:
        lease = self._pins.pop(key).lease
        del self._by_lease[lease]
        self._desk.end_lease(lease)


def _size_bytes(slots: Iterable[Slot]) -> int:
    return sum(slot.size_bytes for slot in set(slots))

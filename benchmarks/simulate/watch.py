"""Looks at a simulated host from time to time: its accounts, its budgets, and what its index promises.

What must hold at the moment of an access (nobody touches what is not theirs) is checked there, by host and arena.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from benchmarks.simulate.host import Host
from benchmarks.simulate.prompts import pages_of
from benchmarks.simulate.world import Violation
from pdx.buffer.slots import SlotState
from pdx.handoff.states import Receiving, Sending

TICK_SLACK_S = 0.5  # a daemon looks at its budgets ten times a second
# No half lives as long, whatever stops and dies: the whole budget, two stops, a slow LET_GO, leases of 2 s.
HALF_S_MAX = 40.0

_BEFORE_GRANT = (Sending.CLAIMING, Sending.RESERVING, Receiving.WAITING)
_UNDER_WAY = (Sending.SENDING, Sending.COMMITTING, Receiving.GRANTED)


class Watch:
    """One host's. Remembers since when it has seen each half of a handoff."""

    def __init__(self, host: Host) -> None:
        self._host = host
        self._since: dict[Any, tuple[float, float]] = {}  # half -> when, and the daemon's stopped_s then

    def audit(self) -> None:
        """Raises Violation, or IntegrityError."""
        if self._host.alive:
            self._host.store.check_integrity()
            self._check_touchers()
            self._check_ready()
            self._check_budgets()

    def _check_touchers(self) -> None:
        """Who may touch a block is known to its slot as a hold."""
        store, arena = self._host.store, self._host.arena
        if arena.trusting:
            return
        held_slots = [slot for slot in store.slots.values() if slot.holds]
        held = {(place.header_offset, place.generation) for slot in held_slots for place in slot.places}
        for toucher in arena.touchers:
            if toucher not in held:
                raise Violation("unsafe", f"an engine may touch the block at {toucher[0]:#x}, which is not held")

    def _check_ready(self) -> None:
        """Every page that a lookup can find was vouched for."""
        for (_, block_hash), (slot, position) in self._host.store.index.items():
            for layer, (_, checksum) in enumerate(pages_of(block_hash)):
                if self._host.arena.checksum(slot.places[position], layer) != checksum:
                    raise Violation("wrong", f"layer {layer} of an indexed page in {slot} is not what its key says")

    def _check_budgets(self) -> None:
        host = self._host
        before, self._since = self._since, {}
        for half in self._halves():
            since, stopped_s = self._since[half] = before.get(half, (host.world.now, host.stopped_s))
            waited = host.world.now - since - (host.stopped_s - stopped_s) - TICK_SLACK_S
            budgets = half.handle.budgets
            late = half.state in _BEFORE_GRANT and waited > budgets.grant_s
            late |= half.state in _UNDER_WAY and waited > budgets.total_s
            if (late or waited > HALF_S_MAX) and host.asleep_until <= host.world.now:
                raise Violation("late", f"{half!r} is {waited:.1f} s old at {host.name}")

    def _halves(self) -> Iterator[Any]:
        handoffs: Any = self._host.handoffs  # its books are private, and this is an audit
        for record in handoffs._sending.records.values():
            if record.sender.state is not Sending.ENDED:
                yield record.sender
        for record in handoffs._receiving.records.values():
            yield record.receiver


def unfinished_slots(host: Host) -> int:
    """Slots that somebody still fills, or that wait for somebody to fall quiet."""
    return sum(slot.state is not SlotState.READY for slot in host.store.slots.values())

"""When the control thread wakes up for what lanes say: at once where somebody waits for it, else with something else.

Most puts of a handoff end, and most slabs of it arrive, while the next layer is computed, and nothing follows from it.
A turn of the control thread for each is time that an engine on the same core does not have. Such events wait for the
next turn, which on prefill's side comes with the next layer, and for LANES_S at the most. They know their own times.

Nobody can tell beforehand what will be said: so failures (PutFailed, PeerLost, LaneFailed) are heard as late where no
half is hurried, and new handoffs may take a lane that was lost up to LANES_S ago.
"""

from __future__ import annotations

from collections.abc import Container, Iterator, Sequence

import zmq

from pdx.daemon.handoffs import Handoffs
from pdx.transport.api import Event, Lane

LANES_S = 0.05
# With more of them under way somebody nearly always waits, and finding out would be work in every turn.
HALVES_ASKED = 16


class LaneWatch:
    """Keeps lanes in the poller, or out of it. Owned by the control thread."""

    def __init__(self, lanes: Sequence[Lane], poller: zmq.Poller) -> None:
        self._lanes = lanes
        self._poller = poller
        self._is_hurried = False

    def begin(self, handoffs: Handoffs, timeout_s: float) -> float:
        """Before the poller polls. Returns for how long it may."""
        is_hurried = _waited_for(handoffs)
        if is_hurried != self._is_hurried:
            self._is_hurried = is_hurried
            for lane in self._lanes:
                self._poller.modify(lane.fileno(), zmq.POLLIN if is_hurried else 0)
        return timeout_s if is_hurried else min(timeout_s, LANES_S)

    def take(self, ready: Container[object]) -> Iterator[tuple[str, list[Event]]]:
        """Events of each lane that has some, under its scheme; `ready`: what the poller found."""
        for lane in self._lanes:
            if (not self._is_hurried or lane.fileno() in ready) and (events := lane.take_events()):
                yield lane.scheme, events


def _waited_for(handoffs: Handoffs) -> bool:
    outgoing, incoming = handoffs.halves
    if not 0 < len(outgoing) + len(incoming) <= HALVES_ASKED or handoffs.reservations_waiting:
        return True
    return any(record.sender.hurried for record in outgoing) or any(record.receiver.hurried for record in incoming)

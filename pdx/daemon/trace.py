"""What happened when, per handoff, for timelines. Bounded; times are this process's monotonic nanoseconds.

Engine and daemon of one host share CLOCK_MONOTONIC, so their events lie on one axis. Traces of two daemons may be
merged only when both run on one host (as in the demo).
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

HANDOFFS_MAX = 64  # the last ones; older traces are forgotten
EVENTS_MAX = 5_000  # 20 prompt chunks of 80 layers filled, put and sent; some 100 MB at the very worst


class Tracer:
    """Keeps the events of the last HANDOFFS_MAX handoffs. Owned by the control thread."""

    def __init__(self) -> None:
        self._events: OrderedDict[bytes, list[dict[str, Any]]] = OrderedDict()

    def note(self, handoff_id: bytes, what: str, at_ns: int, **details: Any) -> None:
        events = self._events.get(handoff_id)
        if events is None:
            events = self._events[handoff_id] = []
            if len(self._events) > HANDOFFS_MAX:
                self._events.popitem(last=False)
        if len(events) < EVENTS_MAX:
            events.append({"what": what, "at_ns": at_ns, **details})

    def events(self, handoff_id: bytes) -> list[dict[str, Any]]:
        return list(self._events.get(handoff_id, ()))

"""What happened when, per handoff, for timelines and the live page. Times are this process's monotonic nanoseconds.

Always on, so bounded and cheap: what happens once a handoff is kept as it was said, what happens with every layer and
prompt chunk as numbers in an array, 32 bytes for a layer that has landed, and a microsecond.

Engine and daemon of one host share CLOCK_MONOTONIC, so their events lie on one axis. Traces of two daemons may be
merged as they are only when both run on one host (as in the demo); who asks over a network has to place each answer by
its `now_ns`.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Iterator
from operator import itemgetter
from typing import Any

from pdx.verbs import MARK_CHARS_MAX, Course, Mark, PageEvent

HANDOFFS_MAX = 1024  # the last ones; older traces are forgotten
EVENTS_MAX = 5_000  # of one handoff: 20 prompt chunks of 80 layers filled, put and sent
ROWS_MAX = 400_000  # page events of all handoffs together: 20 MB at the most
MARKS_MAX = 64  # of one handoff: a peer that says WAIT for ever does not fill our memory

_FIELDS: dict[str, tuple[str, ...]] = {
    "filled": ("step", "step_started_ns", "layer", "pages", "block"),
    "put": ("layer", "pages", "block"),
    "sent": (),
    "landed": ("layer", "pages", "block"),
}
_PICK = {what: itemgetter(*fields) for what, fields in _FIELDS.items() if fields}


class Tracer:
    """Keeps the events of the last HANDOFFS_MAX handoffs. Owned by the control thread."""

    def __init__(self) -> None:
        self._traces: OrderedDict[bytes, _Trace] = OrderedDict()
        self._rows = 0

    def note(self, handoff_id: bytes, what: str, at_ns: int, **details: Any) -> None:
        trace = self._traces.get(handoff_id)
        if trace is None:
            trace = self._traces[handoff_id] = _Trace()
            if len(self._traces) > HANDOFFS_MAX:
                self._forget_oldest()
        if what not in _FIELDS:
            if len(trace.marks) < MARKS_MAX:
                trace.marks.append({"what": what, "at_ns": at_ns, **details})
            return
        if trace.rows >= EVENTS_MAX:
            return
        trace.rows += 1
        self._rows += 1
        trace.pages[what].append(at_ns)
        if details:
            trace.pages[what].extend(_PICK[what](details))
        while self._rows > ROWS_MAX and len(self._traces) > 1:
            self._forget_oldest()

    def events(self, handoff_id: bytes) -> list[dict[str, Any]]:
        """All of one handoff, as they were said."""
        trace = self._traces.get(handoff_id)
        if trace is None:
            return []
        pages = [
            {"what": what, "at_ns": at_ns, **dict(zip(_FIELDS[what], values, strict=True))}
            for what in _FIELDS
            for at_ns, values in trace.each(what)
        ]
        return [*trace.marks, *pages]

    def course(self, handoff_id: bytes, *, now_ns: int) -> Course:
        """The same for who draws it: without what only `timeline` wants to know."""
        trace = self._traces.get(handoff_id) or _Trace()
        marks = [Mark(what=mark["what"], at_ns=mark["at_ns"], note=_note(mark)) for mark in trace.marks]
        filled = [PageEvent(at_ns, values[2], values[3]) for at_ns, values in trace.each("filled")]
        landed = [PageEvent(at_ns, values[0], values[1]) for at_ns, values in trace.each("landed")]
        return Course(now_ns=now_ns, marks=marks, computed=filled, landed=landed, whole=trace.rows < EVENTS_MAX)

    def _forget_oldest(self) -> None:
        _, trace = self._traces.popitem(last=False)
        self._rows -= trace.rows


class _Trace:
    """One handoff's."""

    __slots__ = ("marks", "pages", "rows")

    def __init__(self) -> None:
        self.marks: list[dict[str, Any]] = []
        self.pages = {what: array("q") for what in _FIELDS}
        self.rows = 0

    def each(self, what: str) -> Iterator[tuple[int, tuple[int, ...]]]:
        """(time, values of its fields), in the order in which they were said."""
        numbers, width = self.pages[what], 1 + len(_FIELDS[what])
        for start in range(0, len(numbers), width):
            at_ns, *values = numbers[start : start + width]
            yield at_ns, tuple(values)


def _note(mark: dict[str, Any]) -> str:
    said = [f"{name} {value}" for name, value in mark.items() if name not in ("what", "at_ns") and value != ""]
    return ", ".join(said)[:MARK_CHARS_MAX]

"""The open windows of one lane, for lanes whose receiver checks them. Knows memory and spans, no sockets.

A window goes open -> closed, or open -> closing -> closed when a frame is being written through it at that moment.
Only an open window admits frames, ids are random and never reused, and a connection delivers frames in order.
Therefore a put whose last frame was admitted had all its frames admitted: receivers keep no state per put.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

from pdx.errors import WireError
from pdx.transport.api import Arrived, Event, Span, WindowClosed
from pdx.transport.spans import SpanSet, check_inside


class CheckedRegion:
    """A Region whose windows are checked by the receiver, so that nothing a peer is told gives it power."""

    def __init__(self, memory: memoryview, windows: WindowTable) -> None:
        self.memory = memory.cast("B") if memory.format != "B" or memory.ndim != 1 else memory[:]
        self.windows = windows

    def open_window(self, spans: Sequence[Span]) -> int:
        return self.windows.open(self.memory, spans)

    def close_window(self, window: int) -> None:
        self.windows.close(window)


class WindowTable:
    """Thread-safe. `emit` receives Arrived and WindowClosed, in their order, from whichever thread caused them."""

    def __init__(self, *, emit: Callable[[Event], None], new_id: Callable[[], int]) -> None:
        self._emit = emit
        self._new_id = new_id
        self._lock = threading.Lock()
        self._windows: dict[int, _Window] = {}

    def open(self, memory: memoryview, spans: Sequence[Span]) -> int:
        """Raises ValueError if a span lies outside the memory, or the memory is read-only."""
        if memory.readonly:
            raise ValueError("a window cannot be opened over read-only memory")
        check_inside(spans, memory.nbytes)
        window = _Window(memory, SpanSet(spans))
        with self._lock:
            number = self._new_id()
            while number in self._windows:
                number = self._new_id()
            self._windows[number] = window
        return number

    def close(self, number: int) -> None:
        with self._lock:
            window = self._windows.get(number)
            if window is None or window.closing:
                return
            window.closing = True
            self._end_if_quiet(number, window)

    def admit(self, number: int, spans: Sequence[Span]) -> list[memoryview] | None:
        """Where the bytes of one frame belong; end_frame() must follow. None if no such window is open.

        Raises WireError if a span lies outside the window.
        """
        with self._lock:
            window = self._windows.get(number)
            if window is None or window.closing:
                return None
            memory, covers = window.memory, window.spans.covers
            targets: list[memoryview] = []
            for span in spans:
                if not covers(span):
                    raise WireError(f"span {span.offset}+{span.length} lies outside its window")
                targets.append(memory[span.offset : span.offset + span.length])
            window.frames_under_way += 1
            return targets

    def end_frame(self, number: int, *, notice: bytes | None) -> None:
        """The admitted frame is over. `notice`: this was the last frame of a put, and whole."""
        with self._lock:
            window = self._windows[number]
            window.frames_under_way -= 1
            if notice is not None:
                self._emit(Arrived(number, notice))
            self._end_if_quiet(number, window)

    def _end_if_quiet(self, number: int, window: _Window) -> None:
        if window.closing and not window.frames_under_way:
            del self._windows[number]
            self._emit(WindowClosed(number))


class _Window:
    __slots__ = ("closing", "frames_under_way", "memory", "spans")

    def __init__(self, memory: memoryview, spans: SpanSet) -> None:
        self.memory = memory
        self.spans = spans
        self.frames_under_way = 0  # more than one if the peer has several connections
        self.closing = False

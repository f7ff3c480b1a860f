"""The events a lane's threads leave for the control thread. Owns the deque and the eventfd that announces it."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections import deque
from collections.abc import Iterable

import msgspec

from pdx.transport.api import Arrived, Event, PutDone

# Only peers can fill the mailbox without limit (notices); past this their connections wait. 64 Ki notices of a few
# hundred bytes are some 20 MiB, but one may have 64 KiB: so their bytes count too.
EVENTS_MAX = 1 << 16
NOTICES_BYTES_MAX = 64 << 20


class Mailbox:
    """Many writers, one reader. add() from any thread; take() and close() from the control thread."""

    def __init__(self) -> None:
        self._events: deque[Event] = deque()
        self._notices_bytes = 0  # under the lock of `_room`
        self._descriptor = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._announced = False
        # A Condition's lock is reentrant: close() may come from a signal handler while take() holds it.
        self._room = threading.Condition()
        self._is_closed = False

    @property
    def has_room(self) -> bool:
        return len(self._events) < EVENTS_MAX and self._notices_bytes < NOTICES_BYTES_MAX

    def fileno(self) -> int:
        return self._descriptor

    def add(self, event: Event) -> None:
        self.add_quietly(event)
        self.announce()

    def add_quietly(self, event: Event) -> None:
        """For events that can wait for a later announce(), which the caller owes."""
        if isinstance(event, Arrived | PutDone):  # they may be taken later, and tell of rates
            msgspec.structs.force_setattr(event, "at_ns", time.monotonic_ns())
        if isinstance(event, Arrived):
            with self._room:
                self._notices_bytes += len(event.notice)
        self._events.append(event)

    def add_all(self, events: Iterable[Event]) -> None:
        for event in events:
            self.add(event)

    def announce(self) -> None:
        """Makes the descriptor readable."""
        if not self._announced:
            self._announced = True
            if self._descriptor >= 0:
                os.eventfd_write(self._descriptor, 1)

    def take(self) -> list[Event]:
        if self._descriptor >= 0:
            with contextlib.suppress(BlockingIOError):
                os.eventfd_read(self._descriptor)
        # After the read and before the drain: a writer that still sees True has appended what we drain now.
        self._announced = False
        taken = [self._events.popleft() for _ in range(len(self._events))]
        with self._room:
            self._notices_bytes -= sum(len(event.notice) for event in taken if isinstance(event, Arrived))
            self._room.notify_all()
        return taken

    def wait_for_room(self, timeout_s: float) -> bool:
        """Holds a peer back while the control thread is behind. False if it still is after `timeout_s`, or closing."""
        if self.has_room:
            return True
        with self._room:
            self._room.wait_for(lambda: self._is_closed or self.has_room, timeout_s)
        return not self._is_closed and self.has_room

    def stop_waiting(self) -> None:
        """Sends away whoever waits for room."""
        with self._room:
            self._is_closed = True
            self._room.notify_all()

    def close(self) -> None:
        """Idempotent. What was added can still be taken."""
        self.stop_waiting()
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)

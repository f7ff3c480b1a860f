"""Threads that do a tier's blocking work, and the box where the results wait. Knows jobs only by what runs them.

Nothing here outlives its owner's close(), except a thread that hangs in the kernel: it is a daemon thread, and its job
never comes back.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Generic, TypeVar

J = TypeVar("J")


class Inbox(Generic[J]):
    """Many writers, one reader, and a descriptor that is readable while there is something to take."""

    def __init__(self) -> None:
        self._items: deque[J] = deque()
        self._descriptor = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._lock = threading.Lock()

    def fileno(self) -> int:
        return self._descriptor

    def add(self, item: J) -> None:
        self._items.append(item)
        self.announce()

    def announce(self) -> None:
        """Makes the descriptor readable until the next take()."""
        with self._lock:  # a late thread must not write to a number that close() gave back
            if self._descriptor >= 0:
                os.eventfd_write(self._descriptor, 1)

    def take(self) -> list[J]:
        if self._descriptor >= 0:
            with contextlib.suppress(BlockingIOError):
                os.eventfd_read(self._descriptor)
        return [self._items.popleft() for _ in range(len(self._items))]

    def close(self) -> None:
        """Idempotent. What was added can still be taken."""
        with self._lock:
            descriptor, self._descriptor = self._descriptor, -1
            if descriptor >= 0:
                os.close(descriptor)


class Crew(Generic[J]):
    """`work` is called with each job, first in, first out, by one of `threads` threads, and must not raise."""

    def __init__(
        self, name: str, *, threads: int, work: Callable[[J], None], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._work = work
        self._clock = clock
        self._queue: deque[J] = deque()
        self._busy: dict[int, tuple[J, float]] = {}  # by thread: what it does, since when
        self._wake = threading.Condition()
        self._is_held = False
        self._is_closing = False
        self._threads = [
            threading.Thread(target=self._run, args=(number,), name=f"{name}-{number}", daemon=True)
            for number in range(threads)
        ]
        for thread in self._threads:
            thread.start()

    def add(self, job: J) -> None:
        with self._wake:
            self._queue.append(job)
            self._wake.notify()

    def withdraw(self, job: J) -> bool:
        """False if it has begun, or is done."""
        with self._wake:
            try:
                self._queue.remove(job)
            except ValueError:
                return False
            return True

    def withdraw_all(self) -> list[J]:
        with self._wake:
            withdrawn = list(self._queue)
            self._queue.clear()
            return withdrawn

    def hold(self) -> None:
        """No job begins until `go_on`. Called by a job, before its owner hears of it: what waits may be in vain."""
        with self._wake:
            self._is_held = True

    def go_on(self) -> None:
        with self._wake:
            self._is_held = False
            self._wake.notify_all()

    def oldest_started_at(self) -> float | None:
        """On the crew's clock, of the jobs under way."""
        with self._wake:
            return min((started_at for _, started_at in self._busy.values()), default=None)

    def wait_idle(self, timeout_s: float) -> bool:
        """Whether nothing is done, nor will be without a word of the owner."""
        with self._wake:
            return self._wake.wait_for(lambda: not self._may_begin and not self._busy, timeout_s)

    def close(self, timeout_s: float) -> bool:
        """Ends the threads after their present jobs; whether all have. Queued jobs must have been withdrawn."""
        with self._wake:
            assert not self._queue, "jobs are queued"
            self._is_closing = True
            self._wake.notify_all()
        deadline = time.monotonic() + timeout_s
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        return not any(thread.is_alive() for thread in self._threads)

    @property
    def _may_begin(self) -> bool:
        return bool(self._queue) and not self._is_held

    def _run(self, number: int) -> None:
        while True:
            with self._wake:
                self._busy.pop(number, None)
                if not self._may_begin and not self._busy:
                    self._wake.notify_all()  # wait_idle
                self._wake.wait_for(lambda: self._may_begin or self._is_closing)
                if not self._queue:
                    return
                job = self._queue.popleft()
                self._busy[number] = (job, self._clock())
            self._work(job)

"""The number of the last step for which this worker touches no slot any more, though copies outlive their steps."""

from __future__ import annotations

import threading
from collections.abc import Callable


class Fence:
    """Publishes the step before the oldest one that has not ended or has a copy under way. Any thread."""

    def __init__(self, publish: Callable[[int], None]) -> None:
        """`publish` is called with growing numbers, one call at a time."""
        self._publish = publish
        self._lock = threading.Lock()
        self._held: dict[int, int] = {}  # step -> its copies under way
        self._ended = 0
        self._published = 0

    def hold(self, step: int) -> None:
        """A copy begins. Before `ended` is told of this step."""
        with self._lock:
            assert step > self._ended
            self._held[step] = self._held.get(step, 0) + 1

    def release(self, step: int) -> None:
        """One of the step's copies is done, and whatever it wrote into headers."""
        with self._lock:
            self._held[step] -= 1
            if not self._held[step]:
                del self._held[step]
            self._tell()

    def ended(self, step: int) -> None:
        """No more copies begin in steps up to this one."""
        with self._lock:
            self._ended = max(self._ended, step)
            self._tell()

    def _tell(self) -> None:
        passed = min(self._ended, min(self._held, default=self._ended + 1) - 1)
        if passed > self._published:
            self._published = passed
            self._publish(passed)

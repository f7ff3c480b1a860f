"""Counts that two threads make and one of them collects."""

from __future__ import annotations

import threading
from collections import Counter


class Tally:
    """Any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts: Counter[str] = Counter()

    def add(self, counts: Counter[str]) -> None:
        with self._lock:
            self._counts.update(counts)

    def take(self) -> Counter[str]:
        """Since the last call."""
        with self._lock:
            counts, self._counts = self._counts, Counter()
        return counts

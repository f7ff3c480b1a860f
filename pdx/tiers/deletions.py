"""Which files a disk tier has to delete: a few under way, the others in a line, and those that could not go now.

After a large clear a million files wait. The threads that delete them also write, and a write is not to wait for all.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable

AT_ONCE = 64  # before a write
AGAIN_S = 30.0  # after a file could not be deleted


class Deletions:
    """One thread. `begin` has a file deleted; `ended` or `withdrawn` must follow."""

    def __init__(
        self, failed: Iterable[str], *, may_begin: Callable[[], bool], begin: Callable[[str], None], now: float
    ) -> None:
        """`failed`: what could not be deleted before."""
        self._may_begin = may_begin
        self._begin = begin
        self._under_way: set[str] = set()
        self._line: deque[str] = deque()
        self._failed = list(failed)
        self._again_at = now + AGAIN_S

    def add(self, name: str) -> None:
        if not self._may_begin():
            self._failed.append(name)
        elif len(self._under_way) >= AT_ONCE:
            self._line.append(name)
        else:
            self._under_way.add(name)
            self._begin(name)

    def withdrawn(self, name: str) -> None:
        """It was to be deleted, and has not been touched."""
        self._under_way.remove(name)
        self.add(name)

    def ended(self, name: str, *, deleted: bool, now: float) -> None:
        self._under_way.discard(name)
        if not deleted:
            self._failed.append(name)
            self._again_at = now + AGAIN_S
        if self._line:
            self.add(self._line.popleft())

    def again(self) -> None:
        """Whatever has kept files from being deleted may be over."""
        for name in self.take_all():
            self.add(name)

    def tick(self, now: float) -> None:
        if self._failed and now >= self._again_at and self._may_begin():
            self.again()

    def take_all(self) -> list[str]:
        """All that are not under way."""
        names = [*self._failed, *self._line]
        self._failed.clear()
        self._line.clear()
        return names

"""Which files a disk tier has to delete: a few under way, the others in a line, and those that could not go now.

After a large clear a million files wait. The threads that delete them also write, and a write is not to wait for all.
Of those that could not go one is asked for now and then, each time another, and the others when it has gone: a disk
that is read-only refuses them all.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable

AT_ONCE = 64  # before a write; and so many failures in a row are the whole disk's
AGAIN_S = 30.0  # between two tries of what could not be deleted


class Deletions:
    """One thread. `begin` has a file deleted; `ended` or `withdrawn` must follow."""

    def __init__(
        self, failed: Iterable[str], *, may_begin: Callable[[], bool], begin: Callable[[str], None], now: float
    ) -> None:
        """`failed`: what an earlier life, or the start of this one, could not delete."""
        self._may_begin = may_begin
        self._begin = begin
        self._under_way: set[str] = set()
        self._line: deque[str] = deque()
        self._failed = deque(failed)
        self._failed_in_row = 0
        self._has_failed = False  # some of this round, and nobody has heard of it
        self._asked: str | None = None  # for all that have failed: under way
        self._again_at = now

    def add(self, name: str) -> None:
        if not self._may_begin() or self._failed_in_row >= AT_ONCE:
            self._failed.append(name)
        elif len(self._under_way) >= AT_ONCE:
            self._line.append(name)
        else:
            self._start(name)

    def withdrawn(self, name: str) -> None:
        """It was to be deleted, and has not been touched."""
        self._leave(name)
        self.add(name)

    def ended(self, name: str, *, deleted: bool, now: float) -> int:
        """How many can't be deleted now, if a round ends in which some failed. Else 0."""
        was_asked = self._leave(name)
        if deleted:
            self._failed_in_row = 0
            if was_asked:
                self.again()
        else:
            if not self._failed and not was_asked:
                self._again_at = now + AGAIN_S
            self._failed.append(name)
            self._has_failed = True
            self._failed_in_row += 1
            if self._failed_in_row >= AT_ONCE:
                self._failed.extend(self._line)
                self._line.clear()
        if self._line:
            self.add(self._line.popleft())
        if self._under_way or not self._has_failed:
            return 0
        self._has_failed = False
        return len(self._failed)

    def again(self) -> None:
        """Whatever has kept files from being deleted may be over."""
        self._failed_in_row = 0
        for name in self.take_all():
            self.add(name)

    def tick(self, now: float) -> None:
        if self._failed and now >= self._again_at and self._asked is None and self._may_begin():
            self._again_at = now + AGAIN_S
            self._asked = self._failed.popleft()
            self._start(self._asked)

    def take_all(self) -> list[str]:
        """All that are not under way."""
        names = [*self._failed, *self._line]
        self._failed.clear()
        self._line.clear()
        return names

    def _start(self, name: str) -> None:
        self._under_way.add(name)
        self._begin(name)

    def _leave(self, name: str) -> bool:
        """It is no longer under way. Whether it was asked for all that have failed."""
        self._under_way.discard(name)
        was_asked = name == self._asked
        if was_asked:
            self._asked = None
        return was_asked

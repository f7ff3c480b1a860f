"""How many questions pdxd has yet to read: a stopped one would otherwise be sent more and more, kept in our memory."""

from __future__ import annotations

from collections import deque

UNREAD_MAX = 48


class Unread:
    """Questions that may be left out, by their requests. Owned by the scheduler's thread."""

    def __init__(self) -> None:
        self._requests: deque[str] = deque()

    def sent(self, request_id: str) -> None:
        self._requests.append(request_id)

    def answered(self, request_id: str) -> None:
        """One of this request's: pdxd has read all that were sent before it, too, whatever becomes of them."""
        if request_id in self._requests:
            while self._requests.popleft() != request_id:
                pass

    def lost(self) -> None:
        """Nobody reads them any more."""
        self._requests.clear()

    @property
    def full(self) -> bool:
        return len(self._requests) >= UNREAD_MAX

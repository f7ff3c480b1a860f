"""What requests are called towards pdxd. A client may choose a request's id, of any length; a frame has an end."""

from __future__ import annotations

import itertools

ID_CHARS_MAX = 256


class Names:
    """Their ids, or for long ones shorter ones of our own. Owned by the scheduler's thread."""

    def __init__(self) -> None:
        self._ours: dict[str, str] = {}  # by request id, of long ones only
        self._theirs: dict[str, str] = {}
        self._numbers = itertools.count(1)

    def of(self, request_id: str) -> str:
        if len(request_id) <= ID_CHARS_MAX:
            return request_id
        ours = self._ours.get(request_id)
        if ours is None:  # longer than any that stands for itself, so it is nobody else's
            ours = f"{request_id[:ID_CHARS_MAX]} ... ({next(self._numbers)})"
            self._ours[request_id], self._theirs[ours] = ours, request_id
        return ours

    def back(self, name: str) -> str:
        """The id of the request that has this name."""
        return self._theirs.get(name, name)

    def forget(self, request_id: str) -> None:
        ours = self._ours.pop(request_id, None)
        if ours is not None:
            del self._theirs[ours]

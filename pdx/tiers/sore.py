"""Parts of a medium that take no writes while the others do. Sans-IO; knows a part by its name only.

One failed write may be the whole medium's trouble, and pauses all of it. But what fails in one part again and again,
between writes that go well elsewhere, is that part's: a folder with a bad block. It is left alone for a while, for else
each write there would pause all others.
"""

from __future__ import annotations

STRIKES_MAX = 2  # one may be a medium that was full for a minute
REST_S = 3600.0  # costs a pause of the medium each time; and a part is small


class Sore:
    """One thread. `now` is in seconds on any clock."""

    def __init__(self) -> None:
        self._suspect: str | None = None  # where the last write failed, with none that went well since
        self._strikes: dict[str, int] = {}  # since the last write there that went well
        self._until: dict[str, float] = {}

    def wrote(self, part: str, *, ok: bool, now: float) -> str | None:
        """The part that is left alone from now on, if it is seen by this."""
        if not ok:
            self._suspect = part
            return None
        self._strikes.pop(part, None)
        suspect, self._suspect = self._suspect, None
        if suspect is None or suspect == part:
            return None
        self._strikes[suspect] = self._strikes.get(suspect, 0) + 1
        if self._strikes[suspect] < STRIKES_MAX:
            return None
        self._until[suspect] = now + REST_S
        return suspect

    def rests(self, part: str, *, now: float) -> bool:
        """Whether this part is not to be written to now."""
        return part in self._until and now < self._until[part]

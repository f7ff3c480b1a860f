"""How fast something is, as measured here: work per busy second, the old counting less. Pure: `now` is given."""

from __future__ import annotations

HALF_LIFE_S = 60.0  # how soon half of a measurement's weight is gone: minutes, as loads on machines change


class Rate:
    """Work per second. One thread."""

    def __init__(self, *, half_life_s: float = HALF_LIFE_S) -> None:
        self._half_life_s = half_life_s
        self._work = 0.0
        self._seconds = 0.0
        self._at = 0.0

    def measured(self, work: float, *, seconds: float, now: float) -> None:
        keep = 0.5 ** (max(0.0, now - self._at) / self._half_life_s)
        self._work = self._work * keep + work
        self._seconds = self._seconds * keep + seconds
        self._at = now

    @property
    def per_s(self) -> float | None:
        """None before anything was measured."""
        return self._work / self._seconds if self._seconds > 0 else None

    def __repr__(self) -> str:
        return f"<Rate {self.per_s or 0:.4g}/s>"


class Busy:
    """Shares out the time of something that has much to do at once: no second is counted twice, idle ones never."""

    def __init__(self) -> None:
        self._ended_at = 0.0

    def ended(self, *, began_at: float, now: float) -> float:
        """The seconds of a piece of work, those before the end of the last one not counted. About as they end."""
        seconds = max(0.0, now - max(began_at, self._ended_at))
        self._ended_at = max(self._ended_at, now)
        return seconds

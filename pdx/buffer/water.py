"""When to make room before anybody asks for it: below the low mark, up to the high one, a little at a time."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Waterline:
    """Marks of free units, as shares of all. Between them nothing happens, so that no single claim sets it off again.

    `batch` bounds one round: its evictions run on the daemon's control thread.
    """

    low: float = 0.05
    high: float = 0.10
    batch: int = 256

    def __post_init__(self) -> None:
        if not 0 <= self.low <= self.high <= 1:
            raise ValueError(f"0 <= low <= high <= 1 does not hold for {self.low} and {self.high}")
        if self.batch < 1:
            raise ValueError(f"a batch has at least one unit, not {self.batch}")

    def to_free(self, *, free: int, total: int, refilling: bool) -> int:
        """Units to free now. `refilling` is whether the last answer was not 0: then it goes on up to the high mark."""
        mark = self.high if refilling else self.low
        if free >= mark * total:
            return 0
        return max(1, min(self.batch, round(self.high * total) - free))

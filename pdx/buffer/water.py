"""When to make room before anybody asks for it: below the low mark, up to the high one, a little at a time."""

from __future__ import annotations

from dataclasses import dataclass

# A round's work is done on the daemon's control thread, whose answers wait meanwhile: some 0.5 ms.
BATCH = 128


@dataclass(frozen=True, slots=True)
class Waterline:
    """Marks of what is free, as shares of the arena. Between them nothing begins, so that no single claim sets it off.

    A low mark of 0 turns it off. `batch` bounds one round, in blocks.
    """

    low: float = 0.05
    high: float = 0.10
    batch: int = BATCH

    def __post_init__(self) -> None:
        if not 0 <= self.low <= self.high <= 1:
            raise ValueError(f"0 <= low <= high <= 1 does not hold for {self.low} and {self.high}")
        if self.batch < 1:
            raise ValueError(f"a batch has at least one block, not {self.batch}")

    def missing(self, free: float, *, refilling: bool) -> float:
        """The share to free now. `refilling`: the last answer was not 0, so that it goes on up to the high mark."""
        mark = self.high if refilling else self.low
        return self.high - free if free < mark and self.low else 0.0


NEVER = Waterline(low=0.0)

"""Whether a medium can be trusted with work. Events in, states out; knows no files, and `now` is an argument.

A medium that can't take writes (full, read-only) still serves reads, and is asked again after a pause. One that can't
be read, or hangs, is switched off for good: an engine that waits for a sick disk is slower than one without a disk.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Literal

from pdx.errors import IllegalTransition

PAUSE_S = 30.0  # others may free room meanwhile; a write per pause is all that a full disk costs
READ_ERRORS_MAX = 8  # in a row: one bad sector costs one block, a dying disk must not cost a read each

HealthEvent = Literal["write_error", "pause_over", "read_errors", "hang"]


class State(StrEnum):
    WELL = "well"
    PAUSED = "paused"
    OFF = "off"


MOVES: dict[tuple[State, HealthEvent], State] = {
    (State.WELL, "write_error"): State.PAUSED,
    (State.PAUSED, "write_error"): State.PAUSED,
    (State.PAUSED, "pause_over"): State.WELL,
    (State.WELL, "read_errors"): State.OFF,
    (State.PAUSED, "read_errors"): State.OFF,
    (State.WELL, "hang"): State.OFF,
    (State.PAUSED, "hang"): State.OFF,
}


class Health:
    """Every method that may change the state says whether it did."""

    def __init__(self, *, pause_s: float = PAUSE_S) -> None:
        self.state = State.WELL
        self._pause_s = pause_s
        self._paused_until = 0.0
        self._read_errors = 0

    def wrote(self, *, ok: bool, now: float) -> bool:
        if ok or self.state is State.OFF:
            return False
        was_well = self.state is State.WELL
        self.on("write_error")
        self._paused_until = now + self._pause_s
        return was_well

    def read(self, *, ok: bool) -> bool:
        self._read_errors = 0 if ok else self._read_errors + 1
        if self._read_errors < READ_ERRORS_MAX or self.state is State.OFF:
            return False
        self.on("read_errors")
        return True

    def hangs(self) -> bool:
        if self.state is State.OFF:
            return False
        self.on("hang")
        return True

    def tick(self, now: float) -> bool:
        if self.state is not State.PAUSED or now < self._paused_until:
            return False
        self.on("pause_over")
        return True

    def on(self, event: HealthEvent) -> None:
        """Raises IllegalTransition, changing nothing, if the table forbids it."""
        if (self.state, event) not in MOVES:
            raise IllegalTransition(f"{event} of a medium that is {self.state}")
        self.state = MOVES[self.state, event]

    def __repr__(self) -> str:
        return f"<Health {self.state}, {self._read_errors} read errors in a row>"

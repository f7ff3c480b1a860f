"""Whether a medium can be trusted with work. Events in, states out; knows no files, and `now` is an argument.

A medium that can't take writes (full, read-only) still serves reads, and after a pause is *tried*: with one write, and
it is well when that has gone well. All that wait would fail, each behind the victims that it has deleted. One that
hangs serves nobody, for an engine that waits for it is slower than one without a disk; but now and then it is asked
whether it answers. One that can't be read is switched off for good: what is rotten does not heal.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Literal

from pdx.errors import IllegalTransition

PAUSE_S = 30.0  # others may free room meanwhile; a write per pause is all that a full disk costs
PROBE_S = 60.0  # one small file a minute: nothing to a server that reboots, soon enough for who waits for its cache
READ_ERRORS_MAX = 8  # in a row: one bad sector costs one block, a dying disk must not cost a read each

HealthEvent = Literal["write_error", "pause_over", "write_done", "read_errors", "hang", "answer"]


class State(StrEnum):
    WELL = "well"
    PAUSED = "paused"
    TRYING = "trying"
    HUNG = "hung"
    OFF = "off"


MOVES: dict[tuple[State, HealthEvent], State] = {
    (State.WELL, "write_error"): State.PAUSED,
    (State.PAUSED, "write_error"): State.PAUSED,
    (State.PAUSED, "pause_over"): State.TRYING,
    (State.TRYING, "write_done"): State.WELL,
    (State.TRYING, "write_error"): State.PAUSED,
    (State.WELL, "read_errors"): State.OFF,
    (State.PAUSED, "read_errors"): State.OFF,
    (State.TRYING, "read_errors"): State.OFF,
    (State.WELL, "hang"): State.HUNG,
    (State.PAUSED, "hang"): State.HUNG,
    (State.TRYING, "hang"): State.HUNG,
    (State.HUNG, "answer"): State.WELL,
    (State.HUNG, "write_error"): State.PAUSED,
    (State.HUNG, "read_errors"): State.OFF,
}


class Health:
    """Every method that may change the state says whether it did."""

    def __init__(
        self, *, pause_s: float = PAUSE_S, probe_s: float = PROBE_S, state: Literal[State.WELL, State.OFF] = State.WELL
    ) -> None:
        self.state: State = state
        self._pause_s = pause_s
        self._probe_s = probe_s
        self._paused_until = 0.0
        self._probed_at = 0.0
        self._read_errors = 0

    @property
    def finds(self) -> bool:
        """Whether what it keeps can be asked for."""
        return self.state in (State.WELL, State.PAUSED, State.TRYING)

    def wrote(self, *, ok: bool, now: float) -> bool:
        """Not said of a medium that was tried and takes no writes yet: it may be full for a week."""
        if ok and self.state is State.TRYING:
            self.on("write_done")
            return True
        if ok or not self.finds:
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

    def hangs(self, *, now: float) -> bool:
        if not self.finds:
            return False
        self.on("hang")
        self._probed_at = now
        return True

    def wants_probe(self, *, now: float) -> bool:
        """Whether a medium that hung is to be asked now. Says so once in `probe_s`."""
        if self.state is not State.HUNG or now - self._probed_at < self._probe_s:
            return False
        self._probed_at = now
        return True

    def answered(self, *, takes_writes: bool, now: float) -> bool:
        """A medium that hung has done, in time, what it was asked for; or said, in time, that it takes no writes."""
        if self.state is not State.HUNG:
            return False
        self.on("answer" if takes_writes else "write_error")
        self._paused_until = now + self._pause_s
        self._read_errors = 0
        return True

    def tick(self, now: float) -> bool:
        """Whether a pause is over now."""
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

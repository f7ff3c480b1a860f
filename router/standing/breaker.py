"""Circuit breakers: who has failed again and again is not asked for a while, then asked once, to see. Sans-IO.

ARCHITECTURE.md has the table. Failures count in a row: any success ends the run, so that one client's impossible
requests, which fail everywhere, don't open what serves others. Failures at one moment (BURST_S) count once where
`bursts` says so: when an engine dies, all that it had under way fails together and says one thing. So do those that may
be the client's doing, for one client can send many at once.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from pdx.errors import IllegalTransition

State = Literal["closed", "open", "half_open"]

BURST_S = 1.0
SAYS_NOTHING = -1  # no life's number

MOVES: dict[tuple[State, str], State] = {
    ("closed", "trip"): "open",
    ("open", "cool"): "half_open",
    ("half_open", "fail"): "open",
    ("half_open", "recover"): "closed",
}


class BreakerSettings(msgspec.Struct, frozen=True, kw_only=True):
    failure_threshold: int = 10  # in a row, within window_s; 0: never opens
    success_threshold: int = 3  # in a row, while half open
    timeout_s: float = 60.0  # from open to half open
    window_s: float = 120.0
    bursts: bool = False


class Breaker:
    """Of one engine, or one pair of daemons. A call takes a ticket from `began` and gives it back to `ended`."""

    def __init__(self, settings: BreakerSettings) -> None:
        self.state: State = "closed"
        self._settings = settings
        self._life = 0  # a state's number: what began in an earlier one says nothing about this
        self._failures = 0
        self._successes = 0
        self._probes = 0
        self._run_began_at = 0.0
        self._failed_at = float("-inf")
        self._opened_at = 0.0

    def __repr__(self) -> str:
        return f"<Breaker {self.state} {self._failures} failures>"

    def lets_through(self, now: float) -> bool:
        """Whether a call may begin: while half open, one at a time."""
        if self.state == "open" and now >= self._opened_at + self._settings.timeout_s:
            self._move("cool")
        return self.state == "closed" or (self.state == "half_open" and self._probes == 0)

    def began(self) -> int:
        self._probes += self.state == "half_open"
        return self._life

    def ended(self, ticket: int, *, ok: bool | None, now: float, proved: bool = True) -> None:
        """None: the call was given up, and says nothing. `proved`: a failure is not the client's doing."""
        if ticket != self._life:
            return
        if self.state == "half_open":
            self._probes -= 1
            self._probed(ok, now)
        elif self.state == "closed" and ok:
            self._failures = 0
        elif self.state == "closed" and ok is False:
            self._failed(now, proved)

    def went(self, ticket: int, *, now: float) -> int:
        """The call goes well so far, and may go on for long: a probe is over with that. Its ticket from now on."""
        if ticket != self._life or self.state != "half_open":
            return ticket
        self.ended(ticket, ok=True, now=now)
        return self._life if self.state == "closed" else SAYS_NOTHING

    @property
    def idle(self) -> bool:
        """Whether forgetting it changes nothing."""
        return self.state == "closed" and not self._failures

    def reopens_in_s(self, now: float) -> float:
        """Until it is half open; 0 if it is not open."""
        return max(0.0, self._opened_at + self._settings.timeout_s - now) if self.state == "open" else 0.0

    def _probed(self, ok: bool | None, now: float) -> None:
        if ok is False:
            self._opened_at = now
            self._move("fail")
        elif ok:
            self._successes += 1
            if self._successes >= self._settings.success_threshold:
                self._move("recover")

    def _failed(self, now: float, proved: bool) -> None:
        if (self._settings.bursts or not proved) and now - self._failed_at < BURST_S:
            return
        self._failed_at = now
        if not self._failures or now - self._run_began_at > self._settings.window_s:
            self._failures, self._run_began_at = 0, now
        self._failures += 1
        if 0 < self._settings.failure_threshold <= self._failures:
            self._opened_at = now
            self._move("trip")

    def _move(self, move: str) -> None:
        try:
            self.state = MOVES[self.state, move]
        except KeyError:
            raise IllegalTransition(f"breaker: {move} in state {self.state}") from None
        self._life += 1
        self._failures = self._successes = self._probes = 0

"""How long the loads of one step may go on. Knows a clock and durations, nothing of pages."""

from __future__ import annotations

from collections.abc import Callable

# A load beside other requests' decoding is work that all of them wait for. They may lose 3 % of their pace to it; the
# last 1 % is for what else a step with a load costs. Several loads have as many shares: whoever waits for one has no
# pace at all yet. But however many come, those that decode keep most of theirs.
FORWARD_SHARE, FORWARD_SHARE_MAX = 0.02, 0.15
# Without a forward pass nobody waits but new requests and aborts: some 200 MB a step, and each more step takes 2 ms.
IDLE_S = 0.040


class LoadBudget:
    """One step's. Spent after the first batch at the earliest, so that loads move on in every step."""

    def __init__(self, *, forward_s: float | None, loads: int, clock: Callable[[], float]) -> None:
        """`forward_s`: how long this step's forward pass took; None: it had none. `loads`: how many are under way."""
        self._clock = clock
        self.hurries = forward_s is not None
        self.began_at = clock()
        share = min(FORWARD_SHARE * loads, FORWARD_SHARE_MAX)
        self._until = self.began_at + (IDLE_S if forward_s is None else min(share * forward_s, IDLE_S))
        self.spent = False

    def batch_done(self) -> None:
        self.spent = self._clock() >= self._until

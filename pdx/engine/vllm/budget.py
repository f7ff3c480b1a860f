"""How long the loads of one step may go on. Knows a clock and durations, nothing of pages."""

from __future__ import annotations

from collections.abc import Callable

# A load beside other requests' decoding is work that all of them wait for: in sum the same whether in a few steps or in
# many. In few, for until then the request that loads has no pace at all, while a step that is a tenth longer shows in
# nobody's median. (A share of 2 % made a second token beside four streams wait for 1.4 s instead of a step.)
FORWARD_SHARE = 0.10
# Without a forward pass nobody waits but new requests and aborts: some 200 MB a step, and each more step takes 2 ms.
IDLE_S = 0.040


class LoadBudget:
    """One step's. Spent after the first batch at the earliest, so that loads move on in every step."""

    def __init__(self, *, forward_s: float | None, clock: Callable[[], float]) -> None:
        """`forward_s`: how long this step's forward pass took; None: it had none."""
        self._clock = clock
        self.hurries = forward_s is not None
        self.began_at = clock()
        self._until = self.began_at + (IDLE_S if forward_s is None else min(FORWARD_SHARE * forward_s, IDLE_S))
        self.spent = False

    def batch_done(self) -> None:
        self.spent = self._clock() >= self._until

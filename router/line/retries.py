"""How much of a router's work may be repetition. No clock: the allowance grows with requests, not with time.

When engines fail, every request would be repeated `retries` times, on engines that have enough to do as it is. With
the budget, repeats are at most SHARE of the requests, plus RESERVE at the start and after a quiet time.
"""

from __future__ import annotations

SHARE = 0.2
RESERVE = 20.0  # some engine's whole load, when it dies on a router that is not busy


class RetryBudget:
    """One for all journeys of a router. Owned by the event loop's thread."""

    def __init__(self) -> None:
        self._left = RESERVE

    def __repr__(self) -> str:
        return f"<RetryBudget {self._left:.1f} of {RESERVE:g}>"

    def on_request(self) -> None:
        self._left = min(RESERVE, self._left + SHARE)

    def take(self) -> bool:
        """Whether one more repeat is allowed; it counts as made."""
        if self._left < 1.0:
            return False
        self._left -= 1.0
        return True

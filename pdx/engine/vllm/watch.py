"""A worker's watch over its weights: which state they are in, by a digest of what they are, before any page moves."""

from __future__ import annotations

import secrets
from collections.abc import Callable

from pdx.engine.vllm.steps import Seen


class Watch:
    """Owned by the model's thread.

    A *state* is "" as long as the weights are those of the engine's start, so also when they are so again; else their
    digest. Weights that can't be seen have a new state, unlike all others, whenever they may have changed.
    """

    def __init__(self, *, unseen: Callable[[], str] = lambda: secrets.token_hex(16)) -> None:
        """`unseen` names states of weights that can't be seen, each once."""
        self._unseen = unseen
        self._digest: Callable[[], str | None] | None = None
        self._first: str | None = None
        self._marked = False
        self._asked = 0
        self.state: str | None = None  # None: nobody has given it a model

    def begin(self, digest: Callable[[], str | None]) -> None:
        """At the engine's start, before anything can change: `digest` is of the weights at the time of the call."""
        self._digest, self._first, self.state = digest, digest(), ""

    def mark(self) -> None:
        """The weights may have changed. Costs nothing: the next look finds out."""
        self._marked = True

    def look(self, asked: int) -> Seen | None:
        """Digests, if the weights may have changed or the scheduler has `asked` again; returns what to tell it then."""
        if self._digest is None or (not self._marked and asked == self._asked):
            return None
        self._marked, self._asked = False, asked
        now = self._digest()
        if now is None:
            self.state = self._unseen()
        else:
            self.state = "" if now == self._first else now
        return Seen(asked, self.state)

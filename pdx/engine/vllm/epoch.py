"""The weight epoch as the scheduler knows it: in which state each rank's weights were when it last looked.

The workers are the authority (see `watch`). Since vLLM resets its caches *before* it takes new weights, a reset asks
every rank to look again, before the next page moves; until all have answered nobody knows what the blocks would mean.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

from pdx.engine.vllm.steps import Seen


class Epoch:
    """Owned by the scheduler's thread."""

    def __init__(self, ranks: int) -> None:
        self._ranks = ranks
        self._states = dict.fromkeys(range(ranks), "")
        self.asked = 0
        self.states: dict[int, str] | None = {}  # by rank, of those unlike the start's. None: not known
        self.name: str | None = ""  # the engine's epoch: "" at its start, else a digest. None: not known

    def ask(self) -> None:
        """Whatever was known is not known any more."""
        self.asked += 1
        self._states = {}
        self.states = self.name = None

    def reported(self, seen: Mapping[int, Seen]) -> None:
        """What ranks have seen. Looks from before the last question say nothing."""
        self._states |= {rank: one.state for rank, one in seen.items() if one.asked == self.asked}
        if len(self._states) == self._ranks:
            self.states = {rank: state for rank, state in self._states.items() if state}
            self.name = self._name(self.states)

    def _name(self, states: Mapping[int, str]) -> str:
        if not states or self._ranks == 1:
            return states.get(0, "")
        each = "/".join(states.get(rank, "") for rank in range(self._ranks))
        return hashlib.blake2b(each.encode(), digest_size=16, person=b"pdx-epoch").hexdigest()

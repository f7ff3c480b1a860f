"""How fast an engine computes prompts, from when its steps were planned and when they were over. `now` is given.

A step may be planned while the one before it runs (async scheduling), so a step's time begins when that one is over.
Decoding in the same step counts as time: it is what a prompt meets here. Steps with no more than a block of prompts,
such as the tail behind a hit, say more of a step than of computing: they are left out. What a first step takes longer,
to warm up, makes loads look better than they are, and is forgotten by half-lives.
"""

from __future__ import annotations

from collections import deque
from typing import NamedTuple

from pdx.rates import Busy, Rate

STEPS_MAX = 8  # planned and not over: vLLM has two


class _Planned(NamedTuple):
    number: int
    prompt_tokens: int
    at: float


class Pace:
    """Owned by the scheduler's thread."""

    def __init__(self, *, block_tokens: int) -> None:
        self._block_tokens = block_tokens
        self._rate = Rate()
        self._busy = Busy()
        self._planned: deque[_Planned] = deque(maxlen=STEPS_MAX)

    def planned(self, number: int, *, prompt_tokens: int, now: float) -> None:
        """A step with a forward pass. `prompt_tokens`: of those it computes."""
        self._planned.append(_Planned(number, prompt_tokens, now))

    def over(self, number: int, *, now: float) -> None:
        """The worker has done this step, and so all before it. Steps that were not planned here are ignored."""
        while self._planned and self._planned[0].number <= number:
            step = self._planned.popleft()
            if step.number < number:  # when it was over nobody knows
                continue
            seconds = self._busy.ended(began_at=step.at, now=now)
            if step.prompt_tokens > self._block_tokens:
                self._rate.measured(step.prompt_tokens, seconds=seconds, now=now)

    @property
    def tokens_per_s(self) -> float:
        """0 before anything was measured."""
        return self._rate.per_s or 0.0

"""Whether loading a block's bytes beats computing them again, from rates that were measured here. Pure: `now` is given.

A rate is work per busy second, averaged over what was measured, the old counting less. As long as one side has no rate,
loading is chosen: that is what measures it. Later, one of many skipped loads is tried all the same, or a tier that was
slow once would never be asked again. How fast blocks are computed is the asker's to say: a tier has many.
"""

from __future__ import annotations

from dataclasses import dataclass

from pdx.rates import HALF_LIFE_S, Rate

TRIED_EVERY = 50  # one of so many skipped loads: at worst 2 % of the time that they save


@dataclass(frozen=True, slots=True)
class Verdict:
    load: bool
    load_s: float | None  # None: not measured yet
    compute_s: float | None
    tried: bool = False  # it looks too slow, and is loaded to be measured again


class CostModel:
    """One for each way that blocks come. Counts what it decides."""

    def __init__(self, *, half_life_s: float = HALF_LIFE_S, tried_every: int = TRIED_EVERY) -> None:
        self.loads = 0
        self.skips = 0
        self.tries = 0  # loads that looked too slow, to measure again
        self._tried_every = tried_every
        self._load = Rate(half_life_s=half_life_s)

    def loaded(self, size_bytes: int, *, seconds: float, now: float) -> None:
        """A load has come in, `seconds` after it was asked for, those in which it waited for others not counted."""
        self._load.measured(size_bytes, seconds=seconds, now=now)

    @property
    def bytes_per_s(self) -> float | None:
        """None: not measured yet."""
        return self._load.per_s

    def judge(self, *, tokens: int, tokens_per_s: float, size_bytes: int, queued_bytes: int = 0) -> Verdict:
        """Load these blocks, which hold `tokens` tokens, behind `queued_bytes` of others' loads, or compute them?

        `tokens_per_s`: of the engine that asks; 0: not measured yet.
        """
        load_rate = self._load.per_s
        load_s = (size_bytes + queued_bytes) / load_rate if load_rate else None
        compute_s = tokens / tokens_per_s if tokens_per_s else None
        if load_s is None or compute_s is None or load_s < compute_s:
            self.loads += 1
            return Verdict(True, load_s, compute_s)
        self.skips += 1
        if self.skips % self._tried_every == 0:
            self.tries += 1
            return Verdict(True, load_s, compute_s, tried=True)
        return Verdict(False, load_s, compute_s)

    def __repr__(self) -> str:
        return f"<CostModel {self._load} bytes: {self.loads} loads, {self.skips} skips>"

"""Whether loading a block's bytes beats computing them again, from rates that were measured here. Pure: `now` is given.

A rate is work per busy second, averaged over what was measured, the old counting less. As long as one side has no rate,
loading is chosen: that is what measures it. Later, one of many skipped loads is tried all the same, or a tier that was
slow once would never be asked again.
"""

from __future__ import annotations

from dataclasses import dataclass

HALF_LIFE_S = 60.0  # how soon half of a measurement's weight is gone: minutes, as loads on machines change
TRIED_EVERY = 50  # one of so many skipped loads: at worst 2 % of the time that they save


class Rate:
    """Work per second. One thread."""

    def __init__(self, *, half_life_s: float = HALF_LIFE_S) -> None:
        self._half_life_s = half_life_s
        self._work = 0.0
        self._seconds = 0.0
        self._at = 0.0

    def measured(self, work: float, *, seconds: float, now: float) -> None:
        keep = 0.5 ** (max(0.0, now - self._at) / self._half_life_s)
        self._work = self._work * keep + work
        self._seconds = self._seconds * keep + seconds
        self._at = now

    @property
    def per_s(self) -> float | None:
        """None before anything was measured."""
        return self._work / self._seconds if self._seconds > 0 else None

    def __repr__(self) -> str:
        return f"<Rate {self.per_s or 0:.4g}/s>"


@dataclass(frozen=True, slots=True)
class Verdict:
    load: bool
    load_s: float | None  # None: not measured yet
    compute_s: float | None


class CostModel:
    """One for each pair of engine and tier. Counts what it decides."""

    def __init__(self, *, half_life_s: float = HALF_LIFE_S, tried_every: int = TRIED_EVERY) -> None:
        self.loads = 0
        self.skips = 0
        self.tries = 0  # loads that looked too slow, to measure again
        self._tried_every = tried_every
        self._compute = Rate(half_life_s=half_life_s)
        self._load = Rate(half_life_s=half_life_s)

    def computed(self, tokens: int, *, seconds: float, now: float) -> None:
        """An engine has computed so many tokens of a prompt."""
        self._compute.measured(tokens, seconds=seconds, now=now)

    def loaded(self, size_bytes: int, *, seconds: float, now: float) -> None:
        """A load has come in, `seconds` after it was asked for, those in which it waited for others not counted."""
        self._load.measured(size_bytes, seconds=seconds, now=now)

    def judge(self, *, tokens: int, size_bytes: int, queued_bytes: int = 0) -> Verdict:
        """Load these blocks, which hold `tokens` tokens, behind `queued_bytes` of others' loads, or compute them?"""
        load_rate, compute_rate = self._load.per_s, self._compute.per_s
        load_s = (size_bytes + queued_bytes) / load_rate if load_rate else None
        compute_s = tokens / compute_rate if compute_rate else None
        if load_s is None or compute_s is None or load_s < compute_s:
            self.loads += 1
            return Verdict(True, load_s, compute_s)
        self.skips += 1
        if self.skips % self._tried_every == 0:
            self.tries += 1
            return Verdict(True, load_s, compute_s)
        return Verdict(False, load_s, compute_s)

    def __repr__(self) -> str:
        return f"<CostModel {self._load} bytes, {self._compute} tokens: {self.loads} loads, {self.skips} skips>"

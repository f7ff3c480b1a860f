"""What all requests of a router share: who is there, how much each engine has, and where requests wait for them."""

from __future__ import annotations

import math
import time
from collections import Counter as Tally
from collections.abc import Iterator
from contextlib import contextmanager

import msgspec

from pdx.router.directory import Directory
from pdx.router.gate import Gate
from pdx.router.metrics import Metrics
from pdx.router.pending import Pending
from pdx.router.policy import Candidate, Snapshot
from pdx.router.registry import Registry
from pdx.router.retries import RetryBudget
from pdx.router.standing import Standing
from pdx.router.upstream import Upstream


class Outside:
    """Owned by the event loop's thread."""

    def __init__(
        self,
        *,
        directory: Directory,
        registry: Registry,
        upstream: Upstream,
        metrics: Metrics,
        pending: Pending,
        standing: Standing,
        gate: Gate,
    ) -> None:
        self.directory = directory
        self.registry = registry
        self.upstream = upstream
        self.metrics = metrics
        self.pending = pending
        self.standing = standing
        self.gate = gate
        self.retry_budget = RetryBudget()
        self.under_way = 0  # requests of clients
        self.in_flight: Tally[str] = Tally()  # engine id -> calls under way
        self.in_line: Tally[str] = Tally()  # engine id -> those of them from which nothing has come yet

    def snapshot(self) -> Snapshot:
        """The engines that may be asked now, with this router's own load counted in."""
        flight, line = self.in_flight, self.in_line
        seen = (
            msgspec.structs.replace(c, in_flight=flight[c.engine_id], in_line=line[c.engine_id])
            for c in self.directory.snapshot()
        )
        return self.standing.applied(seen, time.monotonic())

    def reasons(self) -> list[str]:
        """Why some engines, pairs or all of them are not asked, in words for operators."""
        standing = self.standing
        return [
            *(["this router is draining"] if self.gate.queue.draining else []),
            *(f"engine {engine_id} is drained" for engine_id in sorted(standing.drained)),
            *(
                f"engine {engine_id} keeps failing: its breaker is {breaker.state.replace('_', ' ')}"
                for engine_id, breaker in sorted(standing.states().items())
                if breaker.state != "closed"
            ),
            *(f"handoffs from daemon {a} to {b} keep failing" for a, b in sorted(standing.broken_pairs())),
        ]

    def retry_after_s(self, model: str) -> int:
        """When an engine of this model that is spared now is asked again. Others join within seconds, or never."""
        engines = [c.engine_id for c in self.directory.snapshot() if model in c.info.models]
        return max(1, math.ceil(self.standing.opens_in_s(engines, time.monotonic())))

    @contextmanager
    def in_flight_at(self, engine: Candidate) -> Iterator[None]:
        with self._counted(self.in_flight, engine.engine_id):
            yield

    @contextmanager
    def in_line_at(self, engine: Candidate) -> Iterator[None]:
        with self._counted(self.in_line, engine.engine_id):
            yield

    @contextmanager
    def _counted(self, tally: Tally[str], engine_id: str) -> Iterator[None]:
        tally[engine_id] += 1
        try:
            yield
        finally:
            tally[engine_id] -= 1
            if not tally[engine_id]:
                del tally[engine_id]
            self.gate.stir()

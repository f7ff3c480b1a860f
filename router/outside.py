"""What all requests of a router share: who is there, how much each engine has, and where requests wait for them."""

from __future__ import annotations

import math
import time
from collections import Counter as Tally
from collections.abc import Callable

import msgspec

from pdx.router.choice.forecast import NOMINAL_TOKENS_PER_S, worth_bringing
from pdx.router.choice.knowledge import Knowledge
from pdx.router.choice.policy import Asked, Candidate, Snapshot, choose_pair
from pdx.router.choice.prompt import Prompt
from pdx.router.choice.prompts import Prompts
from pdx.router.choice.sharing import Sharing
from pdx.router.choice.work import Work
from pdx.router.engines.directory import Directory
from pdx.router.engines.registry import Registry
from pdx.router.engines.upstream import Upstream
from pdx.router.line.gate import Gate
from pdx.router.line.retries import RetryBudget
from pdx.router.live.recorder import Recorder
from pdx.router.metrics import Metrics, Moment
from pdx.router.request.pending import Pending
from pdx.router.request.request import Request
from pdx.router.request_log import RequestLog
from pdx.router.standing.standing import Standing


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
        knowledge: Knowledge,
        request_log: RequestLog | None = None,
    ) -> None:
        self.directory = directory
        self.registry = registry
        self.upstream = upstream
        self.metrics = metrics
        self.pending = pending
        self.standing = standing
        directory.renamed = standing.renamed
        self.gate = gate
        self.knowledge = knowledge
        self.request_log = request_log
        self.prompts = Prompts(upstream, knowledge, count=lambda ids: metrics.prompts.labels(ids=ids).inc())
        self.sharing = Sharing(knowledge, registry.tell, lambda outcome: metrics.brought.labels(outcome=outcome).inc())
        registry.heard_holdings = lambda daemon_id: self.sharing.heard(daemon_id, time.monotonic())
        self.work = Work()
        self.retry_budget = RetryBudget()
        self.recorder = Recorder()
        self.under_way = 0  # requests of clients
        metrics.queued.set_function(lambda: len(gate.queue))
        metrics.ejected.set_function(lambda: len(standing.ejected()))
        metrics.unpaired.set_function(lambda: len(standing.broken_pairs()))
        self.in_flight: Tally[str] = Tally()  # engine id -> calls under way
        self.in_line: Tally[str] = Tally()  # engine id -> those of them from which nothing has come yet
        self.changes = 0  # of these two

    def snapshot(self) -> Snapshot:
        """The engines that may be asked now, with this router's own load counted in."""
        now, seen = time.monotonic(), self.directory.snapshot()
        told: dict[bytes, list[float]] = {}
        for engine in seen:
            if engine.told_tokens_per_s:
                told.setdefault(engine.space, []).append(engine.told_tokens_per_s)
        paces = {space: sum(each) / len(each) for space, each in told.items()}
        return self.standing.applied((self._with_load(c, paces.get(c.space, 0.0), now) for c in seen), now)

    def _with_load(self, seen: Candidate, others_pace: float, now: float) -> Candidate:
        engine_id, work = seen.engine_id, self.work
        pace = seen.told_tokens_per_s or others_pace or work.tokens_per_s(seen.space)
        return msgspec.structs.replace(
            seen, in_flight=self.in_flight[engine_id], in_line=self.in_line[engine_id], tokens_per_s=pace,
            ahead_s=work.ahead_s(engine_id, pace or NOMINAL_TOKENS_PER_S, now), step_s=work.step_s(engine_id),
        )  # fmt: skip

    async def brought(self, prompt: Prompt, request: Request, snapshot: Snapshot, turn: int) -> None:
        """Returns when what is worth bringing has come to where the prompt would be computed now."""
        if not any(prompt.found.values()) or not any(engine.links for engine in snapshot):
            return  # nobody is known to have any of it, or nobody to have sent anything to anybody
        pair = choose_pair(snapshot, request.model, policy="prefix", turn=turn, asked=Asked(prompt=prompt))
        bring = worth_bringing(pair.prefill, snapshot, prompt) if pair is not None else None
        if bring is not None:
            await self.sharing.bring(bring, prompt, salt=request.body.get("cache_salt") or "")

    def moment(self) -> Moment:
        """For the metrics."""
        return Moment(
            roles=[c.info.role for c in self.directory.snapshot()],
            reservations_waiting=self.directory.reservations_waiting(),
            known_blocks=len(self.knowledge),
        )

    def reasons(self) -> list[str]:
        """Why some engines, pairs or all of them are not asked, in words for operators."""
        standing = self.standing
        return [
            *(["this router is draining"] if self.gate.queue.draining else []),
            *(f"engine {engine_id} is drained" for engine_id in sorted(standing.drained)),
            *(
                f"engine {engine_id} keeps failing: its breaker is {state.replace('_', ' ')}"
                for engine_id, state in sorted(standing.ejected().items())
            ),
            *(f"handoffs from daemon {a} to {b} keep failing" for a, b in sorted(standing.broken_pairs())),
        ]

    def retry_after_s(self, model: str) -> int:
        """When an engine of this model that is ejected now is asked again. Others join within seconds, or never."""
        if not self.standing.ejected():
            return 1
        engines = [c.engine_id for c in self.directory.snapshot() if model in c.info.models]
        return max(1, math.ceil(self.standing.opens_in_s(engines, time.monotonic())))

    def sent(
        self, engine: Candidate, prompt: Prompt | None, *, waits: bool, whole: bool = False
    ) -> Callable[[bool], None]:
        """A call goes there, with a prompt if it is one that the engine has to compute.

        Call the result when the call is over, and say whether it took the time that a first token takes. `waits`: for
        another engine's work, so that its time says nothing. `whole`: its answer comes in one piece, at its end.
        """
        now, tokens = time.monotonic(), 0.0
        if prompt is not None:
            tokens = prompt.work_tokens(engine)
            if self.directory.knows_daemon(engine.daemon):  # one that has left would never leave again
                self.knowledge.expect(prompt.names_at(engine), engine.daemon, now)
        load = 0 if waits else self.in_flight[engine.engine_id]
        pace = engine.tokens_per_s or NOMINAL_TOKENS_PER_S
        computed_by = now + self.work.ahead_s(engine.engine_id, pace, now) + tokens / pace if whole else math.inf
        piece = self.work.sent(
            engine.engine_id, tokens, now, load=load, kind=engine.space, computed_by=computed_by
        )  # fmt: skip
        return lambda answered: self.work.over(piece, time.monotonic(), answered=answered)

    def in_flight_at(self, engine: Candidate) -> Callable[[], None]:
        """One call more is under way there, until the result is called."""
        return self._counted(self.in_flight, engine.engine_id)

    def in_line_at(self, engine: Candidate) -> Callable[[], None]:
        """One call more from which nothing has come yet, until the result is called."""
        return self._counted(self.in_line, engine.engine_id)

    def _counted(self, tally: Tally[str], engine_id: str) -> Callable[[], None]:
        tally[engine_id] += 1
        self.changes += 1

        def over() -> None:
            tally[engine_id] -= 1
            self.changes += 1
            if not tally[engine_id]:
                del tally[engine_id]
            self.gate.stir()

        return over

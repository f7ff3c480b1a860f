"""The router's choices in virtual time: its own policy, forecast, knowledge and work, and nothing else of it.

They decide from what simulated daemons tell by the daemon's own `HoldingsTeller`, up to 50 ms late. Minutes of 32
engines take seconds, so that a throughput is found to 3 %.
"""

from __future__ import annotations

import hashlib
import heapq
import itertools
import random
from collections.abc import Callable
from dataclasses import dataclass, field

from benchmarks.routing.host import ENGINES, MODEL, PREFILL_TOKENS_PER_S, ROLES, SPACE, STEP_MORE_S, Host, prefill_s
from benchmarks.routing.workloads import BLOCK_TOKENS, TTFT_P95_S, Sessions, Turn, Workload
from pdx.daemon.holdings import TURN_S
from pdx.router.choice.blocks import Blocks
from pdx.router.choice.knowledge import Knowledge
from pdx.router.choice.policy import Asked, Candidate, PolicyName, choose_instead, choose_pair
from pdx.router.choice.prompt import Prompt
from pdx.router.choice.work import Piece, Work
from pdx.wire import Holdings


@dataclass
class Run:
    """All of one policy at one rate."""

    policy: PolicyName
    now: float = 0.0
    first_tokens_s: list[float] = field(default_factory=list)
    computed: int = 0
    asked: int = 0

    def __post_init__(self) -> None:
        hosts = [Host(f"{role[0]}{n}", role) for role in ROLES for n in range(ENGINES)]
        self.hosts = {host.info.engine_id: host for host in hosts}
        self.free_at = dict.fromkeys(self.hosts, 0.0)  # when an engine has computed all prompts that it has
        self.knowledge, self.work = Knowledge(names_max=1 << 22), Work()
        self._turn = 0
        self._rng = random.Random(5)
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._numbers = itertools.count()

    def at(self, when: float, what: Callable[[], None]) -> None:
        heapq.heappush(self._events, (when, next(self._numbers), what))

    def play(self, sessions: Sessions, *, sessions_per_s: float, seconds: float) -> None:
        """First-token times are those of the last two thirds: what came before warms up."""

        def next_session() -> None:
            self._ask(next(sessions))
            self.at(self.now + self._rng.expovariate(sessions_per_s), next_session)

        if self.policy == "prefix":
            self.at(0.0, self._tell)
        self.at(0.0, next_session)
        while self.now < seconds:
            self.now, _, what = heapq.heappop(self._events)
            what()
            if self.now < seconds / 3:
                self.first_tokens_s.clear()

    def _tell(self) -> None:
        for host in self.hosts.values():
            host.teller.tick(["r"], self._told, self.now)
        self.at(self.now + TURN_S, self._tell)

    def _told(self, router: str, message: Holdings) -> bool:
        assert self.knowledge.on_holdings(message)
        return True

    def _ask(self, turns: list[Turn]) -> None:
        """The first of these turns; the others come when it has been answered."""
        turn, asked_at = turns[0], self.now
        self.asked += 1
        self._turn += 1
        names = _names([*turn.prompt, *turn.answer])
        prompt_names, answer_names = names[: len(turn.prompt)], names[len(turn.prompt) :]
        prompt = None
        if self.policy == "prefix":
            blocks = Blocks.called({SPACE: prompt_names})
            found = self.knowledge.found(blocks.names(SPACE), self.now)
            prompt = Prompt(tokens=len(turn.prompt) * BLOCK_TOKENS, blocks=blocks, found={SPACE: found})
        snapshot = tuple(self._seen(host) for host in self.hosts.values())
        asked = Asked(draws=tuple(self._rng.random() for _ in range(4)), prompt=prompt)  # type: ignore[arg-type]
        pair = choose_pair(snapshot, MODEL, policy=self.policy, turn=self._turn, asked=asked)
        assert pair is not None
        alone = choose_instead(pair, snapshot, MODEL, policy=self.policy, asked=asked)
        decode = self.hosts[(alone[0] if alone else pair.decode).engine_id]
        prefill = decode if alone else self.hosts[pair.prefill.engine_id]
        piece = self._sent(prefill, prompt)
        decode.running += 1
        uncached = prefill.uncached(prompt_names)
        self.computed += uncached
        done_at = max(self.now, self.free_at[prefill.info.engine_id]) + prefill_s(uncached)
        self.free_at[prefill.info.engine_id] = done_at

        def computed() -> None:
            self.work.over(piece, self.now, answered=True)
            prefill.keep(prompt_names)
            decode.keep(prompt_names)
            self.at(self.now + len(turn.answer) * BLOCK_TOKENS * decode.step_s(), answered)

        def answered() -> None:
            decode.running -= 1
            prefill.keep(answer_names)
            decode.keep(answer_names)
            if len(turns) > 1:
                self.at(self.now + turn.think_s, lambda: self._ask(turns[1:]))

        self.first_tokens_s.append(done_at - asked_at)  # known now: lines are first in, first out
        self.at(done_at, computed)

    def _seen(self, host: Host) -> Candidate:
        engine_id = host.info.engine_id
        return Candidate(
            info=host.info, daemon=host.ref, space=SPACE, told_tokens_per_s=PREFILL_TOKENS_PER_S,
            tokens_per_s=PREFILL_TOKENS_PER_S, in_flight=host.running, in_line=0, step_s=STEP_MORE_S,
            ahead_s=self.work.ahead_s(engine_id, PREFILL_TOKENS_PER_S, self.now),
        )  # fmt: skip

    def _sent(self, prefill: Host, prompt: Prompt | None) -> Piece:
        tokens = 0.0
        if prompt is not None:
            seen = self._seen(prefill)
            tokens = prompt.work_tokens(seen)
            self.knowledge.expect(prompt.names_at(seen), prefill.ref, self.now)
        return self.work.sent(prefill.info.engine_id, tokens, self.now, load=1)


def _names(said: list[int]) -> list[bytes]:
    """Of these blocks: as in an engine, each depends on all before it."""
    names, name = [], b""
    for block in said:
        name = hashlib.blake2b(name + block.to_bytes(8, "big"), digest_size=32).digest()
        names.append(name)
    return names


def throughput(workload: Workload, policy: PolicyName, seconds: float) -> dict[str, float]:
    """The most requests a second whose p95 first-token time is within the limit, to 3 %."""
    rate = workload.rate
    low, high, best = 0.0, None, {"requests_per_s": 0.0}
    while rate > 1.0 and (high is None or not low or high / low > 1.03):
        run = Run(policy)
        run.play(workload.sessions(random.Random(3)), sessions_per_s=rate / workload.turns, seconds=seconds)
        times = sorted(run.first_tokens_s)
        p50, p95 = (times[int(len(times) * share)] for share in (0.5, 0.95))
        if p95 <= TTFT_P95_S:
            low = rate
            best = {
                "requests_per_s": rate, "ttft_p50_s": p50, "ttft_p95_s": p95,
                "computed_tokens_a_request": run.computed / run.asked,
            }  # fmt: skip
        else:
            high = rate
        rate = rate * 1.5 if high is None else rate / 1.5 if not low else (low * high) ** 0.5
    return {name: round(value, 3) for name, value in best.items()}

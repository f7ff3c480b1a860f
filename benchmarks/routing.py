"""What choosing engines by what they keep is worth: 16 + 16 engines, simulated, against round robin.

The router's own parts decide (policy, forecast, knowledge, work) from what simulated daemons tell by the daemon's own
`HoldingsTeller`, up to 50 ms late. Engines are a model: prefill computes one prompt after the other at a fixed pace
and finds its prefix in its host's memory, which forgets what was used longest ago; decode engines take longer for each
step the more requests they have; what they say goes back to the prompt's host. Sessions come by chance, at a rate that
is raised until the 95th percentile of first-token times reaches the limit: that rate is a policy's throughput.
"""

from __future__ import annotations

import argparse
import heapq
import itertools
import random
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from benchmarks.harness.report import Report
from pdx.buffer.index import Index
from pdx.daemon.holdings import TURN_S, HoldingsTeller
from pdx.keys import ContentFingerprint, LayoutFingerprint, short_names, space_of
from pdx.router.choice.knowledge import Knowledge
from pdx.router.choice.policy import Asked, Candidate, PolicyName, choose_instead, choose_pair
from pdx.router.choice.prompt import Prompt
from pdx.router.choice.work import Piece, Work
from pdx.wire import DaemonRef, EngineInfo, Holdings

ENGINES = 16  # on either side
TTFT_P95_S = 2.0  # the limit at which throughputs are compared
MODEL = "simulated"
BLOCK_TOKENS = 64  # so that a run takes seconds
PREFILL_TOKENS_PER_S = 4_000.0
REQUEST_S = 0.01  # which a prefill takes beside its tokens
STEP_S, STEP_MORE_S = 0.01, 0.0002  # of decode, and more of it for each other request
HOST_BLOCKS = 10_000  # that a host's memory keeps: 640 thousand tokens
CONTENT = ContentFingerprint(
    model=MODEL, weights="w", weight_epoch="", dtype="bf16", block_tokens=BLOCK_TOKENS, hash_algorithm="sha256_cbor/s"
)
LAYOUT = LayoutFingerprint(
    engine="simulated", attention="none", layers=32, page_bytes=64 << 10, block_tokens=BLOCK_TOKENS, packing="none",
    kv_groups=1, ranks=1,
)  # fmt: skip
SPACE = space_of(CONTENT, LAYOUT)


@dataclass(frozen=True)
class Turn:
    """One request: what its prompt's blocks are called, how many tokens its answer has, and of the next when."""

    names: tuple[bytes, ...]
    answer: tuple[bytes, ...]  # blocks that its answer makes whole
    think_s: float


Sessions = Iterator[list[Turn]]


class Host:
    """A daemon's memory, and the engine before it."""

    def __init__(self, name: str, role: str) -> None:
        self.ref = DaemonRef(daemon_id=name, incarnation=1, control="", lanes=[])
        self.index = Index()
        self.teller = HoldingsTeller(self.ref, self.index, None)
        self.info = EngineInfo(
            engine_id=name, role=role, model=MODEL, url="http://simulated", content=CONTENT, layout=LAYOUT  # type: ignore[arg-type]
        )  # fmt: skip
        self.seen = Candidate(
            info=self.info, daemon=self.ref, space=SPACE, told_tokens_per_s=PREFILL_TOKENS_PER_S,
            tokens_per_s=PREFILL_TOKENS_PER_S,
        )  # fmt: skip
        self.free_at = 0.0
        self.running = 0
        self._blocks: OrderedDict[bytes, None] = OrderedDict()

    def leading(self, names: Sequence[bytes]) -> int:
        return next((n for n, name in enumerate(names) if name not in self._blocks), len(names))

    def keep(self, names: Sequence[bytes]) -> None:
        for name in reversed(names):  # the head of a chain is used last, and outlives its tail
            if name not in self._blocks:
                self.index.told((SPACE, name), True)
            self._blocks[name] = None
            self._blocks.move_to_end(name)
        while len(self._blocks) > HOST_BLOCKS:
            name, _ = self._blocks.popitem(last=False)
            self.index.told((SPACE, name), False)


@dataclass
class Run:
    """All of one policy at one rate."""

    policy: PolicyName
    now: float = 0.0
    first_tokens_s: list[float] = field(default_factory=list)
    computed: int = 0
    asked: int = 0

    def __post_init__(self) -> None:
        self.prefills = [Host(f"p{n}", "prefill") for n in range(ENGINES)]
        self.decodes = [Host(f"d{n}", "decode") for n in range(ENGINES)]
        self.hosts = {host.info.engine_id: host for host in (*self.prefills, *self.decodes)}
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
        tokens = len(turn.names) * BLOCK_TOKENS
        prompt = None
        if self.policy == "prefix":
            names = tuple(short_names(SPACE, turn.names))
            found = self.knowledge.found(names, self.now)
            prompt = Prompt(tokens=tokens, names={SPACE: names}, found={SPACE: found})
        snapshot = tuple(self._seen(host) for host in self.hosts.values())
        asked = Asked(draws=tuple(self._rng.random() for _ in range(4)), prompt=prompt)  # type: ignore[arg-type]
        pair = choose_pair(snapshot, MODEL, policy=self.policy, turn=self._turn, asked=asked)
        assert pair is not None
        alone = choose_instead(pair, snapshot, MODEL, policy=self.policy, asked=asked)
        decode = self.hosts[(alone[0] if alone else pair.decode).engine_id]
        prefill = decode if alone else self.hosts[pair.prefill.engine_id]
        piece = self._sent(prefill, prompt)
        decode.running += 1
        starts_at = max(self.now, prefill.free_at)
        # What is there when its turn comes is what counts: until then others' blocks come and go.
        prefill.free_at = starts_at + self._reserve_s(prefill, turn)

        def computed() -> None:
            self.work.over(piece, self.now, answered=True)
            prefill.keep(turn.names)
            decode.keep(turn.names)
            step_s = STEP_S + STEP_MORE_S * decode.running
            self.at(self.now + len(turn.answer) * BLOCK_TOKENS * step_s, answered)

        def answered() -> None:
            decode.running -= 1
            prefill.keep(turn.answer)
            decode.keep(turn.answer)
            if len(turns) > 1:
                self.at(self.now + turn.think_s, lambda: self._ask(turns[1:]))

        self.first_tokens_s.append(prefill.free_at - asked_at)  # known now: lines are first in, first out
        self.at(prefill.free_at, computed)

    def _reserve_s(self, prefill: Host, turn: Turn) -> float:
        uncached = max(1, (len(turn.names) - prefill.leading(turn.names)) * BLOCK_TOKENS)
        self.computed += uncached
        return REQUEST_S + uncached / PREFILL_TOKENS_PER_S

    def _seen(self, host: Host) -> Candidate:
        engine_id = host.info.engine_id
        return msgspec.structs.replace(
            host.seen, in_flight=host.running, in_line=0,
            ahead_s=self.work.ahead_s(engine_id, PREFILL_TOKENS_PER_S, self.now), step_s=STEP_MORE_S,
        )  # fmt: skip

    def _sent(self, prefill: Host, prompt: Prompt | None) -> Piece:
        tokens = 0.0
        if prompt is not None:
            tokens = prompt.work_tokens(prefill.seen)
            self.knowledge.expect(prompt.names_at(prefill.seen), prefill.ref, self.now)
        return self.work.sent(prefill.info.engine_id, tokens, self.now, load=1)


def chats(rng: random.Random) -> Sessions:
    """Six turns of a document of 2,000 tokens and questions about it; people read for some seconds."""
    for number in itertools.count():
        names = blocks(f"document {number}", 32)
        turns = []
        for turn in range(6):
            names += blocks(f"question {number} {turn}", 3)
            answer = blocks(f"answer {number} {turn}", 3)
            turns.append(Turn(tuple(names), tuple(answer), rng.uniform(1.0, 5.0)))
            names = [*names, *answer]
        yield turns


def shared(rng: random.Random) -> Sessions:
    """One question each, behind one of 256 prompts of 4,000 tokens, some of which many use: a host has room for 150."""
    prompts = [blocks(f"system {number}", 64) for number in range(256)]
    weights = [1 / (rank + 1) ** 0.7 for rank in range(len(prompts))]
    for number in itertools.count():
        (prompt,) = rng.choices(prompts, weights)
        names = prompt + blocks(f"question {number}", 8)
        yield [Turn(tuple(names), tuple(blocks(f"answer {number}", 2)), 0.0)]


def unlike(rng: random.Random) -> Sessions:
    """Nothing comes twice; lengths differ by ten."""
    for number in itertools.count():
        names = blocks(f"prompt {number}", rng.choice((6, 12, 30, 60)))
        yield [Turn(tuple(names), tuple(blocks(f"answer {number}", 2)), 0.0)]


# Sessions, turns of each, and requests a second from which the search begins.
WORKLOADS: dict[str, tuple[Callable[[random.Random], Sessions], int, float]] = {
    "chats": (chats, 6, 60.0),
    "shared prefixes": (shared, 1, 30.0),
    "zero reuse": (unlike, 1, 24.0),
}


def blocks(what: str, count: int) -> list[bytes]:
    seed = random.Random(what).randbytes(24)
    return [seed + number.to_bytes(8, "big") for number in range(count)]


def throughput(workload: str, policy: PolicyName, seconds: float) -> dict[str, float]:
    """The most requests a second whose p95 first-token time is within the limit, to 3 %."""
    sessions, turns, rate = WORKLOADS[workload]
    low, high, best = 0.0, None, {"requests_per_s": 0.0}
    while rate > 1.0 and (high is None or not low or high / low > 1.03):
        run = Run(policy)
        run.play(sessions(random.Random(3)), sessions_per_s=rate / turns, seconds=seconds)
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


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.routing", description=__doc__.split("\n")[0])
    parser.add_argument("--seconds", type=float, default=90.0, help="simulated, of each run (default %(default)s)")
    parser.add_argument("--quick", action="store_true", help="fewer seconds: shows that it runs")
    parser.add_argument("--json", type=Path, help="where to write the result (default: benchmarks/history)")
    given = parser.parse_args(arguments)
    report = Report("routing")
    seconds = 30.0 if given.quick else given.seconds
    for workload in WORKLOADS:
        found = {policy: throughput(workload, policy, seconds) for policy in ("round_robin", "prefix")}  # type: ignore[arg-type]
        report.figures[workload] = found
        for policy, figures in found.items():
            report.progress(f"{workload}, {policy}: {figures}")
        ratio = round(found["prefix"]["requests_per_s"] / found["round_robin"]["requests_per_s"], 2)
        least = 0.95 if workload == "zero reuse" else 1.8
        report.bar(f"{workload}: throughput over round robin's", ratio, f">= {least}", ratio >= least, unit="x")
    report.write(given.json)
    return 0 if report.all_hold else 1


if __name__ == "__main__":
    raise SystemExit(main())

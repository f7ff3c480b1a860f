"""Two prefill and two decode engines of real vLLM, each on a host of its own, under both policies.

A closed loop: so many people, each of whom asks as soon as the last answer is there. What all of them use together is
more than one host keeps and less than two. The same requests under either policy, from hosts that know nothing.

On two cores the prefill engines share one and the decode engines the other. A policy can only save prefill's work, so
answers are short: with longer ones (`chats, longer answers`, which has no bar) the default policy fills decode's core,
where a step of two requests takes nearly twice as long as that of one. And an engine of vLLM polls for a second after
its last step, which halves the other's pace: it hits whoever leaves engines idle, which is the better policy.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from benchmarks.harness.arms import BUDGETS, DAEMON_SETTINGS, DECODE_CPUS, ENGINE_FLAGS, PREFILL_CPUS, Scratch
from benchmarks.harness.measure import completion, percentile, prompt_of, stream
from benchmarks.harness.part import Part
from benchmarks.harness.rig import Rig, post, wait_until
from benchmarks.model import element_bytes
from pdx.admin import ClearRequest
from pdx.client import DaemonClient
from pdx.errors import PdxError
from pdx.kv import LocalKv
from pdx.router.choice.policy import PolicyName

ENGINES = {"P0": "prefill", "P1": "prefill", "D0": "decode", "D1": "decode"}
# 4,300 tokens of the demo model, and 5,800 in an engine's own cache, by the bytes of its numbers.
ARENA_MIB, CACHE_MIB = 48, 64
# The smallest that vLLM's vectorised kernels for CPUs take. The default there is 128, more than a turn is long; on GPUs
# it is 16.
BLOCK_TOKENS = 32
ANSWER_S = 300.0
RESET_S = 20.0
ENVIRONMENT = {"VLLM_SERVER_DEV_MODE": "1"}  # for /reset_prefix_cache

Ask = Callable[[list[int]], list[int]]  # a prompt; returns the answer's token ids
Session = Callable[[Ask], object]


@dataclass(frozen=True)
class Workload:
    sessions: Callable[[], list[Session]]
    people: int
    answer_tokens: int
    least: float | None  # times round robin's throughput; None: no bar
    rounds: int = 1


@dataclass
class Outcome:
    seconds: float = 0.0
    first_tokens_s: list[float] = field(default_factory=list)
    ways: dict[str, int] = field(default_factory=dict)

    @property
    def requests_per_s(self) -> float:
        return len(self.first_tokens_s) / self.seconds

    @property
    def p95_s(self) -> float:
        return percentile(self.first_tokens_s, 95)

    def add(self, other: Outcome) -> None:
        self.seconds += other.seconds
        self.first_tokens_s += other.first_tokens_s
        for way, count in other.ways.items():
            self.ways[way] = self.ways.get(way, 0) + count

    def figures(self) -> dict[str, object]:
        return {
            "requests_per_s": round(self.requests_per_s, 3), "requests": len(self.first_tokens_s),
            "ttft_p50_s": round(percentile(self.first_tokens_s, 50), 2), "ttft_p95_s": round(self.p95_s, 2),
            "ways": ", ".join(f"{way} {count}" for way, count in sorted(self.ways.items())),
        }  # fmt: skip


def chats() -> list[Session]:
    """Six turns about a document of 640 tokens; eight people."""

    def session(number: int) -> Session:
        def converse(ask: Ask) -> None:
            prompt = prompt_of(640, number)
            for turn in range(6):
                prompt += prompt_of(96, 1000 * number + turn)
                prompt += ask(prompt)

        return converse

    return [session(number) for number in range(12)]


def shared() -> list[Session]:
    """One question each, behind one of 10 prompts of 1,024 tokens."""
    rng = random.Random(11)

    def session(number: int, system: int) -> Session:
        return lambda ask: ask(prompt_of(1024, 500 + system) + prompt_of(48, 2000 + number))

    return [session(number, rng.randrange(10)) for number in range(64)]


def unlike() -> list[Session]:
    """Nothing comes twice."""

    def session(number: int) -> Session:
        return lambda ask: ask(prompt_of((192, 384, 576)[number % 3], 3000 + number))

    return [session(number) for number in range(24)]


WORKLOADS = {
    "chats": Workload(chats, 8, 8, 1.8, rounds=2),
    "chats, longer answers": Workload(chats, 8, 16, None),
    "shared prefixes": Workload(shared, 6, 8, 1.8),
    "zero reuse": Workload(unlike, 4, 8, 0.95, rounds=2),
}


class Quartet:
    """The engines, their four daemons, and a router whose policy can be changed."""

    def __init__(self, scratch: Scratch) -> None:
        self._model = scratch.model
        self._rig: Rig = scratch.rig("real")
        self._router: Part = self._routed("round_robin")
        cores = {"prefill": PREFILL_CPUS, "decode": DECODE_CPUS}
        arena, cache_bytes = f"{ARENA_MIB * element_bytes()}MiB", CACHE_MIB * element_bytes() << 20
        flags = (*ENGINE_FLAGS, "--kv-cache-memory-bytes", str(cache_bytes), "--block-size", str(BLOCK_TOKENS))
        for name, role in ENGINES.items():
            host = f"host-{name}"
            self._rig.start_daemon(host, cpus=cores[role], **{**DAEMON_SETTINGS, "arena": arena})
            self._rig.start_engine(
                name, role, host, cpu=cores[role], flags=flags, environment=ENVIRONMENT
            )  # fmt: skip
        self._rig.wait_routable(len(ENGINES))
        self._tools: list[DaemonClient] = [self._rig.tool(f"host-{name}") for name in ENGINES]

    def run(self, workload: Workload, policy: PolicyName) -> Outcome:
        """All sessions once, from hosts that know nothing. Raises PdxError where an answer is none."""
        self._forget()
        self._rig.forget(self._router)
        self._router.stop()
        self._router = self._routed(policy)
        self._rig.wait_routable(len(ENGINES))
        outcome, lock = Outcome(), threading.Lock()

        def ask(prompt: list[int]) -> list[int]:
            body = completion(self._model, prompt, workload.answer_tokens, return_token_ids=True)
            timing = stream(self._rig.url, body, ANSWER_S)
            if not timing.good:
                raise PdxError(f"{policy}: status {timing.status}: {timing.error}")
            way = timing.headers.get("x-pdx-way", "alone")
            with lock:
                outcome.first_tokens_s.append(timing.first_token_s)
                outcome.ways[way] = outcome.ways.get(way, 0) + 1
            return list(_answer(timing.events))

        began = time.monotonic()
        with ThreadPoolExecutor(workload.people) as people:
            list(people.map(lambda session: session(ask), workload.sessions()))
        outcome.seconds = time.monotonic() - began
        return outcome

    def cpu_seconds(self) -> dict[str, float]:
        return {part.name: round(part.cpu_seconds(), 1) for part in self._rig.parts}

    def _routed(self, policy: PolicyName) -> Part:
        return self._rig.start_router("--policy", policy, *BUDGETS, cpus=DECODE_CPUS)

    def _forget(self) -> None:
        for part in self._rig.parts:
            if part.name in ENGINES:
                wait_until(lambda url=part.url: _reset(url), RESET_S, f"{part.name} forgets")  # type: ignore[misc]
        for tool in self._tools:
            LocalKv(tool).clear(ClearRequest(everything=True))


def _answer(events: Sequence[dict[str, object]]) -> Iterator[int]:
    for event in events:
        for choice in event["choices"]:  # type: ignore[attr-defined]
            yield from choice.get("token_ids") or ()


def _reset(url: str) -> bool:
    return post(f"{url}/reset_prefix_cache", {}, deadline_s=RESET_S).status == 200

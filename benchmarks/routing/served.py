"""The router that serves, as a process of its own, in front of 16 + 16 simulated engines: over HTTP and ZeroMQ.

In real time, so that a throughput can't be found to 3 % by trying: round robin's is between two rates a tenth apart,
and the default policy must do with so many times the upper one.
"""

from __future__ import annotations

import asyncio
import json
import random
import sys
from dataclasses import dataclass, field

import aiohttp
import uvloop

from benchmarks.harness.arms import DECODE_CPUS, PREFILL_CPUS, Scratch
from benchmarks.harness.measure import percentile
from benchmarks.harness.part import Part
from benchmarks.harness.rig import wait_until
from benchmarks.routing.host import ENGINES, MODEL, ROLES
from benchmarks.routing.workloads import BLOCK_TOKENS, TTFT_P95_S, Sessions, Turn, Workload, tokens_of
from pdx.router.choice.policy import PolicyName

READY_S = 30.0
ANSWER_S = 60.0
STEP = 1.1  # between two rates that are tried
DONE = b"data: [DONE]\n\n"


@dataclass
class Outcome:
    """One policy at one rate."""

    requests_per_s: float  # offered
    first_tokens_s: list[float] = field(default_factory=list)  # of the last two thirds: what came before warms up
    errors: list[str] = field(default_factory=list)
    asked: int = 0
    computed_tokens: int = 0
    router_cpu_s: float = 0.0
    engines_cpu_s: float = 0.0

    @property
    def p95_s(self) -> float:
        return percentile(self.first_tokens_s, 95)

    @property
    def holds(self) -> bool:
        return not self.errors and bool(self.first_tokens_s) and self.p95_s <= TTFT_P95_S

    def figures(self) -> dict[str, float]:
        return {
            "requests_per_s": round(self.requests_per_s, 1), "asked": self.asked, "errors": len(self.errors),
            "ttft_p50_s": round(percentile(self.first_tokens_s, 50), 3), "ttft_p95_s": round(self.p95_s, 3),
            "computed_tokens_a_request": round(self.computed_tokens / self.asked, 1),
            "router_cpu_s": round(self.router_cpu_s, 2), "engines_cpu_s": round(self.engines_cpu_s, 2),
        }  # fmt: skip


def limits(scratch: Scratch, name: str, workload: Workload, *, seconds: float) -> tuple[Outcome, Outcome]:
    """Round robin at the highest rate that it can do, of those tried, and at the next, which it can't."""
    tried: dict[int, Outcome] = {}
    step = 0
    while True:
        rate = workload.rate * STEP**step
        tried[step] = run(scratch, f"{name} round robin {step}", workload, "round_robin", rate, seconds)
        print(f"  {name}, round robin: {tried[step].figures()}", flush=True)
        below, above = step if tried[step].holds else step - 1, step + 1 if tried[step].holds else step
        if below in tried and above in tried:
            return tried[below], tried[above]
        step = above if tried[step].holds else below


def run(scratch: Scratch, name: str, workload: Workload, policy: PolicyName, rate: float, seconds: float) -> Outcome:
    """A router and engines that know nothing yet, asked at so many requests a second."""
    folder = name.replace(" ", "-")
    rig = scratch.rig(folder)
    router = rig.start_router("--policy", policy, "--max-waiting", "0", cpus=DECODE_CPUS)
    file = scratch.folder / folder / "engines.json"
    key = scratch.folder / folder / "cluster.key"
    command = [
        *(sys.executable, "-m", "benchmarks.routing.fleet", "--key", str(key)),
        *("--publish", str(file), "--control", rig.control),
    ]
    fleet = rig.start_program("engines", command, cpus=PREFILL_CPUS)
    wait_until(file.exists, READY_S, f"the simulated engines listen; see {fleet.log}")
    rig.wait_routable(len(ROLES) * ENGINES)
    outcome = Outcome(rate)
    uvloop.run(_ask(workload, router, json.loads(file.read_text())[0], outcome, seconds))
    outcome.router_cpu_s, outcome.engines_cpu_s = router.cpu_seconds(), fleet.cpu_seconds()
    for part in (fleet, router):
        part.stop()
        rig.forget(part)
    return outcome


class _Clients:
    """People who come by chance, each with a session of turns."""

    def __init__(self, http: aiohttp.ClientSession, url: str, outcome: Outcome, seconds: float) -> None:
        self._http = http
        self._url = url
        self._outcome = outcome
        self._loop = asyncio.get_running_loop()
        began = self._loop.time()
        self._warm_at, self._over_at = began + seconds / 3, began + seconds

    async def come(self, sessions: Sessions, sessions_per_s: float) -> None:
        """Until time is over and all have their answers."""
        rng, due = random.Random(5), self._loop.time()
        async with asyncio.TaskGroup() as tasks:
            while due < self._over_at:
                tasks.create_task(self._session(next(sessions)))
                due += rng.expovariate(sessions_per_s)
                await asyncio.sleep(due - self._loop.time())

    async def _session(self, turns: list[Turn]) -> None:
        for turn in turns:
            if self._loop.time() >= self._over_at:
                return
            await self._turn(turn)
            await asyncio.sleep(turn.think_s)

    async def _turn(self, turn: Turn) -> None:
        body = {
            "model": MODEL, "prompt": [token for block in turn.prompt for token in tokens_of(block)],
            "max_tokens": len(turn.answer) * BLOCK_TOKENS, "stream": True,
        }  # fmt: skip
        self._outcome.asked += 1
        asked_at, first_at, heard = self._loop.time(), 0.0, b""
        try:
            async with self._http.post(f"{self._url}/v1/completions", json=body) as reply:
                async for data in reply.content.iter_any():
                    first_at = first_at or self._loop.time()
                    heard = (heard + data)[-len(DONE) :]
                if reply.status != 200 or heard != DONE:
                    self._outcome.errors.append(f"status {reply.status}, ends in {heard!r}")
                    return
        except (aiohttp.ClientError, TimeoutError) as error:
            self._outcome.errors.append(repr(error))
            return
        if asked_at >= self._warm_at:
            self._outcome.first_tokens_s.append(first_at - asked_at)


async def _ask(workload: Workload, router: Part, engine_url: str, outcome: Outcome, seconds: float) -> None:
    timeout = aiohttp.ClientTimeout(total=ANSWER_S)
    async with aiohttp.ClientSession(timeout=timeout, connector=aiohttp.TCPConnector(limit=0)) as http:
        clients = _Clients(http, router.url, outcome, seconds)
        await clients.come(workload.sessions(random.Random(3)), outcome.requests_per_s / workload.turns)
        async with http.get(f"{engine_url}/computed") as reply:
            outcome.computed_tokens = (await reply.json())["tokens"]

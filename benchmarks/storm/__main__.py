"""Ten thousand requests while routers and hosts are killed, stopped, drained and started; then floods.

Fake engines over real sockets, real routers. The seed fixes what is asked and what breaks, not the timing. A request
must be right, or refused cleanly, or lost with a router that was killed, and always by its deadline; afterwards
nothing may be left anywhere. Then one router gets more requests at once than it has room for, and holds thousands of
streams on which nothing happens: its memory must have a bound.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import secrets
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import aiohttp

from benchmarks.harness.leaving import leaving
from benchmarks.harness.report import Report, options
from benchmarks.storm.clients import Clients, Tally
from benchmarks.storm.fleet import Fleet, Host, Part, Router
from benchmarks.storm.floods import idle_streams, storm_of_429

REQUESTS = 10_000
PEOPLE = 40
BURSTS = 5
REQUEST_S = 4.0
DEADLINE_S = REQUEST_S + 2.0  # the router says 504 itself, but may be told to end meanwhile
QUIET_S = 10.0
FAULT_PAUSE_S = (0.1, 0.8)
ROUTER_FLAGS = [
    *("--request-timeout-secs", f"{REQUEST_S}", "--prefill-timeout-secs", "2", "--retries", "2"),
    *("--queue-size", "24", "--queue-timeout-secs", "2", "--max-in-flight-prefill", "8"),
    *("--max-in-flight-decode", "8", "--cb-failure-threshold", "4", "--cb-timeout-secs", "1", "--drain-secs", "3"),
]
# Three hosts with one fingerprint and one that was upgraded: its engines pair among themselves only.
HOSTS = {"h0": [], "h1": [], "h2": [], "h3": ["--weights", "B"]}
DESCRIPTORS_MAX = 32  # more than at the start: connections that are kept for the next request


class Faults:
    """One after the other, each healed before the end. At most one router and two hosts are away at a time."""

    def __init__(self, fleet: Fleet, chance: random.Random) -> None:
        self.counts: Counter[str] = Counter()
        self._fleet, self._chance = fleet, chance
        self._away: set[Part] = set()

    async def run(self, over: asyncio.Event) -> None:
        async with asyncio.TaskGroup() as tasks:
            while not over.is_set():
                await asyncio.sleep(self._chance.uniform(*FAULT_PAUSE_S))
                part = self._chance.choice([*self._fleet.routers, *self._fleet.hosts])
                hosts_away = sum(isinstance(each, Host) for each in self._away)
                routers_away = len(self._away) - hosts_away
                if part in self._away or (routers_away if isinstance(part, Router) else hosts_away // 2):
                    continue
                kind = self._chance.choice(["kill", "kill", "leave", "stop"])
                self.counts[f"{kind} {'router' if isinstance(part, Router) else 'host'}"] += 1
                self._away.add(part)
                tasks.create_task(self._fault(part, kind, self._chance.uniform(0.1, 2.0)))

    async def _fault(self, part: Part, kind: str, away_s: float) -> None:
        match kind:
            case "stop":
                part.send(signal.SIGSTOP)
                await asyncio.sleep(away_s)
                part.send(signal.SIGCONT)
            case "kill":
                await part.kill()
                await asyncio.sleep(away_s)
                await part.start()
            case _:
                await part.leave()
                await asyncio.sleep(away_s)
                await part.start()
        self._away.remove(part)


async def storm(report: Report, scratch: Path, seed: int, requests: int) -> None:
    fleet = Fleet(scratch, routers=2, router_flags=ROUTER_FLAGS, hosts=HOSTS)
    chance, total, faults = random.Random(seed), Tally(), Counter[str]()
    async with _session() as client:
        try:
            await fleet.start(client)
            descriptors = {router.name: router.descriptors() for router in fleet.routers}
            left: list[str] = []
            begun = time.monotonic()
            for burst in range(BURSTS):
                tally, broke = await _burst(fleet, client, chance, requests // BURSTS)
                total.counts += tally.counts
                total.violations += tally.violations
                total.seconds += tally.seconds
                faults += broke
                left += await _left(fleet, client, descriptors)
                counts = ", ".join(f"{count} {what}" for what, count in sorted(total.counts.items()))
                report.progress(f"burst {burst + 1} of {BURSTS}: {counts}; {sum(faults.values())} faults")
            seconds = time.monotonic() - begun
        finally:
            await fleet.stop()
    for violation in [*total.violations, *left][:10]:
        print(f"    {violation[:400]}")
    total.seconds.sort()
    report.bar("requests under faults", total.requests, f">= {requests}", total.requests >= requests)
    report.equal("unanswered past their deadline", total.counts["UNANSWERED"], 0)
    report.equal("wrong or unclean", total.counts["WRONG"] + total.counts["UNCLEAN"], 0)
    report.equal("left behind in routers and engines", len(left), 0)
    share = round(total.counts["right"] / total.requests, 3)
    report.bar("answered", share, "> 0.5", share > 0.5)
    report.figures["storm"] = {
        "seed": seed, "outcomes": dict(total.counts), "faults": dict(faults), "seconds": round(seconds, 1),
        "longest_s": round(total.seconds[-1], 2), "deadline_s": DEADLINE_S,
    }  # fmt: skip


async def _burst(
    fleet: Fleet, client: aiohttp.ClientSession, chance: random.Random, requests: int
) -> tuple[Tally, Counter[str]]:
    over, faults = asyncio.Event(), Faults(fleet, random.Random(chance.random()))
    clients = Clients(fleet.routers, random.Random(chance.random()), requests=requests, deadline_s=DEADLINE_S)
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(faults.run(over))
        tally = await clients.run(client, PEOPLE)
        over.set()
    await fleet.joined(client)
    return tally, faults.counts


async def _left(fleet: Fleet, client: aiohttp.ClientSession, descriptors: dict[str, int]) -> list[str]:
    """What there still is when nobody asks any more."""
    ends_at = time.monotonic() + QUIET_S
    while True:
        found = []
        if count := await fleet.in_flight(client):
            found.append(f"{count} requests in flight in routers")
        pages = await fleet.pages(client)
        found += [f"{page['open']} calls open at a host" for page in pages if page["open"]]
        found += [f"{page['mixed']} handles of strangers" for page in pages if page["mixed"]]
        found += [
            f"{router.name} holds {more} descriptors more than at its start"
            for router in fleet.routers
            if (more := router.descriptors() - descriptors[router.name]) > DESCRIPTORS_MAX
        ]
        if not found or time.monotonic() > ends_at:
            return found
        await asyncio.sleep(0.2)


def _session() -> aiohttp.ClientSession:
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0, force_close=True), timeout=aiohttp.ClientTimeout(total=None)
    )


async def _run(report: Report, scratch: Path, options: argparse.Namespace) -> None:
    await storm(report, scratch, options.seed, options.requests)
    async with _session() as client:
        await storm_of_429(report, scratch, client, requests=options.flood)
        await idle_streams(report, scratch, client, streams=options.streams)


@leaving()
def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="pdx bench storm", description=__doc__)
    options(parser)
    parser.add_argument("--seed", type=int, help="of what is asked and what breaks (default: a random one)")
    parser.add_argument("--requests", type=int, default=REQUESTS, help="(default: %(default)s)")
    parser.add_argument("--flood", type=int, default=3000, help="requests at once (default: %(default)s)")
    parser.add_argument("--streams", type=int, default=5000, help="idle streams (default: %(default)s)")
    chosen = parser.parse_args(argv)
    if chosen.quick:
        chosen.requests, chosen.flood, chosen.streams = 2000, 1000, 500
    chosen.seed = secrets.randbits(32) if chosen.seed is None else chosen.seed
    scratch = Path(tempfile.mkdtemp(prefix="pdx-storm-"))
    print(f"seed {chosen.seed}; logs in {scratch}", flush=True)
    report = Report("storm")
    asyncio.run(_run(report, scratch, chosen))
    report.write(chosen.json)
    if report.all_hold:
        shutil.rmtree(scratch)
    return 0 if report.all_hold else 1


if __name__ == "__main__":
    sys.exit(main())

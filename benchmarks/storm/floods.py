"""More than a router has room for: requests at once, and streams on which nothing happens. Its memory has a bound."""

from __future__ import annotations

import asyncio
import resource
from collections import Counter
from pathlib import Path

import aiohttp

from benchmarks.harness.report import Report
from benchmarks.storm.clients import PATH
from benchmarks.storm.fleet import Fleet, Router, until

FLOOD_S = 60.0
ROUNDS = 3
KEPT_MAX = 32
KEPT_S = 10.0
AT_ONCE = 200  # connections that are being opened
STREAM_KIB_MAX = 128
GROWTH_MAX = 1.15  # from the first round to the last: what is not given back would add up
BODY = {"model": "smol", "prompt": [7, 8, 9], "max_tokens": 12, "ignore_eos": True}


async def storm_of_429(report: Report, scratch: Path, client: aiohttp.ClientSession, *, requests: int) -> None:
    """`requests` at once, three times, at a router with room for a fraction."""
    flags = ["--max-in-flight-decode", "16", "--queue-size", "50", "--queue-timeout-secs", "5"]
    fleet = Fleet(_folder(scratch, "flood"), routers=1, router_flags=flags, hosts={"h0": []})
    counts: Counter[int] = Counter()
    without_retry_after = 0

    async def ask(router: Router) -> None:
        nonlocal without_retry_after
        async with asyncio.timeout(FLOOD_S), client.post(router.url + PATH, json=BODY) as reply:
            await reply.read()
        counts[reply.status] += 1
        without_retry_after += reply.status == 429 and "Retry-After" not in reply.headers

    try:
        await fleet.start(client)
        (router,) = fleet.routers
        before, rss = router.rss_mib(), []
        for _ in range(ROUNDS):
            await asyncio.gather(*(ask(router) for _ in range(requests)))
            await _idle(client, router)
            rss.append(router.rss_mib())
        report.bar("flood: every request answered, with 200, 429 or 504", dict(counts), "3 kinds",
                   set(counts) <= {200, 429, 504} and counts[429] > 0 and counts[200] > 0)  # fmt: skip
        report.equal("flood: 429 without Retry-After", without_retry_after, 0)
        growth = rss[-1] / rss[0]
        report.bar("flood: memory after the last flood, of that after the first", round(growth, 3), f"<= {GROWTH_MAX}",
                   growth <= GROWTH_MAX)  # fmt: skip
        report.figures["flood"] = {
            "at_once": requests, "rounds": ROUNDS, "rss_mib_before": round(before, 1),
            "rss_mib_after": [round(mib, 1) for mib in rss], "peak_mib": round(router.peak_mib(), 1),
        }  # fmt: skip
    finally:
        await fleet.stop()


async def idle_streams(report: Report, scratch: Path, client: aiohttp.ClientSession, *, streams: int) -> None:
    """`streams` that have begun and stand still, held at once, three times."""
    needed = 2 * streams + 500
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < needed <= hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))
    flags = ["--max-waiting", "0", "--queue-size", "0", "--request-timeout-secs", "600", "--journey", "after"]
    fleet = Fleet(_folder(scratch, "idle"), routers=1, router_flags=flags, hosts={"h0": ["--idle", "--pace-s", "0"]})
    try:
        await fleet.start(client)
        (router,) = fleet.routers
        before, descriptors, rss, opened = router.rss_mib(), router.descriptors(), [], 0
        for _ in range(ROUNDS):
            gate = asyncio.Semaphore(AT_ONCE)
            replies = await asyncio.gather(*(_stream(client, router, gate) for _ in range(streams)))
            opened += len(replies)
            rss.append(router.rss_mib())
            for reply in replies:
                reply.close()
            await _idle(client, router)
            pages = [page async for page in _closed(fleet, client)]
        kept = await _kept(router, descriptors)
        per_stream = (rss[0] - before) * 1024 / streams
        report.equal("idle: streams begun", opened, ROUNDS * streams)
        report.bar("idle: memory of a stream", round(per_stream, 1), f"<= {STREAM_KIB_MAX}",
                   per_stream <= STREAM_KIB_MAX, unit="KiB")  # fmt: skip
        growth = rss[-1] / rss[0]
        report.bar("idle: memory of the last round, of the first", round(growth, 3), f"<= {GROWTH_MAX}",
                   growth <= GROWTH_MAX)  # fmt: skip
        report.equal("idle: calls open when all clients have left", sum(pages), 0)
        report.bar("idle: descriptors kept", kept, f"<= {KEPT_MAX}", kept <= KEPT_MAX)
        report.figures["idle"] = {
            "streams": streams, "rounds": ROUNDS, "rss_mib_before": round(before, 1),
            "rss_mib": [round(mib, 1) for mib in rss],
        }  # fmt: skip
    finally:
        await fleet.stop()


async def _stream(client: aiohttp.ClientSession, router: Router, gate: asyncio.Semaphore) -> aiohttp.ClientResponse:
    async with gate, asyncio.timeout(FLOOD_S):
        reply = await client.post(router.url + PATH, json={**BODY, "stream": True})
        assert reply.status == 200, await reply.read()
        assert await reply.content.readuntil(b"\n\n")
        return reply


async def _idle(client: aiohttp.ClientSession, router: Router) -> None:
    await until(client, router.url + "/metrics", lambda _, body: b"\npdx_router_inflight 0.0\n" in body)


async def _closed(fleet: Fleet, client: aiohttp.ClientSession):  # type: ignore[no-untyped-def]
    """Calls that hosts still have open, once they have had the time to notice."""
    for host in fleet.hosts:
        await until(client, host.page, lambda _, body: b'"open": 0' in body)
        async with client.get(host.page) as reply:
            yield (await reply.json())["open"]


async def _kept(router: Router, before: int) -> int:
    """Descriptors more than at the start, once connections to engines that nobody used again are closed."""
    for _ in range(round(KEPT_S / 0.1)):
        if router.descriptors() - before <= KEPT_MAX:
            break
        await asyncio.sleep(0.1)
    return router.descriptors() - before


def _folder(scratch: Path, name: str) -> Path:
    folder = scratch / name
    folder.mkdir()
    return folder

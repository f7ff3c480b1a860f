"""A daemon and an engine are killed while clients ask about documents: hits go on, and no request fails.

Two engines on one host behind a router, one pdxd with a disk. The daemon dies with all of its memory, and the engines
start it anew: what it had written is found on the disk. Then an engine dies in the midst of requests, and is started
again. Nobody streams, so that the router may give a request to the other engine.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import islice
from pathlib import Path

from benchmarks.harness.arms import BUDGETS, DECODE_CPUS, PREFILL_CPUS, Scratch
from benchmarks.harness.measure import completion, prompt_of, table
from benchmarks.harness.report import Report
from benchmarks.harness.rig import Reply, Rig, post, stats, wait_until
from benchmarks.prefix.hits import BLOCK_TOKENS

DOCUMENTS, DOCUMENT_TOKENS, QUESTION_TOKENS, ANSWER_TOKENS = 6, 1500, 32, 8
CLIENTS, QUESTIONS = 3, 18  # in each of three parts: as usual, with a new daemon, with a new engine
ANSWER_S, WRITE_S, STRIKE_S = 120.0, 60.0, 1.0
SHARE = 0.9
ENGINES = {"E0": PREFILL_CPUS, "E1": DECODE_CPUS}


def measure(scratch: Scratch, disk: Path, report: Report) -> None:
    rig = scratch.rig("restart")
    rig.start_router(*BUDGETS)
    daemon = rig.start_daemon("a", arena="512MiB", linger_s="600", disk=str(disk), disk_cap="4GiB")
    engines = {name: rig.start_engine(name, "both", "a", cpu=cpu) for name, cpu in ENGINES.items()}
    rig.wait_routable(len(engines))
    report.progress("restart: documents are read")
    for document in range(DOCUMENTS):
        _ask(rig, prompt_of(DOCUMENT_TOKENS, document))
    tool = rig.tool("a")
    wait_until(lambda: not stats(tool)["disk"]["waiting_writes"], WRITE_S, "the disk has everything")
    numbers = iter(range(10_000, 20_000))
    rows = []

    def part(name: str) -> list[Reply]:
        report.progress(f"restart: {name}")
        before = stats(rig.tool("a"))["counters"]
        replies = _questions(rig, numbers, QUESTIONS)
        after = stats(rig.tool("a"))["counters"]
        hits = after.get("lookup_hit_blocks", 0) - before.get("lookup_hit_blocks", 0)
        possible = QUESTIONS * (DOCUMENT_TOKENS // BLOCK_TOKENS)
        failed = sum(reply.status != 200 for reply in replies)
        rows.append([name, len(replies), failed, f"{hits / possible:.3f}"])
        report.equal(f"restart, {name}: requests that failed", failed, 0)
        report.bar(f"restart, {name}: blocks found below the engines", round(hits / possible, 3), f">= {SHARE}",
                   hits / possible >= SHARE)  # fmt: skip
        return replies

    part("as usual")
    report.progress("restart: kill -9 of the daemon in mid-load")
    struck = _struck(rig, numbers, lambda: daemon.signal(signal.SIGKILL))
    report.equal("restart: requests that failed while the daemon died", struck, 0)
    rig.forget(daemon)
    rig.wait_routable(len(engines))  # which the router hears from the daemon that the engines have started
    part("with a new daemon")
    report.progress("restart: kill -9 of an engine in mid-load")
    struck = _struck(rig, numbers, lambda: engines["E1"].signal(signal.SIGKILL))
    report.equal("restart: requests that failed while an engine died", struck, 0)
    rig.forget(engines["E1"])
    rig.start_engine("E1", "both", "a", cpu=ENGINES["E1"])
    part("with an engine that starts")
    rig.wait_routable(len(engines))
    part("with a new engine")
    report.figures["restart"] = rows
    table("Restarts", ("part", "requests", "failed", "found below"), rows)


def _struck(rig: Rig, numbers: Iterator[int], strike: Callable[[], None]) -> int:
    """Requests that fail when it strikes among them."""
    timer = threading.Timer(STRIKE_S, strike)
    timer.start()
    replies = _questions(rig, numbers, QUESTIONS)
    timer.join()
    return sum(reply.status != 200 for reply in replies)


def _questions(rig: Rig, numbers: Iterator[int], count: int) -> list[Reply]:
    prompts = [
        prompt_of(DOCUMENT_TOKENS, number % DOCUMENTS) + prompt_of(QUESTION_TOKENS, number)
        for number in islice(numbers, count)
    ]
    with ThreadPoolExecutor(CLIENTS) as clients:
        return list(clients.map(partial(_ask, rig), prompts))


def _ask(rig: Rig, prompt: list[int]) -> Reply:
    return post(f"{rig.url}/v1/completions", completion(rig.model, prompt, ANSWER_TOKENS), deadline_s=ANSWER_S)

"""Goodput under overload: answers within their time, at twice what a pair can do, against the most that it can do.

The peak is looked for with a growing number of clients that ask one request after the other (closed loop). Then
requests arrive by chance at twice that rate, whether earlier ones are answered or not (open loop), once at a router
that takes everything in, which is the naive variant, and once at one that turns away who would wait for half of the
limit, as it predicts. An answer counts if it is whole and comes within LIMIT_FACTOR times what a lone request takes.
Both count what was asked within a window, whenever it was answered. Before the window the load lasts as long as the
limit, so that no line is still being filled in it, and in the open loop for as long behind it: none is emptied unseen.
Clients that are turned away do not come again here; those that wait do so much longer than the limit. Two kinds of
load: one fills the prefill engine, the other the decode engine.
"""

from __future__ import annotations

import itertools
import random
import statistics
import threading
import time
import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.chaos.call import Call
from benchmarks.harness.measure import prompt_of
from benchmarks.harness.part import Part
from benchmarks.harness.report import Report
from benchmarks.harness.rig import Rig, rig_in, unleased

CHUNK = ("--max-num-batched-tokens", "256")
DAEMON: dict[str, Any] = {"arena": "512MiB", "linger_s": "600"}
LONE = 5  # requests that tell what a lone one takes
LIMIT_FACTOR = 5
CLIENTS = (1, 2, 4, 8, 16)  # engines take 16 sequences at once
CLOSED_S, OPEN_S, QUICK_CLOSED_S, QUICK_OPEN_S = 15.0, 60.0, 8.0, 20.0
PATIENCE_S = 45.0
WINDOW_LIMITS = 4  # a slow machine needs longer windows to answer enough, and a line longer to outgrow the limit
OVERLOAD, BAR = 2.0, 0.8
WAITING_SHARE = 0.5  # of the limit may be spent waiting for an engine


@dataclass(frozen=True)
class Load:
    """What every request of a load looks like; no two share a prefix."""

    name: str
    prompt_tokens: int
    answer_tokens: int

    def body(self, model: str, number: int) -> dict[str, Any]:
        prompt = prompt_of(self.prompt_tokens, number)
        tokens = {"max_tokens": self.answer_tokens, "min_tokens": self.answer_tokens, "ignore_eos": True}
        return {"model": model, "prompt": prompt, "temperature": 0, "stream": True, **tokens}


LOADS = (Load("prefill-bound", 320, 6), Load("decode-bound", 32, 48))


@dataclass(frozen=True)
class Asked:
    """How one request ended. `status` 0: it broke, or was not answered for PATIENCE_S."""

    status: int
    seconds: float
    at_s: float  # when it was asked, by the monotonic clock


@dataclass(frozen=True)
class Run:
    """Requests that were asked in a window of so many seconds."""

    asked: list[Asked]
    window_s: float

    @classmethod
    def of(cls, asked: Sequence[Asked], begins_at: float, window_s: float) -> Run:
        """Of all that were asked, those of the window that begins then. All of them have ended."""
        return cls([one for one in asked if begins_at <= one.at_s < begins_at + window_s], window_s)

    def rate(self, limit_s: float) -> float:
        """Good answers per second."""
        return self.outcomes(limit_s)["in time"] / self.window_s

    def outcomes(self, limit_s: float) -> Counter[str]:
        return Counter(
            ("in time" if one.seconds <= limit_s else "too late") if one.status == 200 else str(one.status)
            for one in self.asked
        )


def measure(model: Path, scratch: Path, report: Report, *, quick: bool) -> None:
    with rig_in(model, scratch) as rig:
        router = rig.start_router("--max-waiting", "0")
        rig.start_engine("P0", "prefill", "a", cpu=0, flags=CHUNK, **DAEMON)
        rig.start_engine("D0", "decode", "b", cpu=1, **DAEMON)
        rig.wait_routable(2)
        report.figures["goodput"] = {}
        for load in LOADS[:1] if quick else LOADS:
            router = _measure_load(Overload(rig, load), router, report, quick=quick)


def _measure_load(overload: Overload, router: Part, report: Report, *, quick: bool) -> Part:
    closed_s, open_s = (QUICK_CLOSED_S, QUICK_OPEN_S) if quick else (CLOSED_S, OPEN_S)
    name, rig = overload.load.name, overload.rig
    limit_s = LIMIT_FACTOR * overload.lone_s()
    closed_s, open_s = max(closed_s, WINDOW_LIMITS * limit_s), max(open_s, WINDOW_LIMITS * limit_s)
    by_clients = {clients: overload.closed(clients, closed_s, limit_s).rate(limit_s) for clients in CLIENTS}
    peak = max(by_clients.values())
    wait_s = f"{WAITING_SHARE * limit_s:.1f}"
    naive = overload.open(OVERLOAD * peak, open_s, limit_s)
    router = _restart(rig, router, "--max-wait-s", wait_s)
    guarded = overload.open(OVERLOAD * peak, open_s, limit_s)
    router = _restart(rig, router, "--max-waiting", "0")
    share, naive_share = guarded.rate(limit_s) / peak, naive.rate(limit_s) / peak
    print(f"  {name}: limit {limit_s:.2f} s; answers in time per second by clients: "
          f"{', '.join(f'{clients}: {rate:.2f}' for clients, rate in by_clients.items())}")  # fmt: skip
    report.bar(f"goodput, {name}: at {OVERLOAD:g} x peak, --max-wait-s {wait_s}, of the peak", round(share, 3),
               f">= {BAR}", share >= BAR)  # fmt: skip
    report.bar(f"goodput, {name}: the naive variant (--max-waiting 0) misses it", round(naive_share, 3),
               f"< {BAR}", naive_share < BAR)  # fmt: skip
    refused = guarded.outcomes(limit_s)["429"]
    report.bar(f"goodput, {name}: turned away with 429", refused, "> 0", refused > 0)
    report.figures["goodput"][name] = {
        "limit_s": round(limit_s, 3), "peak_per_s": round(peak, 3), "by_clients": by_clients,
        "max_wait_s": wait_s, "guarded": guarded.outcomes(limit_s), "naive": naive.outcomes(limit_s),
    }  # fmt: skip
    return router


class Overload:
    """Asks a pair in one kind of load; prompts are never asked twice."""

    def __init__(self, rig: Rig, load: Load) -> None:
        self.rig = rig
        self.load = load
        self._numbers = itertools.count(zlib.crc32(load.name.encode()))

    def lone_s(self) -> float:
        """What a request takes when it is alone."""
        return statistics.median(self._ask().seconds for _ in range(LONE))

    def closed(self, clients: int, window_s: float, warm_s: float) -> Run:
        """So many clients, each asking again when it is answered."""
        asked: list[Asked] = []
        begins_at = time.monotonic() + warm_s

        def client() -> None:
            while time.monotonic() < begins_at + window_s:
                asked.append(self._ask())

        _join([_started(client) for _ in range(clients)])
        return Run.of(asked, begins_at, window_s)

    def open(self, rate: float, window_s: float, margin_s: float) -> Run:
        """Requests arrive by chance, `rate` a second on average, also for `margin_s` before and after the window."""
        asked: list[Asked] = []
        generator = random.Random(f"{self.load.name}/arrivals")  # the same for all variants
        threads = []
        at = begun = time.monotonic()
        while (at := at + generator.expovariate(rate)) < begun + window_s + 2 * margin_s:
            time.sleep(max(0.0, at - time.monotonic()))
            threads.append(_started(lambda: asked.append(self._ask())))
        _join(threads)
        return Run.of(asked, begun + margin_s, window_s)

    def _ask(self) -> Asked:
        body = self.load.body(str(self.rig.model), next(self._numbers))
        at_s = time.monotonic()
        heard = Call(f"{self.rig.url}/v1/completions", body, deadline_s=PATIENCE_S).run()
        whole = heard.done and not heard.error
        return Asked(heard.status if whole or heard.status != 200 else 0, heard.seconds, at_s)


def _restart(rig: Rig, router: Part, *flags: str) -> Part:
    router.stop()
    rig.forget(router)
    router = rig.start_router(*flags)
    rig.wait_routable(2)
    unleased(rig.tool("a"), rig.tool("b"), deadline_s=PATIENCE_S)
    return router


def _started(target: Callable[[], object]) -> threading.Thread:
    thread = threading.Thread(target=target)
    thread.start()
    return thread


def _join(threads: Sequence[threading.Thread]) -> None:
    for thread in threads:
        thread.join(2 * PATIENCE_S)

"""How much slower the engine's own work is while pages move at the bus's rate."""

from __future__ import annotations

import statistics
import threading
import time
from collections import deque
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Self

import torch

from benchmarks.device.bus import Mover
from benchmarks.device.common import ARENA_BYTES, MIB, PAGE_OF_8B_MODEL, Bench, Work, build, pinned_arena
from benchmarks.harness.measure import table
from benchmarks.harness.report import Report
from pdx.engine.device import CudaPinned, CudaStream

BAR = 2.0
MATMUL = 8192
MATMULS = 60  # one measurement: some 80 ms
NAIVE_PAGES = 16  # behind each product, in the engine's own stream
START_S = 10.0


class Traffic:
    """Moves the arena's bytes again and again, from its own thread: while one run is copied the next is enqueued."""

    def __init__(self, move: Work, stream: CudaStream) -> None:
        self._move, self._stream = move, stream
        self._stop, self._started = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._work)
        self.runs = 0  # that have ended

    def __enter__(self) -> Self:
        self._thread.start()
        assert self._started.wait(START_S)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()
        torch.cuda.synchronize()

    def _work(self) -> None:
        ends: deque[torch.cuda.Event] = deque()
        run = 0
        while not self._stop.is_set():
            self._move(run)
            ends.append(torch.cuda.Event(blocking=True))
            ends[-1].record(self._stream.torch)
            run += 1
            if len(ends) > 1:
                ends.popleft().synchronize()
                self.runs += 1
                self._started.set()


class Products:
    """The engine's own work: large products, one after the other, in a stream of its own."""

    def __init__(self) -> None:
        self._a, self._b = (torch.randn(MATMUL, MATMUL, dtype=torch.bfloat16, device="cuda") for _ in range(2))
        self._out = torch.empty_like(self._a)
        self._stream = torch.cuda.Stream()

    def milliseconds(self, between: Work | None = None) -> float:
        """`between`: what else is enqueued in the same stream after each product."""
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        with torch.cuda.stream(self._stream):
            for _ in range(MATMULS):  # not timed: the card's clocks settle
                torch.matmul(self._a, self._b, out=self._out)
            before.record()
            for n in range(MATMULS):
                torch.matmul(self._a, self._b, out=self._out)
                if between is not None:
                    between(n)
            after.record()
        after.synchronize()
        return before.elapsed_time(after)


def measure(report: Report, folder: Path, rounds: int) -> None:
    """Beside nothing, nothing again (A/A), saves and loads that fill the bus, and copies in the engine's own stream."""
    bench, products = build(PAGE_OF_8B_MODEL, ARENA_BYTES, folder), Products()
    rates: dict[str, list[float]] = {}
    with pinned_arena(bench.device) as pinned:
        mover, caller = Mover(bench, pinned, MIB), bench.device.new_stream()

        def beside(name: str, move: Work) -> float:
            with Traffic(move, caller) as traffic:
                first, started = traffic.runs, time.perf_counter()
                taken_ms = products.milliseconds()
                moved, seconds = (traffic.runs - first) * ARENA_BYTES, time.perf_counter() - started
            assert moved, "nothing moved beside the products"
            rates.setdefault(name, []).append(moved / seconds / 1e9)
            return taken_ms

        arms: dict[str, Callable[[], float]] = {
            "nothing": products.milliseconds,
            "nothing again": products.milliseconds,
            "saves": partial(beside, "saves", partial(mover.out, caller)),
            "loads": partial(beside, "loads", partial(mover.back, caller)),
            "pages copied in the engine's stream": partial(products.milliseconds, partial(copy_pages, bench, pinned)),
        }
        times: dict[str, list[float]] = {name: [] for name in arms}
        for run in range(rounds + 1):
            turn = run % len(arms)  # whoever comes first finds a cooler card
            for name, arm in [*arms.items()][turn:] + [*arms.items()][:turn]:
                taken = arm()
                if run:  # the first warms up
                    times[name].append(taken)
        torch.cuda.synchronize()
    _judge(report, times, {name: round(statistics.median(found), 1) for name, found in rates.items()})


def copy_pages(bench: Bench, pinned: CudaPinned, run: int) -> None:
    for n in range(run * NAIVE_PAGES, (run + 1) * NAIVE_PAGES):
        place = pinned.memory[n * bench.page_bytes : (n + 1) * bench.page_bytes]
        place.copy_(bench.cache[bench.ids[n]], non_blocking=True)


def _judge(report: Report, times: dict[str, list[float]], rates: dict[str, float]) -> None:
    alone = times.pop("nothing")
    slower = {
        name: round(100 * (statistics.median(b / a for a, b in zip(alone, found, strict=True)) - 1), 2)
        for name, found in times.items()
    }
    table(
        f"{MATMULS} products of {MATMUL} x {MATMUL} bf16, {statistics.median(alone):.1f} ms alone",
        ("beside", "GB/s meanwhile", "slower by"),
        [(name, str(rates.get(name, "")), f"{value:.2f} %") for name, value in slower.items()],
    )
    report.figures["products slower by %"] = slower
    report.figures["GB/s beside products"] = rates
    for name in ("saves", "loads"):
        holds = slower[name] <= BAR
        report.bar(f"products beside {name} that fill the bus, slower by", slower[name], f"<= {BAR}", holds, unit="%")

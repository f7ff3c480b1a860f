"""How much slower the engine's own work is while pages move at the bus's rate.

A GPU under large products is as fast as its power allows, and swings by some percent within tenths of a second. So the
products never stop: what runs beside them is switched from window to window, in random order, and each window is
compared with the two beside nothing of the same round.
"""

from __future__ import annotations

import random
import statistics
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Self

import torch

from benchmarks.device.bus import Mover, copy_all
from benchmarks.device.common import ARENA_BYTES, MIB, PAGE_OF_8B_MODEL, Bench, Work, build, pinned_arena
from benchmarks.harness.measure import table
from benchmarks.harness.report import Report
from pdx.engine.device import CudaPinned

BAR = 2.0
MATMUL = 8192
GROUP = 4  # products that are enqueued at once; two groups are ahead of the device
WINDOW = 12  # groups that are timed: some 75 ms
SETTLE = 3  # groups before them, once all beside them is as it is to be
WINDOWS_A_ROUND = 6  # rounds of the other parts are longer
NAIVE_PAGES = 16  # behind each product, in the engine's own stream
SWITCH_S = 10.0


class Traffic:
    """Moves the arena's bytes again and again, from its own thread: while one run is copied the next is enqueued."""

    def __init__(self) -> None:
        self._changed = threading.Condition()  # guards the next three
        self._move: Work | None = None
        self._ends = False
        self.steady = True  # what was asked for is under way, and nothing else
        self._thread = threading.Thread(target=self._work)
        self.runs = 0  # that have ended

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._changed:
            self._ends = True
            self._changed.notify()
        self._thread.join()
        torch.cuda.synchronize()

    def switch(self, move: Work | None) -> None:
        """`move` enqueues a run, and has the current stream wait for it."""
        with self._changed:
            self._move, self.steady = move, False
            self._changed.notify()

    def _work(self) -> None:
        stream = torch.cuda.Stream()
        moving: Work | None = None
        under_way: deque[torch.cuda.Event] = deque()
        while not self._ends:
            if moving is not self._move:
                while under_way:
                    under_way.popleft().synchronize()
                moving = self._move
            elif moving is None:
                with self._changed:
                    self.steady = self._move is None
                    self._changed.wait_for(lambda: not self.steady or self._ends)
            else:
                with torch.cuda.stream(stream):
                    moving(self.runs)
                    under_way.append(torch.cuda.Event(blocking=True))
                    under_way[-1].record()
                if len(under_way) > 1:
                    under_way.popleft().synchronize()
                    with self._changed:
                        self.runs += 1
                        self.steady = moving is self._move


class Products:
    """The engine's own work: large products, one after the other, in a stream of its own. The device never runs dry."""

    def __init__(self) -> None:
        self._a, self._b = (torch.randn(MATMUL, MATMUL, dtype=torch.bfloat16, device="cuda") for _ in range(2))
        self._out = torch.empty_like(self._a)
        self._stream = torch.cuda.Stream()
        self._ahead: deque[torch.cuda.Event] = deque()

    def group(self, between: Work | None = None) -> torch.cuda.Event:
        """Enqueues one; returns an event behind it. `between`: what else is enqueued behind each product."""
        if len(self._ahead) > 1:
            self._ahead.popleft().synchronize()
        with torch.cuda.stream(self._stream):
            for n in range(GROUP):
                torch.matmul(self._a, self._b, out=self._out)
                if between is not None:
                    between(n)
            end = torch.cuda.Event(enable_timing=True, blocking=True)
            end.record()
        self._ahead.append(end)
        return end

    def milliseconds(self, between: Work | None = None) -> float:
        """Of a window."""
        before = [self.group(between) for _ in range(SETTLE)][-1]
        after = [self.group(between) for _ in range(WINDOW)][-1]
        after.synchronize()
        return before.elapsed_time(after)


@dataclass
class Arm:
    move: Work | None = None  # beside the products
    between: Work | None = None  # in their stream
    milliseconds: list[float] = field(default_factory=list)
    rates: list[float] = field(default_factory=list)  # GB/s meanwhile


def measure(report: Report, folder: Path, rounds: int) -> None:
    """Beside nothing, nothing again (A/A), one memcpy after another (the floor), saves and loads as fast as an engine's
    staging lets them, and copies in the engine's own stream."""
    bench = build(PAGE_OF_8B_MODEL, ARENA_BYTES, folder)
    with pinned_arena(bench.device) as pinned:
        mover = Mover(bench, pinned, MIB)
        arms = {
            "nothing": Arm(),
            "nothing again": Arm(),
            "memcpy out": Arm(partial(copy_all, bench, pinned, "out")),
            "memcpy in": Arm(partial(copy_all, bench, pinned, "in")),
            "saves": Arm(in_current(bench, mover.out)),
            "loads": Arm(in_current(bench, mover.back)),
            "pages copied in the engine's stream": Arm(between=partial(copy_pages, bench, pinned)),
        }
        run_all(arms, rounds * WINDOWS_A_ROUND)
    _judge(report, arms)


def in_current(bench: Bench, move: Callable[..., None]) -> Work:
    return lambda run: move(bench.device.compute_stream(), run)


def run_all(arms: dict[str, Arm], rounds: int) -> None:
    products, order = Products(), random.Random(11)
    with Traffic() as traffic:
        for _ in range(rounds):
            for arm in order.sample(list(arms.values()), len(arms)):
                traffic.switch(arm.move)
                deadline = time.monotonic() + SWITCH_S
                while not traffic.steady:
                    assert time.monotonic() < deadline, "nothing moves beside the products"
                    products.group(arm.between)
                first, started = traffic.runs, time.perf_counter()
                arm.milliseconds.append(products.milliseconds(arm.between))
                moved, seconds = (traffic.runs - first) * ARENA_BYTES, time.perf_counter() - started
                arm.rates.append(moved / seconds / 1e9)


def copy_pages(bench: Bench, pinned: CudaPinned, run: int) -> None:
    for n in range(run * NAIVE_PAGES, (run + 1) * NAIVE_PAGES):
        place = pinned.memory[n * bench.page_bytes : (n + 1) * bench.page_bytes]
        place.copy_(bench.cache[bench.ids[n]], non_blocking=True)


def slower_by(arms: dict[str, Arm]) -> dict[str, tuple[float, float, float]]:
    """%: median over the rounds, and the ends of the middle half."""
    first, second = (arms[name].milliseconds for name in ("nothing", "nothing again"))
    found = {}
    for name, arm in arms.items():
        alone = first if name == "nothing again" else [(a + b) / 2 for a, b in zip(first, second, strict=True)]
        each = [100 * (taken / base - 1) for taken, base in zip(arm.milliseconds, alone, strict=True)]
        low, middle, high = statistics.quantiles(each, n=4)
        found[name] = round(middle, 2), round(low, 2), round(high, 2)
    del found["nothing"]
    return found


def _judge(report: Report, arms: dict[str, Arm]) -> None:
    slower = slower_by(arms)
    rates = {name: round(statistics.median(arm.rates), 1) for name, arm in arms.items() if arm.move}
    table(
        f"{WINDOW * GROUP} products of {MATMUL} x {MATMUL} bf16, "
        f"{statistics.median(arms['nothing'].milliseconds):.1f} ms alone; {len(arms['nothing'].milliseconds)} windows",
        ("beside", "GB/s meanwhile", "slower by", "middle half"),
        [
            (name, str(rates.get(name, "")), f"{middle:.2f} %", f"{low:.2f} to {high:.2f}")
            for name, (middle, low, high) in slower.items()
        ],
    )
    report.figures["products slower by %"] = slower
    report.figures["GB/s beside products"] = rates
    for name in ("saves", "loads"):
        value = slower[name][0]
        report.bar(f"products beside {name}, slower by", value, f"<= {BAR}", value <= BAR, unit="%")

"""How much slower the engine's own work is while pages move at the bus's rate."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from benchmarks.device.bus import Mover
from benchmarks.device.common import ARENA_BYTES, MIB, PAGE_OF_8B_MODEL, Work, build, pinned_arena
from benchmarks.harness.measure import table
from benchmarks.harness.report import Report
from pdx.engine.device import CudaStream

BAR = 2.0
MATMUL = 8192
MATMULS = 60  # one measurement: some 80 ms
BESIDE = 16  # times the arena's bytes: longer than the products take


def measure(report: Report, folder: Path, rounds: int) -> None:
    """A matmul loop alone, alone again (A/A), beside saves that fill the bus, and with the copies in its own stream."""
    bench = build(PAGE_OF_8B_MODEL, ARENA_BYTES, folder)
    a, b = (torch.randn(MATMUL, MATMUL, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    out = torch.empty_like(a)
    compute = CudaStream(torch.cuda.Stream(), None)
    with pinned_arena(bench.device) as pinned:
        mover, caller = Mover(bench, pinned, MIB), bench.device.new_stream()
        moved: list[int] = []

        def loop(beside: Work | None, run: int) -> float:
            before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda.synchronize()
            if beside is not None:
                for n in range(BESIDE):
                    beside(run + n)
            with torch.cuda.stream(compute.torch):
                before.record()
                for _ in range(MATMULS):
                    torch.matmul(a, b, out=out)
                after.record()
            after.synchronize()
            if beside is not None and run:
                moved.append(not caller.torch.query())
            torch.cuda.synchronize()
            return before.elapsed_time(after)

        def naive(run: int) -> float:
            """Each page is copied in the engine's stream, between its matmuls, for as many bytes as the bus moves."""
            before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda.synchronize()
            with torch.cuda.stream(compute.torch):
                before.record()
                for n in range(MATMULS):
                    torch.matmul(a, b, out=out)
                    for page in range(n * 16, n * 16 + 16):
                        pinned.memory[page * bench.page_bytes :][: bench.page_bytes].copy_(
                            bench.cache[bench.ids[page]], non_blocking=True
                        )
                after.record()
            after.synchronize()
            return before.elapsed_time(after)

        arms: dict[str, Callable[[int], float]] = {
            "alone": partial(loop, None), "alone again": partial(loop, None),
            "beside saves": partial(loop, partial(mover.out, caller)),
            "beside loads": partial(loop, partial(mover.back, caller)), "in the engine's stream": naive,
        }  # fmt: skip
        times: dict[str, list[float]] = {name: [] for name in arms}
        for run in range(rounds + 1):
            for name, arm in arms.items():
                taken = arm(run)
                if run:
                    times[name].append(taken)
        assert all(moved), f"{moved}: the copies ended before the matmuls did: nothing was measured"
    _bars(report, times)


def _bars(report: Report, times: dict[str, list[float]]) -> None:
    alone = times.pop("alone")
    slower = {
        name: round(100 * (statistics.median(b / a for a, b in zip(alone, found, strict=True)) - 1), 2)
        for name, found in times.items()
    }
    table(
        f"{MATMULS} products of {MATMUL} x {MATMUL} bf16: {statistics.median(alone):.1f} ms alone",
        ("beside", "slower by"),
        [(name, f"{value:.2f} %") for name, value in slower.items()],
    )
    report.figures["matmul slower by %"] = slower
    for name in ("beside saves", "beside loads"):
        report.bar(f"matmul {name} at the bus's rate, slower by", slower[name], f"<= {BAR}",
                   slower[name] <= BAR, unit="%")  # fmt: skip

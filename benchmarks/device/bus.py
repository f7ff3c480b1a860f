"""Between blocks on the device and slabs in the arena: all of the way, beside one copy and beside single pages."""

from __future__ import annotations

import random
from functools import partial
from pathlib import Path

import torch

from benchmarks.device.common import (
    ARENA_BYTES,
    MIB,
    PAGE_OF_8B_MODEL,
    Bench,
    Work,
    build,
    pinned_arena,
    seconds_of,
)
from benchmarks.harness.measure import table
from benchmarks.harness.report import Report
from pdx.engine.device import CudaPinned, CudaStaging, CudaStream, check
from pdx.engine.kernels import Mode
from pdx.engine.streams import Copy

# Pages one by one as engines copy them: by a Python loop of torch copies. No bar against bare calls of the driver from
# a loop that does nothing else: one memcpy of all bytes is 3.2 times as fast as those, so nothing can be 4.5 times.
ARENA_BAR, PAGES_BAR = 0.95, 4.5
ARMS = ("memcpy", "ours", "torch", "driver", "batch")
SLAB_BYTES = (MIB, 2 * MIB, 4 * MIB, 16 * MIB)
STAGING_BYTES = 32 * MIB


def slabs(order: list[int], slab_bytes: int, page_bytes: int, first: int, pages: int) -> list[Copy]:
    """`pages` pages from `first` on, cut into slabs that lie in the arena in `order`."""
    each = slab_bytes // page_bytes
    return [Copy(start, each, order[(first + start) // each] * slab_bytes) for start in range(0, pages, each)]


def measure(report: Report, folder: Path, rounds: int) -> None:
    bench = build(PAGE_OF_8B_MODEL, ARENA_BYTES, folder)
    with pinned_arena(bench.device) as pinned:
        rows = []
        for slab_bytes in SLAB_BYTES:
            stream = bench.device.new_stream()
            arms = arms_of(bench, pinned, stream, slab_bytes)
            for name in ARMS:
                verify(bench, pinned.memory, stream, name, arms[f"out {name}"], arms[f"in {name}"])
            rows += arena_rows(report, seconds_of(stream, arms, rounds), slab_bytes)
        names = ("slab", "", "one memcpy", "ours", "page by page (torch, in Python)", "(driver)", "(one batch)")
        table(f"GB/s, {ARENA_BYTES // MIB} MiB in pages of 64 KiB (of one memcpy)", names, rows)


def arena_rows(report: Report, seconds: dict[str, float], slab_bytes: int) -> list[tuple[str, ...]]:
    rows = []
    for way in ("out", "in"):
        rate = {name[len(way) + 1 :]: ARENA_BYTES / s / 1e9 for name, s in seconds.items() if name.startswith(way)}
        floor, ours = rate.pop("memcpy"), rate.pop("ours")
        share = round(ours / floor, 3)
        title = f"device -> arena, slabs of {slab_bytes // MIB} MiB" if way == "out" else (
            f"arena -> device, slabs of {slab_bytes // MIB} MiB"
        )  # fmt: skip
        report.bar(f"{title}, of one memcpy", share, f">= {ARENA_BAR}", share >= ARENA_BAR)
        gain = round(ours / rate["torch"], 2)
        name = f"{title}, against a Python loop of torch copies of pages"
        report.bar(name, gain, f">= {PAGES_BAR}", gain >= PAGES_BAR, unit="x")
        report.figures[title] = {"memcpy": round(floor, 1), "ours": round(ours, 1)} | {
            name: round(value, 1) for name, value in rate.items()
        }
        others = (f"{rate[name]:.1f} ({rate[name] / floor:.2f})" for name in ("torch", "driver", "batch"))
        rows.append((f"{slab_bytes // MIB} MiB", way, f"{floor:.1f}", f"{ours:.1f} ({share:.2f})", *others))
    return rows


class Mover:
    """Staging buffers in turn, as the connector's movers take them: gather behind what empties the buffer."""

    def __init__(self, bench: Bench, pinned: CudaPinned, slab_bytes: int) -> None:
        self.bench, self.device, self.pinned = bench, bench.device, pinned
        self.slab_bytes = slab_bytes
        self.pages = STAGING_BYTES // bench.page_bytes
        self.staging = [self.device.new_staging(self.pages) for _ in range(2)]
        self.kernels, self.copies = self.device.new_stream(), self.device.new_stream()
        self.order = list(range(ARENA_BYTES // slab_bytes))
        random.Random(7).shuffle(self.order)
        self.blocks = self.device.block_list(self.kernels, bench.ids)
        self.digests = torch.zeros(len(bench.ids), dtype=torch.int64, pin_memory=True)

    def out(self, caller: CudaStream, run: int) -> None:
        device, empty = self.device, [self.device.record(caller)] * 2
        for lot, first in enumerate(range(0, self.bench.count, self.pages)):
            staging = self.staging[lot & 1]
            device.wait(self.kernels, empty[lot & 1])
            at = self.bench.half(run) + first
            self._launch("gather", at, staging)
            device.wait(self.copies, device.record(self.kernels))
            copies = slabs(self.order, self.slab_bytes, self.bench.page_bytes, first, self.pages)
            device.copy_out(self.copies, staging, self.pinned, copies)
            empty[lot & 1] = device.record(self.copies)
        device.wait(caller, device.record(self.copies))

    def back(self, caller: CudaStream, run: int) -> None:
        device, empty = self.device, [self.device.record(caller)] * 2
        for lot, first in enumerate(range(0, self.bench.count, self.pages)):
            staging = self.staging[lot & 1]
            device.wait(self.copies, empty[lot & 1])
            copies = slabs(self.order, self.slab_bytes, self.bench.page_bytes, first, self.pages)
            device.copy_in(self.copies, self.pinned, staging, copies)
            device.wait(self.kernels, device.record(self.copies))
            at = self.bench.half(run) + first
            self._launch("scatter", at, staging)
            empty[lot & 1] = device.record(self.kernels)
        device.wait(caller, device.record(self.kernels))

    def _launch(self, mode: Mode, first: int, staging: CudaStaging) -> None:
        digests = self.digests.data_ptr() + 8 * first
        self.device.launch(self.kernels, mode, 0, self.blocks, first, self.pages, staging, digests)


def copy_all(bench: Bench, pinned: CudaPinned, way: str, run: int) -> None:
    """One memcpy of half of the cache, in the current stream."""
    part = bench.cache.view(-1)[bench.half(run) * bench.page_bytes :][:ARENA_BYTES]
    to, start = (pinned.memory, part) if way == "out" else (part, pinned.memory)
    to.copy_(start, non_blocking=True)


def verify(bench: Bench, arena: torch.Tensor, stream: CudaStream, name: str, out: Work, back: Work) -> None:
    """Each half of the cache out to a wiped arena, and back to a wiped cache: together they are what it was."""
    before, restored = bench.cache.clone(), torch.zeros_like(bench.cache)
    for run in (0, 1):
        arena.zero_()
        for work in (out, back):
            torch.cuda.synchronize()
            with torch.cuda.stream(stream.torch):
                work(run)
            torch.cuda.synchronize()
            if work is out:
                bench.cache.zero_()
        restored += bench.cache
        bench.cache.copy_(before)
    torch.cuda.synchronize()
    assert torch.equal(restored, before), f"{name}: pages changed on their way"


def arms_of(bench: Bench, pinned: CudaPinned, stream: CudaStream, slab_bytes: int) -> dict[str, Work]:
    device = bench.device
    mover, size = Mover(bench, pinned, slab_bytes), bench.page_bytes
    slots = pinned.memory
    singles = device.block_list(stream, bench.ids)
    batch = [Copy(n, 1, n * size) for n in range(bench.count)]
    device_first = bench.cache.data_ptr()

    def by_torch(way: str, run: int) -> None:
        for n, block_id in enumerate(bench.ids[bench.half(run) :][: bench.count]):
            page, place = bench.cache[block_id], slots[n * size : (n + 1) * size]
            (place.copy_ if way == "out" else page.copy_)(page if way == "out" else place, non_blocking=True)

    def by_driver(way: str, run: int) -> None:
        from cuda.bindings import driver

        handle, base = stream.torch.cuda_stream, slots.data_ptr()
        for n, block_id in enumerate(bench.ids[bench.half(run) :][: bench.count]):
            page, place = device_first + block_id * size, base + n * size
            to, start = (place, page) if way == "out" else (page, place)
            check(driver.cuMemcpyAsync(to, start, size, handle), "a copy")

    def by_batch(way: str, run: int) -> None:
        chosen = [Copy(c.first + bench.half(run), 1, c.arena_offset) for c in batch]
        device.copy_straight(stream, pinned, 0, singles, chosen, out=way == "out")

    arms: dict[str, Work] = {}
    for way in ("out", "in"):
        arms |= {
            f"{way} memcpy": partial(copy_all, bench, pinned, way),
            f"{way} ours": partial(mover.out if way == "out" else mover.back, stream),
            f"{way} torch": partial(by_torch, way), f"{way} driver": partial(by_driver, way),
            f"{way} batch": partial(by_batch, way),
        }  # fmt: skip
    return arms

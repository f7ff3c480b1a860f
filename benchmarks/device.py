"""What the GPU data path costs beside what the GPU and its bus can do. Needs an NVIDIA GPU, torch and cuda.core.

    python -m benchmarks.device [--quick] [--json FILE]        some 60 s; 20 s with --quick

Everything is compared byte for byte before it is timed, the arms of a table take turns, and medians count. The naive
variants are what one writes first: pages copied one by one, and copies on the engine's own stream. `nvcc` and
`compute-sanitizer`, where they are installed, run the kernels' own self-test.
"""

from __future__ import annotations

import argparse
import contextlib
import mmap
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from benchmarks.harness.measure import table
from benchmarks.harness.report import Report, options
from pdx.engine.device import CudaDevice, CudaPinned, CudaStaging, CudaStream
from pdx.engine.kernels import Mode, reference
from pdx.engine.streams import Copy
from pdx.engine.ways import measure, ways_of

KIB, MIB = 1 << 10, 1 << 20
PAGE_BYTES = (4 * KIB, 16 * KIB, 32 * KIB, 64 * KIB, 96 * KIB, 256 * KIB, MIB)
BAR_PAGE_BYTES = 16 * KIB  # and larger
PAGE_OF_8B_MODEL = 64 * KIB  # 16 tokens, 8 heads of 128, K and V, two bytes each
SLAB_BYTES = (MIB, 2 * MIB, 4 * MIB, 16 * MIB)
KERNEL_BYTES, ARENA_BYTES, STAGING_BYTES = 512 * MIB, 512 * MIB, 32 * MIB
ROUNDS, QUICK_ROUNDS = 15, 5
MATMUL = 8192
MATMULS = 60  # one measurement: some 80 ms
BESIDE = 16  # times the arena's bytes: longer than the products take
COPY_BAR, ARENA_BAR, PAGES_BAR, MATMUL_BAR = 0.90, 0.95, 4.5, 2.0

Work = Callable[[int], None]  # one run; its number says which half of the memory to take


@dataclass(frozen=True)
class Bench:
    """A cache of twice as many blocks as are moved at once, in random order."""

    device: CudaDevice
    cache: torch.Tensor
    ids: list[int]

    @property
    def page_bytes(self) -> int:
        return self.device.page_bytes

    @property
    def count(self) -> int:
        return len(self.ids) // 2

    def half(self, run: int) -> int:
        return (run & 1) * self.count


def build(page_bytes: int, total_bytes: int, folder: Path) -> Bench:
    blocks = 2 * (total_bytes // page_bytes)
    cache = torch.randint(0, 256, (blocks, page_bytes), dtype=torch.uint8, device="cuda")
    ids = list(range(blocks))
    random.Random(page_bytes).shuffle(ids)
    return Bench(CudaDevice([cache], folder), cache, ids)


def seconds_of(stream: CudaStream, arms: dict[str, Work], rounds: int) -> dict[str, float]:
    """Medians on the device's own clock, the arms in turn; each twice, of which the second time counts."""
    times: dict[str, list[float]] = {name: [] for name in arms}
    for run in range(rounds + 2):
        for name, work in arms.items():
            before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            with torch.cuda.stream(stream.torch):
                work(run)  # not timed: the host gets ahead, and the device's cache holds what this arm leaves in it
                before.record()
                work(run + 1)
            after.record(stream.torch)
            after.synchronize()
            if run >= 2:
                times[name].append(before.elapsed_time(after) / 1e3)
    return {name: statistics.median(found) for name, found in times.items()}


# --- kernels --------------------------------------------------------------------------------------------------------


def kernels(report: Report, folder: Path, rounds: int) -> None:
    rows = []
    for page_bytes in PAGE_BYTES:
        bench = build(page_bytes, KERNEL_BYTES, folder)
        verify_kernels(bench)
        seconds = kernel_seconds(bench, rounds)
        floor = seconds["copy"]
        for name, taken in seconds.items():
            moved = KERNEL_BYTES * (1 if name == "digest" else 2)
            report.figures[f"{name}, pages of {page_bytes // KIB} KiB"] = {"gb_s": round(moved / taken / 1e9)}
        rows.append(
            (f"{page_bytes // KIB} KiB", f"{2 * KERNEL_BYTES / floor / 1e9:.0f}",
             *(f"{2 * KERNEL_BYTES / seconds[n] / 1e9:.0f} ({floor / seconds[n]:.2f})" for n in list(seconds)[1:-1]),
             f"{KERNEL_BYTES / seconds['digest'] / 1e9:.0f}")
        )  # fmt: skip
        for name in ("gather", "scatter") if page_bytes >= BAR_PAGE_BYTES else ():
            share = round(floor / seconds[name], 3)
            report.bar(
                f"{name}, pages of {page_bytes // KIB} KiB, of a device-to-device copy", share, f">= {COPY_BAR}",
                share >= COPY_BAR,
            )  # fmt: skip
    names = ("page", "copy", "gather", "scatter", "gather + digest", "scatter + digest", "digest (reads only)")
    table(f"GB/s read + written, {KERNEL_BYTES // MIB} MiB a launch (of the copy)", names, rows)


def kernel_seconds(bench: Bench, rounds: int) -> dict[str, float]:
    device, stream = bench.device, bench.device.new_stream()
    blocks = device.block_list(stream, bench.ids)
    staging = device.new_staging(bench.count)
    flat = bench.cache.view(-1)
    digests = torch.empty(bench.count, dtype=torch.int64, device="cuda")

    def launch(mode: Mode, digest: bool, run: int) -> None:
        device.launch(
            stream, mode, 0, blocks, bench.half(run), bench.count, None if mode == "look" else staging,
            digests.data_ptr() if digest else 0,
        )  # fmt: skip

    def copy(run: int) -> None:
        start = bench.half(run) * bench.page_bytes
        staging.memory.copy_(flat[start : start + staging.memory.numel()])

    arms: dict[str, Work] = {
        "copy": copy,
        "gather": partial(launch, "gather", False), "scatter": partial(launch, "scatter", False),
        "gather + digest": partial(launch, "gather", True), "scatter + digest": partial(launch, "scatter", True),
        "digest": partial(launch, "look", True),
    }  # fmt: skip
    return seconds_of(stream, arms, rounds)


def verify_kernels(bench: Bench) -> None:
    """Kernels and torch do the same to the same bytes, holes and all."""
    device, stream, count = bench.device, bench.device.new_stream(), min(bench.count, 64)
    ids = [-1 if n % 7 == 3 else block_id for n, block_id in enumerate(bench.ids[:count])]
    blocks, staging = device.block_list(stream, ids), device.new_staging(count)
    staging.memory.fill_(0x5A)
    expected = torch.full((1, count, bench.page_bytes), 0x5A, dtype=torch.uint8, device="cuda")
    torch.cuda.synchronize()
    digests = device.gather(stream, 0, blocks, 0, count, staging)
    torch.cuda.synchronize()
    assert digests.read() == reference("gather", [bench.cache], ids, expected, digest=True)
    assert torch.equal(staging.memory.view_as(expected), expected)
    twin = bench.cache.clone()
    staging.memory.random_(0, 256)
    torch.cuda.synchronize()
    digests = device.scatter(stream, 0, blocks, 0, count, staging)
    looked = device.look(stream, 0, blocks, 0, count)
    torch.cuda.synchronize()
    wanted = reference("scatter", [twin], ids, staging.memory.view_as(expected), digest=True)
    assert digests.read() == wanted == looked.read()
    assert torch.equal(bench.cache, twin)


# --- between device and arena ---------------------------------------------------------------------------------------


@contextlib.contextmanager
def pinned_arena(device: CudaDevice) -> Iterator[CudaPinned]:
    """A memfd, as pdxd's arena is."""
    fd = os.memfd_create("bench-arena")
    try:
        os.ftruncate(fd, ARENA_BYTES)
        memory = memoryview(mmap.mmap(fd, ARENA_BYTES))
        memory[:] = random.Random(1).randbytes(MIB) * (ARENA_BYTES // MIB)  # and so every page is there
        arena = device.pin(memory)
        yield arena
        torch.cuda.synchronize()
        device.unpin(arena)
    finally:
        os.close(fd)


def slabs(order: list[int], slab_bytes: int, page_bytes: int, first: int, pages: int) -> list[Copy]:
    """`pages` pages from `first` on, cut into slabs that lie in the arena in `order`."""
    each = slab_bytes // page_bytes
    return [
        Copy(start, each, order[(first + start) // each] * slab_bytes) for start in range(0, pages, each)
    ]


def arena(report: Report, folder: Path, rounds: int) -> None:
    bench = build(PAGE_OF_8B_MODEL, ARENA_BYTES, folder)
    with pinned_arena(bench.device) as pinned:
        rows = []
        for slab_bytes in SLAB_BYTES:
            verify_arena(bench, pinned, slab_bytes)
            seconds = arena_seconds(bench, pinned, slab_bytes, rounds)
            rows += arena_rows(report, seconds, slab_bytes)
        names = ("slab", "", "one memcpy", "ours", "page by page (torch)", "(driver)", "(one batch)")
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
        report.bar(f"{title}, against page by page", gain, f">= {PAGES_BAR}", gain >= PAGES_BAR, unit="x")
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


def verify_arena(bench: Bench, pinned: CudaPinned, slab_bytes: int) -> None:
    """Out, wiped, and back: every block is what it was."""
    mover, stream = Mover(bench, pinned, slab_bytes), bench.device.new_stream()
    before = bench.cache.clone()
    mover.out(stream, 0)
    torch.cuda.synchronize()
    bench.cache[torch.tensor(bench.ids[: bench.count], device="cuda")] = 0
    torch.cuda.synchronize()
    mover.back(stream, 0)
    torch.cuda.synchronize()
    assert torch.equal(bench.cache, before), "pages changed on their way"


def arena_seconds(bench: Bench, pinned: CudaPinned, slab_bytes: int, rounds: int) -> dict[str, float]:
    device, stream = bench.device, bench.device.new_stream()
    mover, size = Mover(bench, pinned, slab_bytes), bench.page_bytes
    flat, slots = bench.cache.view(-1), pinned.memory
    singles = device.block_list(stream, bench.ids)
    batch = [Copy(n, 1, n * size) for n in range(bench.count)]
    device_first = bench.cache.data_ptr()

    def memcpy(way: str, run: int) -> None:
        part = flat[bench.half(run) * size :][:ARENA_BYTES]
        (slots.copy_ if way == "out" else part.copy_)(part if way == "out" else slots, non_blocking=True)

    def by_torch(way: str, run: int) -> None:
        for n, block_id in enumerate(bench.ids[bench.half(run) :][: bench.count]):
            page, place = bench.cache[block_id], slots[n * size : (n + 1) * size]
            (place.copy_ if way == "out" else page.copy_)(page if way == "out" else place, non_blocking=True)

    def by_driver(way: str, run: int) -> None:
        from cuda.bindings import driver

        handle, base = stream.torch.cuda_stream, slots.data_ptr()
        for n, block_id in enumerate(bench.ids[bench.half(run) :][: bench.count]):
            page, place = device_first + block_id * size, base + n * size
            driver.cuMemcpyAsync(place if way == "out" else page, page if way == "out" else place, size, handle)

    def by_batch(way: str, run: int) -> None:
        chosen = [Copy(c.first + bench.half(run), 1, c.arena_offset) for c in batch]
        device.copy_straight(stream, pinned, 0, singles, chosen, out=way == "out")

    arms: dict[str, Work] = {}
    for way in ("out", "in"):
        arms |= {
            f"{way} memcpy": partial(memcpy, way),
            f"{way} ours": partial(mover.out if way == "out" else mover.back, stream),
            f"{way} torch": partial(by_torch, way), f"{way} driver": partial(by_driver, way),
            f"{way} batch": partial(by_batch, way),
        }  # fmt: skip
    return seconds_of(stream, arms, rounds)


# --- beside the engine's own work -----------------------------------------------------------------------------------


def interference(report: Report, folder: Path, rounds: int) -> None:
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
    interference_bars(report, times)


def interference_bars(report: Report, times: dict[str, list[float]]) -> None:
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
        report.bar(f"matmul {name} at the bus's rate, slower by", slower[name], f"<= {MATMUL_BAR}",
                   slower[name] <= MATMUL_BAR, unit="%")  # fmt: skip


# --- choice, host time, sanitizer -----------------------------------------------------------------------------------


def choice(report: Report, folder: Path) -> None:
    rows = []
    for page_bytes in PAGE_BYTES:
        bench = build(page_bytes, 64 * MIB, folder)
        rates = measure(bench.device)
        straight = ways_of(bench.device, folder).loads_straight
        rows.append((f"{page_bytes // KIB} KiB", f"{rates.staged:.1f}", f"{rates.straight:.1f}",
                     "straight" if straight else "staged"))  # fmt: skip
        report.figures[f"loads of {page_bytes // KIB} KiB pages"] = {
            "staged": rates.staged, "straight": rates.straight, "chosen": rows[-1][-1],
        }  # fmt: skip
    table("arena -> blocks, GB/s: which way an engine with such pages takes", ("page", "staged", "straight", ""), rows)


def host_time(report: Report, folder: Path) -> None:
    """What one layer of one step costs the thread that runs the model: 128 pages in 8 slabs (2,048 tokens)."""
    bench = build(PAGE_OF_8B_MODEL, 64 * MIB, folder)
    device = bench.device
    with pinned_arena(device) as pinned:
        kernels_, copying, staging = device.new_stream(), device.new_stream(), device.new_staging(128)
        blocks = device.block_list(kernels_, bench.ids[:128])
        copies = [Copy(n * 16, 16, n * MIB) for n in range(8)]
        times = []
        for _ in range(200):
            started = time.perf_counter()
            device.wait(kernels_, device.record(device.compute_stream()))
            digests = device.gather(kernels_, 0, blocks, 0, 128, staging)
            device.wait(copying, device.record(kernels_))
            device.copy_out(copying, staging, pinned, copies)
            emptied = device.record(copying)
            times.append(time.perf_counter() - started)
            device.synchronize(emptied)
            digests.read()
    report.figures["host time of a layer, us"] = round(statistics.median(times) * 1e6, 1)
    print(f"  host time of one layer of a step of 2,048 tokens: {statistics.median(times) * 1e6:.0f} us")


def sanitizer(report: Report, cases: int) -> None:
    """The kernels' self-test, plain and under compute-sanitizer. Without the tools it says so, and sets no bar."""
    if not (shutil.which("nvcc") and shutil.which("compute-sanitizer")):
        print("  nvcc or compute-sanitizer is not installed: the sanitizer's part is left out")
        report.figures["compute-sanitizer"] = "not installed"
        return
    source = Path(__file__).resolve().parent.parent / "cuda" / "page_copy.cu"
    major, minor = torch.cuda.get_device_capability()
    with tempfile.TemporaryDirectory() as folder:
        program = str(Path(folder) / "page_copy")
        subprocess.run(["nvcc", "-O3", "-std=c++17", f"-arch=sm_{major}{minor}", "-DPDX_SELF_TEST", str(source),
                        "-o", program], check=True, timeout=120)  # fmt: skip
        arms = {
            "self-test": [program, str(cases), "test"],
            "memcheck": ["compute-sanitizer", "--error-exitcode", "9", program, "3", "test"],
            "racecheck": ["compute-sanitizer", "--tool", "racecheck", "--error-exitcode", "9", program, "3", "test"],
            "initcheck": ["compute-sanitizer", "--tool", "initcheck", "--error-exitcode", "9", program, "3", "test"],
        }
        for name, command in arms.items():
            done = subprocess.run(command, capture_output=True, text=True, timeout=240)
            report.equal(f"kernels, {name}: exit status", done.returncode, 0)
            print("    " + " ".join(line for line in done.stdout.splitlines() if "self-test" in line or "SUMM" in line))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options(parser)
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("benchmarks.device needs an NVIDIA GPU that torch can use; `pdx check` says what is missing")
    rounds = QUICK_ROUNDS if arguments.quick else ROUNDS
    report = Report("device")
    report.figures["gpu"] = torch.cuda.get_device_name()
    with tempfile.TemporaryDirectory(prefix="pdx-device-") as name:
        folder = Path(name)
        kernels(report, folder, rounds)
        arena(report, folder, rounds)
        interference(report, folder, rounds)
        choice(report, folder)
        host_time(report, folder)
    sanitizer(report, 20 if arguments.quick else 300)
    report.write(arguments.json)
    sys.exit(0 if report.all_hold else 1)


if __name__ == "__main__":
    main()

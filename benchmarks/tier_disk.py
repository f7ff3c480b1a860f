"""How fast the disk tier writes and reads blocks, beside what the disk itself can do: python -m benchmarks.tier_disk.

One block per request, at several numbers of requests under way. The rate to beat is a bare loop of O_DIRECT reads
(writes) of the same size at the same depth, measured in turns with the tier on the same file system; fio's, where it is
installed, stands beside it. After each timed pass of reads the tier reads every block again, untimed, and all bytes are
compared with those written under its key: each page has its block's number in it.
"""

from __future__ import annotations

import argparse
import contextlib
import mmap
import os
import random
import shutil
import statistics
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from benchmarks.harness.fio import read_rate
from benchmarks.harness.report import Report
from pdx.buffer.evict import Lru
from pdx.tiers.conformance import User
from pdx.tiers.disk import READERS, DiskTier
from pdx.tiers.folder import Folder
from pdx.tiers.tier import End, Key, Loaded, Read, Tier, Write, Written

LAYERS, PAGE_BYTES = 30, 96 << 10  # a block of the CPU model; one of an 8B model on CUDA has 2 MiB
BLOCK_BYTES = LAYERS * PAGE_BYTES
DEPTHS = (1, 2, READERS, 8)
BOUND = 1.3  # a hit may take so many times what the bare reads take
GB = 1e9


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="pdx bench tier_disk", description=__doc__.split("\n")[0])
    parser.add_argument("--folder", type=Path, help="on the file system to measure (default: the temporary one)")
    parser.add_argument("--blocks", type=int, default=96, help="blocks of 2.8 MiB per round (default %(default)s)")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--quick", action="store_true", help="few blocks, two rounds, two depths: shows that it runs")
    parser.add_argument("--json", type=Path, help="where to write the result (default: benchmarks/history)")
    given = parser.parse_args(arguments)
    blocks, rounds, depths = (6, 2, (1, READERS)) if given.quick else (given.blocks, given.rounds, DEPTHS)
    report = Report("tier_disk")
    report.figures.update(block_bytes=BLOCK_BYTES, blocks=blocks, rounds=rounds)
    with tempfile.TemporaryDirectory(prefix="pdx-tier-", dir=given.folder) as folder:
        bench = Bench(Path(folder), blocks)
        for depth in depths:
            measure(report, bench, depth, rounds)
        fio = read_rate(
            Path(folder) / "bare", block_bytes=BLOCK_BYTES, total_bytes=blocks * BLOCK_BYTES, depth=max(depths),
            order="randread",
        )  # fmt: skip
        report.figures["fio_read_gb_s"] = None if fio is None else round(fio / GB, 3)
    report.write(given.json)
    return 0 if report.all_hold else 1


def measure(report: Report, bench: Bench, depth: int, rounds: int) -> None:
    """Bare and tier in turns, so that a disk whose speed wanders wanders for both."""
    arms: dict[str, Callable[[int], float]] = {
        "bare write": bench.bare_write, "tier write": bench.tier_write,
        "bare read": bench.bare_read, "tier read": bench.tier_read,
    }  # fmt: skip
    rates: dict[str, list[float]] = {arm: [] for arm in arms}
    for _ in range(rounds):
        for arm, run in arms.items():
            rates[arm].append(bench.blocks * BLOCK_BYTES / run(depth) / GB)
    medians = {arm: statistics.median(values) for arm, values in rates.items()}
    report.figures[f"depth {depth}"] = {
        arm: {"gb_s": round(medians[arm], 3), "min": round(min(values), 3), "max": round(max(values), 3)}
        for arm, values in rates.items()
    }
    shown = ", ".join(f"{arm} {medians[arm]:.2f}" for arm in arms)
    print(f"depth {depth}: {shown} GB/s, median of {rounds}", flush=True)
    # The ratio of each pair of neighbours, not of medians taken minutes apart.
    ratios = [bare / tier for bare, tier in zip(rates["bare read"], rates["tier read"], strict=True)]
    ratio = round(statistics.median(ratios), 2)
    report.figures[f"depth {depth}"]["hit time over bare reads"] = ratio
    if depth == READERS:
        report.bar(f"hit time over bare reads, depth {depth}", ratio, f"<= {BOUND}", ratio <= BOUND)


class Bench:
    """Blocks of random bytes and their numbers, the tier they go to, and a file of the same size for the bare loop."""

    def __init__(self, folder: Path, blocks: int) -> None:
        self.blocks = blocks
        self._folder = folder
        self._rng = random.Random(1)
        self._source = memoryview(mmap.mmap(-1, BLOCK_BYTES))
        self._source[:] = self._rng.randbytes(BLOCK_BYTES)
        self._is_direct = True

    def bare_write(self, depth: int) -> float:
        return self._bare(depth, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, os.pwritev)

    def bare_read(self, depth: int) -> float:
        return self._bare(depth, os.O_RDONLY, os.preadv)

    def tier_write(self, depth: int) -> float:
        """Twice as many buffers as writers, used again and again, as slots are: no writer waits for us."""
        shutil.rmtree(self._folder / "tier", ignore_errors=True)
        buffers = self._buffers(2 * depth)
        for buffer in buffers:
            buffer[:] = self._source

        def ask(number: int, buffer: memoryview) -> Write:
            stamp(buffer, number)
            return Write(key_of(number), pages(buffer))

        def took(number: int, buffer: memoryview, end: End) -> None:
            assert isinstance(end, Written), end

        with self._tier(depth) as tier:
            return self._through(tier, range(self.blocks), buffers, ask, took)

    def tier_read(self, depth: int) -> float:
        """Seconds of the first of two passes; in the second, every block is looked at as it comes.

        As many buffers as readers, used again and again, as slots are.
        """
        buffers = self._buffers(depth)
        right = memoryview(bytearray(self._source))

        def ask(number: int, buffer: memoryview) -> Read:
            return Read(key_of(number), pages(buffer))

        def took(number: int, buffer: memoryview, end: End) -> None:
            assert isinstance(end, Loaded), end

        def look(number: int, buffer: memoryview, end: End) -> None:
            took(number, buffer, end)
            stamp(right, number)
            assert np.array_equal(buffer, right), f"other bytes came back than those of block {number}"

        with self._tier(depth) as tier:
            seconds = self._through(tier, self._order(), buffers, ask, took)
            for buffer in buffers:
                stamp(buffer, self.blocks)  # of no block: what is not filled again is seen
            self._through(tier, self._order(), buffers, ask, look)
            assert tier.stats().loaded == 2 * self.blocks
        return seconds

    def _through(
        self, tier: Tier, numbers: Iterable[int], buffers: Sequence[memoryview],
        ask: Callable[[int, memoryview], Write | Read], took: Callable[[int, memoryview, End], None],
    ) -> float:  # fmt: skip
        """One request for each block, in the order of `numbers`, each with a buffer that is free again after `took`."""
        user, waiting = User(tier), deque(numbers)
        started_at = time.perf_counter()
        free, busy = list(buffers), dict[int, tuple[int, memoryview]]()
        while waiting or busy:
            while free and waiting:
                number, buffer = waiting.popleft(), free.pop()
                busy[user.ask(ask(number, buffer))] = number, buffer
            ended = [ticket for ticket in busy if ticket in user.ends]
            if not ended:
                user.pump(time.monotonic() + 10.0)
            for ticket in ended:
                number, buffer = busy.pop(ticket)
                took(number, buffer, user.ends[ticket])
                free.append(buffer)
        return time.perf_counter() - started_at

    def _buffers(self, depth: int) -> list[memoryview]:
        memory = memoryview(mmap.mmap(-1, depth * BLOCK_BYTES))
        memory[:: mmap.PAGESIZE] = bytes(len(memory[:: mmap.PAGESIZE]))  # faulted in, as an arena is
        return [memory[index * BLOCK_BYTES : (index + 1) * BLOCK_BYTES] for index in range(depth)]

    def _order(self) -> list[int]:
        return self._rng.sample(range(self.blocks), self.blocks)

    @contextlib.contextmanager
    def _tier(self, depth: int) -> Iterator[DiskTier]:
        files = Folder.open(self._folder / "tier")
        self._is_direct = files.is_direct
        cap_bytes = 2 * self.blocks * BLOCK_BYTES + (16 << 20)
        tier = DiskTier(files, cap_bytes=cap_bytes, policy=Lru(), readers=depth, writers=depth)
        try:
            yield tier
        finally:
            tier.close(drain_s=5.0)

    def _bare(self, depth: int, flags: int, call: Callable[[int, list[memoryview], int], int]) -> float:
        """The same requests without a tier: one file, `depth` threads, each a buffer and one call per block."""
        path = self._folder / "bare"
        fd = os.open(path, flags | (os.O_DIRECT if self._is_direct else 0), 0o600)
        order = self._order()
        lock = threading.Lock()

        def run() -> None:
            buffer = memoryview(mmap.mmap(-1, BLOCK_BYTES))
            buffer[:] = self._source
            while True:
                with lock:
                    if not order:
                        return
                    number = order.pop()
                moved = call(fd, pages(buffer), number * BLOCK_BYTES)
                assert moved == BLOCK_BYTES, f"{moved} bytes moved"

        try:
            if flags & os.O_CREAT:
                os.posix_fallocate(fd, 0, self.blocks * BLOCK_BYTES)
            with ThreadPoolExecutor(depth) as pool:
                started_at = time.perf_counter()
                for future in [pool.submit(run) for _ in range(depth)]:
                    future.result()
                return time.perf_counter() - started_at
        finally:
            os.close(fd)


def key_of(number: int) -> Key:
    return b"bench", number.to_bytes(32, "little")


def stamp(block: memoryview, number: int) -> None:
    """Makes each page of it one of this block."""
    for page in pages(block):
        page[:8] = number.to_bytes(8, "little")


def pages(block: memoryview) -> list[memoryview]:
    return [block[start : start + PAGE_BYTES] for start in range(0, BLOCK_BYTES, PAGE_BYTES)]


if __name__ == "__main__":
    raise SystemExit(main())

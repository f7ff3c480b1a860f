"""What lanes carry between two processes, beside bare sockets and the libraries under them: pdx bench transport.

Every arm is two processes, pinned to a core each, that move the same cold memory (384 MiB; 192 with --quick) in the
same puts, and are stopped while others run. Arms take turns, bars are medians of ratios within a turn, and bytes are
verified before any is timed. A put ends when its notice is there. What a lane's threads, the kernel and a library that
spins do for one side shares that side's core. Then, with root, the wire between two network namespaces: see sharing.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from mmap import MAP_POPULATE, MAP_SHARED, mmap
from pathlib import Path

import numpy as np

from benchmarks.harness.leaving import leaving
from benchmarks.harness.measure import median, percentile, table
from benchmarks.harness.report import Report, options
from benchmarks.transport import sharing
from benchmarks.transport.ends import CERTIFICATES
from benchmarks.transport.iperf import rate
from benchmarks.transport.pair import SOURCE_CPU, TARGET_CPU, Move, Pair
from benchmarks.transport.shapes import SHAPES, Shape

TOTAL_BYTES, QUICK_BYTES = 384 << 20, 192 << 20
ROUNDS, QUICK_ROUNDS = 9, 3
SLABS, QUICK_SLABS = 3000, 500
BARE = "bare sockets"
UCX_TCP = {"UCX_TLS": "tcp,self"}
# What each arm needs to be installed, and its environment.
ARMS: dict[str, tuple[str, dict[str, str]]] = {
    BARE: ("", {}),
    "pdx tcp": ("", {}),
    "pdx tcp, TLS 1.3": ("cryptography", {}),
    "NIXL over tcp": ("nixl", UCX_TCP),
    "NIXL over tcp, spinning": ("nixl", UCX_TCP),
    "pdx nixl over tcp": ("nixl", UCX_TCP),
    "NIXL": ("nixl", {}),
    "pdx nixl": ("nixl", {}),
    "ucxx": ("ucxx", {}),
    "pdx ucx": ("ucxx", {}),
}
# At least so many times what the best of other arms carries in the same turn. Without one of them there is no bar.
BARS = (
    ("pdx tcp", (BARE,), 0.9), ("pdx tcp", ("NIXL over tcp", "NIXL over tcp, spinning"), 2.0),
    ("pdx nixl", ("NIXL",), 0.9), ("pdx ucx", ("ucxx",), 0.9),
)  # fmt: skip
SLAB_EXTRA_US = 100


class Memories:
    """The bytes that all arms share: a source that nobody writes to but us, and a target."""

    def __init__(self, total_bytes: int) -> None:
        self.total_bytes = total_bytes
        self.files = os.memfd_create("source"), os.memfd_create("target")
        for descriptor in self.files:
            os.ftruncate(descriptor, total_bytes)
        self._maps = [mmap(descriptor, total_bytes, flags=MAP_SHARED | MAP_POPULATE) for descriptor in self.files]
        self.source, self.target = (np.frombuffer(memory, dtype=np.uint8) for memory in self._maps)
        self.source[:] = np.random.default_rng(1).integers(0, 256, total_bytes, dtype=np.uint8)

    def check(self, pair: Pair, shape: Shape) -> None:
        """Raises SystemExit unless a move brings every span to its place."""
        self.target[:] = 0
        pair.move(shape)
        for put in shape.puts(self.total_bytes):
            for copy in put:
                source = self.source[copy.source_offset : copy.source_offset + copy.length]
                if not np.array_equal(source, self.target[copy.target_offset : copy.target_offset + copy.length]):
                    raise SystemExit(f"{pair.arm}: other bytes landed at {copy.target_offset} than were sent")

    def memcpy(self, shape: Shape) -> Move:
        """The same spans by one thread of this process."""
        puts = shape.puts(self.total_bytes)
        cpu_s, started = time.process_time(), time.monotonic()
        for put in puts:
            for copy in put:
                source = self.source[copy.source_offset : copy.source_offset + copy.length]
                self.target[copy.target_offset : copy.target_offset + copy.length] = source
        return Move(time.monotonic() - started, time.process_time() - cpu_s)


@contextlib.contextmanager
def pairs(memories: Memories, wanted: list[str], report: Report) -> Iterator[list[Pair]]:
    opened: list[Pair] = []
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="pdx-certificates-")))
        if importlib.util.find_spec("cryptography"):
            from benchmarks.harness.certificates import Authority

            Authority(folder).issue("host")
        for arm in wanted:
            module, environment = ARMS[arm]
            if module and importlib.util.find_spec(module) is None:
                print(f"  {arm}: {module} is not installed")
                continue
            pair = Pair(arm, memories.files, {**environment, CERTIFICATES: str(folder)})
            stack.callback(pair.close)
            opened.append(pair)
        for pair in opened:
            for shape in SHAPES:
                memories.check(pair, shape)
            report.progress(f"{pair.arm}: every byte in its place")
        yield opened


def rates(report: Report, memories: Memories, opened: list[Pair], rounds: int) -> None:
    """Fills in figures and bars, shape by shape."""
    for shape in SHAPES:
        moves: dict[str, list[Move]] = {name: [] for name in ("memcpy", *(pair.arm for pair in opened))}
        for _ in range(rounds):
            moves["memcpy"].append(memories.memcpy(shape))
            for pair in opened:
                moves[pair.arm].append(pair.move(shape))
        moved_gb = sum(copy.length for put in shape.puts(memories.total_bytes) for copy in put) / 1e9
        puts = len(shape.puts(memories.total_bytes))
        seconds = {name: median([move.seconds for move in taken]) for name, taken in moves.items()}
        cpu_s = {name: median([move.cpu_s for move in taken]) / moved_gb for name, taken in moves.items()}
        table(
            f"puts of {shape.name}, {moved_gb:.2f} GB",
            ("", "GB/s", "us a put", "CPU s a GB", "of bare sockets", "of memcpy"),
            [
                (name, f"{moved_gb / taken:.2f}", f"{taken / puts * 1e6:.0f}", f"{cpu_s[name]:.2f}",
                 f"{seconds[BARE] / taken:.0%}" if BARE in seconds else "", f"{seconds['memcpy'] / taken:.0%}")
                for name, taken in seconds.items()
            ],
        )  # fmt: skip
        report.figures[shape.name] = {
            name: {
                "gb_s": round(moved_gb / taken, 3), "us_a_put": round(taken / puts * 1e6, 1),
                "cpu_s_a_gb": round(cpu_s[name], 3),
                "all_gb_s": [round(moved_gb / move.seconds, 3) for move in moves[name]],
            }
            for name, taken in seconds.items()
        }  # fmt: skip
        for ours, theirs, least in BARS:
            if moves.keys() >= {ours, *theirs}:
                turns = zip(moves[ours], *(moves[name] for name in theirs), strict=True)
                ratios = [min(move.seconds for move in others) / own.seconds for own, *others in turns]
                ratio, peer = round(median(ratios), 2), theirs[0] if len(theirs) == 1 else f"the better {theirs[0]}"
                report.bar(f"{ours} of {peer}, {shape.name}", ratio, f">= {least}", ratio >= least, unit="x")


def latencies(report: Report, opened: list[Pair], slabs: int) -> None:
    """One slab of 64 KiB with its notice, one way: half of a round trip of two such."""
    turns, found = 5, dict[str, list[float]]()
    for _ in range(turns):
        for pair in opened:
            found.setdefault(pair.arm, []).extend(pair.round_trips(slabs // turns))
    micros = {arm: [seconds / 2 * 1e6 for seconds in taken] for arm, taken in found.items()}
    report.figures["one slab, us"] = {
        arm: {"p50": round(percentile(taken, 50), 1), "p99": round(percentile(taken, 99), 1)}
        for arm, taken in micros.items()
    }
    table(
        "one slab of 64 KiB with its notice, half a round trip", ("", "p50 us", "p99 us"),
        [(arm, f"{percentile(taken, 50):.0f}", f"{percentile(taken, 99):.0f}") for arm, taken in micros.items()],
    )  # fmt: skip
    for arm in ("pdx tcp", "pdx nixl", "pdx ucx"):
        if arm in micros and BARE in micros:
            extra = round(percentile(micros[arm], 50) - percentile(micros[BARE], 50), 1)
            report.bar(
                f"{arm}: one slab above a bare one, p50",
                extra,
                f"<= {SLAB_EXTRA_US}",
                extra <= SLAB_EXTRA_US,
                unit="us",
            )


@leaving()
def main() -> int:
    parser = argparse.ArgumentParser(prog="pdx bench transport", description=__doc__.partition("\n")[0])
    options(parser)
    parser.add_argument("--arms", nargs="*", choices=list(ARMS), default=list(ARMS), help="(default: all)")
    parser.add_argument("--part", choices=("loopback", "wire", "all"), default="all")
    chosen = parser.parse_args()
    os.sched_setaffinity(0, {SOURCE_CPU})
    report = Report("transport")
    if chosen.part != "wire":
        memories = Memories(QUICK_BYTES if chosen.quick else TOTAL_BYTES)
        iperf = rate(cpus=(SOURCE_CPU, TARGET_CPU), seconds=1 if chosen.quick else 3)
        report.figures["iperf3_gb_s"] = None if iperf is None else round(iperf / 1e9, 3)
        print(
            "  iperf3: not installed (Debian package iperf3)" if iperf is None else f"  iperf3: {iperf / 1e9:.2f} GB/s"
        )
        with pairs(memories, chosen.arms, report) as opened:
            latencies(report, opened, QUICK_SLABS if chosen.quick else SLABS)
            rates(report, memories, opened, QUICK_ROUNDS if chosen.quick else ROUNDS)
    if chosen.part != "loopback":
        sharing.measure(report, quick=chosen.quick)
    report.write(chosen.json)
    return 0 if report.all_hold else 1


if __name__ == "__main__":
    sys.exit(main())

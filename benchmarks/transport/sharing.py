"""A slow wire, shared: four handoffs at once, a last slab behind another's burst, and small messages beside both.

Two namespaces as in `links`, one tcp lane in each. Goodput and fairness are measured while all four have something to
send; the wire's own figure is iperf3's, through the same shape in the same run (a bare stream's where it is missing).
"""

from __future__ import annotations

import os
import socket
import struct
import threading
import time

from benchmarks.harness.measure import median, percentile, table
from benchmarks.harness.netns import PAYLOAD_SHARE, Wire, inside, why_not
from benchmarks.harness.report import Report
from benchmarks.transport.iperf import rate
from benchmarks.transport.pair import SOURCE_CPU, TARGET_CPU, Pair

MBITS = (1000, 200)
MEMORY_BYTES = 128 << 20
SLAB_BYTES = 192 << 10
HANDOFFS = 4
SHARE_S, QUICK_SHARE_S = 4.0, 1.5  # of the four together, as far as the memory lasts: see _handoffs
BURST_BYTES = 64 << 20
BURSTS, QUICK_BURSTS = 8, 2
IDLE_SLABS, QUICK_IDLE_SLABS = 300, 60
GAP_S = 0.025
GOODPUT_BAR, BEHIND_BAR = 0.97, 3.0
FAIR_BAR = 0.99  # Jain's index; 1 is equal, 1/4 is one alone
# A beat is late when the next is due: the daemon's own come every second.
BEAT_EVERY_S, BEAT_BYTES = 0.02, 64
LATE_S, LOST_S = 1.0, 10.0
BEATS_SHARE = 0.8  # of as many as the time allows: threads that share a core with an end of the lane beat less often


def measure(report: Report, *, quick: bool) -> None:
    if reason := why_not():
        print(f"  the shared wire is not measured: {reason}")
        report.figures["wire"] = reason
        return
    files = os.memfd_create("source"), os.memfd_create("target")
    for descriptor in files:
        os.ftruncate(descriptor, MEMORY_BYTES)
    rows = []
    with Wire() as wire:
        pair = Pair("pdx tcp", files, {}, hosts=(wire.source, wire.target))
        try:
            for mbit in MBITS:
                rows.append(_at(report, wire, pair, mbit, quick=quick))
        finally:
            pair.close()
    for descriptor in files:
        os.close(descriptor)
    table("one tcp lane over a shaped wire", COLUMNS, rows)


COLUMNS = (
    "Mbit/s", "iperf3 MB/s", "4 handoffs MB/s", "share", "Jain", "slab idle p50 ms", "p99", "behind 64 MiB p50", "p99",
    "beat max ms",
)  # fmt: skip


def _at(report: Report, wire: Wire, pair: Pair, mbit: int, *, quick: bool) -> tuple[object, ...]:
    line = mbit * 1e6 / 8 * PAYLOAD_SHARE
    wire.shape(line)
    seconds = QUICK_SHARE_S if quick else SHARE_S
    ceiling = rate(
        cpus=(SOURCE_CPU, TARGET_CPU), seconds=round(seconds), address=wire.target.wire,
        within=(wire.source.prefix, wire.target.prefix),
    )  # fmt: skip
    source = "iperf3" if ceiling else "a bare stream (no iperf3)"
    ceiling = ceiling or wire.goodput(seconds=seconds)
    idle = _slabs(pair, QUICK_IDLE_SLABS if quick else IDLE_SLABS, burst_bytes=0)
    with Beats(wire) as beats:
        goodput, fairness = _handoffs(pair, int(line * seconds))
        slabs = int(BURST_BYTES / line / GAP_S * 0.8)  # all of them while the burst lasts
        behind = [
            delay
            for _ in range(QUICK_BURSTS if quick else BURSTS)
            for delay in _slabs(pair, slabs, burst_bytes=BURST_BYTES)
        ]
    name, share = f"{mbit} Mbit/s", round(goodput / ceiling, 3)
    late_ms = round(beats.longest_s * 1e3, 1)
    report.bar(f"{name}: {HANDOFFS} handoffs of {source}", share, f">= {GOODPUT_BAR}", share >= GOODPUT_BAR, unit="x")
    report.bar(f"{name}: Jain's index of their shares", round(fairness, 4), f">= {FAIR_BAR}", fairness >= FAIR_BAR)
    ratio = round(percentile(behind, 99) / percentile(idle, 99), 2)
    report.bar(
        f"{name}: last slab behind 64 MiB against idle, p99", ratio, f"<= {BEHIND_BAR:g}", ratio <= BEHIND_BAR, unit="x"
    )
    beats.judge(report, name)
    figures = {
        "ceiling_mb_s": round(ceiling / 1e6, 2), "handoffs_mb_s": round(goodput / 1e6, 2), "jain": round(fairness, 4),
        "idle_ms": [round(percentile(idle, at) * 1e3, 2) for at in (50, 99)],
        "behind_ms": [round(percentile(behind, at) * 1e3, 2) for at in (50, 99)],
        "slabs": [len(idle), len(behind)], "longest_beat_ms": late_ms,
    }  # fmt: skip
    report.figures[name] = figures
    return (
        str(mbit), f"{ceiling / 1e6:.2f}", f"{goodput / 1e6:.2f}", f"{share:.3f}", f"{fairness:.4f}",
        f"{median(idle) * 1e3:.1f}", f"{percentile(idle, 99) * 1e3:.1f}", f"{median(behind) * 1e3:.1f}",
        f"{percentile(behind, 99) * 1e3:.1f}", f"{late_ms:.1f}",
    )  # fmt: skip


def _handoffs(pair: Pair, total_bytes: int) -> tuple[float, float]:
    """Goodput of all, and how equal their shares were when the first had sent its last slab."""
    puts = min(total_bytes, MEMORY_BYTES) // SLAB_BYTES // HANDOFFS  # at 1 Gbit/s the memory is through in 1.1 s
    call = {"do": "handoffs", "queues": HANDOFFS, "puts": puts, "slab_bytes": SLAB_BYTES}
    _, arrivals = pair.across(call, puts * HANDOFFS)
    landed = dict.fromkeys(map(str, range(HANDOFFS)), 0)
    for _, notice in arrivals:
        landed[notice] += 1
        if landed[notice] == puts:
            break
    warm = len(arrivals) // 10  # as iperf3's first second, which is not counted either
    goodput = (len(arrivals) - 1 - warm) * SLAB_BYTES / (arrivals[-1][0] - arrivals[warm][0])
    return goodput, jain(list(landed.values()))


def _slabs(pair: Pair, slabs: int, *, burst_bytes: int) -> list[float]:
    """Seconds from put to arrival of each last slab."""
    burst_puts = burst_bytes // SLAB_BYTES
    call = {"do": "slabs", "burst_puts": burst_puts, "slabs": slabs, "gap_s": GAP_S, "slab_bytes": SLAB_BYTES}
    began, arrivals = pair.across(call, burst_puts + slabs)
    ended = [at for at, notice in arrivals if notice == "last"]
    return [end - start for start, end in zip(began, ended, strict=True)]


def jain(shares: list[int]) -> float:
    return sum(shares) ** 2 / (len(shares) * sum(share * share for share in shares))


class Beats:
    """Small messages on a connection of their own over the same wire, from entering to leaving the context."""

    def __init__(self, wire: Wire) -> None:
        self.count, self.longest_s, self.lasted_s, self.has_ended = 0, 0.0, 0.0, False
        self._over = threading.Event()
        listening = inside(wire.target, lambda: socket.create_server((wire.target.wire, 0)))
        address = listening.getsockname()
        self._sender = inside(wire.source, lambda: socket.create_connection(address, 5))
        self._receiver, _ = listening.accept()
        listening.close()
        for connection in (self._sender, self._receiver):
            connection.settimeout(LOST_S)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._threads = [threading.Thread(target=self._send), threading.Thread(target=self._receive)]

    def judge(self, report: Report, name: str) -> None:
        """Once left: none was late, and there was one whenever one was due, from the first to the end."""
        late_ms, least = round(self.longest_s * 1e3, 1), max(1, int(self.lasted_s / BEAT_EVERY_S * BEATS_SHARE))
        report.bar(
            f"{name}: longest beat of {self.count}", late_ms, f"< {LATE_S * 1e3:g}", late_ms < LATE_S * 1e3, unit="ms"
        )
        came = f"{self.count}, and their end" if self.has_ended else f"{self.count}, and no end"
        report.bar(
            f"{name}: beats that came", came, f">= {least}, and their end", self.has_ended and self.count >= least
        )

    def __enter__(self) -> Beats:
        self._began = time.monotonic()
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.lasted_s = time.monotonic() - self._began
        self._over.set()
        for thread in self._threads:
            thread.join(20)
        self._sender.close()
        self._receiver.close()

    def _send(self) -> None:
        while not self._over.wait(BEAT_EVERY_S):
            self._sender.sendall(struct.pack("<d", time.monotonic()).ljust(BEAT_BYTES, b"."))
        self._sender.shutdown(socket.SHUT_WR)

    def _receive(self) -> None:
        try:
            while beat := self._receiver.recv(BEAT_BYTES, socket.MSG_WAITALL):
                self.count += 1
                self.longest_s = max(self.longest_s, time.monotonic() - struct.unpack_from("<d", beat)[0])
            self.has_ended = True
        except OSError:  # none for LOST_S, or the connection broke
            self.longest_s = max(self.longest_s, LOST_S)

"""`make soak`: thousands of handoffs between real daemons while engines and daemons are killed and stopped, and the
wire between them is cut, reset, stalled and bent.

Engines are page engines (tests/page_engine.py): the real connector halves, no model, and every row of KV that is read
is checked. The seed fixes what is asked and what breaks in each burst, not the timing. After each burst everything is
healed and must be quiet, whole and free. A run that was interrupted goes on with --resume.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import secrets
import shutil
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import msgspec

from benchmarks.harness.leaving import leaving
from benchmarks.harness.report import HISTORY, Report
from benchmarks.harness.rig import wait_until
from benchmarks.soak.burst import BURST, ENGINES, Burst, Failed
from benchmarks.soak.parts import Engine, Host
from pdx.daemon.peers import UNREACHED_S
from pdx.errors import PdxError
from pdx.launch import processes
from pdx.transport.choice import TCP
from pdx.transport.conformance_faults import FAULTS
from pdx.whole import write_whole

# 1 MiB holds some 15 prompts: reservations wait and cache is evicted all the time.
SETTINGS = {"arena": "1MiB", "linger_s": "5", "lease_s": "2", "digest_mode": "true", "poison": "true"}
FDS_GROWN_MAX = 16  # connections to peers that come and go; to those that are gone for UNREACHED_S
MINUTES = 5.0
LOCAL = "handoffs_by_local"  # a daemon's count of those that it had no lane to look for
VICTIMS = (" engine", " daemon", " wire")  # what a count of faults ends with
# At 3 faults in a hundred handoffs 0.97 were answered, 0.91 of those from loaded pages; 0.99 took the lane asked for.
ANSWERED_MIN, LOADED_MIN, OVER_MIN = 0.9, 0.8, 0.9


class Progress(msgspec.Struct):
    """What --resume keeps."""

    seed: int
    transport: str = "tcp"
    bursts: int = 0
    seconds: float = 0.0
    counts: dict[str, int] = msgspec.field(default_factory=dict)

    @property
    def handoffs(self) -> int:
        return sum(self.counts.get(how, 0) for how in ("answered", "given up", "lost"))

    @property
    def faults(self) -> int:
        return sum(count for what, count in self.counts.items() if what.endswith(VICTIMS))


class Soak:
    """The parts, and one burst after the other until enough has been seen."""

    def __init__(self, scratch: Path, progress: Progress) -> None:
        self.progress = progress
        self.key = secrets.token_bytes(32)
        key_file = scratch / "cluster.key"
        key_file.touch(mode=0o600)
        key_file.write_bytes(self.key)
        self._scratch = scratch
        self._number = 0
        self.answered_before = progress.counts.get("answered", 0)  # by other daemons, whose counters are gone
        self._fds: dict[int, Counter[str]] = {}  # pid -> descriptors, by kind, when it was first seen quiet
        self.fds_grown = 0
        # What flips on a one-sided lane's connection is for TCP's checksum to find: it carries the right to write.
        self.wire_faults = FAULTS["receiver" if progress.transport == TCP else "sender"]
        settings = {**SETTINGS, "transport": progress.transport, "key_file": str(key_file)}
        self.hosts = {n: Host(n, scratch / n, **settings) for n in "ab"}
        self.engines: dict[str, Engine] = {}

    def start(self) -> None:
        """Whatever comes of it, `close` is to follow."""
        for name in ENGINES:
            self.start_engine(name)

    def start_engine(self, name: str) -> None:
        role, host = ENGINES[name]
        self.engines[name] = Engine(name, role, self.hosts[host], log=self._scratch / f"{name}.log")

    def next_number(self) -> int:
        self._number += 1
        return self._number

    def count(self, what: str) -> None:
        self.progress.counts[what] = self.progress.counts.get(what, 0) + 1

    def burst(self) -> None:
        """Raises Failed or TimeoutError."""
        begun = time.monotonic()
        generator = random.Random(f"{self.progress.seed}/{self.progress.bursts}")
        Burst(self, generator).run()
        self._look()
        self.progress.bursts += 1
        self.progress.seconds += time.monotonic() - begun

    def _look(self) -> None:
        """Everything is healed and nothing is asked: everything must be there, free and whole."""
        for host in self.hosts.values():
            complaint = host.complaint()
            if complaint:
                raise Failed(complaint)
            if len(self._daemons(host)) != 1:
                raise Failed(f"daemons of {host.name}: {self._daemons(host)}")
        for part in [*self.hosts.values(), *self.engines.values()]:
            with contextlib.suppress(TimeoutError):
                wait_until(lambda pid=part.pid: self._grown(pid) <= FDS_GROWN_MAX, UNREACHED_S + 10, "few descriptors")
            more = self._grown(part.pid)
            self.fds_grown = max(more, self.fds_grown)
            if more > FDS_GROWN_MAX:
                kinds = _descriptors(part.pid) - self._fds[part.pid]
                raise Failed(f"{part.name} holds {more} descriptors more than when it was first seen quiet: {kinds}")

    def _grown(self, pid: int) -> int:
        """By so many descriptors, since it was first seen quiet."""
        now = _descriptors(pid)
        return now.total() - self._fds.setdefault(pid, now).total()

    def _daemons(self, host: Host) -> list[int]:
        flag, found = f"--run-dir={host.flags['run_dir']}".encode(), []
        for entry in Path("/proc").iterdir():
            with contextlib.suppress(OSError):
                if entry.name.isdigit() and flag in (entry / "cmdline").read_bytes().split(b"\0"):
                    found.append(int(entry.name))
        return found

    def close(self) -> list[int]:
        """Ends everything. Returns processes that are left."""
        for engine in self.engines.values():
            if not engine.ended:
                engine.end()
        for host in self.hosts.values():
            host.resume()
            host.close()
        with contextlib.suppress(TimeoutError):
            wait_until(lambda: not any(self._daemons(host) for host in self.hosts.values()), 20, "daemons linger out")
        left = [pid for host in self.hosts.values() for pid in self._daemons(host)]
        processes.kill(left)
        return left


@leaving()
def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="pdx bench soak", description=__doc__)
    parser.add_argument("--seed", type=int, help="of what is asked and what breaks (default: a random one)")
    parser.add_argument("--handoffs", type=int, help="end when there were so many")
    parser.add_argument("--faults", type=int, help="end when there were so many")
    parser.add_argument(
        "--minutes", type=float, help=f"end after so long at the latest (default {MINUTES:g}, or as the others say)"
    )
    parser.add_argument("--transport", default="tcp", metavar="LANE", help="between the hosts (default %(default)s)")
    parser.add_argument("--resume", type=Path, metavar="FILE", help="go on where FILE says, and keep it up to date")
    parser.add_argument("--json", type=Path, help=f"where to write (default: a new file in {HISTORY.name}/)")
    options = parser.parse_args(argv)
    if not (options.minutes or options.handoffs or options.faults):
        options.minutes = MINUTES
    progress = Progress(options.seed if options.seed is not None else secrets.randbits(32), options.transport)
    if options.resume and options.resume.exists():
        progress = msgspec.json.decode(options.resume.read_bytes(), type=Progress)
    report = Report(f"soak-{progress.transport}")
    scratch = Path(tempfile.mkdtemp(prefix="pdx-soak-"))
    print(f"seed {progress.seed}; logs in {scratch}", flush=True)
    soak = Soak(scratch, progress)
    finding, interrupted = "", False
    try:
        soak.start()
        while _done(progress, options) < 1.0:
            soak.burst()
            _tell(progress, options)
            if options.resume:
                write_whole(options.resume, msgspec.json.encode(progress))
    except (Failed, TimeoutError, PdxError) as error:
        finding = f"burst {progress.bursts} of seed {progress.seed}: {error}"
    except KeyboardInterrupt:
        print("interrupted", flush=True)
        interrupted = True
    finally:
        left = soak.close()
    _judge(report, soak, options, finding, left, interrupted=interrupted)
    report.write(options.json)
    if report.all_hold:
        shutil.rmtree(scratch)
    return 0 if report.all_hold else 1


def _descriptors(pid: int) -> Counter[str]:
    """By kind: socket, anon_inode, a file's name. Raises Failed if the process is gone."""
    kinds, folder = Counter[str](), f"/proc/{pid}/fd"
    try:
        numbers = os.listdir(folder)
    except FileNotFoundError:
        raise Failed(f"process {pid} has ended by itself") from None
    for number in numbers:
        with contextlib.suppress(FileNotFoundError):
            kinds[os.readlink(f"{folder}/{number}").partition(":[")[0]] += 1
    return kinds


def _done(progress: Progress, options: argparse.Namespace) -> float:
    """How much of the run is over, from 0 to 1: all that was to be counted, or the time that it may take."""
    by_time = progress.seconds / (options.minutes * 60) if options.minutes else 0.0
    asked = ((progress.handoffs, options.handoffs), (progress.faults, options.faults))
    return max(by_time, min((seen / wanted for seen, wanted in asked if wanted), default=0.0))


def _tell(progress: Progress, options: argparse.Namespace) -> None:
    done = _done(progress, options)
    left_s = progress.seconds * (1 - done) / done if 0 < done < 1 else 0.0
    counts = ", ".join(f"{count} {what}" for what, count in sorted(progress.counts.items()))
    print(f"  burst {progress.bursts}: {progress.handoffs} handoffs, {progress.handoffs / progress.seconds:.0f}/s "
          f"({counts}); about {left_s:.0f} s to go", flush=True)  # fmt: skip


def _judge(
    report: Report, soak: Soak, options: argparse.Namespace, finding: str, left: list[int], *, interrupted: bool
) -> None:
    progress, totals = soak.progress, Counter[str]()
    for host in soak.hosts.values():
        totals += host.counters
    whole = f"{progress.handoffs} handoffs in {progress.bursts} bursts of {BURST}, {progress.faults} faults"
    report.bar("every page read was right; all leases, slots, descriptors and processes came back", finding or whole,
               "nothing found", not finding and progress.handoffs > 0)  # fmt: skip
    report.equal("processes left at the end", len(left), 0)
    report.equal("interrupted", interrupted, False)
    judge_counts(report, progress, totals, options, answered_before=soak.answered_before)
    report.figures = {"seed": progress.seed, "descriptors_grown": soak.fds_grown, "seconds": round(progress.seconds, 1),
                      **progress.counts, "daemons": dict(totals)}  # fmt: skip


def judge_counts(
    report: Report, progress: Progress, totals: Counter[str], options: argparse.Namespace, *, answered_before: int
) -> None:
    """Whether as much was done as was asked for, and most of it by what is tested here.

    `totals`: of the daemons of this run; `answered_before`: before it, if it was resumed.
    """

    def share(name: str, part: int, whole: int, least: float) -> None:
        value = part / whole if whole else 0.0
        report.bar(name, f"{value:.3f} ({part} of {whole})", f">= {least}", value >= least)

    for what, seen, wanted in (
        ("handoffs", progress.handoffs, options.handoffs), ("faults", progress.faults, options.faults),
    ):  # fmt: skip
        if wanted:
            report.bar(f"{what} that were asked for", seen, f">= {wanted}", seen >= wanted)
    answered = progress.counts.get("answered", 0)
    share("handoffs answered", answered, progress.handoffs, ANSWERED_MIN)
    share("answers from pages that were loaded, not computed", totals["loads_ok"], answered - answered_before,
          LOADED_MIN)  # fmt: skip
    over = totals[f"handoffs_by_{progress.transport}"]
    between = sum(count for name, count in totals.items() if name.startswith("handoffs_by_")) - totals[LOCAL]
    share(f"handoffs between hosts over {progress.transport}", over, between, OVER_MIN)


if __name__ == "__main__":
    sys.exit(main())

"""Simulates handoffs by the hundred thousand, with faults at every step, and writes what was found.

    python -m benchmarks.simulate --handoffs 1000000     # the bar of the release; goes on with --resume FILE
    python -m benchmarks.simulate --seed 7 --episode 123 # that episode alone, with the trace of its last events
    python -m benchmarks.simulate --break window         # a naive variant: which invariant catches it, and when

An episode is a world of its own (see benchmarks.simulate.simulator); its seed is made of the run's and of its number.
"""

from __future__ import annotations

import argparse
import logging
import os
import secrets
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec
import xxhash

from benchmarks.harness.report import HISTORY, Report
from benchmarks.simulate.breaks import BREAKS
from benchmarks.simulate.simulator import Outcome, run_episode
from pdx.whole import write_whole

EPISODE_HANDOFFS = 200
BATCH = 20  # episodes one process runs: half a minute, so that progress is seen and little is lost
BATCH_S_MAX = 1200.0  # forty times as long as it takes; an episode that hangs is a finding
BREAK_EPISODES_MAX = 40  # a naive variant that lives longer than this is not caught
QUICK_HANDOFFS = 4_000
TRACE_LINES = 120
SETTLED_MIN = 0.3  # a system that gives up every handoff is right as well


class Progress(msgspec.Struct):
    """What --resume keeps."""

    seed: int
    batches: int = 0
    handoffs: int = 0
    events: int = 0
    seconds: float = 0.0
    counts: dict[str, int] = {}
    findings: list[tuple[int, str, str]] = []  # episode, kind, what

    def add(self, episode: int, outcome: Outcome) -> None:
        self.handoffs += outcome.handoffs
        self.events += outcome.events
        self.counts = dict(Counter(self.counts) + Counter(outcome.counts))
        if outcome.finding:
            self.findings.append((episode, outcome.kind, outcome.finding))


def main(argv: list[str] | None = None) -> int:
    options = _parser().parse_args(argv)
    seed = options.seed if options.seed is not None else secrets.randbits(32)
    if options.batch is not None:
        return _run_batch(seed, options.batch)
    if options.broken:
        return 0 if _caught(options.broken, seed) else 1
    if options.episode is not None:
        return _repeat(seed, options.episode)
    if options.quick:
        options.handoffs = QUICK_HANDOFFS
    progress = Progress(seed)
    if options.resume and options.resume.exists():
        progress = msgspec.json.decode(options.resume.read_bytes(), type=Progress)
    return _simulate(progress, options)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="pdx bench simulate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--handoffs", type=int, default=1_000_000, help="how many (default: %(default)s)")
    parser.add_argument("--seed", type=int, help="of everything (default: a random one)")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1, help="(default: one a core)")
    parser.add_argument("--json", type=Path, help=f"where to write (default: a new file in {HISTORY.name}/)")
    parser.add_argument("--quick", action="store_true", help=f"only {QUICK_HANDOFFS:,} handoffs")
    parser.add_argument("--resume", type=Path, metavar="FILE", help="go on where FILE says, and keep it up to date")
    parser.add_argument("--episode", type=int, help="repeat only this one, and show its end")
    parser.add_argument("--break", dest="broken", choices=sorted(BREAKS), help="run a naive variant until it is caught")
    parser.add_argument("--batch", type=int, help=argparse.SUPPRESS)  # what the processes are started with
    return parser


def seed_of(seed: int, episode: int) -> int:
    return xxhash.xxh3_64_intdigest(f"{seed}/{episode}".encode())


# --- a run ----------------------------------------------------------------------------------------------------


def _simulate(progress: Progress, options: argparse.Namespace) -> int:
    report = Report("simulate")
    print(f"seed {progress.seed}, {options.handoffs:,} handoffs in {options.processes} processes", flush=True)
    batches = -(-options.handoffs // (EPISODE_HANDOFFS * BATCH))
    started, before_s, before = time.monotonic(), progress.seconds, progress.handoffs
    pool = ThreadPoolExecutor(options.processes)
    numbers = range(progress.batches, batches)
    try:
        for number, outcomes in zip(numbers, pool.map(lambda n: _batch(progress.seed, n), numbers), strict=True):
            for n, outcome in enumerate(outcomes):
                progress.add(number * BATCH + n, outcome)
            progress.batches = number + 1
            elapsed_s = time.monotonic() - started
            progress.seconds = before_s + elapsed_s
            rate = (progress.handoffs - before) / elapsed_s
            left_s = max(0, options.handoffs - progress.handoffs) / rate
            print(f"  {progress.handoffs:,} handoffs, {rate:.0f}/s, about {left_s / 60:.1f} min to go", flush=True)
            if options.resume:
                write_whole(options.resume, msgspec.json.encode(progress))
            if progress.findings:
                break
    except KeyboardInterrupt:
        print("interrupted", flush=True)
    finally:
        pool.shutdown(cancel_futures=True)
    _judge(report, progress, options.handoffs)
    report.write(options.json)
    return 0 if report.all_hold else 1


def _batch(seed: int, number: int) -> list[Outcome]:
    """Runs some episodes in a process of their own."""
    command = [sys.executable, "-m", "benchmarks.simulate", "--seed", str(seed), "--batch", str(number)]
    done = subprocess.run(command, stdout=subprocess.PIPE, timeout=BATCH_S_MAX, check=True)
    return [msgspec.json.decode(line, type=Outcome) for line in done.stdout.splitlines()]


def _run_batch(seed: int, number: int) -> int:
    """What that process does: one line of JSON per episode."""
    logging.getLogger("pdxd").setLevel(logging.ERROR)  # what breaks here is told by the million
    for episode in range(number * BATCH, (number + 1) * BATCH):
        outcome = run_episode(seed_of(seed, episode), handoffs=EPISODE_HANDOFFS)
        sys.stdout.buffer.write(msgspec.json.encode(outcome) + b"\n")
    return 0


def _judge(report: Report, progress: Progress, wanted: int) -> None:
    found = Counter(kind for _, kind, _ in progress.findings)
    for episode, _, what in progress.findings:
        print(f"FOUND in episode {episode}: {what}\n  repeat it: python -m benchmarks.simulate --seed {progress.seed} "
              f"--episode {episode}", flush=True)  # fmt: skip
    report.bar("handoffs simulated", progress.handoffs, f">= {wanted}", progress.handoffs >= wanted)
    settled = progress.counts.get("daemons: receives_settled", 0) / max(progress.handoffs, 1)
    report.bar("share of handoffs that settled, among all these faults", round(settled, 2), f">= {SETTLED_MIN}",
               settled >= SETTLED_MIN)  # fmt: skip
    report.equal("requests or pages that were wrong", found["wrong"], 0)
    report.equal("past their deadline or budget", found["late"], 0)
    report.equal("leases, slots, windows or journeys left over", found["leaked"], 0)
    report.equal("accesses to memory that was not theirs, and broken accounts", found["unsafe"], 0)
    for name in BREAKS:
        after = _caught(name, progress.seed)
        report.bar(f"without {name}: caught after handoffs", after, "caught", after is not None)
    report.figures = {
        "seed": progress.seed, "episodes": progress.batches * BATCH, "seconds": round(progress.seconds, 1),
        "handoffs_per_s": round(progress.handoffs / max(progress.seconds, 1e-9), 1), "events": progress.events,
        **dict(sorted(progress.counts.items())),
    }  # fmt: skip


# --- one episode, and naive variants --------------------------------------------------------------------------


def _repeat(seed: int, episode: int) -> int:
    outcome = run_episode(seed_of(seed, episode), handoffs=EPISODE_HANDOFFS)
    for line in outcome.trace[-TRACE_LINES:]:
        print(line)
    counts = ", ".join(f"{count} {what}" for what, count in sorted(outcome.counts.items()))
    print(f"{outcome.handoffs} handoffs, {outcome.events} events, trace {outcome.fingerprint} ({counts})")
    print(outcome.finding or "every invariant held")
    return 1 if outcome.finding else 0


def _caught(name: str, seed: int) -> int | None:
    """Handoffs until an invariant does not hold, over a few episodes; None if all of them do."""
    handoffs = 0
    for outcome in _broken_episodes(name, seed):
        handoffs += outcome.handoffs
        if outcome.finding:
            print(f"  without {name}, after {handoffs} handoffs: {outcome.finding}", flush=True)
            return handoffs
    return None


def _broken_episodes(name: str, seed: int) -> Iterator[Outcome]:
    for episode in range(BREAK_EPISODES_MAX):
        yield run_episode(seed_of(seed, episode), handoffs=EPISODE_HANDOFFS, parts=BREAKS[name])


if __name__ == "__main__":
    sys.exit(main())

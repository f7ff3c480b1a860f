"""What choosing engines by what they keep is worth: 16 + 16 engines, simulated, against round robin.

Engines are a model: prefill computes one prompt after the other at a fixed pace and finds its prefix in its host's
memory, which forgets what was used longest ago; decode engines take longer for each step the more requests they have;
what they say goes back to the prompt's host. Sessions come by chance, at a rate that is raised until the 95th
percentile of first-token times reaches 2 s: that rate is a policy's throughput.

"simulated" are the router's choices alone, in virtual time, and so more exact. "served" is the router's own process,
asked over HTTP, with engines and daemons that are HTTP servers and ZeroMQ sockets. "real" are 2 + 2 engines of vLLM,
asked in a closed loop: see `real`. The full run takes about 40 minutes, the quick one, without "real", 3.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Mapping
from pathlib import Path

from benchmarks.harness.arms import PREFILL_CPUS, Scratch
from benchmarks.harness.measure import pin_client, table
from benchmarks.harness.part import cores_of
from benchmarks.harness.report import Report, options
from benchmarks.model import build
from benchmarks.routing import real, served, simulated
from benchmarks.routing.host import MODEL
from benchmarks.routing.workloads import TTFT_P95_S, WORKLOADS, Workload
from pdx.router.choice.policy import PolicyName

SIMULATED_S, SERVED_S = 90.0, 90.0
QUICK_SIMULATED_S, QUICK_SERVED_S = 60.0, 24.0  # with less time caches are not full yet, and policies alike
QUICK_SERVED = ("shared prefixes",)  # sessions of one turn: the others need longer to be under way
POLICIES: tuple[PolicyName, PolicyName] = ("round_robin", "prefix")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="pdx bench routing",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="examples:\n  pdx bench routing --only simulated\n  pdx bench routing --quick",
    )
    options(parser)
    parser.add_argument("--only", choices=("simulated", "served", "real"), help="one of the three parts")
    chosen = parser.parse_args(argv)
    report = Report("routing")
    if chosen.only in (None, "simulated"):
        judge_simulated(report, QUICK_SIMULATED_S if chosen.quick else SIMULATED_S)
    if chosen.only in (None, "served"):
        os.sched_setaffinity(0, cores_of(PREFILL_CPUS))  # with the engines: the router has the other core
        workloads = {name: WORKLOADS[name] for name in QUICK_SERVED} if chosen.quick else WORKLOADS
        with Scratch(Path(MODEL)) as scratch:
            judge_served(scratch, report, workloads, QUICK_SERVED_S if chosen.quick else SERVED_S)
    if chosen.only == "real" or (chosen.only is None and not chosen.quick):
        pin_client()
        with Scratch(chosen.model or build()) as scratch:
            judge_real(scratch, report)
    report.write(chosen.json)
    return 0 if report.all_hold else 1


def judge_simulated(report: Report, seconds: float) -> None:
    for name, workload in WORKLOADS.items():
        found = {policy: simulated.throughput(workload, policy, seconds) for policy in POLICIES}
        for policy, figures in found.items():
            report.progress(f"{name}, {policy}, simulated: {figures}")
        report.figures[f"{name}, simulated"] = found
        ratio = round(found["prefix"]["requests_per_s"] / found["round_robin"]["requests_per_s"], 2)
        report.bar(f"{name}, simulated: throughput over round robin's", ratio, f">= {workload.least}",
                   ratio >= workload.least, unit="x")  # fmt: skip


def judge_served(scratch: Scratch, report: Report, workloads: Mapping[str, Workload], seconds: float) -> None:
    rows = []
    for name, workload in workloads.items():
        best, over = served.limits(scratch, name, workload, seconds=seconds)
        wanted = workload.least * over.requests_per_s
        ours = served.run(scratch, f"{name} prefix", workload, "prefix", wanted, seconds)
        arms = {"round robin": best, "round robin, a tenth more": over, "prefix": ours}
        report.figures[f"{name}, served"] = {arm: outcome.figures() for arm, outcome in arms.items()}
        rows += [(name, arm, *outcome.figures().values()) for arm, outcome in arms.items()]
        report.equal(f"{name}, served: requests of the default policy that went wrong", ours.errors[:3], [])
        report.bar(
            f"{name}, served: p95 of the first token at {workload.least} times what is too much for round robin",
            round(ours.p95_s, 3), f"<= {TTFT_P95_S}", ours.holds, unit="s",
        )  # fmt: skip
    table("The router's process before 16 + 16 simulated engines", ("", "policy", *over.figures()), rows)


def judge_real(scratch: Scratch, report: Report) -> None:
    quartet, rows = real.Quartet(scratch), []
    for name, workload in real.WORKLOADS.items():
        found = {policy: real.Outcome() for policy in POLICIES}
        for number in range(workload.rounds):
            for policy in POLICIES if number % 2 == 0 else reversed(POLICIES):
                outcome = quartet.run(workload, policy)
                found[policy].add(outcome)
                report.progress(f"{name}, {policy}, real: {outcome.figures()}")
        figures = {policy: outcome.figures() for policy, outcome in found.items()}
        report.figures[f"{name}, real"] = figures
        rows += [(name, policy, *each.values()) for policy, each in figures.items()]
        theirs, ours = found["round_robin"], found["prefix"]
        if workload.least is None:
            continue
        ratio = round(ours.requests_per_s / theirs.requests_per_s, 2)
        report.bar(f"{name}, real: throughput over round robin's", ratio, f">= {workload.least}",
                   ratio >= workload.least, unit="x")  # fmt: skip
        if workload.least > 1:
            later = round(ours.p95_s / theirs.p95_s, 2)
            report.bar(f"{name}, real: p95 of the first token, of round robin's", later, "<= 1", later <= 1)
    report.figures["real, CPU seconds"] = quartet.cpu_seconds()
    table("2 + 2 engines of vLLM, each on a host of its own", ("", "policy", *figures["prefix"]), rows)


if __name__ == "__main__":
    sys.exit(main())

"""`pdx bench chaos`: real engines, daemons and a router, asked all the time while they are killed, stopped and cut off.

Two prefill and two decode engines on two hosts (network namespaces: needs root) answer 2,000 checked requests under
200 faults: kill -9 and SIGSTOP of every part, cut links, clients that leave; each aimed at a phase of a request. Then
everything is healed and must be quiet, whole and free. A second section stops decode engines for longer than their
lease while they read, once at daemons and workers that check nothing: the naive variant. A third offers a pair twice
what it can do: goodput must stay. The seed fixes what is asked and what breaks, not the timing; --resume goes on after
an interruption. On two cores the faults take some 40 minutes, the rest 12, and --quick 8 in all.
"""

from __future__ import annotations

import argparse
import http.client
import secrets
import shutil
import sys
import tempfile
from pathlib import Path
from urllib.parse import urlsplit

import msgspec

from benchmarks.chaos import goodput, stopped
from benchmarks.chaos.call import Call
from benchmarks.chaos.faults import Injector
from benchmarks.chaos.fleet import Fleet
from benchmarks.chaos.ledger import Ledger, State, table
from benchmarks.chaos.plan import faults, wish
from benchmarks.chaos.questions import Known, candidates, learn, learned
from benchmarks.chaos.traffic import DEADLINE_S, Traffic, body_of
from benchmarks.chaos.verdict import judge
from benchmarks.harness.arms import start_plain, wait_engines
from benchmarks.harness.netns import Wire, why_not
from benchmarks.harness.report import HISTORY, Report
from benchmarks.harness.rig import REPOSITORY, Rig, rig_in, unleased, wait_until
from benchmarks.model import build
from pdx.errors import PdxError
from pdx.launch import processes

REQUESTS, FAULTS, QUESTIONS = 2000, 200, 220
QUICK_REQUESTS, QUICK_FAULTS, QUICK_QUESTIONS = 120, 12, 60
POOL_SEED = 1  # of the questions: the same for all runs, so that a machine learns their answers once
RUN_S = 5400.0
QUIET_S = 30.0  # budgets, leases and tombstones are over by then
LAST_WISHES = 24
SHARED_MEMORY_S = 20.0  # engines that end in order take a while to unlink what is theirs
PARTS = ("faults", "stopped", "goodput")


def main(argv: list[str] | None = None) -> int:
    options = parse(argv)
    if reason := why_not():
        print(f"chaos: {reason}", file=sys.stderr)
        return 2
    state = State(options.seed if options.seed is not None else secrets.randbits(32))
    if options.resume and options.resume.exists():
        state = msgspec.json.decode(options.resume.read_bytes(), type=State)
    ledger, report = Ledger(state, options.resume), Report("chaos")
    scratch = Path(tempfile.mkdtemp(prefix="pdx-chaos-"))
    report.figures["seed"] = state.seed
    try:
        model = options.model or build()
        if options.only in (None, "faults"):
            print(f"faults: seed {state.seed}; logs in {scratch}", flush=True)
            pool = known_questions(model, scratch / "plain", QUICK_QUESTIONS if options.quick else QUESTIONS)
            break_everything(model, scratch / "faults", ledger, report, pool, options)
        if options.only == "stopped" or not (options.only or options.quick):
            print("stopped: readers that come back after their lease, with and without quarantine", flush=True)
            stopped.measure(model, scratch / "stopped", report, known_questions(model, scratch / "plain", QUESTIONS))
        if options.only in (None, "goodput"):
            print("goodput: a pair is offered twice what it can do", flush=True)
            goodput.measure(model, scratch / "goodput", report, quick=options.quick)
    except KeyboardInterrupt:
        print("interrupted", flush=True)
        return 130
    except (TimeoutError, PdxError, SystemExit, OSError) as error:
        report.bar("ran to its end", str(error), "yes", False)
    finally:
        ledger.keep()
    report.write(options.json)
    if report.all_hold:
        shutil.rmtree(scratch)
        return 0
    print(f"seed {state.seed}; logs are kept in {scratch}")
    return 1


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="pdx bench chaos", description=__doc__)
    parser.add_argument("--requests", type=int, help=f"requests that end (default {REQUESTS})")
    parser.add_argument("--faults", type=int, help=f"faults among them (default {FAULTS})")
    parser.add_argument("--seed", type=int, help="of what is asked and what breaks (default: a random one)")
    parser.add_argument("--quick", action="store_true", help=f"{QUICK_REQUESTS} requests, {QUICK_FAULTS} faults")
    parser.add_argument("--only", choices=PARTS, help='one section (default: all; --quick: no "stopped")')
    parser.add_argument("--resume", type=Path, metavar="FILE", help="go on where FILE says, and keep it up to date")
    parser.add_argument("--model", type=Path, help="model folder (default: the demo's)")
    parser.add_argument("--json", type=Path, help=f"where to write (default: a new file in {HISTORY.name}/)")
    options = parser.parse_args(argv)
    options.requests = options.requests or (QUICK_REQUESTS if options.quick else REQUESTS)
    options.faults = options.faults or (QUICK_FAULTS if options.quick else FAULTS)
    return options


def known_questions(model: Path, scratch: Path, count: int) -> list[Known]:
    """The pool, with the answers of one plain engine; that is started only if this machine has never learnt them."""
    questions = candidates(count, seed=POOL_SEED)

    def learn_now() -> list[Known]:
        print(f"  one plain engine answers {len(questions)} questions first", flush=True)
        with rig_in(model, scratch) as rig:
            part = start_plain(rig, "plain", "0-1")
            wait_engines([part])
            return learn(questions, url=part.url, model=str(model))

    return learned(REPOSITORY / ".cache" / "chaos", questions, model=model, learn_now=learn_now)


def break_everything(
    model: Path, scratch: Path, ledger: Ledger, report: Report, pool: list[Known], options: argparse.Namespace
) -> None:
    """The section "faults". Raises TimeoutError when something never becomes well."""
    shared_before = set(processes.SHARED_MEMORY.iterdir())
    with Wire() as wire, rig_in(model, scratch) as rig:
        fleet = Fleet(rig, wire, find=ledger.find)
        traffic = Traffic(
            pool, ledger, model=str(model), router_url=fleet.router_url, router_died_since=fleet.router_died_since
        )
        plan = faults(options.faults, seed=ledger.seed)
        injector = Injector(fleet, traffic, ledger, plan=plan, requests=options.requests)
        fleet.start()
        injector.heal()
        traffic.start()
        try:
            injector.run(deadline_s=RUN_S)
            injector.heal()
        finally:
            fleet.let_go()
            report.equal("every client came back", traffic.stop(), True)
            injector.close()
            _judge(report, ledger, options)
        injector.heal()
        _judge_leaks(report, rig, fleet)
        _judge_service(report, rig, ledger, pool, str(model))
    left = _left_in_shared_memory(fleet, shared_before)
    report.equal("leaked: processes and files in /dev/shm", left, [])


def _judge(report: Report, ledger: Ledger, options: argparse.Namespace) -> None:
    state, ended, done = ledger.state, ledger.wishes_ended, len(ledger.state.faults_done)
    report.bar("requests that ended", ended, f">= {options.requests}", ended >= options.requests)
    report.bar("faults", done, f">= {options.faults}", done >= options.faults)
    for kind, count in ledger.violations.items():
        names = {"late": "past their deadline", "unclean": "neither answer nor clean error"}
        report.equal(f"requests: {names.get(kind, kind)}", count, 0)
    others = len(state.findings) - sum(ledger.violations.values())
    report.bar("other findings (a part ended by itself)", max(0, others), "0", others <= 0)
    right = state.outcomes.get("right", 0)
    report.bar("answered, and rightly", right, ">= half of all", right >= ended / 2)
    report.figures |= {
        "outcomes": state.outcomes, "turned_away_and_came_again": state.turned_away, "right_answers_by_way": state.ways,
        "errors": state.errors, "faults": table(state.faults), "slowest": state.slowest, "findings": state.findings,
        "seconds": round(state.seconds),
    }  # fmt: skip
    for victim, phases in table(state.faults).items():
        print(f"    {victim:<16} {', '.join(f'{count} x {phase}' for phase, count in phases.items())}")


def _judge_leaks(report: Report, rig: Rig, fleet: Fleet) -> None:
    """Healed, and asked nothing: everything must be free."""
    quiet = unleased(rig.tool("a"), rig.tool("b"), deadline_s=QUIET_S)
    report.equal("free: every lease, slot and half of a handoff (and the books agree)", quiet, True)
    under_way = {"router": _gauge(rig.url, "pdx_router_inflight")}
    for name, part in fleet.engines.items():
        gauges = ("vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc")
        under_way[name] = sum(_gauge(part.url, gauge) for gauge in gauges)
    report.equal("leaked: requests and KV blocks in router and engines", {k: v for k, v in under_way.items() if v}, {})
    report.figures["engine_starts"] = dict(fleet.starts)


def _judge_service(report: Report, rig: Rig, ledger: Ledger, pool: list[Known], model: str) -> None:
    """After all of it, pairs serve as on the first day."""
    right = paired = 0
    for number in range(LAST_WISHES):
        one = wish(number, seed=~ledger.seed, pool=pool)
        known = pool[one.question]
        call = Call(rig.url + known.question.path, body_of(one, known, model), deadline_s=DEADLINE_S)
        heard = call.run()
        verdict = judge(one, known.answer(one.max_tokens), heard, left=False, router_died=False, deadline_s=DEADLINE_S)
        right += verdict.kind == "right"
        paired += "x-pdx-prefill" in heard.headers
    report.equal("healed: answered rightly", right, LAST_WISHES)
    report.equal("healed: by pairs", paired, LAST_WISHES)


def _left_in_shared_memory(fleet: Fleet, before: set[Path]) -> list[str]:
    try:
        wait_until(lambda: not fleet.stray_shared_memory(before), SHARED_MEMORY_S, "shared memory is given back")
    except TimeoutError:
        return fleet.stray_shared_memory(before)
    return []


def _gauge(url: str, name: str) -> float:
    """The sum of a metric over its labels. Raises OSError."""
    target = urlsplit(url)
    connection = http.client.HTTPConnection(target.hostname or "", target.port, timeout=10)
    try:
        connection.request("GET", "/metrics")
        lines = connection.getresponse().read().decode().splitlines()
    finally:
        connection.close()
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith((f"{name} ", f"{name}{{")))


if __name__ == "__main__":
    sys.exit(main())

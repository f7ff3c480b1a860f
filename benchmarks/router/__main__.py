"""What a router adds, by vllm-router's method: closed loops of 1 and 64 clients against engines that compute nothing.

Clients and engines on one core, the router on the other; times are those of the router less those without one, all arms
in turns. Two prefill and two decode engines, which say that they compute 5,000 tokens a second; both routers run as
they do by default, but ours without a limit to what waits in an engine, for vllm-router has none and 64 clients are
more; vllm-router in its PD mode. No two prompts are the same, so that pdx-router has them tokenized
first, as long as engines answer that soon enough; "the same prompt" is one whose ids it remembers. Then streams: as
many tokens a second as one worker passes on, and two, each of them with a share of the core so that two fit on it. The
full run takes about 6 minutes, the quick one 2.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.harness import quota
from benchmarks.harness.arms import DECODE_CPUS, PREFILL_CPUS, Scratch
from benchmarks.harness.measure import median, percentile, table
from benchmarks.harness.part import Part, cores_of
from benchmarks.harness.peers import FRONT_S, vllm_router
from benchmarks.harness.report import Report, options
from benchmarks.harness.rig import Rig, get, wait_until
from benchmarks.router.load import NUMBER, Samples, closed_loop
from benchmarks.router.mock import EACH, MODEL, ROLES
from pdx.launch.ports import free_ports

TOKENS = 8
PROMPT = "The quick brown fox jumps over the lazy dog. " * 50  # some 512 tokens
CLIENTS = 64
STREAM_TOKENS = 512
OFFERED_PER_S = 22_000  # of streamed tokens, by all clients together
SHARE = 0.2  # of a core, for each worker whose scaling is looked at
OVERLOAD = 30_000  # tokens a second offered to each of these, for a whole core: more than it can pass on
WARM_REQUESTS = 200
READY_S = 30.0
ADDED_MS_MAX, TOKENS_PER_S_MIN, SCALING_MIN = 1.0, 15_000, 1.7


@dataclass(frozen=True)
class Plan:
    """How much is run."""

    rounds: int
    alone: int  # requests of one client, a round
    together: int  # of 64
    streams: int


FULL, QUICK = Plan(8, 400, 3000, 256), Plan(3, 200, 1000, 128)


@dataclass
class Arm:
    """A way to the engines, and what was seen of it."""

    name: str
    url: str
    part: Part | None = None
    prompt: str = NUMBER.decode() + PROMPT
    one: Samples = field(default_factory=Samples)
    many: Samples = field(default_factory=Samples)
    cpu_s: float = 0.0  # of the router, for the requests of `many`
    asked: int = 0  # requests so far: no two have the same number

    def run(self, plan: Plan) -> None:
        _into(self.one, self.ask(1, plan.alone))
        before = self.part.cpu_seconds() if self.part else 0.0
        _into(self.many, self.ask(CLIENTS, plan.together))
        self.cpu_s += (self.part.cpu_seconds() if self.part else 0.0) - before

    def ask(self, clients: int, requests: int) -> Samples:
        self.asked += requests
        return ask(self.url, clients=clients, requests=requests, prompt=self.prompt, first=self.asked - requests)


def ask(
    url: str,
    *,
    clients: int,
    requests: int,
    tokens: int = TOKENS,
    itl_s: float = 0.0,
    prompt: str = PROMPT,
    first: int = 0,
) -> Samples:
    # The time between tokens travels as the temperature: every router passes that on, and no mock samples.
    body = {"model": MODEL, "prompt": prompt, "max_tokens": tokens, "stream": True, "temperature": itl_s}
    return closed_loop(url, json.dumps(body).encode(), clients=clients, requests=requests, tokens=tokens, first=first)


def _into(all_of_them: Samples, more: Samples) -> None:
    all_of_them.first_s += more.first_s
    all_of_them.whole_s += more.whole_s
    all_of_them.errors += more.errors
    all_of_them.tokens += more.tokens
    all_of_them.wall_s += more.wall_s


@contextmanager
def engines(rig: Rig, folder: Path) -> Iterator[dict[str, list[str]]]:
    """The mock engines, announced to the rig's router, which has them when this begins."""
    file = folder / f"mock-{len(rig.parts)}.json"
    command = [
        *(sys.executable, "-m", "benchmarks.router.mock", "--key", str(folder / "cluster.key")),
        *("--publish", str(file), "--control", rig.control),
    ]
    part = rig.start_program("mock", command, cpus=PREFILL_CPUS)
    wait_until(file.exists, READY_S, f"mock engines listen; see {part.log}")
    rig.wait_routable(len(ROLES) * EACH)
    yield json.loads(file.read_text())
    part.stop()
    rig.forget(part)


def start_peer(rig: Rig, where: dict[str, list[str]]) -> Part:
    port, metrics_port = free_ports(2)
    command = [vllm_router(), "--vllm-pd-disaggregation", "--port", str(port), "--prometheus-port", str(metrics_port)]
    command += [word for role in ROLES for url in where[role] for word in (f"--{role}", url)]
    part = rig.start_program("vllm-router", command, cpus=DECODE_CPUS)
    part.url = f"http://127.0.0.1:{port}"
    wait_until(lambda: get(f"{part.url}/v1/models") == 200, FRONT_S, f"vllm-router has its engines; see {part.log}")
    return part


def measure_requests(scratch: Scratch, plan: Plan, report: Report) -> list[Arm]:
    rig = scratch.rig("requests")
    router = rig.start_router("--policy", "prefix", "--max-waiting", "0", cpus=DECODE_CPUS)
    with engines(rig, scratch.folder / "requests") as where:
        arms = [Arm("direct", where["decode"][0]), Arm("pdx-router", router.url, router)]
        arms.append(Arm("pdx-router, the same prompt", router.url, router, prompt=PROMPT))
        try:
            peer = start_peer(rig, where)
            arms.append(Arm("vllm-router", peer.url, peer))
        except Exception as error:  # noqa: BLE001 - a peer that does not start is a line of the report, not its end
            report.progress(f"without vllm-router: {error}")
        for arm in arms:
            arm.ask(8, WARM_REQUESTS)
        for number in range(plan.rounds):
            for arm in arms[number % len(arms) :] + arms[: number % len(arms)]:
                arm.run(plan)
            report.progress(f"round {number + 1} of {plan.rounds}")
        # Who waits for ids and who is placed by his length is the router's choice, by how soon engines answer.
        report.figures["prompts by where their ids are from"] = _ids_by(router.url)
        for arm in arms:
            if arm.part is not None:
                report.figures[f"{arm.name} RSS MiB"] = round(_rss_bytes(arm.part) / (1 << 20), 1)
    return arms


def judge_requests(arms: list[Arm], report: Report) -> None:
    direct, rows = arms[0], []
    for arm in arms:
        added_1 = (median(arm.one.first_s) - median(direct.one.first_s)) * 1e3
        added_64 = (percentile(arm.many.first_s, 99) - percentile(direct.many.first_s, 99)) * 1e3
        mean_us = (
            sum(arm.one.first_s) / len(arm.one.first_s) - sum(direct.one.first_s) / len(direct.one.first_s)
        ) * 1e6
        cpu = arm.cpu_s / len(arm.many.first_s) * 1000
        found = {
            "added TTFT p50 ms, c=1": round(added_1, 3),
            "added TTFT p99 ms, c=1": round(
                (percentile(arm.one.first_s, 99) - percentile(direct.one.first_s, 99)) * 1e3, 3
            ),
            "mean minus direct us, c=1": round(mean_us),
            "TTFT p50 ms, c=64": round(median(arm.many.first_s) * 1e3, 2),
            "added TTFT p99 ms, c=64": round(added_64, 2),
            "requests/s, c=64": round(len(arm.many.first_s) / arm.many.wall_s),
            "CPU s per 1000 requests": round(cpu, 3),
            "errors": arm.one.errors + arm.many.errors,
        }
        report.figures[arm.name] = found
        rows.append((arm.name, *found.values()))
    table("Of requests with 8 tokens, after some 512", ("", *report.figures["direct"]), rows)
    pdx = report.figures["pdx-router"]
    report.bar("added TTFT p50, one client", pdx["added TTFT p50 ms, c=1"], f"≤ {ADDED_MS_MAX}",
               pdx["added TTFT p50 ms, c=1"] <= ADDED_MS_MAX, unit="ms")  # fmt: skip
    report.equal("requests that went wrong", sum(report.figures[arm.name]["errors"] for arm in arms), 0)


def measure_streams(scratch: Scratch, plan: Plan, report: Report, *, workers: int, share: float | None) -> float:
    """Tokens a second through so many workers, each with this share of the router's core."""
    name = f"streams-{workers}-{share or 'all'}"
    rig = scratch.rig(name)
    # A process id is all that tells a worker: so always the same program with hub and workers, unless it has the core.
    flags = ("--workers", str(workers)) if share else ()
    router = rig.start_router("--policy", "prefix", "--max-waiting", "0", *flags, cpus=DECODE_CPUS)
    with engines(rig, scratch.folder / name):
        rate = OFFERED_PER_S if share is None else OVERLOAD * share * workers
        itl_s = CLIENTS / rate
        ask(router.url, clients=CLIENTS, requests=CLIENTS, tokens=32)
        before = router.cpu_seconds()
        if share is None:
            seen = ask(router.url, clients=CLIENTS, requests=plan.streams, tokens=STREAM_TOKENS, itl_s=itl_s)
        else:
            serving = sorted(router.pids)[2:] if workers > 1 else router.pids
            with quota.limited(serving, share):
                seen = ask(router.url, clients=CLIENTS, requests=plan.streams, tokens=STREAM_TOKENS, itl_s=itl_s)
        cpu = router.cpu_seconds() - before
    report.equal(f"streams that went wrong ({name})", seen.errors, 0)
    report.figures[name] = {
        "tokens/s": round(seen.tokens / seen.wall_s),
        "offered tokens/s": round(rate),
        "router CPU s": round(cpu, 2),
        "tokens per CPU s": round(seen.tokens / cpu) if cpu else 0,
        "wall s": round(seen.wall_s, 2),
    }
    report.progress(f"{name}: {report.figures[name]}")
    router.stop()
    rig.forget(router)
    return seen.tokens / seen.wall_s


def judge_streams(scratch: Scratch, plan: Plan, report: Report) -> None:
    alone = measure_streams(scratch, plan, report, workers=1, share=None)
    report.bar("streamed tokens a second, one worker", round(alone), f"≥ {TOKENS_PER_S_MIN}", alone >= TOKENS_PER_S_MIN)
    reason = quota.why_not()
    if reason:
        report.progress(f"scaling was not looked at: {reason}")
        return
    one = measure_streams(scratch, plan, report, workers=1, share=SHARE)
    two = measure_streams(scratch, plan, report, workers=2, share=SHARE)
    report.bar("two workers beside one", round(two / one, 2), f"≥ {SCALING_MIN}", two / one >= SCALING_MIN, unit="×")


def _ids_by(url: str) -> dict[str, int]:
    with urllib.request.urlopen(f"{url}/metrics", timeout=READY_S) as reply:
        told = re.findall(r'^pdx_router_prompts_total\{ids="(\w+)"\} ([0-9.e+]+)', reply.read().decode(), re.MULTILINE)
    return {ids: int(float(count)) for ids, count in told}


def _rss_bytes(part: Part) -> int:
    pages = [int(Path(f"/proc/{pid}/statm").read_text().split()[1]) for pid in part.pids]
    return sum(pages) * os.sysconf("SC_PAGE_SIZE")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="pdx bench router",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="examples:\n  pdx bench router\n  pdx bench router --quick --only requests",
    )
    options(parser)
    parser.add_argument("--only", choices=("requests", "streams"), help="one of the two parts")
    chosen = parser.parse_args(argv)
    plan, report = QUICK if chosen.quick else FULL, Report("router")
    os.sched_setaffinity(0, cores_of(PREFILL_CPUS))  # with the engines: the routers have the other core
    with Scratch(chosen.model or Path(MODEL)) as scratch:
        if chosen.only != "streams":
            judge_requests(measure_requests(scratch, plan, report), report)
        if chosen.only != "requests":
            judge_streams(scratch, plan, report)
    report.write(chosen.json)
    return 0 if report.all_hold else 1


if __name__ == "__main__":
    sys.exit(main())

"""Is the transfer hidden? Links of 0.1 to 1.5 times what prefill produces, between two network namespaces.

A prefill engine and its pdxd live in one namespace, a decode engine and its pdxd in another; the wire between them is
slowed to rho = production rate / link rate, with the production rate measured here first. What is exposed of every
transfer is read from the daemons' traces (see `exposure`), and compared with what can't be hidden. Beside it: the same
daemons pushing only after prefill (see `late`), and vLLM's NixlConnector over TCP on the same wire. That has no traces:
its figure is the client's, from prefill's last byte to the first token, less a decode step, hence more than its
transfer (its proxy, admission at decode). Needs root.
The full run takes 12 to 35 minutes, as fast as the machine computes.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec

from benchmarks.harness.arms import DAEMON_SETTINGS, DECODE_CPUS, ENGINE_FLAGS, PREFILL_CPUS, Arm, Scratch, wait_engines
from benchmarks.harness.exposure import Exposure, read_exposure
from benchmarks.harness.measure import completion, median, pin_client, prompt_of, stream, table
from benchmarks.harness.netns import WIRE_DEVICE, Wire, why_not
from benchmarks.harness.part import Part
from benchmarks.harness.peers import TCP, calm_progress_threads, start_front, start_nixl
from benchmarks.harness.relay import Relay
from benchmarks.harness.report import Report, options
from benchmarks.harness.rig import counter, wait_until
from benchmarks.model import build
from benchmarks.naive.late import after_prefill
from pdx.wire import Ask

RHOS = (0.1, 0.5, 0.9, 1.5)
PROMPT_OF_CHUNK = {256: 2048, 2048: 2048, 3500: 3500}  # prompt-chunk budget -> tokens of the prompts
DEADLINE_S = 120.0
LANDED_S = 60.0
WARM_TOKENS = 3500
# Pushing after prefill is silent for a whole prefill, which a product's budgets take for a dead peer.
LONG_BUDGETS = ("--handoff-slab-s", "60", "--handoff-total-s", "120")
STEPS = 8  # tokens of an answer by which a decode step is timed
NIXL_SEED = 10_000
GOODPUT_S = 0.5
OPEN_BYTES_PER_S = 125e6  # for what is not measured on a slow wire: some 14 times what this engine produces


@dataclass(frozen=True)
class Plan:
    """How much is run."""

    prompt_of_chunk: dict[int, int]
    rhos: tuple[float, ...]
    repeats: int
    nixl_chunk: int


FULL = Plan(PROMPT_OF_CHUNK, RHOS, repeats=3, nixl_chunk=2048)
QUICK = Plan({512: 1024}, (0.5, 1.5), repeats=2, nixl_chunk=512)


@dataclass(frozen=True)
class Point:
    """One link rate with one prompt-chunk budget."""

    chunk: int
    rho: float
    link_bytes_per_s: float  # asked for
    goodput_bytes_per_s: float  # measured through the same wire
    pushed: list[Exposure]
    late: Exposure


class TwoHosts:
    """The pair on both ends of the wire; the prefill engine is started anew for every prompt-chunk budget."""

    def __init__(self, scratch: Scratch, wire: Wire) -> None:
        self._scratch, self._wire = scratch, wire
        self._seed = 0
        self.rig = rig = scratch.rig("links")
        rig.start_router(*LONG_BUDGETS, host=wire.outside, cpus=DECODE_CPUS)
        for name, host, cpus in (("source", wire.source, PREFILL_CPUS), ("target", wire.target, DECODE_CPUS)):
            rig.start_daemon(
                name, cpus=cpus, prefix=host.prefix, module="benchmarks.naive.late", host=host.wire, **DAEMON_SETTINGS
            )
        self._start_engine("D", "decode", ())
        self.source, self.target = rig.tool("source"), rig.tool("target")
        self.late = rig.settings_of("source").run_path

    @contextlib.contextmanager
    def with_chunk(self, chunk: int) -> Iterator[Arm]:
        """The pair with this budget, warm."""
        self._wire.shape(OPEN_BYTES_PER_S)
        prefill = self._start_engine("P", "prefill", ("--max-num-batched-tokens", str(chunk)))
        self.rig.wait_routable(2)
        arm = Arm(self._scratch, f"pdx, chunks of {chunk}", self.rig.url, list(self.rig.parts), ready=lambda: True)
        self.push(WARM_TOKENS)
        yield arm
        prefill.stop()
        self.rig.forget(prefill)

    def push(self, tokens: int) -> Exposure:
        """One new prompt from one host to the other, its pages verified by the decode engine."""
        self._seed += 1
        verified = counter(self.target, "loads_ok")
        timing = stream(self.rig.url, completion(self.rig.model, prompt_of(tokens, self._seed), 2), DEADLINE_S)
        handoff = timing.headers.get("x-pdx-handoff", "none")
        if not timing.good or handoff == "none":
            raise SystemExit(f"no handoff: status {timing.status}, {timing.headers.get('x-pdx-reason', timing.error)}")
        wait_until(lambda: counter(self.target, "loads_ok") > verified, LANDED_S, "decode has verified the pages")
        exposure = self._exposure(bytes.fromhex(handoff))
        if exposure is None:
            raise SystemExit("the daemons' traces do not hold the whole handoff")
        return exposure

    def stop(self) -> None:
        """Its memory and cores are for the next pair."""
        for part in reversed(self.rig.parts):
            part.stop()

    def _exposure(self, handoff: bytes) -> Exposure | None:
        events = [
            event
            for tool in (self.source, self.target)
            for event in tool.ask(Ask(verb="trace", handoff_id=handoff)).body["events"]
        ]
        page_bytes = counter(self.source, "bytes_put") // counter(self.source, "pages_put")
        return read_exposure(events, page_bytes=page_bytes)

    def _start_engine(self, name: str, role: str, flags: tuple[str, ...]) -> Part:
        host, daemon, cpus = (
            (self._wire.source, "source", PREFILL_CPUS)
            if role == "prefill"
            else (self._wire.target, "target", DECODE_CPUS)
        )
        return self.rig.start_engine(
            name, role, daemon, cpu=cpus, flags=(*ENGINE_FLAGS, *flags), host=host.management, prefix=host.prefix
        )


def sweep(hosts: TwoHosts, wire: Wire, plan: Plan, report: Report) -> list[Point]:
    points = []
    for chunk, tokens in plan.prompt_of_chunk.items():
        with hosts.with_chunk(chunk) as arm:
            production = median([hosts.push(tokens).production_bytes_per_s for _ in range(plan.repeats)])
            print(f"chunks of {chunk}: KV is produced at {production / 1e6:.2f} MB/s", flush=True)
            for rho in plan.rhos:
                wire.shape(production / rho)
                goodput = wire.goodput(seconds=GOODPUT_S)
                pushed = [hosts.push(tokens) for _ in range(plan.repeats)]
                with after_prefill(hosts.late):
                    late = hosts.push(tokens)
                points.append(Point(chunk, rho, production / rho, goodput, pushed, late))
                exposed_ms = ", ".join(f"{push.exposed_s * 1e3:.1f}" for push in pushed)
                print(f"  rho {rho:g}: {exposed_ms} ms exposed; {late.exposed_s * 1e3:.0f} pushed late", flush=True)
            report.arm(arm)
    return points


def sweep_nixl(scratch: Scratch, wire: Wire, points: list[Point], plan: Plan, report: Report) -> dict[float, float]:
    """NixlConnector on the same wire: prefill's last byte to the client's first token, less a decode step; by rho."""
    chunk, tokens = plan.nixl_chunk, plan.prompt_of_chunk[plan.nixl_chunk]
    rig = scratch.rig("nixl")
    engines = [
        start_nixl(
            rig, name, cpus, lanes=TCP, flags=("--max-num-batched-tokens", str(chunk)), host=host.management,
            prefix=host.prefix, environment={"UCX_NET_DEVICES": WIRE_DEVICE},
        )
        for name, cpus, host in (("P", PREFILL_CPUS, wire.source), ("D", DECODE_CPUS, wire.target))
    ]  # fmt: skip
    wait_engines(engines)
    gaps: dict[float, float] = {}
    with Relay() as relay:
        relay.target = engines[0].url
        front = start_front(rig, "proxy", relay.url, engines[1].url)
        arm = Arm(scratch, "NixlConnector", front.url, rig.parts, ready=lambda: True)
        calm_progress_threads(engines)

        def gap_s(seed: int) -> float:
            timing = stream(front.url, completion(rig.model, prompt_of(tokens, seed), STEPS), DEADLINE_S)
            if not timing.good:
                raise SystemExit(f"NixlConnector: status {timing.status}, {timing.error}")
            return (timing.token_ns[0] - relay.answered(timing.sent_ns).last_byte_ns) / 1e9 - median(timing.gaps_s)

        wire.shape(OPEN_BYTES_PER_S)
        gap_s(NIXL_SEED)
        for number, point in enumerate(points):
            if point.chunk == chunk:
                wire.shape(point.link_bytes_per_s)
                seeds = range(plan.repeats - 1)
                gaps[point.rho] = median([gap_s(NIXL_SEED + 100 * number + seed + 1) for seed in seeds])
        report.arm(arm)
    arm.stop()
    return gaps


def judge(points: list[Point], nixl: dict[float, float], plan: Plan, report: Report) -> None:
    """The bars: what is exposed above what may be, each handoff by its own computing time."""
    rows = []
    for point in points:
        link, rho = point.goodput_bytes_per_s, point.rho
        exposed = median([push.exposed_s for push in point.pushed])
        allowed = median([push.allowed_s(rho, link) for push in point.pushed])
        excess = median([push.exposed_s - push.allowed_s(rho, link) for push in point.pushed])
        name = f"rho {rho:g}, {point.chunk}-token chunks"
        report.bar(f"{name}: exposed", round(exposed * 1e3, 1), f"<= {allowed * 1e3:.1f}", excess <= 0, unit="ms")
        late_misses = point.late.exposed_s > point.late.allowed_s(rho, link)
        report.bar(
            f"{name}: pushing after prefill misses that", round(point.late.exposed_s * 1e3, 1),
            f"> {allowed * 1e3:.1f}", late_misses, unit="ms",
        )  # fmt: skip
        first = point.pushed[0]
        rows.append((
            name, f"{point.link_bytes_per_s * 8e-6:.1f}", f"{link / 1e6:.2f}",
            f"{median([push.production_bytes_per_s for push in point.pushed]) / link:.2f}",
            f"{median([push.compute_s for push in point.pushed]):.2f}", f"{first.total_bytes / link:.2f}",
            f"{first.last_slabs_bytes / link * 1e3:.1f}", f"{allowed * 1e3:.1f}", f"{exposed * 1e3:.1f}",
            f"{point.late.exposed_s * 1e3:.0f}",
            f"{nixl[rho] * 1e3:.0f}" if rho in nixl and point.chunk == plan.nixl_chunk else "-",
        ))  # fmt: skip
    report.figures["columns"], report.figures["rows"] = COLUMNS, rows
    title = "Exposed after the last computed layer; late: pushed after prefill; NIXL: NixlConnector, to its client"
    table(title, COLUMNS, rows)


COLUMNS = (
    "", "link Mbit/s", "seen MB/s", "rho seen", "compute s", "wire s", "last slabs ms", "may be ms", "exposed ms",
    "late ms", "NIXL ms",
)  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(prog="pdx bench links", description=__doc__.partition("\n")[0])
    options(parser)
    chosen = parser.parse_args()
    if reason := why_not() or ("" if find_spec("nixl") else "nixl is missing: pip install 'pdx-kv[bench]'"):
        print(f"links: {reason}", file=sys.stderr)
        return 2
    pin_client()
    report, plan = Report("links"), QUICK if chosen.quick else FULL
    with Wire() as wire, Scratch(chosen.model or build()) as scratch:
        hosts = TwoHosts(scratch, wire)
        points = sweep(hosts, wire, plan, report)
        hosts.stop()
        judge(points, sweep_nixl(scratch, wire, points, plan, report), plan, report)
    report.write(chosen.json)
    return 0 if report.all_hold else 1


if __name__ == "__main__":
    sys.exit(main())

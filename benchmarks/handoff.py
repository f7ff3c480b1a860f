"""How long after prefill's answer comes the first token of decode? Paired journey, against vLLM's NixlConnector.

The gap runs from the last byte of prefill's answer (stamped by a relay before the prefill engine, the same for every
arm) to the first token at the client. Of it the decode engine itself takes its floor (admission, tokens in and out) and
one decode step. What is left is the hand-over: for pdx the scatter of the last pages, for NixlConnector the whole
transfer. All of it runs on loopback over TCP. The naive variant pushes only after prefill and must miss the bar.
The full run takes 10 to 35 minutes, as fast as the engines compute.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass

from benchmarks.harness.arms import Scratch, pdx_pair
from benchmarks.harness.measure import fit, memcpy_rate, pin_client, table
from benchmarks.harness.peers import TCP, nixl_pairs
from benchmarks.harness.relay import Relay
from benchmarks.harness.report import Report, options
from benchmarks.harness.ways import Detours, Samples, Way, failed_loads, floor_of, interleaved, measure, verified
from benchmarks.model import build

EXTRA_MS = 4.0
NIXL_FACTOR, NIXL_FROM_TOKENS = 0.5, 2048
PAIRED, NAIVE, AFTER = "paired", "paired, pushed after prefill", "after prefill"
NIXL, ROUTER = "NixlConnector", "vllm-router"
ROUTED = f"{NIXL}, {ROUTER}"


@dataclass(frozen=True)
class Plan:
    sizes: tuple[int, ...]
    rounds: int
    fronts: tuple[str, ...]
    after: bool = True  # also the journey that asks decode after prefill


FULL = Plan((257, 513, 1025, 2049, 3585), 5, ("proxy", ROUTER))
QUICK = Plan((257, 513, 1025, 2049), 2, ("proxy",), after=False)


def run(scratch: Scratch, report: Report, plan: Plan) -> None:
    with Relay() as pdx_relay, Relay() as nixl_relay:
        peers = nixl_pairs(scratch, NIXL, plan.fronts, lanes=TCP, relay=nixl_relay)
        pair = pdx_pair(scratch, "pdx", daemon_module="benchmarks.naive.late", relay=pdx_relay)
        ways = [Way(PAIRED, pair, "paired"), Way(NAIVE, pair, "paired", late=True)]
        ways += [Way(AFTER, pair, "after")] if plan.after else []
        ways += [Way(f"{NIXL}, {front}", peer) for front, peer in zip(plan.fronts, peers, strict=True)]
        report.progress("all engines serve")
        with ways[0].active():
            bytes_of = verified(pair, ways[0], plan.sizes)
            failed_before = failed_loads(pair)
        for peer in peers:
            with peer.active():
                peer.warm(plan.sizes)
        samples, detours = Samples(), Detours()
        for number, way in interleaved(ways, plan.rounds):
            relay = pdx_relay if way.arm is pair else nixl_relay
            for size in plan.sizes:
                seed = number * len(ways) + ways.index(way)
                samples.add(way, size, measure(way, size, seed, detours, relay, find_floor=floor_of))
            report.progress(f"round {number + 1} of {plan.rounds}: {way.name}")
        detours.judge(report)
        with pair.active():
            report.equal("loads that failed while timing", failed_loads(pair) - failed_before, 0)
        for arm in scratch.arms:
            report.arm(arm)
    report.figures["memcpy_gb_per_s"] = round(memcpy_rate() / 1e9, 2)
    judge(report, plan, samples, [way.name for way in ways], bytes_of)


def judge(report: Report, plan: Plan, samples: Samples, ways: list[str], bytes_of: dict[int, int]) -> None:
    peers = [way for way in ways if way.startswith(NIXL)]
    for size in plan.sizes:
        floor = samples.floor((PAIRED, NAIVE, AFTER), size)
        allowed_ms = 1e3 * (floor.engine_s + floor.step_s) + EXTRA_MS
        parts = f"<= {allowed_ms:.1f} = floor {1e3 * floor.engine_s:.1f} + step {1e3 * floor.step_s:.1f} + {EXTRA_MS:g}"
        gap_ms, naive_ms = (1e3 * samples.gap_s(way, size) for way in (PAIRED, NAIVE))
        report.bar(f"gap at {size} tokens", round(gap_ms, 1), parts, gap_ms <= allowed_ms, unit="ms")
        if ROUTED in peers:
            first_ms, theirs_ms = (1e3 * samples.first_token_s(way, size) for way in (PAIRED, ROUTED))
            report.bar(f"first token at {size} tokens against {ROUTED}", round(first_ms, 1), f"<= {theirs_ms:.1f}",
                       first_ms <= theirs_ms, unit="ms")  # fmt: skip
        if size < NIXL_FROM_TOKENS:
            continue
        report.bar(f"gap at {size} tokens, naive variant misses it", round(naive_ms, 1), f"> {allowed_ms:.1f}",
                   naive_ms > allowed_ms, unit="ms")  # fmt: skip
        ours_ms = 1e3 * samples.overhead_s(PAIRED, size)
        for peer in peers:
            half_ms = NIXL_FACTOR * 1e3 * samples.overhead_s(peer, size)
            report.bar(f"gap - ITL at {size} tokens against {peer}", round(ours_ms, 1),
                       f"<= {half_ms:.1f} = {NIXL_FACTOR} x theirs", ours_ms <= half_ms, unit="ms")  # fmt: skip
    show(report, plan, samples, ways, bytes_of)


def show(report: Report, plan: Plan, samples: Samples, ways: list[str], bytes_of: dict[int, int]) -> None:
    ceiling = report.figures["memcpy_gb_per_s"] * 1e9
    rows = []
    for size in plan.sizes:
        floor = samples.floor((PAIRED, NAIVE, AFTER), size)
        for way in ways:
            rows.append((
                size, way, 1e3 * samples.gap_s(way, size), 1e3 * samples.step_s(way, size),
                1e3 * samples.overhead_s(way, size), 1e3 * floor.engine_s, 1e3 * bytes_of[size] / ceiling,
                1e3 * samples.first_token_s(way, size), 1e3 * samples.second_gap_s(way, size),
            ))  # fmt: skip
    columns = ("tokens", "way", "gap ms", "ITL ms", "gap - ITL ms", "engine floor ms", "memcpy of its KV ms",
               "first token ms", "second gap ms")  # fmt: skip
    table("hand-over, medians", columns, rows)
    fits = {}
    for way in ways:
        found = fit([bytes_of[size] for size in plan.sizes], [samples.overhead_s(way, size) for size in plan.sizes])
        fits[way] = {"fixed_ms": found.fixed_ms, "gb_per_s": found.gb_per_s}
    lines = [(way, each["fixed_ms"], each["gb_per_s"], ceiling / 1e9) for way, each in fits.items()]
    table("gap - ITL as a line over the bytes of KV", ("way", "fixed ms", "GB/s", "ceiling: memcpy GB/s"), lines)
    report.figures |= {"fits": fits, "kv_bytes": bytes_of,
                       "first_second_gap_step_ms": samples.raw()}  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="pdx bench handoff", description=__doc__)
    options(parser)
    flags = parser.parse_args(argv)
    pin_client()
    report = Report("handoff")
    with Scratch(flags.model or build()) as scratch:
        run(scratch, report, QUICK if flags.quick else FULL)
    report.write(flags.json)
    return 0 if report.all_hold else 1


if __name__ == "__main__":
    sys.exit(main())

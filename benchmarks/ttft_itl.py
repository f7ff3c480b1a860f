"""First token, second token and the other streams' gaps, always together: seeded journey against its peers.

The first token has two bars of 5 ms: over a prefill engine alone (plain vLLM on the same core), and over prefill's own
answer to the same request, stamped by a relay before it. What lies between them is what pushing costs prefill.

Arms: the prefill engine alone (plain vLLM on the same core); the pdx pair, seeded; the same pair with each half of the
idea taken away (first token only after decode has it; pages pushed only after prefill), which must miss its bar;
vLLM's NixlConnector pair behind the usual proxy. Idle rounds hold the bars. Then busy rounds: a stream decodes on the
decode engine (on the plain arm: on the one engine) while a prompt arrives, and its gaps are shown beside.
The last step is `vllm bench serve` against each arm. The full run takes about 14 minutes; the quick one leaves out the
peer and the busy rounds.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from benchmarks.harness.arms import Arm, Scratch, pdx_pair, plain
from benchmarks.harness.load import bench_serve
from benchmarks.harness.measure import (
    Background,
    Fit,
    completion,
    fit,
    median,
    memcpy_rate,
    percentile,
    pin_client,
    prompt_of,
    table,
)
from benchmarks.harness.peers import nixl_pair
from benchmarks.harness.relay import Relay
from benchmarks.harness.report import Report, options
from benchmarks.harness.ways import (
    DEADLINE_S,
    Detours,
    Samples,
    Way,
    failed_loads,
    interleaved,
    measure,
    rested_floor_of,
    this_way,
    verified,
)
from benchmarks.model import build
from pdx.errors import PdxError

FIRST_EXTRA_MS, SECOND_EXTRA_MS, COPY_FACTOR = 5.0, 8.0, 1.3
ALONE, SEEDED, NAIVE_FIRST, NAIVE_SECOND, NIXL = (
    "prefill engine alone", "pdx, seeded", "pdx, whole answer after prefill", "pdx, seeded, pushed after prefill",
    "NixlConnector pair",
)  # fmt: skip
STREAM_PROMPT_TOKENS, STREAM_TOKENS = 129, 3000  # two minutes: it is left before
BENCH_OUTPUT_TOKENS = 24


@dataclass(frozen=True)
class Plan:
    sizes: tuple[int, ...]
    rounds: int
    busy_sizes: tuple[int, ...]
    busy_rounds: int
    bench_prompts: int
    bench_tokens: int
    peer: bool


FULL = Plan((257, 513, 1025, 2049, 3457), 5, (513, 2049), 2, bench_prompts=6, bench_tokens=1000, peer=True)
QUICK = Plan((257, 513, 1025, 2049), 1, (), 0, bench_prompts=0, bench_tokens=0, peer=False)


def run(scratch: Scratch, report: Report, plan: Plan) -> None:
    with Relay() as relay:
        run_with(relay, scratch, report, plan)


def run_with(relay: Relay, scratch: Scratch, report: Report, plan: Plan) -> None:
    pair = pdx_pair(scratch, "pdx", daemon_module="benchmarks.naive.late", relay=relay)
    others = [Way(ALONE, plain(scratch, "alone"))]
    others += [Way(NIXL, nixl_pair(scratch, "NixlConnector"))] if plan.peer else []
    seeded = Way(SEEDED, pair, "auto")
    ways = [seeded, Way(NAIVE_SECOND, pair, "auto", late=True), Way(NAIVE_FIRST, pair, "after"), *others]
    report.progress("all engines serve")
    with seeded.active():
        bytes_of = verified(pair, seeded, plan.sizes)
        failed_before = failed_loads(pair)
    for way in others:
        with way.active() as arm:
            arm.warm(plan.sizes)
    samples, detours = Samples(), Detours()
    for number, way in interleaved(ways, plan.rounds):
        for size in plan.sizes:
            stamps = relay if way.arm is pair else None
            find_floor = rested_floor_of if way is seeded else None
            seed = number * len(ways) + ways.index(way)
            samples.add(way, size, measure(way, size, seed, detours, stamps, find_floor=find_floor))
        report.progress(f"round {number + 1} of {plan.rounds}: {way.name}")
    busy = run_busy(ways, report, plan, detours)
    detours.judge(report)
    with pair.active():
        report.equal("loads that failed while timing", failed_loads(pair) - failed_before, 0)
    report.figures["memcpy_gb_per_s"] = round(memcpy_rate() / 1e9, 2)
    judge(report, plan, samples, bytes_of)
    show(report, plan, samples, busy, [way.name for way in ways], bytes_of)
    if plan.bench_prompts:
        run_bench(scratch, report, plan, [seeded, *others])
    for arm in scratch.arms:
        report.arm(arm)


@dataclass(frozen=True)
class Busy:
    """One prompt that arrived beside a stream. Times in seconds."""

    first_token_s: float
    second_gap_s: float
    others_gaps_s: list[float]  # of the stream, from the prompt's arrival to its second token


def run_busy(ways: list[Way], report: Report, plan: Plan, detours: Detours) -> dict[str, list[Busy]]:
    found: dict[str, list[Busy]] = {way.name: [] for way in ways}
    for number, way in interleaved(ways, plan.busy_rounds):
        for size in plan.busy_sizes:
            seed = 1000 + number * len(ways) + ways.index(way)
            found[way.name].append(beside_stream(way, size, seed, detours))
        report.progress(f"busy round {number + 1} of {plan.busy_rounds}: {way.name}")
    return found


def beside_stream(way: Way, size: int, seed: int, detours: Detours) -> Busy:
    """The stream outlives the prompt and is left then. Raises PdxError if it did not."""
    body = completion(way.arm.model, prompt_of(STREAM_PROMPT_TOKENS, seed), STREAM_TOKENS)
    other = Background(decode_url(way.arm), body, DEADLINE_S)
    other.wait_token(DEADLINE_S)
    _, timing = this_way(way, size, seed, detours)
    stream = other.leave()
    if not stream.token_ns or stream.token_ns[-1] < timing.token_ns[1]:
        raise PdxError(f"{way.name}: the stream beside ended before the prompt's second token: {stream.error}")
    return Busy(timing.first_token_s, timing.second_gap_s, stream.gaps_between(timing.sent_ns, timing.token_ns[1]))


def decode_url(arm: Arm) -> str:
    """Where a stream is asked for that shall decode on the arm's decode engine."""
    names = {part.name for part in arm.parts}
    return arm.part("D").url if "D" in names else arm.url


def judge(report: Report, plan: Plan, samples: Samples, bytes_of: dict[int, int]) -> None:
    for size in plan.sizes:
        over_ms = 1e3 * (samples.first_token_s(SEEDED, size) - samples.first_token_s(ALONE, size))
        report.bar(f"first token at {size}, over the prefill engine alone", round(over_ms, 1), f"<= {FIRST_EXTRA_MS:g}",
                   over_ms <= FIRST_EXTRA_MS, unit="ms")  # fmt: skip
        first_ms, naive_ms = (1e3 * samples.beside_prefill_s(way, size) for way in (SEEDED, NAIVE_FIRST))
        report.bar(f"first token at {size}, beside prefill's own answer", round(first_ms, 1), f"<= {FIRST_EXTRA_MS:g}",
                   first_ms <= FIRST_EXTRA_MS, unit="ms")  # fmt: skip
        report.bar(f"first token at {size}, naive variant misses it", round(naive_ms, 1), f"> {FIRST_EXTRA_MS:g}",
                   naive_ms > FIRST_EXTRA_MS, unit="ms")  # fmt: skip
        floor = samples.floor((SEEDED,), size)
        copy_ms = COPY_FACTOR * bytes_of[size] / report.figures["memcpy_gb_per_s"] / 1e6
        allowed_ms = 1e3 * (floor.step_s + floor.engine_s) + copy_ms + SECOND_EXTRA_MS
        second_ms, naive_ms = (1e3 * samples.second_gap_s(way, size) for way in (SEEDED, NAIVE_SECOND))
        why = (f"<= {allowed_ms:.1f} = step {1e3 * floor.step_s:.1f} + floor {1e3 * floor.engine_s:.1f} + "
               f"{COPY_FACTOR} x copy {copy_ms / COPY_FACTOR:.1f} + {SECOND_EXTRA_MS:g}")  # fmt: skip
        report.bar(
            f"second token after the first at {size}", round(second_ms, 1), why, second_ms <= allowed_ms, unit="ms"
        )
        if size == plan.sizes[-1]:  # on short prompts there is too little to push
            report.bar(f"second token after the first at {size}, naive variant misses it", round(naive_ms, 1),
                       f"> {allowed_ms:.1f}", naive_ms > allowed_ms, unit="ms")  # fmt: skip


def show(
    report: Report, plan: Plan, samples: Samples, busy: dict[str, list[Busy]], ways: list[str], bytes_of: dict[int, int]
) -> None:
    memcpy = report.figures["memcpy_gb_per_s"] * 1e9
    rows = [
        (size, way, 1e3 * samples.first_token_s(way, size), 1e3 * samples.second_gap_s(way, size),
         1e3 * samples.step_s(way, size), 1e3 * samples.first_token_s(ALONE, size), 1e3 * bytes_of[size] / memcpy)
        for size in plan.sizes for way in ways
    ]  # fmt: skip
    table(
        "idle machine, medians",
        ("tokens", "way", "first token ms", "second gap ms", "ITL ms", "ceiling: alone ms", "memcpy of its KV ms"),
        rows,
    )  # fmt: skip
    columns = ("way", "first token ms", "second gap ms", "stream's p99 ITL ms")
    beside = [
        (way, 1e3 * median([each.first_token_s for each in found]), 1e3 * median([each.second_gap_s for each in found]),
         1e3 * percentile([gap for each in found for gap in each.others_gaps_s], 99))
        for way, found in busy.items() if found
    ]  # fmt: skip
    if beside:
        table(f"beside a stream, prompts of {plan.busy_sizes} tokens", columns, beside)

    def line(seconds_of: Callable[[int], float]) -> Fit:
        return fit([bytes_of[size] for size in plan.sizes], [seconds_of(size) for size in plan.sizes])

    fits = {"first token - alone": line(lambda n: samples.first_token_s(SEEDED, n) - samples.first_token_s(ALONE, n))}
    for way in (each for each in ways if each != ALONE):
        fits[f"second gap - ITL, {way}"] = line(partial(samples.second_overhead_s, way))
    rates = [(name, found.fixed_ms, found.gb_per_s, memcpy / 1e9) for name, found in fits.items()]
    table("as lines over the bytes of KV", ("what", "fixed ms", "GB/s", "ceiling: memcpy GB/s"), rates)
    report.figures |= {
        "fits": {name: {"fixed_ms": each.fixed_ms, "gb_per_s": each.gb_per_s} for name, each in fits.items()},
        "kv_bytes": bytes_of, "first_second_gap_step_ms": samples.raw(),
        "beside_a_stream_ms": [dict(zip(columns, row, strict=True)) for row in beside],
    }  # fmt: skip


def run_bench(scratch: Scratch, report: Report, plan: Plan, ways: list[Way]) -> None:
    """The load that everybody knows, two requests at once."""
    kept = {}
    for way in ways:
        with way.active() as arm:
            kept[way.name] = bench_serve(
                arm, scratch.folder, input_tokens=plan.bench_tokens, output_tokens=BENCH_OUTPUT_TOKENS,
                prompts=plan.bench_prompts, at_once=2, seed=7,
            )  # fmt: skip
    columns = ("way", "median TTFT ms", "p99 ITL ms", "median TPOT ms", "tokens/s out")
    names = ("median_ttft_ms", "p99_itl_ms", "median_tpot_ms", "output_throughput")
    table("vllm bench serve", columns, [(way, *(found[name] for name in names)) for way, found in kept.items()])
    report.figures["vllm_bench_serve"] = kept


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="pdx bench ttft_itl", description=__doc__)
    options(parser)
    flags = parser.parse_args(argv)
    pin_client()
    report = Report("ttft_itl")
    with Scratch(flags.model or build()) as scratch:
        run(scratch, report, QUICK if flags.quick else FULL)
    report.write(flags.json)
    return 0 if report.all_hold else 1


if __name__ == "__main__":
    sys.exit(main())

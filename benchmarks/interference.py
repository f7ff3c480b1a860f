"""Why anyone should care: what decode streams feel while 2,000-token prompts arrive, and where a pair loses.

Four streams decode without a pause; prompts come by the clock, the same for every arm, as often as the pair's prefill
engine can take (with a reserve). Arms, one after another, each on the same two cores: the pair; one plain engine on
both at several chunk sizes, vLLM's default among them; two plain engines that take requests in turn, which is the naive
way to use two engines and must miss the bar. First token, second token and the streams' p99 ITL stand together.
Then each arm is idle and takes prompts of several lengths, one by one: there a pair loses to one engine with two cores,
and docs/gain_or_loss.svg draws from those figures where it pays. The full run takes about 12 minutes.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.harness.arms import Arm, PdxPair, Scratch, pdx_pair, serving, start_plain, two_plain, wait_engines
from benchmarks.harness.gain import Measured
from benchmarks.harness.measure import completion, median, percentile, pin_client, prompt_of, stream, table
from benchmarks.harness.pictures import OTHER, PAIR, PLAIN, Mark, Panel, frontier, gain_map
from benchmarks.harness.report import Report, options
from benchmarks.harness.rig import REPOSITORY, counter
from benchmarks.harness.steady import Outcome, percentile_of_time, run_load
from benchmarks.model import build

PDX, TWO = "pdx pair", "two plain engines in turn"  # names of arms; see also plain_name
STREAMS = 4
DEFAULT_CHUNK = 2048  # vLLM's own for a server on this platform
BOTH_CPUS = "0-1"
RESERVE = 1.15  # prompts come so many times slower than the idle pair could prefill them
ITL_SHARE = 0.25
DEADLINE_S = 120.0
IDLE_SEED = 7000
WARM = (3500, 100)
KV_CACHE = ("--kv-cache-memory-bytes", str(512 << 20))  # the streams grow: no arm shall preempt one
LAYERS = 30  # of the demo model
MAP_PROMPTS = (64, 128, 256, 512, 1024, 2048, 3500)
MAP_LINKS = (30e6, 55e6, 100e6, 200e6, 500e6, 1e9, 10e9)
DOCS = REPOSITORY / "docs"


@dataclass(frozen=True)
class Plan:
    chunks: tuple[int, ...]
    prompts: int
    prompt_tokens: int
    idle_tokens: tuple[int, ...]
    idle_repeats: int


FULL = Plan((64, 128, 256, 512, 1024, 2048), prompts=9, prompt_tokens=2000, idle_tokens=(64, 256, 1024, 2048, 3500),
            idle_repeats=2)  # fmt: skip
QUICK = Plan((256, 2048), prompts=4, prompt_tokens=1000, idle_tokens=(64, 1024), idle_repeats=1)


@dataclass(frozen=True)
class Idle:
    """What one prompt after another sees on an idle arm, by its tokens. Seconds."""

    first_s: dict[int, float]
    second_gap_s: dict[int, float]


def ask_idle(arm: Arm, lengths: Sequence[int], repeats: int, *, seed: int) -> Idle:
    first: dict[int, float] = {}
    second: dict[int, float] = {}
    for tokens in lengths:
        timings = []
        for repeat in range(repeats):
            body = completion(arm.model, prompt_of(tokens, seed + repeat), 8)
            timings.append(stream(arm.url, body, DEADLINE_S))
            if not timings[-1].good:
                raise SystemExit(f"{arm.name}: status {timings[-1].status}, {timings[-1].error}")
        first[tokens] = median([timing.first_token_s for timing in timings])
        second[tokens] = median([timing.second_gap_s for timing in timings])
    return Idle(first, second)


class Benchmark:
    """The arms in turn; only one is not stopped."""

    def __init__(self, scratch: Scratch, plan: Plan, report: Report) -> None:
        self._scratch, self._plan, self._report = scratch, plan, report
        self._period_s = 0.0
        self.outcomes: dict[str, Outcome] = {}
        self.idle: dict[str, Idle] = {}
        self.kv_bytes_per_token = 0.0

    def run(self) -> None:
        self._pair()
        for arm in self._plain_arms():
            self._measure(arm.name, [arm], idle=arm.name == plain_name(DEFAULT_CHUNK))
        self._measure(TWO, list(two_plain(self._scratch, TWO, flags=KV_CACHE)), idle=False)

    def _pair(self) -> None:
        pair = pdx_pair(self._scratch, PDX, engine_flags=KV_CACHE)
        with pair.active():
            pair.warm(WARM)
            idle = ask_idle(pair, [self._plan.prompt_tokens], self._plan.idle_repeats, seed=IDLE_SEED)
            self._period_s = RESERVE * idle.first_s[self._plan.prompt_tokens]
            self.kv_bytes_per_token = self._bytes_per_token(pair)
        print(f"a prompt of {self._plan.prompt_tokens:,} tokens every {self._period_s:.2f} s", flush=True)
        self._report.figures["period_s"] = self._period_s
        self._measure(PDX, [pair], idle=True)

    def _plain_arms(self) -> list[Arm]:
        """All chunk sizes, started at once, which takes a third of the time, and stopped until their turn."""
        rig = self._scratch.rig("plain")
        parts = {}
        for chunk in self._plan.chunks:
            budget = () if chunk == DEFAULT_CHUNK else ("--max-num-batched-tokens", str(chunk))
            parts[chunk] = start_plain(rig, f"chunks-{chunk}", BOTH_CPUS, (*KV_CACHE, *budget))
        wait_engines(list(parts.values()))
        arms = [
            Arm(self._scratch, plain_name(chunk), part.url, [part], ready=serving(part))
            for chunk, part in parts.items()
        ]
        for arm in arms:
            arm.pause()
        return arms

    def _measure(self, name: str, arms: list[Arm], *, idle: bool) -> None:
        for arm in arms:
            arm.resume()
            arm.warm(WARM)
        before = sum(sum(arm.cpu_seconds().values()) for arm in arms)
        outcome = run_load(
            [arm.url for arm in arms], arms[0].model, streams=STREAMS, prompts=self._plan.prompts,
            prompt_tokens=self._plan.prompt_tokens, period_s=self._period_s, seed=1,
        )  # fmt: skip
        cpu_s = sum(sum(arm.cpu_seconds().values()) for arm in arms) - before
        self.outcomes[name] = outcome
        ways = Counter(timing.headers.get("x-pdx-way", "alone") for timing in outcome.prompts)
        self._report.figures[name] = {**outcome.figures, "cpu_s": cpu_s, "ways": dict(ways)}
        print(f"  {name}: first token {outcome.first_token_s:.2f} s, p99 ITL "
              f"{percentile(outcome.gaps_s, 99) * 1e3:.0f} ms", flush=True)  # fmt: skip
        if idle:
            self.idle[name] = ask_idle(arms[0], self._plan.idle_tokens, self._plan.idle_repeats, seed=IDLE_SEED)
        for arm in arms:
            self._report.arm(arm)
            arm.stop()

    def _bytes_per_token(self, pair: PdxPair) -> float:
        """Of what was pushed for one prompt of whole blocks."""
        source, _ = pair.tools()
        before, tokens = counter(source, "bytes_put"), 512
        stream(pair.url, completion(pair.model, prompt_of(tokens, 9), 2), DEADLINE_S)
        return (counter(source, "bytes_put") - before) / tokens


def plain_name(chunk: int) -> str:
    return f"plain, chunks of {chunk:,}" + (" (default)" if chunk == DEFAULT_CHUNK else "")


def judge(outcomes: Mapping[str, Outcome], plan: Plan, report: Report) -> None:
    def at(name: str) -> tuple[float, float]:
        return percentile(outcomes[name].gaps_s, 99), outcomes[name].first_token_s

    def by_time_ms(name: str) -> float:
        """Two engines in turn stand still rarely, for a whole prefill: those few gaps are no percentile of so many."""
        return percentile_of_time(outcomes[name].gaps_s, 99) * 1e3

    ways = Counter(timing.headers.get("x-pdx-way", "alone") for timing in outcomes[PDX].prompts)
    report.equal("prompts that went through the pair", ways.total() - ways["alone"], plan.prompts)
    itl_s, first_s = at(PDX)
    allowed_ms = ITL_SHARE * at(plain_name(DEFAULT_CHUNK))[0] * 1e3
    report.bar("p99 ITL of the streams, pdx", round(itl_s * 1e3, 1), f"<= {allowed_ms:.1f}", itl_s * 1e3 <= allowed_ms,
               unit="ms")  # fmt: skip
    ours_ms, naive_ms, allowed_ms = by_time_ms(PDX), by_time_ms(TWO), ITL_SHARE * by_time_ms(plain_name(DEFAULT_CHUNK))
    report.bar("the same by time (the gap that a moment falls into)", round(ours_ms, 1), f"<= {allowed_ms:.1f}",
               ours_ms <= allowed_ms, unit="ms")  # fmt: skip
    report.bar(f"{TWO} miss that", round(naive_ms, 1), f"> {allowed_ms:.1f}", naive_ms > allowed_ms, unit="ms")
    chunks = [plain_name(chunk) for chunk in plan.chunks]
    better = [name for name in chunks if at(name)[0] <= itl_s and at(name)[1] <= first_s]
    report.bar("plain chunk sizes that are as good in p99 ITL and in first token", len(better), "0", not better)
    columns = ["", *next(iter(outcomes.values())).figures]
    rows = [[name, *(f"{value:.3g}" if value < 100 else f"{value:.0f}" for value in outcome.figures.values())]
            for name, outcome in outcomes.items()]  # fmt: skip
    table(f"{STREAMS} streams and a {plan.prompt_tokens:,}-token prompt every {report.figures['period_s']:.1f} s; "
          "the ceiling is each arm without prompts", columns, rows)  # fmt: skip


def show_idle(idle: Mapping[str, Idle], report: Report) -> None:
    pair, alone = idle[PDX], idle[plain_name(DEFAULT_CHUNK)]
    rows: list[list[object]] = []
    for tokens in pair.first_s:
        figures = [pair.first_s[tokens], pair.second_gap_s[tokens], alone.first_s[tokens], alone.second_gap_s[tokens]]
        loss_s = figures[0] + figures[1] - figures[2] - figures[3]
        rows.append([f"{tokens:,}", *(f"{figure * 1e3:.0f}" for figure in figures), f"{loss_s * 1e3:+.0f}"])
    columns = ("tokens", "pdx first", "pdx second gap", "plain first", "plain second gap", "pdx loses")
    table("Idle machine, ms: where a pair loses to one engine with both cores", columns, rows)
    report.figures["idle_ms"] = {"columns": columns, "rows": rows}


def pause_per_token(outcome: Outcome, plan: Plan) -> float:
    """How long each stream stood still for a prompt's load, by the prompt's tokens: what gaps exceed a usual step."""
    usual_s = median(outcome.gaps_s)
    excess_s = sum(gap - usual_s for gap in outcome.gaps_s if gap > 1.5 * usual_s)
    return excess_s / (STREAMS * plan.prompts * plan.prompt_tokens)


def draw(benchmark: Benchmark, plan: Plan, folder: Path, report: Report) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    pair, alone = benchmark.idle[PDX], benchmark.idle[plain_name(DEFAULT_CHUNK)]
    pause = pause_per_token(benchmark.outcomes[PDX], plan)
    measured = Measured(
        plain_first_s=alone.first_s, plain_second_gap_s=median(list(alone.second_gap_s.values())),
        pair_first_s=pair.first_s, pair_second_gap_s=pair.second_gap_s, pair_pause_s_per_token=pause,
        kv_bytes_per_token=benchmark.kv_bytes_per_token, layers=LAYERS, chunk_tokens=DEFAULT_CHUNK,
    )  # fmt: skip
    steps = [percentile(benchmark.outcomes[name].gaps_s, 50) * 1e3 for name in (PDX, plain_name(DEFAULT_CHUNK))]
    panels = [
        Panel(title, lambda tokens, link, people=people: measured.gain_s(tokens, link / 8, streams=people))  # type: ignore[misc]
        for title, people in (("Idle machine", 0), (f"{STREAMS} streams decode meanwhile", STREAMS))
    ]
    lengths = ", ".join(f"{tokens:,}" for tokens in plan.idle_tokens)
    caption = (
        "Green: seconds of waiting that a pdx pair saves for one prompt, all people together, against one plain engine",
        "with the same two cores; red: what it loses. Its asker waits for the second token, others while they pause.",
        f"Measured: prompts of {lengths} tokens on both, over loopback, and the pause of a load. The rest is computed",
        "from that (benchmarks/harness/gain.py); benchmarks/links.py measures slow links themselves. Not in it: decode",
        f"steps of {steps[0]:.0f} ms on the pair's one core against {steps[1]:.0f} ms on both.",
    )
    picture = gain_map("Where a prefill/decode pair pays: link speed × prompt length", panels,
                       prompts=MAP_PROMPTS, links_bits_per_s=MAP_LINKS, caption=caption)  # fmt: skip
    (folder / "gain_or_loss.svg").write_text(picture, encoding="utf-8")
    (folder / "frontier.svg").write_text(draw_frontier(benchmark.outcomes, plan, report), encoding="utf-8")
    print(f"wrote {folder / 'gain_or_loss.svg'} and {folder / 'frontier.svg'}")


def draw_frontier(outcomes: Mapping[str, Outcome], plan: Plan, report: Report) -> str:
    def mark(name: str, label: str, colour: str, line: str = "") -> Mark:
        outcome = outcomes[name]
        return Mark(label, outcome.first_token_s, percentile(outcome.gaps_s, 99) * 1e3, colour, line)

    marks = [mark(plain_name(chunk), f"plain, {chunk:,}", PLAIN, "plain") for chunk in plan.chunks]
    marks += [mark(TWO, "two plain", OTHER), mark(PDX, "pdx pair", PAIR)]
    caption = (
        f"{STREAMS} decode streams and a {plan.prompt_tokens:,}-token prompt every "
        f"{report.figures['period_s']:.1f} s; two cores for every arm.",
        "Blue: one plain engine at each prompt-chunk budget. Lower left is better.",
    )
    title = "What decode streams feel, and what prompts wait"
    x_label, y_label = "first token, median, s", "inter-token latency of the streams, p99, ms"
    return frontier(title, marks, x_label=x_label, y_label=y_label, caption=caption)


def main() -> int:
    parser = argparse.ArgumentParser(prog="pdx bench interference", description=__doc__.partition("\n")[0])
    options(parser)
    parser.add_argument("--pictures", type=Path, metavar="DIR", help="where pictures go (default: docs/, of full runs)")
    chosen = parser.parse_args()
    pin_client()
    report, plan = Report("interference"), QUICK if chosen.quick else FULL
    with Scratch(chosen.model or build()) as scratch:
        benchmark = Benchmark(scratch, plan, report)
        benchmark.run()
    judge(benchmark.outcomes, plan, report)
    show_idle(benchmark.idle, report)
    if folder := chosen.pictures or (None if chosen.quick else DOCS):
        draw(benchmark, plan, folder, report)
    report.write(chosen.json)
    return 0 if report.all_hold else 1


if __name__ == "__main__":
    sys.exit(main())

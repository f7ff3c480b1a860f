"""What pushing costs those who push and those who decode: nothing worth a figure, with an A/A control beside it.

Prefill: time to the first token of a pair whose prefill engine pushes every page (asked through the router, its hop
included) over that of a plain engine, and CPU seconds of the prefill engine with its pdxd over the plain engine's.
Decode: inter-token latency of an engine with the connector over a plain engine's, alone and while another request's
pages arrive and are loaded; then the plain engine has a plain prefill engine at work on the other core. Every figure is
a ratio within one round; rounds go through the arms there and back (ABBA), and whoever is not measured is stopped. The
control is a second plain engine, and its ratio to the first what this machine can tell apart at all.
The full run takes about 11 minutes.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

from benchmarks.harness.arms import DECODE_CPUS, PREFILL_CPUS, Arm, PdxPair, Scratch, pdx_pair, plain_engines
from benchmarks.harness.measure import (
    Background,
    Timing,
    bootstrap_interval,
    completion,
    median,
    memcpy_rate,
    percentile,
    pin_client,
    prompt_of,
    stream,
    table,
)  # fmt: skip
from benchmarks.harness.report import Report, options
from benchmarks.harness.rig import counter
from benchmarks.model import build

TAX_MAX, EXCLUDED = 1.03, 1.05  # the bar of the median, and what its 95 % interval must not reach
STEADY_PROMPT, STEADY_TOKENS, LOADED_TOKENS = 64, 128, 240  # a stream alone, and one that outlasts a prefill beside it
WARM = (3500, 100)
ATTEMPTS = 5
DEADLINE_S = 120.0
BASE = "plain"
Samples = dict[str, list[float]]  # arm name -> one figure a round


@dataclass(frozen=True)
class Plan:
    prompt_tokens: int
    prefill_rounds: int
    decode_rounds: int
    load_rounds: int


FULL = Plan(prompt_tokens=2048, prefill_rounds=12, decode_rounds=8, load_rounds=6)
QUICK = Plan(prompt_tokens=1024, prefill_rounds=5, decode_rounds=4, load_rounds=2)


@dataclass
class Tax:
    """The arms, each of two engines: one for prefill on core 0 and one for decode on core 1."""

    pair: PdxPair
    plains: Mapping[str, tuple[Arm, Arm]]  # name -> (for prefill, for decode)
    plan: Plan
    cpu_s: dict[str, float] = field(default_factory=dict)
    gaps_s: dict[str, list[float]] = field(default_factory=dict)  # while loading, all rounds together
    _seed: int = 0

    def warm(self) -> None:
        """Every KV pool and the arena have been written once, and every page that was pushed was verified."""
        for prefill, decode in self.plains.values():
            for arm in (prefill, decode):
                with arm.active():
                    arm.warm(WARM)
        with self.pair.active():
            self.pair.warm(WARM)
            self._ask(self.pair.decode.url, self.pair.model, 64, 2)
            source, target = self.pair.tools()
            landed = counter(target, "pages_landed")
            if not 0 < counter(source, "pages_put") <= landed <= counter(target, "pages_verified"):
                raise SystemExit("not every page that was put has landed and was verified")

    def prefill(self) -> Samples:
        """Seconds to the first token; CPU seconds of what prefills are added up beside."""
        samples: Samples = {}
        for prompt, name in self._turns(self.plan.prefill_rounds):
            with (self.pair if name == "pdx" else self.plains[name][0]).active():
                first_token_s, cpu_s = self._push(prompt) if name == "pdx" else self._compute(name, prompt)
            samples.setdefault(name, []).append(first_token_s)
            self.cpu_s[name] = self.cpu_s.get(name, 0.0) + cpu_s
        return samples

    def _compute(self, name: str, prompt: int) -> tuple[float, float]:
        arm = self.plains[name][0]
        before = sum(arm.cpu_seconds().values())
        timing = self._ask(arm.url, arm.model, self.plan.prompt_tokens, 1, prompt)
        return timing.first_token_s, sum(arm.cpu_seconds().values()) - before

    def _push(self, prompt: int) -> tuple[float, float]:
        """A first token that can't be streamed before decode has answered is not prefill's: another prompt then."""
        for attempt in range(ATTEMPTS):
            before = self.pair.cpu_seconds()
            # With one token only the router would end the handoff, for nobody needs its pages.
            seed = prompt + attempt * 10_000
            timing = self._ask(self.pair.url, self.pair.model, self.plan.prompt_tokens, 2, seed)
            after = self.pair.cpu_seconds()
            if timing.headers.get("x-pdx-way") == "seeded":
                return timing.first_token_s, sum(after[part] - before[part] for part in ("P", "pdxd-a"))
        raise SystemExit(f"{ATTEMPTS} prompts went the way {timing.headers.get('x-pdx-way')!r}, not seeded")

    def decode(self) -> Samples:
        """Median seconds between two tokens of a stream that is alone."""
        samples: Samples = {}
        for prompt, name in self._turns(self.plan.decode_rounds):
            arm, url = self._decoder(name)
            with arm.active():
                timing = self._ask(url, arm.model, STEADY_PROMPT, STEADY_TOKENS, prompt)
            samples.setdefault(name, []).append(median(timing.gaps_s))
        return samples

    def decode_loading(self) -> Samples:
        """The same while another prompt is prefilled on the other core and, with pdx, its pages come and are loaded."""
        samples: Samples = {}
        for prompt, name in self._turns(self.plan.load_rounds):
            arm, url = self._decoder(name)
            with contextlib.ExitStack() as stack:
                stack.enter_context(arm.active())
                if name != "pdx":
                    stack.enter_context(self.plains[name][0].active())
                body = completion(arm.model, prompt_of(STEADY_PROMPT, prompt), LOADED_TOKENS)
                steady = Background(url, body, DEADLINE_S)
                beside, tokens = (self.pair.url, 2) if name == "pdx" else (self.plains[name][0].url, 1)
                other = self._ask(beside, arm.model, self.plan.prompt_tokens, tokens, prompt)
                timing = steady.join()
            gaps = list(gaps_between(timing, other.sent_ns, other.ended_ns))
            if timing.ended_ns < other.ended_ns or not gaps:
                raise SystemExit("the steady stream ended before the other request: raise LOADED_TOKENS")
            samples.setdefault(name, []).append(median(gaps))
            self.gaps_s.setdefault(name, []).extend(gaps)
        return samples

    def _decoder(self, name: str) -> tuple[Arm, str]:
        if name == "pdx":
            return self.pair, self.pair.decode.url
        arm = self.plains[name][1]
        return arm, arm.url

    def _turns(self, rounds: int) -> Iterator[tuple[int, str]]:
        """A new prompt's seed each round, the same for all arms of it; there and back."""
        names = [*self.plains, "pdx"]
        for number in range(rounds):
            self._seed += 1
            for name in names if number % 2 == 0 else reversed(names):
                yield self._seed, name

    def _ask(self, url: str, model: object, tokens: int, answer: int, seed: int = 0) -> Timing:
        timing = stream(url, completion(model, prompt_of(tokens, seed), answer), DEADLINE_S)
        if not timing.good:
            raise SystemExit(f"{url}: status {timing.status}, {timing.error}")
        return timing


def gaps_between(timing: Timing, from_ns: int, to_ns: int) -> Iterator[float]:
    for before, after in zip(timing.token_ns, timing.token_ns[1:], strict=False):
        if from_ns <= before and after <= to_ns:
            yield (after - before) / 1e9


def judge(name: str, samples: Samples, report: Report) -> list[object]:
    """Bars of one figure; its row of the table."""
    ratios = {arm: [own / base for own, base in zip(samples[arm], samples[BASE], strict=True)] for arm in samples}
    ratio, (low, high) = median(ratios["pdx"]), bootstrap_interval(ratios["pdx"], seed=1)
    control = median(ratios["control"])
    control_low, control_high = bootstrap_interval(ratios["control"], seed=2)
    report.bar(f"{name}: pdx / plain", round(ratio, 4), f"<= {TAX_MAX}", ratio <= TAX_MAX)
    report.bar(
        f"{name}: 95 % interval excludes {EXCLUDED}", f"{low:.4f} to {high:.4f}", f"< {EXCLUDED}", high < EXCLUDED
    )
    report.figures[name] = {"samples_s": samples, "control": [control, control_low, control_high]}
    milliseconds = [f"{median(samples[arm]) * 1e3:.1f}" for arm in (BASE, "control", "pdx")]
    return [
        name, *milliseconds, f"{control:.4f} ({control_low:.4f} to {control_high:.4f})",
        f"{ratio:.4f} ({low:.4f} to {high:.4f})",
    ]  # fmt: skip


def judge_cpu(tax: Tax, report: Report) -> None:
    thousands = tax.plan.prompt_tokens * tax.plan.prefill_rounds / 1000
    each = {name: seconds / thousands for name, seconds in tax.cpu_s.items()}
    ratio, control = each["pdx"] / each[BASE], each["control"] / each[BASE]
    report.bar("CPU seconds per 1,000 prompt tokens: pdx / plain", round(ratio, 4), f"<= {TAX_MAX}", ratio <= TAX_MAX)
    report.figures["cpu_s_per_1000_tokens"] = each
    rows = [[name, f"{seconds:.3f}", f"{seconds / each[BASE]:.4f}"] for name, seconds in each.items()]
    table("CPU seconds per 1,000 prompt tokens (pdx: prefill engine and its pdxd)", ("", "s", "to plain"), rows)
    print(f"  A/A control {control:.4f}")


def show_pauses(tax: Tax, report: Report) -> None:
    """Medians hide the one step into which a load falls."""
    rows = []
    for name, gaps in tax.gaps_s.items():
        figures = [percentile(gaps, 50), percentile(gaps, 99), max(gaps)]
        report.figures.setdefault("gaps_while_loading_ms", {})[name] = [round(gap * 1e3, 2) for gap in figures]
        rows.append([name, len(gaps), *(f"{gap * 1e3:.1f}" for gap in figures)])
    table("Gaps of a stream beside a prefill (pdx: and its load), ms", ("", "gaps", "p50", "p99", "longest"), rows)


def main() -> int:
    parser = argparse.ArgumentParser(prog="pdx bench tax", description=__doc__.partition("\n")[0])
    options(parser)
    chosen = parser.parse_args()
    pin_client()
    report, plan = Report("tax"), QUICK if chosen.quick else FULL
    report.figures["ceiling_memcpy_gb_per_s"] = round(memcpy_rate() / 1e9, 2)
    with Scratch(chosen.model or build()) as scratch:
        pair = pdx_pair(scratch, "pdx")
        cpus = {f"{name}-{core}": core for name in (BASE, "control") for core in (PREFILL_CPUS, DECODE_CPUS)}
        engines = plain_engines(scratch, "plain", cpus)
        plains = {BASE: (engines[0], engines[1]), "control": (engines[2], engines[3])}
        tax = Tax(pair, plains, plan)
        tax.warm()
        steps: dict[str, Callable[[], Samples]] = {
            f"prefill of {plan.prompt_tokens:,} tokens, first token": tax.prefill,
            "decode ITL, alone": tax.decode,
            "decode ITL, beside a load": tax.decode_loading,
        }
        rows = [judge(name, step(), report) for name, step in steps.items()]
        for arm in scratch.arms:
            report.arm(arm)
    columns = ("", "plain ms", "control ms", "pdx ms", "A/A: control / plain", "pdx / plain")
    table("Medians; ratios within a round with their 95 % intervals; the ceiling is the control", columns, rows)
    judge_cpu(tax, report)
    show_pauses(tax, report)
    report.write(chosen.json)
    return 0 if report.all_hold else 1


if __name__ == "__main__":
    sys.exit(main())

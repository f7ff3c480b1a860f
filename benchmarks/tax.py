"""What pushing costs those who push and those who decode: nothing worth a figure, with an A/A control beside it.

Prefill: time to the first token of a pair whose prefill engine pushes every page (asked through the router, its hop
included) over that of a plain engine, and CPU seconds of the prefill engine with its pdxd over the plain engine's.
Decode: inter-token latency of an engine with the connector over a plain engine's, alone and while another request's
prompt is prefilled on the other core, its pages arrive and are loaded; a plain engine has a plain one on the other
core, idle or at work. Hosts have cores beside those that compute: both daemons are on the core whose engine is not
measured, decode's when that is prefill's, and the other way round. That is a ratio of medians, and a load falls into
one gap of a hundred or a few: what a stream loses to the load itself is judged apart, by the gaps from the moment
decode is asked to its answer, beside those of a plain engine that is asked for a prompt in its own cache, and thus does
all that decode does but load. Every ratio is of one round; rounds go through the arms there and back (ABBA), and
whoever is not measured is stopped. Of two equal engines one may be a tenth faster for minutes, or for as long as it
lives: all have their memory in huge pages and are started anew several times, and the intervals are of lives, drawn
with their rounds. The control is a second plain engine, and its ratio to the first what this machine can tell apart at
all. The naive variant is the same pair whose daemons poll instead of sleeping, each on its engine's core; it must miss
every bar of a ratio. That of the loads is a plain engine that computes the prompt where the stream is. (Loads that take
a prompt in one step are none: that is a few milliseconds at this length.) A life takes a quarter of an hour, the full
run an hour and a half.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TypeVar

from benchmarks.harness.arms import DECODE_CPUS, PREFILL_CPUS, Arm, PdxPair, Scratch, pdx_pair, plain_engines
from benchmarks.harness.measure import (
    Background,
    Timing,
    completion,
    interval_of_lives,
    median,
    memcpy_rate,
    pin_client,
    prompt_of,
    stream,
    table,
)  # fmt: skip
from benchmarks.harness.report import Report, options
from benchmarks.harness.rig import counter
from benchmarks.harness.ways import REPEATED_MAX
from benchmarks.model import build
from benchmarks.naive.polling import polling

TAX_MAX, EXCLUDED = 1.03, 1.05  # the bar of the median, and what its 95 % interval must not reach
# A machine that is shared drifts by a tenth within seconds: many short samples, side by side, see past that.
STEADY_PROMPT, STEADY_TOKENS, LOADED_TOKENS = 64, 12, 130  # a stream alone, and one that outlasts a prefill beside it
# While a prompt is loaded no gap of a stream is longer than so many steps and so much: the step that it falls into, one
# that the machine has delayed, and the copying. And all its gaps together take a step more than a plain engine's.
GAP_STEPS, GAP_EXTRA_S, LOST_STEPS = 2, 0.020, 1
# Programs that were stopped have to catch up when they go on, and the more of them an arm has the longer: a stream of
# some 3 s goes before what is measured, in every arm.
SETTLING_TOKENS = 100
WARM = (1024, 100)
HUGE_PAGES = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
ATTEMPTS, SEEDS_APART, NAIVE_SEED = 5, 10_000, 5_000
DEADLINE_S = 120.0
BASE, PDX, NAIVE, COMPUTES = "plain", "pdx", "pdx that polls", "plain that computes the prompt itself"
PAIRS = (PDX, NAIVE)
Each = TypeVar("Each")
Samples = dict[str, list[float]]  # arm name -> one figure a round


@dataclass(frozen=True)
class Plan:
    """Rounds are those of one life; the naive variant's, of each kind, are in the first."""

    prompt_tokens: int
    lives: int
    prefill_rounds: int
    decode_rounds: int
    load_rounds: int
    naive_rounds: int


FULL = Plan(prompt_tokens=512, lives=6, prefill_rounds=8, decode_rounds=8, load_rounds=2, naive_rounds=2)
QUICK = Plan(prompt_tokens=512, lives=1, prefill_rounds=3, decode_rounds=3, load_rounds=1, naive_rounds=1)


@dataclass(frozen=True)
class Felt:
    """What a stream felt of a prompt that came to its engine. Seconds."""

    ordinary_s: float  # its median gap before, while the prompt was computed on the other core
    gaps_s: list[float]  # all that overlap the time in which its own engine served the prompt

    @property
    def lost_s(self) -> float:
        """Beyond an ordinary step each."""
        return sum(self.gaps_s) - len(self.gaps_s) * self.ordinary_s


@dataclass
class Tax:
    """One life of the arms, each of two engines: one for prefill on core 0 and one for decode on core 1."""

    pair: PdxPair
    plains: Mapping[str, tuple[Arm, Arm]]  # name -> (for prefill, for decode)
    plan: Plan
    naive_rounds: int
    parts_s: dict[str, list[dict[str, float]]] = field(default_factory=dict)  # CPU of the prefills, by part
    felt: dict[str, list[Felt]] = field(default_factory=dict)  # of the streams beside a load, one a round
    pushed: int = 0  # prompts that went to a pair to be timed
    other_ways: int = 0  # of them those that were not seeded: another prompt was asked instead
    handed_over: int = 0  # prompts beside a stream
    loaded: int = 0  # what decode's daemon says of them
    _seed: int = 0

    def warm(self) -> None:
        """Kernels are chosen by shape at first use, and every page that was pushed was verified."""
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
        """Seconds to the first token; CPU seconds of what prefills are kept beside."""
        samples: Samples = {}
        for prompt, name in self._turns(self.plan.prefill_rounds):
            with self._active(name, 0):
                first_token_s, cpu_s = self._compute(name, prompt) if name not in PAIRS else self._push(prompt)
            samples.setdefault(name, []).append(first_token_s)
            self.parts_s.setdefault(name, []).append(cpu_s)
        return samples

    @property
    def cpu_s(self) -> Samples:
        """Of the prefills."""
        return {name: [sum(parts.values()) for parts in samples] for name, samples in self.parts_s.items()}

    def _compute(self, name: str, prompt: int) -> tuple[float, dict[str, float]]:
        arm = self.plains[name][0]
        before, after = arm.cpu_seconds(), dict[str, float]()
        timing = self._ask(
            arm.url, arm.model, self.plan.prompt_tokens, 1, prompt, began=lambda: after.update(arm.cpu_seconds())
        )
        return timing.first_token_s, {part: after[part] - before[part] for part in after}

    def _push(self, prompt: int) -> tuple[float, dict[str, float]]:
        """A first token that can't be streamed before decode has answered is not prefill's: another prompt then."""
        for attempt in range(ATTEMPTS):
            before, after = self.pair.cpu_seconds(), dict[str, float]()
            # With one token only the router would end the handoff, for nobody needs its pages. But decode's time is
            # not prefill's, whose processes spin for a while when they are done.
            seed = prompt + attempt * SEEDS_APART
            timing = self._ask(
                self.pair.url, self.pair.model, self.plan.prompt_tokens, 2, seed,
                began=lambda after=after: after.update(self.pair.cpu_seconds()),
            )  # fmt: skip
            if self._seeded(timing):
                return timing.first_token_s, {part: after[part] - before[part] for part in ("P", "pdxd-a")}
        raise SystemExit(f"{ATTEMPTS} prompts went the way {timing.headers.get('x-pdx-way')!r}, not seeded")

    def decode(self) -> Samples:
        """Median seconds between two tokens of a stream that is alone, beside an idle engine on the other core."""
        samples: Samples = {}
        for prompt, name in self._turns(self.plan.decode_rounds):
            with self._both(name) as arm:
                timing = self._ask(self._decoder(name), arm.model, STEADY_PROMPT, STEADY_TOKENS, prompt)
            samples.setdefault(name, []).append(median(timing.gaps_s))
        return samples

    def decode_loading(self) -> Samples:
        """The same while another prompt is prefilled on the other core and, with pdx, its pages come and are loaded.

        The median: nearly all of its gaps are beside the prefill. `felt` has those beside the load.
        """
        samples: Samples = {}
        for prompt, name in self._turns(self.plan.load_rounds, naive=(NAIVE, COMPUTES)):
            for attempt in range(ATTEMPTS):
                if (felt := self._beside(name, prompt + attempt * SEEDS_APART, samples)) is not None:
                    break
            else:
                raise SystemExit(f"{ATTEMPTS} prompts beside a stream went another way, not seeded")
            self.felt.setdefault(name, []).append(felt)
        return samples

    def _beside(self, name: str, prompt: int, samples: Samples) -> Felt | None:
        """One stream beside one prompt, its median gap added to `samples`. None: the prompt went another way."""
        with self._both(name, learns=prompt if name in self.plains else None) as arm:
            loads_before = self._loads(name)
            body = completion(arm.model, prompt_of(STEADY_PROMPT, prompt), LOADED_TOKENS)
            steady = Background(self._decoder(name), body, DEADLINE_S)
            if name in PAIRS:
                computed = other = self._ask(self.pair.url, arm.model, self.plan.prompt_tokens, 2, prompt)
                asked_ns = other.token_ns[0]  # prefill's token passes the router, which asks decode at once
            else:
                prefill = self._plains(name)[0]
                computed = self._ask(prefill.url, arm.model, self.plan.prompt_tokens, 1, prompt)
                other = self._ask(arm.url, arm.model, self.plan.prompt_tokens + 1, 1, prompt)
                asked_ns = other.sent_ns
            timing = steady.join()
            loads = self._loads(name) - loads_before
        if not timing.good or not timing.token_ns[0] < asked_ns or timing.ended_ns < other.ended_ns:
            raise SystemExit(f"the steady stream broke, or ended too early (LOADED_TOKENS): {timing.error or 'whole'}")
        if name in PAIRS:
            if not self._seeded(other):
                return None
            self.handed_over += 1
            self.loaded += loads
        samples.setdefault(name, []).append(median(timing.gaps_between(computed.sent_ns, other.ended_ns)))
        return felt_of(timing, computed.sent_ns, asked_ns, other.ended_ns)

    @contextlib.contextmanager
    def _active(self, name: str, which: int) -> Iterator[Arm]:
        """The pair, or of two plain engines that for prefill (0) or that for decode (1)."""
        with (
            (self.pair if name in PAIRS else self._plains(name)[which]).active() as arm,
            contextlib.ExitStack() as stack,
        ):
            if name == NAIVE:
                stack.enter_context(polling(self.pair.run_dirs))
                stack.enter_context(self.pair.part("pdxd-a").moved(PREFILL_CPUS))
            yield arm

    @contextlib.contextmanager
    def _both(self, name: str, *, learns: int | None = None) -> Iterator[Arm]:
        """Two engines whatever the arm, so that each decodes beside an idle one, and settled. Yields decode's.

        `learns`: the seed of a prompt, one token longer than what is handed over, that decode gets into its own cache.
        """
        with contextlib.ExitStack() as stack:
            if name not in PAIRS:
                stack.enter_context(self._active(name, 0))
            arm = stack.enter_context(self._active(name, 1))
            for daemon in ("pdxd-a", "pdxd-b") if name == PDX else ():
                stack.enter_context(self.pair.part(daemon).moved(PREFILL_CPUS))
            if learns is not None:
                self._ask(self._decoder(name), arm.model, self.plan.prompt_tokens + 1, 1, learns)
            self._ask(self._decoder(name), arm.model, STEADY_PROMPT, SETTLING_TOKENS)
            yield arm

    def _plains(self, name: str) -> tuple[Arm, Arm]:
        return self.plains[BASE if name == COMPUTES else name]

    def _decoder(self, name: str) -> str:
        return self.pair.decode.url if name in PAIRS else self._plains(name)[1].url

    def _loads(self, name: str) -> int:
        """That were right, since the daemon of a pair's decode began."""
        return counter(self.pair.tools()[1], "loads_ok") if name in PAIRS else 0

    def _seeded(self, timing: Timing) -> bool:
        """Counts a prompt that went to the pair. If not: its first token is not prefill's, and came with decode's."""
        seeded = timing.headers.get("x-pdx-way") == "seeded"
        self.pushed += 1
        self.other_ways += not seeded
        return seeded

    def _turns(self, rounds: int, naive: Sequence[str] = (NAIVE,)) -> Iterator[tuple[int, str]]:
        """A new prompt's seed each round, the same for all arms of it; there and back."""
        for number in range(rounds):
            names = [*self.plains, PDX, *(naive if number < self.naive_rounds else ())]
            self._seed += 1
            for name in names if number % 2 == 0 else reversed(names):
                # No engine must find in its caches what it has just computed, as another arm or while daemons slept.
                yield self._seed + (NAIVE_SEED if name in (NAIVE, COMPUTES) else 0), name

    def _ask(
        self, url: str, model: object, tokens: int, answer: int, seed: int = 0, *,
        began: Callable[[], None] = lambda: None,
    ) -> Timing:  # fmt: skip
        """`began` is called with the first token."""
        timing = stream(url, completion(model, prompt_of(tokens, seed), answer), DEADLINE_S, began=began)
        if not timing.good:
            raise SystemExit(f"{url}: status {timing.status}, {timing.error}")
        return timing


def felt_of(stream: Timing, from_ns: int, asked_ns: int, ended_ns: int) -> Felt:
    """`from_ns`: when the prompt was sent to prefill; `asked_ns` to `ended_ns`: what decode served it in."""
    return Felt(median(stream.gaps_between(from_ns, asked_ns)), stream.gaps_between(asked_ns, ended_ns))


def ratios_of(samples: Samples) -> Samples:
    """To the plain engine of the same round."""
    base = samples[BASE]
    return {name: [own / plain for own, plain in zip(each, base, strict=False)] for name, each in samples.items()}


def of_lives(lives: Sequence[Mapping[str, Sequence[Each]]]) -> dict[str, list[Each]]:
    """The rounds of all lives in a row."""
    return {name: [value for life in lives for value in life.get(name, ())] for name in lives[0]}


def judge(name: str, lives: Sequence[Samples], report: Report) -> list[object]:
    """Bars of one figure; its row of the table."""
    each = [ratios_of(life) for life in lives]
    ratios, samples = of_lives(each), of_lives(lives)
    ratio, (low, high) = median(ratios[PDX]), interval_of_lives([life[PDX] for life in each], seed=1)
    control = median(ratios["control"])
    control_low, control_high = interval_of_lives([life["control"] for life in each], seed=2)
    report.bar(f"{name}: pdx / plain", round(ratio, 4), f"<= {TAX_MAX}", ratio <= TAX_MAX)
    report.bar(
        f"{name}: 95 % interval excludes {EXCLUDED}", f"{low:.4f} to {high:.4f}", f"< {EXCLUDED}", high < EXCLUDED
    )
    naive = judge_naive(name, ratios, report)
    report.figures[name] = {"samples_s_by_life": list(lives), "control": [control, control_low, control_high]}
    milliseconds = [f"{median(samples[arm]) * 1e3:.1f}" for arm in (BASE, "control", PDX)]
    return [
        name, *milliseconds, f"{control:.4f} ({control_low:.4f} to {control_high:.4f})",
        f"{ratio:.4f} ({low:.4f} to {high:.4f})", f"{naive:.4f}",
    ]  # fmt: skip


def judge_naive(name: str, ratios: Samples, report: Report) -> float:
    naive = median(ratios[NAIVE])
    report.bar(f"{name}: naive variant misses it", round(naive, 4), f"> {TAX_MAX}", naive > TAX_MAX)
    return naive


def judge_cpu(lives: Sequence[Tax], report: Report) -> None:
    name = "CPU seconds per 1,000 prompt tokens"
    cpu_s = of_lives([life.cpu_s for life in lives])
    ratios = of_lives([ratios_of(life.cpu_s) for life in lives])
    ratio = median(ratios[PDX])
    report.bar(f"{name}: pdx / plain", round(ratio, 4), f"<= {TAX_MAX}", ratio <= TAX_MAX)
    judge_naive(name, ratios, report)
    each = {arm: median(seconds) * 1000 / lives[0].plan.prompt_tokens for arm, seconds in cpu_s.items()}
    report.figures["cpu_s_per_1000_tokens"] = {
        "medians": each, "samples_s_per_prompt": cpu_s, "samples_by_part": [life.parts_s for life in lives],
    }  # fmt: skip
    rows = [[arm, f"{seconds:.3f}", f"{median(ratios[arm]):.4f}"] for arm, seconds in each.items()]
    table(f"{name} (pdx: prefill engine and its pdxd); medians", ("", "s", "to plain, within a round"), rows)


def judge_loads(felt: Mapping[str, Sequence[Felt]], report: Report) -> None:
    """The longest gap of all rounds, and a mean: a load that stalls the stream once in ten times shows in both."""
    step_s = median([each.ordinary_s for each in felt[BASE]])
    longest_s = {name: max(max(each.gaps_s) for each in rounds) for name, rounds in felt.items()}
    more_s = {
        name: statistics.fmean([own.lost_s - plain.lost_s for own, plain in zip(rounds, felt[BASE], strict=False)])
        for name, rounds in felt.items()
    }
    allowed_s, lost_s = GAP_STEPS * step_s + GAP_EXTRA_S, LOST_STEPS * step_s
    for what, found_s, most_s, terms in (
        ("longest gap", longest_s, allowed_s, f" = {GAP_STEPS} plain steps and {GAP_EXTRA_S * 1e3:.0f} ms"),
        ("lost beyond what a plain engine's loses, mean", more_s, lost_s, f" = {LOST_STEPS} plain step"),
    ):
        name = f"a stream beside a load: {what}"
        own_ms, naive_ms, most_ms = (1e3 * each for each in (found_s[PDX], found_s[COMPUTES], most_s))
        report.bar(name, round(own_ms, 1), f"<= {most_ms:.1f}{terms}", own_ms <= most_ms, unit="ms")
        missed = f"{name}, missed where the prompt is computed"
        report.bar(missed, round(naive_ms, 1), f"> {most_ms:.1f}", naive_ms > most_ms, unit="ms")
    report.figures["beside_a_load_ms"] = {
        name: [{"ordinary": 1e3 * each.ordinary_s, "gaps": [1e3 * gap for gap in each.gaps_s]} for each in rounds]
        for name, rounds in felt.items()
    }
    rows = [
        [name, sum(len(each.gaps_s) for each in rounds), *(f"{1e3 * seconds:.1f}" for seconds in (
            median([each.ordinary_s for each in rounds]), longest_s[name],
            statistics.fmean([each.lost_s for each in rounds]), more_s[name],
        ))]
        for name, rounds in felt.items()
    ]  # fmt: skip
    columns = ("", "gaps", "step before", "longest", "lost", "to plain, within a round")
    table("Gaps of a stream while its engine loads a prompt (plain: has it in its cache), ms", columns, rows)


def judge_ways(lives: Sequence[Tax], report: Report) -> None:
    """Whether what was timed is what it is called."""
    pushed, other_ways = sum(life.pushed for life in lives), sum(life.other_ways for life in lives)
    report.figures["pushed"] = {"prompts": pushed, "of them not seeded, and asked again": other_ways}
    share = other_ways / pushed
    report.bar("prompts that went another way and were replaced, share", round(share, 4), f"<= {REPEATED_MAX}",
               share <= REPEATED_MAX)  # fmt: skip
    handed_over = sum(life.handed_over for life in lives)
    report.equal("prompts beside a stream that were loaded", sum(life.loaded for life in lives), handed_over)


def live(number: int, model: Path, plan: Plan, lives: dict[str, list[Samples]], report: Report) -> Tax:
    """Starts all arms, puts what they show under the name of each step, and ends them.

    In every other life the pair is started last: what memory an engine gets depends on who was there before.
    """
    cpus = {f"{name}-{core}": core for name in (BASE, "control") for core in (PREFILL_CPUS, DECODE_CPUS)}
    with Scratch(model) as scratch:
        start_pair = partial(pdx_pair, scratch, PDX, daemon_module="benchmarks.naive.polling", environment=HUGE_PAGES)
        start_plain = partial(plain_engines, scratch, "plain", cpus, environment=HUGE_PAGES)
        if number % 2:
            engines, pair = start_plain(), start_pair()
        else:
            pair, engines = start_pair(), start_plain()
        plains = {BASE: (engines[0], engines[1]), "control": (engines[2], engines[3])}
        tax = Tax(pair, plains, plan, naive_rounds=plan.naive_rounds if number == 0 else 0)
        report.progress(f"life {number + 1} of {plan.lives} has begun")
        tax.warm()
        steps: dict[str, Callable[[], Samples]] = {
            f"prefill of {plan.prompt_tokens:,} tokens, first token": tax.prefill,
            "decode ITL, alone": tax.decode,
            "decode ITL, beside another prompt's prefill and load": tax.decode_loading,
        }
        for name, step in steps.items():
            lives.setdefault(name, []).append(step())
            ratios = {arm: round(median(each), 3) for arm, each in ratios_of(lives[name][-1]).items()}
            report.progress(f"{name}: {ratios}")
        for arm in scratch.arms:
            report.arm(arm, life=number if plan.lives > 1 else None)
    return tax


def main() -> int:
    parser = argparse.ArgumentParser(prog="pdx bench tax", description=__doc__.partition("\n")[0])
    options(parser)
    parser.add_argument("--lives", type=int, metavar="N", help="how often all engines are started (default: 6)")
    chosen = parser.parse_args()
    pin_client()
    report, plan = Report("tax"), QUICK if chosen.quick else FULL
    plan = replace(plan, lives=chosen.lives or plan.lives)
    report.figures["ceiling_memcpy_gb_per_s"] = round(memcpy_rate() / 1e9, 2)
    model, lives = chosen.model or build(), dict[str, list[Samples]]()
    taxes = [live(number, model, plan, lives, report) for number in range(plan.lives)]
    rows = [judge(name, each, report) for name, each in lives.items()]
    columns = ("", "plain ms", "control ms", "pdx ms", "A/A: control / plain", "pdx / plain", "naive / plain")
    table("Medians; ratios within a round with their 95 % intervals; the ceiling is the control", columns, rows)
    judge_cpu(taxes, report)
    judge_loads(of_lives([life.felt for life in taxes]), report)
    judge_ways(taxes, report)
    report.write(chosen.json)
    return 0 if report.all_hold else 1


if __name__ == "__main__":
    sys.exit(main())

"""The ways that a request can go on some arm, measured in turns, and what the decode engine itself takes.

A way is an arm with a journey of pdx's router, or a peer's front. Prompts are 128 k + 1 tokens: asked again at the
decode engine, such a prompt lies in its own cache but for the last token, so that the engine computes just that one.
"""

from __future__ import annotations

import contextlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

from benchmarks.harness.arms import Arm, PdxPair
from benchmarks.harness.measure import Timing, completion, median, prompt_of, stream
from benchmarks.harness.relay import Relay
from benchmarks.harness.report import Report
from benchmarks.harness.rig import counter
from benchmarks.naive.late import after_prefill
from pdx.errors import PdxError

BLOCK_TOKENS = 128  # vLLM's on CPU
ANSWER_TOKENS = 10
DEADLINE_S = 120.0
ATTEMPTS, SEEDS_APART = 5, 100_000
REPEATED_MAX = 0.05  # of all prompts of a way; a single one is no matter
WARM_SEED = -2


class Active(Protocol):
    """An arm, or a way on one: it runs only while it is active."""

    def active(self) -> contextlib.AbstractContextManager[object]: ...


Turn = TypeVar("Turn", bound=Active)


@dataclass(frozen=True)
class Way:
    """`journey` is the router's, on a pdx pair; `late`: its prefill side pushes only after prefill (the naive way)."""

    name: str
    arm: Arm
    journey: str = ""
    late: bool = False

    @property
    def header(self) -> str:
        """What the router says of an answer that went this way."""
        return {"auto": "seeded"}.get(self.journey, self.journey)

    @contextlib.contextmanager
    def active(self) -> Iterator[Arm]:
        with self.arm.active(), contextlib.ExitStack() as stack:
            if isinstance(self.arm, PdxPair):
                self.arm.route("--journey", self.journey)
                if self.late:
                    stack.enter_context(after_prefill(self.arm.run_dir))
            yield self.arm


@dataclass(frozen=True)
class Floor:
    """What the decode engine takes for one step, and beside it for a request whose KV is all in its own cache."""

    step_s: float
    engine_s: float


@dataclass(frozen=True)
class Sample:
    timing: Timing
    # Measured where there is a relay: from prefill's last byte to the client's first token, and all that the first
    # token took beside prefill's own answer, on the way to it as well.
    gap_s: float = 0.0
    beside_prefill_s: float = 0.0
    floor: Floor | None = None

    @property
    def step_s(self) -> float:
        """This answer's own decode step; the gap to the second token belongs to the hand-over."""
        return median(self.timing.gaps_s[1:])


class Detours:
    """How many prompts of each way were asked, and how many of them went another way, so that another was asked."""

    def __init__(self) -> None:
        self._asked: Counter[str] = Counter()
        self._repeated: Counter[str] = Counter()

    def note(self, way: Way, *, repeated: bool) -> None:
        self._asked[way.name] += 1
        self._repeated[way.name] += repeated

    def judge(self, report: Report) -> None:
        """What is not measured must be rare, or the figures are those of a choice of prompts."""
        report.figures["prompts asked, and repeated since they went another way"] = {
            name: [asked, self._repeated[name]] for name, asked in self._asked.items()
        }
        for name, asked in self._asked.items():
            repeated, most = self._repeated[name], max(1, int(REPEATED_MAX * asked))
            report.bar(f"{name}: prompts that went another way, of {asked}", repeated, f"<= {most}", repeated <= most)


class Samples:
    """What was measured: way and size -> samples."""

    def __init__(self) -> None:
        self._samples: dict[tuple[str, int], list[Sample]] = defaultdict(list)

    def add(self, way: Way, size: int, sample: Sample) -> None:
        self._samples[way.name, size].append(sample)

    def of(self, way: str, size: int) -> list[Sample]:
        return self._samples[way, size]

    def first_token_s(self, way: str, size: int) -> float:
        return median([sample.timing.first_token_s for sample in self.of(way, size)])

    def second_gap_s(self, way: str, size: int) -> float:
        return median([sample.timing.second_gap_s for sample in self.of(way, size)])

    def second_overhead_s(self, way: str, size: int) -> float:
        """Of the second token, over one decode step of the same answer."""
        return median([sample.timing.second_gap_s - sample.step_s for sample in self.of(way, size)])

    def gap_s(self, way: str, size: int) -> float:
        return median([sample.gap_s for sample in self.of(way, size)])

    def beside_prefill_s(self, way: str, size: int) -> float:
        return median([sample.beside_prefill_s for sample in self.of(way, size)])

    def overhead_s(self, way: str, size: int) -> float:
        """Of the hand-over, over one decode step of the same answer."""
        return median([sample.gap_s - sample.step_s for sample in self.of(way, size)])

    def step_s(self, way: str, size: int) -> float:
        return median([sample.step_s for sample in self.of(way, size)])

    def floor(self, ways: Sequence[str], size: int) -> Floor:
        """Medians over all samples of these ways."""
        floors = [sample.floor for way in ways for sample in self.of(way, size) if sample.floor]
        return Floor(median([each.step_s for each in floors]), median([each.engine_s for each in floors]))

    def raw(self) -> dict[str, dict[int, list[list[float]]]]:
        """For the JSON: of every sample first token, second gap, gap after prefill and decode step, in ms."""
        found: dict[str, dict[int, list[list[float]]]] = defaultdict(dict)
        for (way, size), samples in self._samples.items():
            found[way][size] = [
                [
                    round(1e3 * s, 2)
                    for s in (each.timing.first_token_s, each.timing.second_gap_s, each.gap_s, each.step_s)
                ]
                for each in samples
            ]
        return found


def measure(
    way: Way,
    size: int,
    seed: int,
    detours: Detours,
    relay: Relay | None = None,
    *,
    find_floor: Callable[[PdxPair, list[int]], Floor] | None = None,
) -> Sample:
    """One new prompt on an active arm. Raises PdxError if the answer is not whole."""
    prompt, timing = this_way(way, size, seed, detours)
    floor = find_floor(way.arm, prompt) if find_floor and isinstance(way.arm, PdxPair) else None
    if relay is None:
        return Sample(timing, floor=floor)
    answer = relay.answered(timing.sent_ns)
    gap_ns = timing.token_ns[0] - answer.last_byte_ns
    return Sample(timing, gap_ns / 1e9, (gap_ns + answer.asked_ns - timing.sent_ns) / 1e9, floor)


def this_way(way: Way, size: int, seed: int, detours: Detours) -> tuple[list[int], Timing]:
    """An answer that went the way it should. A first token that is no whole text is no seed: then another prompt."""
    for attempt in range(ATTEMPTS):
        prompt = prompt_of(size, seed + attempt * SEEDS_APART)
        timing = asked(way.arm.url, way.arm, prompt, way.name)
        taken = timing.headers.get("x-pdx-way", "") == way.header
        detours.note(way, repeated=not taken)
        if taken:
            return prompt, timing
    said = {name: value for name, value in timing.headers.items() if name.startswith("x-pdx-")}
    raise PdxError(f"{way.name}: {ATTEMPTS} prompts of {size} tokens went another way, the last one so: {said}")


def floor_of(pair: PdxPair, prompt: list[int]) -> Floor:
    """Asks the decode engine itself for a prompt that it has just served, hence has in its cache."""
    timing = asked(pair.decode.url, pair, prompt, "the decode engine alone")
    step_s = median(timing.gaps_s)
    return Floor(step_s, timing.first_token_s - step_s)


def rested_floor_of(pair: PdxPair, prompt: list[int]) -> Floor:
    """The same of a decode engine that has just stood by for as long as another such prompt was computed beside it.

    So it does in every hand-over, and its first step after that is slower: the processor's caches hold other things.
    """
    other = [*prompt[1:], prompt[0]]
    asked(pair.prefill.url, pair, other, "the prefill engine alone")
    return floor_of(pair, prompt)


def asked(url: str, arm: Arm, prompt: list[int], who: str) -> Timing:
    timing = stream(url, completion(arm.model, prompt, ANSWER_TOKENS), DEADLINE_S)
    if not timing.good or len(timing.token_ns) < 3:
        raise PdxError(f"{who} answered {timing.status} with {len(timing.token_ns)} tokens: {timing.error}")
    return timing


def interleaved(ways: Sequence[Turn], rounds: int) -> Iterator[tuple[int, Turn]]:
    """Every round has all ways, each round begins with the next one. The way is active while it is yielded."""
    for number in range(rounds):
        start = number % len(ways)
        for way in (*ways[start:], *ways[:start]):
            with way.active():
                yield number, way


def verified(pair: PdxPair, way: Way, sizes: Sequence[int]) -> dict[int, int]:
    """Warms an active pair with every size and checks that decode verified all pages. Returns size -> KV bytes sent."""
    source, target = pair.tools()
    sent = {}
    for size in sizes:
        before = counter(source, "bytes_put"), counter(target, "loads_ok"), counter(target, "loads_failed")
        asked(pair.url, pair, prompt_of(size, WARM_SEED), way.name)
        after = counter(source, "bytes_put"), counter(target, "loads_ok"), counter(target, "loads_failed")
        sent[size] = after[0] - before[0]
        if after[1:] != (before[1] + 1, before[2]):
            raise PdxError(f"{way.name}: {size} tokens were not handed over and verified")
    return sent


def failed_loads(pair: PdxPair) -> int:
    """Since the daemon started. A timing counts only if this did not grow: a failed load is computed again."""
    return counter(pair.tools()[1], "loads_failed")

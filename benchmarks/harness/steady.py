"""Open-loop load: decode streams that never pause, and prompts that arrive by the clock whatever the arm does.

Owns threads and their times; knows nothing of arms. The same arrivals reach every arm, so an arm that falls behind
shows it in its own figures.
"""

from __future__ import annotations

import http.client
import json
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from urllib.parse import urlsplit

from benchmarks.harness.measure import Background, Timing, completion, percentile, prompt_of

STEADY_PROMPT, STEADY_TOKENS = 32, 3500  # more tokens than any arm makes while it is measured
READ_S = 60.0  # a gap of a plain engine is a whole prefill; beyond this the arm is broken
START_S = 60.0
ANSWER_TOKENS = 8
QUIET_TOKENS = 60  # tokens of each stream before the first prompt comes


class Steady:
    """One stream, from its first token on until `stop`: then its connection is closed and the engine drops it."""

    def __init__(self, url: str, model: object, seed: int) -> None:
        self._token_ns: list[int] = []
        self._failed = ""
        self._started, self._stopping = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, args=(url, model, seed), daemon=True)
        self._thread.start()

    def wait_started(self) -> None:
        if not self._started.wait(START_S) or self._failed:
            raise SystemExit(f"a steady stream did not start: {self._failed or 'no token'}")

    def wait_tokens(self, count: int, clock: threading.Event) -> None:
        """Until it has made so many. Raises SystemExit if that takes too long."""
        end = time.monotonic() + START_S
        while len(self._token_ns) < count and not self._failed:
            if time.monotonic() > end:
                raise SystemExit("a steady stream stands still before any prompt has come")
            clock.wait(0.05)

    def stop(self) -> list[int]:
        """The times of its tokens, in monotonic nanoseconds. Raises SystemExit if it ended by itself."""
        self._stopping.set()
        self._thread.join(READ_S)
        if self._failed:
            raise SystemExit(f"a steady stream broke: {self._failed}")
        return self._token_ns

    def _run(self, url: str, model: object, seed: int) -> None:
        target = urlsplit(url)
        connection = http.client.HTTPConnection(target.hostname or "", target.port, timeout=READ_S)
        body = completion(model, prompt_of(STEADY_PROMPT, seed), STEADY_TOKENS, stream=True)
        try:
            connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
            response = connection.getresponse()
            if response.status != 200:
                self._failed = f"status {response.status}"
                return
            while not self._stopping.is_set():
                line = response.readline()
                if not line or line.startswith(b"data: [DONE]"):
                    self._failed = "it ended by itself"
                    return
                if line.startswith(b"data: {"):
                    self._token_ns.append(time.monotonic_ns())
                    self._started.set()
        except (OSError, http.client.HTTPException) as error:
            self._failed = repr(error)
        finally:
            self._started.set()
            connection.close()


@dataclass(frozen=True)
class Outcome:
    """What the prompts and the streams beside them saw. Seconds."""

    prompts: list[Timing]
    gaps_s: list[float]  # of all streams, while prompts came
    quiet_gaps_s: list[float]  # and before: what the arm could do
    tokens_per_s: float  # of all streams together

    @property
    def first_token_s(self) -> float:
        return percentile([timing.first_token_s for timing in self.prompts], 50)

    @property
    def figures(self) -> dict[str, float]:
        firsts = [timing.first_token_s for timing in self.prompts]
        seconds = [timing.second_gap_s for timing in self.prompts]
        return {
            "first token p50 s": percentile(firsts, 50),
            "first token p99 s": percentile(firsts, 99),
            "second token gap p50 ms": percentile(seconds, 50) * 1e3,
            "ITL without prompts ms": percentile(self.quiet_gaps_s, 50) * 1e3,
            "ITL p50 ms": percentile(self.gaps_s, 50) * 1e3,
            "ITL p99 ms": percentile(self.gaps_s, 99) * 1e3,
            "p99 by time ms": percentile_of_time(self.gaps_s, 99) * 1e3,
            "longest gap ms": max(self.gaps_s) * 1e3,
            "streams' tokens/s": self.tokens_per_s,
        }


def run_load(
    urls: Sequence[str], model: object, *, streams: int, prompts: int, prompt_tokens: int, period_s: float, seed: int
) -> Outcome:
    """Streams, then prompts one every `period_s`, both dealt to the urls in turn. Raises SystemExit if one fails."""
    steady = [Steady(urls[number % len(urls)], model, seed + number) for number in range(streams)]
    try:
        clock = threading.Event()  # never set
        for each in steady:
            each.wait_started()
        started_ns = time.monotonic_ns()
        for each in steady:
            each.wait_tokens(QUIET_TOKENS, clock)
        begun_ns = time.monotonic_ns()
        asked = []
        for number in range(prompts):
            clock.wait(max(0.0, begun_ns / 1e9 + number * period_s - time.monotonic()))
            body = completion(model, prompt_of(prompt_tokens, seed + 1000 + number), ANSWER_TOKENS)
            asked.append(Background(urls[number % len(urls)], body, READ_S * 4))
        answers = [each.join() for each in asked]
        # As many periods as prompts, for every arm: the time after a prompt belongs to it.
        clock.wait(max(0.0, begun_ns / 1e9 + prompts * period_s - time.monotonic()))
        ended_ns = time.monotonic_ns()
    finally:
        times = [each.stop() for each in steady]
    for answer in answers:
        if not answer.good:
            raise SystemExit(f"a prompt failed: status {answer.status}, {answer.error}")
    gaps, quiet = gaps_within(times, begun_ns, ended_ns), gaps_within(times, started_ns, begun_ns)
    return Outcome(answers, gaps, quiet, len(gaps) / ((ended_ns - begun_ns) / 1e9))


def percentile_of_time(gaps_s: Sequence[float], share: float) -> float:
    """The gap that a moment falls into: of all the time that streams take, `share` percent is in none longer.

    A stream that stands still for a quarter of its time, but rarely, has few long gaps among its many short ones.

    >>> percentile_of_time([0.1] * 99 + [30.0], 50)
    30.0
    """
    left_s = sum(gaps_s) * share / 100
    for gap in sorted(gaps_s):
        left_s -= gap
        if left_s <= 0:
            return gap
    return max(gaps_s)


def gaps_within(streams: Sequence[Sequence[int]], from_ns: int, to_ns: int) -> list[float]:
    """Seconds between neighbouring tokens of each stream, of those that ended within."""
    return [
        (after - before) / 1e9 for tokens in streams for before, after in pairwise(tokens) if from_ns < after <= to_ns
    ]

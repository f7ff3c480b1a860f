"""Asks, takes times, and turns them into figures: medians, intervals, fits, ceilings and tables.

Knows HTTP and statistics; nothing of arms. The client runs in this process, pinned, and its CPU seconds are shown too.
"""

from __future__ import annotations

import http.client
import itertools
import json
import math
import mmap
import os
import random
import statistics
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from rich.console import Console
from rich.table import Table

from benchmarks.harness.part import cores_of

CLIENT_CPUS = "1"
TOKEN_IDS = range(1000, 40_000)  # of the demo model's 49,152; none of them is special
COPY_BYTES, COPIES = 64 << 20, 6  # more than any cache holds between two copies
RESAMPLES = 4000


@dataclass(frozen=True)
class Timing:
    """One streamed answer as the client saw it. Times are monotonic nanoseconds. `status` 0: the connection broke."""

    status: int
    sent_ns: int
    first_byte_ns: int = 0
    token_ns: tuple[int, ...] = ()  # one for each event that carries a choice: vLLM sends one for each step
    ended_ns: int = 0
    text: str = ""
    usage: dict[str, Any] = field(default_factory=dict)
    headers: dict[str, str] = field(default_factory=dict)
    finished: bool = False  # [DONE] was seen
    events: tuple[dict[str, Any], ...] = ()
    error: str = ""

    @property
    def first_token_s(self) -> float:
        return (self.token_ns[0] - self.sent_ns) / 1e9

    @property
    def second_gap_s(self) -> float:
        """From the first token to the second."""
        return (self.token_ns[1] - self.token_ns[0]) / 1e9

    @property
    def gaps_s(self) -> list[float]:
        return [(after - before) / 1e9 for before, after in itertools.pairwise(self.token_ns)]

    def gaps_between(self, from_ns: int, to_ns: int) -> list[float]:
        """Those that overlap this time, in seconds."""
        pairs = itertools.pairwise(self.token_ns)
        return [(after - before) / 1e9 for before, after in pairs if from_ns <= after and before <= to_ns]

    @property
    def good(self) -> bool:
        return self.status == 200 and self.finished and bool(self.token_ns)


def prompt_of(tokens: int, seed: int) -> list[int]:
    """Token ids that no other (tokens, seed) begins with: no prefix is cached by accident."""
    return random.Random(f"{tokens}/{seed}").choices(TOKEN_IDS, k=tokens)


def completion(model: object, prompt: str | list[int], max_tokens: int, **more: Any) -> dict[str, Any]:
    """The body of a greedy completion of exactly `max_tokens` tokens."""
    return {
        "model": str(model), "prompt": prompt, "max_tokens": max_tokens, "temperature": 0, "ignore_eos": True, **more,
    }  # fmt: skip


def stream(
    url: str,
    body: dict[str, Any],
    deadline_s: float,
    *,
    path: str = "/v1/completions",
    began: Callable[[], None] = lambda: None,
    enough: Callable[[], bool] = lambda: False,
) -> Timing:
    """Asks for a stream and takes the time of every event. Never raises for what network and server do.

    `began` is called when the first line has come. Once `enough` says so, the rest is left and the connection closed.
    """
    target = urlsplit(url)
    connection = http.client.HTTPConnection(target.hostname or "", target.port, timeout=deadline_s)
    raw = json.dumps({**body, "stream": True, "stream_options": {"include_usage": True}}).encode()
    sent_ns = time.monotonic_ns()
    try:
        connection.request("POST", path, raw, {"Content-Type": "application/json"})
        response = connection.getresponse()
        return _read(response, sent_ns, sent_ns + int(deadline_s * 1e9), began, enough)
    except (OSError, http.client.HTTPException, ValueError) as error:
        return Timing(0, sent_ns, error=repr(error))
    finally:
        connection.close()


def _read(
    response: http.client.HTTPResponse, sent_ns: int, end_ns: int, began: Callable[[], None], enough: Callable[[], bool]
) -> Timing:
    headers = {name.lower(): value for name, value in response.getheaders()}
    if response.status != 200:
        return Timing(response.status, sent_ns, headers=headers, error=response.read().decode(errors="replace"))
    stamped: list[tuple[int, bytes]] = []
    while line := response.readline():
        stamped.append((time.monotonic_ns(), line))
        if len(stamped) == 1:
            began()
        if enough():
            break
        if stamped[-1][0] > end_ns:
            raise TimeoutError("the answer did not end within its deadline")
    # Decoded after the last byte, so that no decoding delays a time.
    data = [(at_ns, line[6:].strip()) for at_ns, line in stamped if line.startswith(b"data: ")]
    events = [(at_ns, json.loads(line)) for at_ns, line in data if line.startswith(b"{")]
    tokens = [(at_ns, event) for at_ns, event in events if _carries_token(event)]
    return Timing(
        status=200,
        sent_ns=sent_ns,
        first_byte_ns=stamped[0][0] if stamped else 0,
        token_ns=tuple(at_ns for at_ns, _ in tokens),
        ended_ns=stamped[-1][0] if stamped else 0,
        text="".join(_text(event) for _, event in tokens),
        usage=next((event["usage"] for _, event in reversed(events) if event.get("usage")), {}),
        headers=headers,
        finished=bool(data) and data[-1][1] == b"[DONE]",
        events=tuple(event for _, event in events),
        error=next((str(event["error"]) for _, event in events if "error" in event), ""),
    )


def _carries_token(event: dict[str, Any]) -> bool:
    """Whether a step stands behind it; chat's first event, which only says who speaks, has none."""
    choices: list[dict[str, Any]] = event.get("choices") or []
    return bool(choices) and "role" not in (choices[0].get("delta") or {})


def _text(event: dict[str, Any]) -> str:
    choice = event["choices"][0]
    return choice.get("text") or choice.get("delta", {}).get("content") or ""


class Background:
    """A stream that decodes in a thread of its own while something else is measured."""

    def __init__(self, url: str, body: dict[str, Any], deadline_s: float, *, path: str = "/v1/completions") -> None:
        self._path = path
        self._timing: Timing | None = None
        self._began, self._enough = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, args=(url, body, deadline_s), daemon=True)
        self._deadline_s = deadline_s
        self._thread.start()

    def wait_token(self, deadline_s: float) -> None:
        """Until its first event has come. Raises TimeoutError."""
        if not self._began.wait(deadline_s):
            raise TimeoutError("the stream in the background did not begin")

    def leave(self) -> Timing:
        """What has come so far, and the next line; the server sees the connection close."""
        self._enough.set()
        return self.join()

    def join(self) -> Timing:
        self._thread.join(self._deadline_s + 5)
        assert self._timing is not None, "stream() returned within its deadline"
        return self._timing

    def _run(self, url: str, body: dict[str, Any], deadline_s: float) -> None:
        self._timing = stream(url, body, deadline_s, path=self._path, began=self._began.set, enough=self._enough.is_set)
        self._began.set()  # also where there was no event


def pin_client() -> None:
    """This process and every thread that it will start. Call first in a benchmark's main."""
    os.sched_setaffinity(0, cores_of(CLIENT_CPUS))


def median(values: Sequence[float]) -> float:
    return statistics.median(values)


def percentile(values: Sequence[float], percent: float) -> float:
    """The nearest-rank percentile: one of the values, never between two."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(len(ordered) * percent / 100) - 1)]


def bootstrap_interval(values: Sequence[float], seed: int, *, percent: float = 95.0) -> tuple[float, float]:
    """The interval of the median of paired differences or ratios."""
    draw = random.Random(seed)
    return _middle((draw.choices(values, k=len(values)) for _ in range(RESAMPLES)), percent)


def interval_of_lives(lives: Sequence[Sequence[float]], seed: int, *, percent: float = 95.0) -> tuple[float, float]:
    """The same where engines were started several times: lives are drawn, and rounds of each. What differs from life
    to life is thus in it."""
    draw = random.Random(seed)
    drawn = (
        [value for life in draw.choices(lives, k=len(lives)) for value in draw.choices(life, k=len(life))]
        for _ in range(RESAMPLES)
    )
    return _middle(drawn, percent)


def _middle(samples: Iterable[Sequence[float]], percent: float) -> tuple[float, float]:
    """Of the medians of RESAMPLES samples."""
    medians = sorted(map(statistics.median, samples))
    outside = (100 - percent) / 200
    return medians[int(RESAMPLES * outside)], medians[int(RESAMPLES * (1 - outside)) - 1]


@dataclass(frozen=True)
class Fit:
    """seconds = fixed + bytes / rate."""

    fixed_ms: float
    gb_per_s: float

    def __str__(self) -> str:
        return f"{self.fixed_ms:.1f} ms + bytes / {self.gb_per_s:.2f} GB/s"


def fit(sizes_bytes: Sequence[float], seconds: Sequence[float]) -> Fit:
    """Theil and Sen's line: the median of all slopes, which a single outlier does not move."""
    points = list(zip(sizes_bytes, seconds, strict=True))
    slopes = [(t2 - t1) / (b2 - b1) for (b1, t1), (b2, t2) in itertools.combinations(points, 2) if b1 != b2]
    slope = statistics.median(slopes) if slopes else 0.0
    fixed_s = statistics.median(t - slope * b for b, t in points)
    return Fit(round(fixed_s * 1e3, 3), round(1e-9 / slope, 3) if slope > 0 else float("inf"))


def memcpy_rate() -> float:
    """Bytes per second of one core, between populated buffers that no cache holds: the ceiling of every transfer."""
    total = COPY_BYTES * COPIES
    with mmap.mmap(-1, total) as source, mmap.mmap(-1, total) as target:
        for buffer in (source, target):
            for offset in range(0, total, mmap.PAGESIZE):
                buffer[offset] = 1
        rates = []
        with memoryview(source) as from_view, memoryview(target) as to_view:
            for _ in range(3):  # the first time a virtual machine may have to get these pages from its host
                taken = []
                for offset in range(0, total, COPY_BYTES):
                    started = time.perf_counter()
                    to_view[offset : offset + COPY_BYTES] = from_view[offset : offset + COPY_BYTES]
                    taken.append(COPY_BYTES / (time.perf_counter() - started))
                rates.append(statistics.median(taken))
    return max(rates)


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Prints one table; the first column to the left, figures to the right."""
    printed = Table(title=title, title_justify="left")
    for index, column in enumerate(columns):
        printed.add_column(column, justify="right" if index else "left")
    for row in rows:
        printed.add_row(*(f"{cell:.3g}" if isinstance(cell, float) else str(cell) for cell in row))
    Console(width=None if os.isatty(1) else 140).print(printed)

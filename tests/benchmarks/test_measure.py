from __future__ import annotations

import json
import math
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from benchmarks.harness.measure import (
    Background,
    bootstrap_interval,
    completion,
    fit,
    interval_of_lives,
    percentile,
    prompt_of,
    stream,
)


def test_prompts_share_no_prefix() -> None:
    prompts = [prompt_of(64, seed) for seed in range(20)] + [prompt_of(65, 0)]
    assert len({tuple(prompt[:2]) for prompt in prompts}) == len(prompts)
    assert prompt_of(64, 3) == prompt_of(64, 3)


def test_percentile_is_one_of_the_values() -> None:
    values = [float(n) for n in range(1, 101)]
    assert percentile(values, 99) == 99
    assert percentile(values, 50) == 50
    assert percentile(values, 0) == 1
    assert percentile([7.0], 99) == 7


def test_fit_finds_the_line_and_ignores_an_outlier() -> None:
    sizes = [1e6, 2e6, 4e6, 8e6, 16e6]
    seconds = [0.005 + size / 2e9 for size in sizes]
    assert fit(sizes, seconds).fixed_ms == pytest.approx(5)
    assert fit(sizes, seconds).gb_per_s == pytest.approx(2)
    seconds[1] += 1.0
    assert fit(sizes, seconds).gb_per_s == pytest.approx(2, rel=0.05)


def test_a_flat_line_has_no_rate() -> None:
    assert fit([1e6, 2e6, 4e6, 8e6], [0.01] * 4).gb_per_s == math.inf


def test_the_interval_holds_the_median_and_narrows() -> None:
    few, many = [1.0, 1.1, 0.9, 1.05], [1.0, 1.1, 0.9, 1.05] * 20
    low, high = bootstrap_interval(few, seed=1)
    assert low <= 1.03 <= high
    narrow = bootstrap_interval(many, seed=1)
    assert narrow[1] - narrow[0] <= high - low


def test_what_differs_between_lives_is_in_the_interval() -> None:
    """Many rounds of few lives tell nothing of the next life."""
    assert interval_of_lives([[1.0] * 50, [1.1] * 50, [1.05] * 50], seed=1) == (1.0, 1.1)


EVENTS = [
    {"choices": [{"text": "a"}]},
    {"choices": [{"text": ""}]},  # half of a character: a step all the same
    {"choices": [{"text": "b"}]},
    {"choices": [], "usage": {"completion_tokens": 3}},
]
CHAT_EVENTS = [
    {"choices": [{"delta": {"role": "assistant", "content": ""}}]},
    {"choices": [{"delta": {"content": "a"}}]},
]


def test_a_stream_is_timed_event_by_event() -> None:
    with server() as url:
        timing = stream(url, completion("m", [1], 3), 5)
    assert timing.good
    assert (timing.text, timing.usage) == ("ab", {"completion_tokens": 3})
    assert len(timing.token_ns) == 3
    assert timing.sent_ns < timing.first_byte_ns <= timing.token_ns[0] <= timing.ended_ns
    assert len(timing.gaps_s) == 2
    assert timing.gaps_between(timing.token_ns[1], timing.token_ns[1]) == timing.gaps_s


def test_the_event_that_says_who_speaks_is_no_token() -> None:
    with server() as url:
        timing = stream(url, {}, 5, path="/v1/chat/completions")
    assert (len(timing.token_ns), timing.text) == (1, "a")


def test_a_stream_without_its_end_is_not_good() -> None:
    with server() as url:
        assert not stream(url, {}, 5, path="/broken").good
        refused = stream(url, {}, 5, path="/refused")
    assert (refused.status, refused.good) == (429, False)


def test_nobody_listens() -> None:
    assert stream("http://127.0.0.1:9", {}, 1).status == 0


def test_a_background_stream_says_when_it_began() -> None:
    with server() as url:
        background = Background(url, {}, 5)
        background.wait_token(5)
        assert background.join().good


def test_a_stream_can_be_left() -> None:
    with server() as url:
        background = Background(url, {}, 20, path="/endless")
        background.wait_token(5)
        timing = background.leave()
    assert timing.token_ns
    assert not timing.finished


class _Engine(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.0"

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(429 if self.path == "/refused" else 200)
        self.end_headers()
        for event in CHAT_EVENTS if "chat" in self.path else EVENTS:
            self.wfile.write(f"data: {json.dumps(event)}\n\n".encode())
        while self.path == "/endless":
            try:
                self.wfile.write(f"data: {json.dumps(EVENTS[0])}\n\n".encode())
            except OSError:
                return
        if self.path != "/broken":
            self.wfile.write(b"data: [DONE]\n\n")

    def log_message(self, format: str, *args: object) -> None:
        pass


@contextmanager
def server() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), _Engine) as engine:
        thread = threading.Thread(target=engine.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{engine.server_port}"
        finally:
            engine.shutdown()
            thread.join()

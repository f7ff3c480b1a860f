"""Open-loop load against a server of ours: tokens by the clock, prompts that come whatever it does."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from benchmarks.harness.steady import STEADY_TOKENS, Steady, gaps_within, percentile_of_time, run_load

TOKEN_S = 0.005


class Model(BaseHTTPRequestHandler):
    """Streams as many tokens as asked, one every TOKEN_S."""

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.send_response(200 if body["model"] == "good" else 404)
        self.end_headers()
        clock = threading.Event()
        try:
            for _ in range(body["max_tokens"]):
                clock.wait(TOKEN_S)
                self.wfile.write(b'data: {"choices": [{"text": "x"}]}\n\n')
            self.wfile.write(b"data: [DONE]\n\n")
        except OSError:
            pass  # the client has left

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def url() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Model) as server:
        server.daemon_threads = False
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def test_gaps_count_where_they_end() -> None:
    assert gaps_within([[0, 10, 30], [5, 25]], 10, 30) == [20e-9, 20e-9]


def test_streams_go_on_while_prompts_come_by_the_clock(url: str) -> None:
    outcome = run_load([url], "good", streams=2, prompts=3, prompt_tokens=5, period_s=0.1, seed=1)
    assert len(outcome.prompts) == 3
    sent_ns = [timing.sent_ns for timing in outcome.prompts]
    assert sent_ns[-1] - sent_ns[0] > 0.15e9, "by the clock, not one after another"
    assert len(outcome.gaps_s) > 0
    assert len(outcome.quiet_gaps_s) > 0
    assert outcome.tokens_per_s > 0
    assert outcome.figures["ITL p50 ms"] >= TOKEN_S * 1e3 * 0.5
    assert all(timing.good for timing in outcome.prompts)


def test_a_stream_ends_when_told(url: str) -> None:
    stream = Steady(url, "good", 1)
    stream.wait_started()
    assert 0 < len(stream.stop()) < STEADY_TOKENS


def test_a_stream_that_is_refused_says_so(url: str) -> None:
    with pytest.raises(SystemExit, match="404"):
        Steady(url, "bad", 1).wait_started()


def test_few_long_pauses_are_no_percentile_of_the_gaps_but_of_the_time() -> None:
    gaps = [0.1] * 300 + [13.0, 14.0]
    assert percentile_of_time(gaps, 40) == 0.1
    assert percentile_of_time(gaps, 70) == 13.0
    assert percentile_of_time(gaps, 99) == 14.0
    assert percentile_of_time([0.25], 99) == 0.25

from __future__ import annotations

import itertools
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from benchmarks.harness.arms import Arm
from benchmarks.harness.report import Report
from benchmarks.harness.ways import ATTEMPTS, Detours, Way, interleaved, measure, this_way
from pdx.errors import PdxError


class _Engine(BaseHTTPRequestHandler):
    """Answers with five tokens; the router's word on the way is the next of `ways`."""

    ways: Iterator[str] = itertools.repeat("seeded")

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(200)
        self.send_header("x-pdx-way", next(self.ways))
        self.end_headers()
        for _ in range(5):
            self.wfile.write(f"data: {json.dumps({'choices': [{'text': 'a'}]})}\n\n".encode())
        self.wfile.write(b"data: [DONE]\n\n")

    def log_message(self, format: str, *args: object) -> None:
        pass


class _Fixed(Arm):
    """An arm of no processes, at a URL that serves already."""

    def __init__(self, url: str, log: list[str], name: str = "fixed") -> None:
        self.name, self.url, self.model, self.parts = name, url, "m", []
        self._log = log

    def pause(self) -> None:
        self._log.append(f"-{self.name}")

    def resume(self) -> None:
        self._log.append(f"+{self.name}")


@pytest.fixture
def arm() -> Iterator[_Fixed]:
    with ThreadingHTTPServer(("127.0.0.1", 0), _Engine) as engine:
        thread = threading.Thread(target=engine.serve_forever)
        thread.start()
        yield _Fixed(f"http://127.0.0.1:{engine.server_port}", [])
        engine.shutdown()
        thread.join()


def test_only_answers_that_went_the_way_are_measured(arm: _Fixed, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_Engine, "ways", iter(["after", "seeded", *["after"] * ATTEMPTS]))
    detours = Detours()
    sample = measure(Way("seeded", arm, "auto"), 8, 1, detours)
    assert sample.timing.headers["x-pdx-way"] == "seeded"
    assert len(sample.timing.token_ns) == 5
    with pytest.raises(PdxError, match="another way"):
        measure(Way("seeded", arm, "auto"), 8, 2, detours)


def test_prompts_that_went_another_way_are_counted_and_must_be_rare(
    arm: _Fixed, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    often, rarely = Way("often", arm, "auto"), Way("rarely", arm, "auto")
    detours, report = Detours(), Report("test")
    monkeypatch.setattr(_Engine, "ways", itertools.cycle([*["after"] * (ATTEMPTS - 1), "seeded"]))
    this_way(often, 8, 1, detours)
    monkeypatch.setattr(_Engine, "ways", itertools.chain(["after"], itertools.repeat("seeded")))
    for seed in range(3):
        this_way(rarely, 8, seed, detours)
    detours.judge(report)
    assert [bar["holds"] for bar in report.bars.values()] == [False, True]
    assert list(report.figures.values()) == [{"often": [ATTEMPTS, ATTEMPTS - 1], "rarely": [4, 1]}]


def test_every_round_begins_with_another_way_and_only_one_runs() -> None:
    log: list[str] = []
    ways = [Way(name, _Fixed("", log, name)) for name in "ab"]
    order = [(number, way.name) for number, way in interleaved(ways, 2)]
    assert order == [(0, "a"), (0, "b"), (1, "b"), (1, "a")]
    assert log == ["+a", "-a", "+b", "-b", "+b", "-b", "+a", "-a"]

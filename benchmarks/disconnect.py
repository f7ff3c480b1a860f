"""A client leaves in the middle of prefill: how long engines, pushes and leases go on. Real daemons and a real router.

Engines are the bare ones of the daemons' tests: they compute a block every BLOCK_S, in steps that nothing interrupts,
with real pages and fences, behind real HTTP. Both engines of a pair are under way (`--journey paired`). Measured from
the moment in which the client closes its connection: until both engines' connections are closed, until the last page
was put and has landed, until both engines know; and from the end of the step that ran then, until no lease is left.
"""

from __future__ import annotations

import argparse
import json
import os
import select
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import ExitStack
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import urlopen

from benchmarks.harness.leaving import leaving
from benchmarks.harness.report import Report, options
from benchmarks.harness.rig import REPOSITORY
from pdx.launch.ports import free_ports

sys.path.insert(0, str(REPOSITORY / "tests"))

from daemon.fleet import PAGES, BareEngine, Fleet, Prompt, fleet_in, prompt_of, until

ROUNDS = 60
BLOCK_S = 0.004
STEP_BLOCKS = 10  # a step takes 40 ms and goes on computing, whatever the engine has heard
BLOCKS = 120
LEAVES_AT = 25  # blocks that have been computed when the client leaves: in the middle of a step
LOOK_S = 0.001
BAR_S = 0.1
ANSWERS_S = 30.0


@dataclass
class Front:
    """An engine's HTTP side: answers nothing, and sees when nobody waits any more."""

    server: ThreadingHTTPServer = field(init=False)
    asked: list[dict[str, Any]] = field(default_factory=list)
    closed_at: float = 0.0

    def __post_init__(self) -> None:
        front = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                front.asked.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
                if select.select([self.connection], [], [], ANSWERS_S)[0]:  # nothing more can come but the end
                    front.closed_at = time.monotonic()
                self.close_connection = True

            def do_GET(self) -> None:
                self.send_response(200)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server.server_port}"


@dataclass
class Times:
    """Of one round, in seconds after the client has left; the leases' after the end of the step."""

    connections: float
    engines_know: float
    last_put: float
    last_landed: float
    leases: float


class Place:
    """Two daemons, an engine at each, and a router over them."""

    def __init__(self, stack: ExitStack, scratch: Path) -> None:
        self.fleet: Fleet = stack.enter_context(fleet_in(scratch))
        self.fronts = [Front(), Front()]
        control = f"tcp://127.0.0.1:{free_ports(1)[0]}"
        self.prefill, self.decode = (
            self.fleet.engine(self.fleet.daemon(arena="16MiB"), name, role=role, url=front.url, router=control)
            for (name, role), front in zip((("P", "prefill"), ("D", "decode")), self.fronts, strict=True)
        )
        published = scratch / "router.json"
        command = [
            *(sys.executable, "-m", "pdx.router.main", "--port", "0", "--control", control, "--journey", "paired"),
            *("--publish", str(published), "--key-file", str(self.fleet.key_file), "--log-level", "error"),
        ]
        router = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": str(REPOSITORY)}, cwd=REPOSITORY)
        stack.callback(router.wait)
        stack.callback(router.kill)
        until(published.exists, "the router listens")
        self.url = json.loads(published.read_bytes())["http"]
        until(self._joined, "both engines have joined")

    def _joined(self) -> bool:
        try:
            return urlopen(f"{self.url}/readyz?engines=2", timeout=5).status == 200
        except OSError:
            return False

    def ask(self) -> socket.socket:
        """A client's connection, on which the request has been sent."""
        body = json.dumps({"model": "m", "prompt": [1, 2, 3], "max_tokens": 8, "stream": True}).encode()
        where = urlsplit(self.url)
        client = socket.create_connection((where.hostname, where.port))
        head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        client.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        return client


def measured(place: Place, number: int) -> Times:
    """One round."""
    prompt, fronts = prompt_of(BLOCKS * 16, seed=number + 1), place.fronts
    for front in fronts:
        front.asked.clear()
        front.closed_at = 0.0
    client = place.ask()
    until(lambda: all(front.asked for front in fronts), "both engines were asked")
    handle = fronts[0].asked[0]["kv_transfer_params"]["pdx_handle"]
    decode = threading.Thread(target=_load, args=(place.decode, prompt, handle))
    opened = place.prefill.open_send(prompt, handle)
    know = Knowing(place)
    block = 0
    while not (know.all and block % STEP_BLOCKS == 0):
        if block < BLOCKS:
            place.prefill.fill(opened, prompt, [block])
        block += 1
        if block == 2:
            decode.start()
        if block == LEAVES_AT:
            decode.join()
            left_at = time.monotonic()
            client.close()
            watch = Watch(place)
        filled_at = time.monotonic()
        while time.monotonic() < filled_at + BLOCK_S:
            know.look()
            if block >= LEAVES_AT:
                watch.look()
            time.sleep(LOOK_S)
    ended_at = time.monotonic()
    place.prefill.let_go(opened.handoff_id, "send", ok=False)
    place.decode.let_go(opened.handoff_id, "load", ok=False)
    while not watch.look():
        time.sleep(LOOK_S)
    until(lambda: all(front.closed_at for front in fronts), "both connections are closed")
    return Times(
        connections=max(front.closed_at for front in fronts) - left_at, engines_know=know.at - left_at,
        last_put=watch.changed["pages_put"] - left_at, last_landed=watch.changed["pages_landed"] - left_at,
        leases=watch.free_at - ended_at,
    )  # fmt: skip


def _load(engine: BareEngine, prompt: Prompt, handle: str) -> None:
    engine.open_load(prompt, handle)


class Knowing:
    """When both engines have heard that the handoff is over."""

    def __init__(self, place: Place) -> None:
        self.at = 0.0
        self._engines = {place.prefill: "SendEnded", place.decode: "LoadEnded"}

    @property
    def all(self) -> bool:
        return not self._engines

    def look(self) -> None:
        for engine, kind in list(self._engines.items()):
            engine._inbox += engine.scheduler.poll()
            told = [message for message in engine._inbox if type(message).__name__ == kind]
            if told:
                engine._inbox.remove(told[0])
                del self._engines[engine]
                self.at = time.monotonic()


class Watch:
    """When the daemons' counters changed last, and when no lease was left."""

    def __init__(self, place: Place) -> None:
        self.changed = dict.fromkeys(("pages_put", "pages_landed"), time.monotonic())
        self.free_at = 0.0
        self._daemons = {"pages_put": place.prefill.daemon, "pages_landed": place.decode.daemon}
        self._seen: dict[str, int] = {}

    def look(self) -> bool:
        """Whether all is free."""
        free = True
        for counter, daemon in self._daemons.items():
            stats, now = daemon.stats(), time.monotonic()
            count = stats["counters"].get(counter, 0)
            if self._seen.setdefault(counter, count) != count:
                self._seen[counter], self.changed[counter] = count, now
            free &= not any(stats["store"]["leases"].values())
        self.free_at = time.monotonic()
        return free


@leaving()
def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="pdx bench disconnect", description=__doc__)
    options(parser)
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="(default: %(default)s)")
    chosen = parser.parse_args(argv)
    report = Report("disconnect")
    rounds = 15 if chosen.quick else chosen.rounds
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="pdx-disconnect-")))
        place = Place(stack, scratch)
        times = [measured(place, number) for number in range(rounds)]
        for daemon in place.fleet.daemons:
            daemon.wait_unleased()
        put = place.prefill.daemon.counter("pages_put")
    for name, words in (
        ("connections", "both engines' requests cancelled after the client left"),
        ("engines_know", "both engines told by their daemons"),
        ("last_put", "the last page put"),
        ("last_landed", "the last page landed"),
        ("leases", "leases ended after the step that ran then"),
    ):
        values = sorted(getattr(each, name) for each in times)
        worst = round(values[-1] * 1e3, 1)
        report.bar(f"{words}, worst of {rounds}", worst, f"<= {BAR_S * 1e3:g}", worst <= BAR_S * 1e3, unit="ms")
        report.figures[f"{name}_ms"] = {
            "p50": round(statistics.median(values) * 1e3, 2), "p90": round(values[int(0.9 * rounds)] * 1e3, 2),
            "max": worst,
        }  # fmt: skip
    computed = rounds * LEAVES_AT * PAGES.layers
    report.bar("pages put, of those computed before clients left", round(put / computed, 3), "0.8 to 1.1",
               0.8 <= put / computed <= 1.1)  # fmt: skip
    report.figures["step_ms"] = STEP_BLOCKS * BLOCK_S * 1e3
    print(json.dumps(report.figures, indent=1))
    report.write(chosen.json)
    return 0 if report.all_hold else 1


if __name__ == "__main__":
    sys.exit(main())

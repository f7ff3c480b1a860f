"""Several routers over the same daemons: each serves all engines, and one that is killed takes nothing with it."""

from __future__ import annotations

import json
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from threading import Event
from typing import Any

import pytest
from fleet import BareEngine, Fleet, prompt_of, until
from http_server import serving

from pdx.errors import ConfigError
from pdx.launch.ports import free_ports

PATH = "/v1/completions"
CLAIM_S = "0.5"
PROMPT = prompt_of(40)


@dataclass
class Front:
    """An engine's HTTP side: what it was asked, and whether it answers."""

    name: str
    url: str = ""
    asked: list[dict[str, Any]] = field(default_factory=list)
    may: Event = field(default_factory=Event)

    @contextmanager
    def listening(self) -> Iterator[None]:
        front = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                front.asked.append(body)
                front.may.wait(20)
                choice = {"index": 0, "text": front.name, "prompt_token_ids": [1, 2, 3], "finish_reason": "length"}
                answer = {"id": "x", "model": "m", "choices": [choice], "usage": {"prompt_tokens": 3}}
                self._say(json.dumps(answer).encode())

            def do_GET(self) -> None:
                self._say(b"")

            def _say(self, body: bytes) -> None:
                try:
                    self.send_response(200)
                    self.send_header("Content-Type", "application/json")
                    self.send_header("Content-Length", str(len(body)))
                    self.end_headers()
                    self.wfile.write(body)
                except OSError:  # the router has gone
                    pass

            def log_message(self, *_: object) -> None:
                pass

        with serving(Handler) as self.url:
            try:
                yield
            finally:
                self.may.set()


class Router:
    """One router process."""

    def __init__(self, directory: Path, name: str, key_file: Path, control: str) -> None:
        file = directory / f"{name}.json"
        flags = ["--port", "0", "--control", control, "--publish", str(file), "--key-file", str(key_file)]
        flags += ["--journey", "after", "--handoff-claim-s", CLAIM_S]
        self.process = subprocess.Popen([sys.executable, "-m", "pdx.router.main", *flags])
        until(file.exists, f"router {name} listens")
        self.url = json.loads(file.read_bytes())["http"]

    def ready(self, engines: int) -> bool:
        try:
            with urllib.request.urlopen(f"{self.url}/readyz?engines={engines}", timeout=5) as reply:
                return reply.status == 200
        except urllib.error.HTTPError as error:
            error.close()
            return False

    def ask(self) -> tuple[str, str]:
        """Who has answered, and how."""
        body = json.dumps({"model": "m", "prompt": [1, 2, 3], "max_tokens": 8}).encode()
        request = urllib.request.Request(self.url + PATH, data=body, headers={"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=15) as reply:
            return json.loads(reply.read())["choices"][0]["text"], reply.headers["x-pdx-way"]

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(10)


@dataclass
class Place:
    """Two daemons with an engine each, and what is needed to start routers over them."""

    directory: Path
    fleet: Fleet
    controls: list[str]
    prefill: BareEngine
    decode: BareEngine
    fronts: dict[str, Front]
    stack: ExitStack

    def router(self, number: int, name: str) -> Router:
        router = Router(self.directory, name, self.fleet.key_file, self.controls[number])
        self.stack.callback(router.kill)
        return router


@pytest.fixture
def place(tmp_path: Path, fleet: Fleet) -> Iterator[Place]:
    controls = [f"tcp://127.0.0.1:{port}" for port in free_ports(2)]
    with ExitStack() as stack:
        fronts = {name: Front(name) for name in ("P", "D")}
        for front in fronts.values():
            stack.enter_context(front.listening())
        engines = {
            name: fleet.engine(fleet.daemon(), name, role=role, url=fronts[name].url, router=", ".join(controls))
            for name, role in (("P", "prefill"), ("D", "decode"))
        }
        yield Place(tmp_path, fleet, controls, engines["P"], engines["D"], fronts, stack)


def test_daemons_and_a_router_speak_ipv6(tmp_path: Path, fleet: Fleet) -> None:
    try:
        (port,) = free_ports(1, host="::1")
    except ConfigError as error:
        pytest.skip(f"this machine has no IPv6: {error}")
    control = f"tcp://[::1]:{port}"
    with ExitStack() as stack:
        front = Front("E")
        stack.enter_context(front.listening())
        prefill, decode = (
            fleet.engine(fleet.daemon(host="::1"), name, role=role, url=front.url, router=control)
            for name, role in (("P", "prefill"), ("D", "decode"))
        )
        assert decode.daemon.ref.control.startswith("tcp://[::1]:")
        router = Router(tmp_path, "R", fleet.key_file, control)
        stack.callback(router.kill)
        until(lambda: router.ready(2), "both are announced")
    handle = fleet.handle(prefill, decode)
    prefill.prefill(PROMPT, handle)
    assert decode.load(PROMPT, handle) == len(PROMPT.names)


def test_a_killed_router_loses_its_connections_and_nothing_else(place: Place) -> None:
    one, two = place.router(0, "one"), place.router(1, "two")
    for router in (one, two):
        until(lambda router=router: router.ready(2), "both engines have joined both routers")
    with ThreadPoolExecutor(1) as threads:
        lost = threads.submit(one.ask)
        until(lambda: place.fronts["P"].asked, "prefill was asked")
        handle = place.fronts["P"].asked[0]["kv_transfer_params"]["pdx_handle"]
        place.prefill.prefill(PROMPT, handle)
        landed = lambda: any("landed" in half for half in place.decode.daemon.stats()["handoffs"])  # noqa: E731
        until(landed, "decode's daemon holds the prompt")
        one.kill()
        with pytest.raises(OSError):
            lost.result(10)
    for engine in (place.prefill, place.decode):
        engine.daemon.wait_unleased()  # nobody told them: the claim budget did
    for front in place.fronts.values():
        front.may.set()
    assert two.ask() == ("D", "after")
    again = place.router(0, "again")  # knows nothing, and hears all within a second or two
    until(lambda: again.ready(2), "the engines have joined the new router")
    assert again.ask() == ("D", "after")

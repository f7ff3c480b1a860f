"""Several workers behind one port: all hear the daemons, one page has all metrics, and they end together."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import IO

import aiohttp
import pytest
from engine_fakes import KEY, FakeDaemon, FakeEngine, daemon_ref, metric, reaches, until, within

from pdx.launch import processes
from pdx.router.metrics import Metrics
from pdx.router.workers.hub import AddedUp, Places
from pdx.router.workers.texts import END

REACHED_S = 20.0
# Answers that all come from one of two workers by chance: once in 2 ** 40. While the other knows no engine yet many are
# asked for, and 12 in a row were seen among them.
IN_A_ROW = 40
PROMPT = {"model": "smol", "prompt": "Once upon a time", "max_tokens": 8}


def started(command: list[str], *, out: IO[bytes] | None = None, **environment: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(command, start_new_session=True, stdout=out, env={**os.environ, **environment})


@asynccontextmanager
async def workers(tmp_path: Path, *engines: FakeEngine, count: int = 2) -> AsyncIterator[tuple[str, int]]:
    """(URL, process id) of a router with engines announced."""
    key, file = tmp_path / "key", tmp_path / "router.json"
    key.write_bytes(KEY)
    key.chmod(0o600)
    flags = ["--port", "0", "--control", "tcp://127.0.0.1:0", "--publish", str(file), "--key-file", str(key)]
    command = [sys.executable, "-m", "pdx.router.main", *flags, "--workers", str(count), "--journey", "after"]
    before = signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # whoever starts it may: it waits for its own none the less
    try:
        process = started(command)
    finally:
        signal.signal(signal.SIGCHLD, before)
    try:
        await until(file.exists, "published")
        where = json.loads(file.read_bytes())
        async with AsyncExitStack() as stack:
            for engine in engines:
                await engine.start()
                stack.push_async_callback(engine.stop)
            await stack.enter_async_context(FakeDaemon(daemon_ref(), list(engines)).announcing(where["control"]))
            yield where["http"], process.pid
    finally:
        process.terminate()
        assert await asyncio.to_thread(process.wait, 10) == 0
        assert processes.of_sessions({process.pid}) == []


async def on_new_connections(url: str, count: int) -> list[aiohttp.ClientResponse]:
    """So many requests, each by a connection of its own, which the kernel spreads."""
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(force_close=True)) as client:
        replies = []
        for _ in range(count):
            async with client.post(url + "/v1/completions", json=PROMPT) as reply:
                await reply.read()
                replies.append(reply)
        return replies


def listening(url: str) -> int:
    """How many sockets of this machine listen there, as the kernel says."""
    port = f":{int(url.rpartition(':')[2]):04X}"
    rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    return sum(local.endswith(port) and state == "0A" for _, local, _, state, *_ in rows)


async def ready(url: str, count: int) -> None:
    """Two workers listen, and so many answers in a row know both engines: of both workers, in all likelihood."""
    await until(lambda: listening(url) == 2, "both listen")
    in_a_row = 0
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(force_close=True)) as client:
        while in_a_row < count:
            async with client.get(url + "/readyz?engines=2") as reply:
                in_a_row = in_a_row + 1 if reply.status == 200 else 0


async def all_know(url: str) -> None:
    """Two workers listen, and none of them does so without knowing both engines."""
    await until(lambda: listening(url) == 2, "both listen")
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(force_close=True)) as client:
        for _ in range(IN_A_ROW):
            async with client.get(url + "/readyz?engines=2") as reply:
                assert reply.status == 200, await reply.text()


async def answers_are(url: str, count: int) -> None:
    """All workers have said so: they are added up every second."""
    async with aiohttp.ClientSession() as client:
        await reaches(client, url, 'pdx_router_requests_total{code="200",model="smol"}', count, REACHED_S)


@within(40)
async def _serve_and_lose_one(tmp_path: Path) -> None:
    p, d = FakeEngine("p0", "prefill"), FakeEngine("d0", "decode")
    async with workers(tmp_path, p, d) as (url, leader):
        await ready(url, IN_A_ROW)
        replies = await on_new_connections(url, 30)
        assert {reply.status for reply in replies} == {200}
        assert {reply.headers["x-pdx-handoff"] for reply in replies} != {"none"}
        await answers_are(url, 30)
        async with aiohttp.ClientSession() as client:
            assert await metric(client, url, 'pdx_router_engines{role="prefill"}') == 1
        children = [pid for pid in processes.of_sessions({leader}) if pid != leader]
        assert len(children) == 3, "two workers and the hub"
        for victim in sorted(children):  # each of the three, one after the other
            await answers_are(url, 30)  # the hub, perhaps a new one, has heard all of them
            os.kill(victim, signal.SIGKILL)
            await until(lambda victim=victim: victim not in processes.of_sessions({leader}), "it is gone")
            await until(lambda: len(processes.of_sessions({leader})) == 4, "it was started anew")
            await all_know(url)
        replies = await on_new_connections(url, 10)
        assert [reply.status for reply in replies] == [200] * 10
        await answers_are(url, 40)  # nothing that was counted is lost, nor counted twice


def test_workers_serve_together_and_each_may_die(tmp_path: Path) -> None:
    _serve_and_lose_one(tmp_path)


def test_none_outlives_the_first(tmp_path: Path) -> None:
    @within(20)
    async def run() -> None:
        file = tmp_path / "router.json"
        command = [
            *(sys.executable, "-m", "pdx.router.main", "--workers", "2", "--port", "0"),
            *("--control", "tcp://127.0.0.1:0", "--publish", str(file)),
        ]
        process = started(command, PDX_RUN_DIR=str(tmp_path / "run"), TMPDIR=scratch)
        await until(file.exists, "published")
        assert os.listdir(scratch) != []
        process.kill()
        process.wait(10)
        await until(lambda: processes.of_sessions({process.pid}) == [], "all have ended")

    with tempfile.TemporaryDirectory() as scratch:  # whose sockets' names would be too long below pytest's
        run()
        assert os.listdir(scratch) == []


def test_a_stop_at_any_moment_of_the_start_ends_all(tmp_path: Path) -> None:
    """Nobody is started whom nobody tells, and a signal between two waits is not lost."""
    flags = ["--workers", "3", "--port", "0", "--control", "tcp://127.0.0.1:0"]
    for number in range(6):
        process = started([sys.executable, "-m", "pdx.router.main", *flags], PDX_RUN_DIR=str(tmp_path / "run"))
        deadline = time.monotonic() + 20
        while len(processes.of_sessions({process.pid})) < 2 and time.monotonic() < deadline:
            time.sleep(0.002)
        time.sleep(number * 0.004)  # the moment is what is tried
        process.terminate()
        try:
            process.wait(10)
            assert processes.of_sessions({process.pid}) == []
        finally:
            process.kill()  # the others end with it, also where this test fails
            process.wait(10)


HANGING_HUB = """
import asyncio, logging, sys
from pdx.router.request.settings import Settings
from pdx.router.service import Options
from pdx.router.workers import supervisor

async def hangs(*args, **more):
    print("hangs", flush=True)
    await asyncio.Event().wait()

supervisor._serve_hub = hangs
supervisor.HUB_START_S = float(sys.argv[1])
sys.exit(supervisor.lead(Options(settings=Settings(cluster_key=bytes(32)), port=0), 2))
"""


@pytest.mark.parametrize(("start_s", "lives"), [(60.0, 1), (1.0, 2)])
def test_a_hub_that_hangs_at_its_start_is_ended(start_s: float, lives: int) -> None:
    """When the time for that is over, and is started anew; or at once with all the rest."""
    command = [sys.executable, "-c", HANGING_HUB, str(start_s)]
    with subprocess.Popen(command, start_new_session=True, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert [process.stdout.readline() for _ in range(lives)] == ["hangs\n"] * lives
            process.terminate()
            assert process.wait(20) == 0
            assert processes.of_sessions({process.pid}) == []
        finally:
            for left in processes.of_sessions({process.pid}):
                os.kill(left, signal.SIGKILL)


HANGING_WORKER = """
import os, sys
from pdx.router.request.settings import Settings
from pdx.router.service import Options, serve
from pdx.router.workers import hub, supervisor

async def told(options):
    print(f"{options.worker} {os.getpid()} {options.own_metrics}", flush=True)
    await serve(options)

supervisor.serve = told
hub.HUNG_ASK_S, drain_s = map(float, sys.argv[1:])
options = Options(settings=Settings(cluster_key=bytes(32)), port=0, control="tcp://127.0.0.1:0", drain_s=drain_s)
sys.exit(supervisor.lead(options, 2))
"""


@asynccontextmanager
async def hanging_worker(out: Path, *, ask_s: float, drain_s: float) -> AsyncIterator[subprocess.Popen[bytes]]:
    """A router of two workers, of which the second is stopped while it serves. Its workers' lives are told in `out`."""
    with tempfile.TemporaryDirectory() as scratch, out.open("wb") as file:  # pytest's own are too long for sockets
        command = [sys.executable, "-c", HANGING_WORKER, str(ask_s), str(drain_s)]
        process = started(command, out=file, TMPDIR=scratch)
        try:
            await until(lambda: len(lives(out)) == 2, "both have begun")
            _, pid, metrics = next(life for life in lives(out) if life[0] == "1")
            await until(Path(metrics).exists, "it serves")
            os.kill(int(pid), signal.SIGSTOP)
            yield process
        finally:
            for left in processes.of_sessions({process.pid}):
                os.kill(left, signal.SIGKILL)
            process.wait(10)


def lives(out: Path) -> list[list[str]]:
    return [line.split() for line in out.read_text().splitlines(keepends=True) if line.endswith("\n")]


@within(40)
async def test_a_worker_that_hangs_is_replaced(tmp_path: Path) -> None:
    async with hanging_worker(tmp_path / "out", ask_s=0.2, drain_s=1.0) as process:
        await until(lambda: len(lives(tmp_path / "out")) == 3, "another begins", REACHED_S)
        (_, stopped, _), (_, other, metrics) = (life for life in lives(tmp_path / "out") if life[0] == "1")
        assert stopped != other
        assert int(stopped) not in processes.of_sessions({process.pid})
        await until(Path(metrics).exists, "it serves")
        process.terminate()
        assert await asyncio.to_thread(process.wait, 20) == 0
        assert processes.of_sessions({process.pid}) == []


@pytest.mark.parametrize(("signals", "drain_s"), [([signal.SIGTERM], 0.1), ([signal.SIGTERM, signal.SIGINT], 60.0)])
def test_a_worker_that_hangs_keeps_nobody_from_ending(
    signals: list[signal.Signals], drain_s: float, tmp_path: Path
) -> None:
    @within(40)
    async def run() -> None:
        async with hanging_worker(tmp_path / "out", ask_s=60.0, drain_s=drain_s) as process:
            for number in signals:
                process.send_signal(number)
            assert await asyncio.to_thread(process.wait, 20) == 0
            assert processes.of_sessions({process.pid}) == []

    run()


@within(20)
async def test_one_answer_missed_is_no_hanging(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pdx.router.workers.hub.HUNG_ASK_S", 0.05)
    silent = asyncio.Event()
    texts = [b"", END, b"", b"", b""]

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        text = texts.pop(0)
        if not text:
            await silent.wait()
        writer.write(text)
        writer.close()

    with tempfile.TemporaryDirectory() as folder:
        places = Places(Path(folder))
        added_up = AddedUp(places, Metrics())
        async with await asyncio.start_unix_server(answer, places.metrics_of(1, 2)):
            assert [await added_up.refresh() for _ in range(5)] == [[], [], [], ["metrics-1-2"], []]
            silent.set()


@pytest.mark.parametrize(("flag", "shared"), [("--port", False), ("--port", True), ("--control", False)])
def test_a_taken_port_is_one_line(flag: str, shared: bool, tmp_path: Path) -> None:
    """`shared`: as another router's workers have it."""
    with socket.create_server(("127.0.0.1", 0), reuse_port=shared) as taken:
        port = taken.getsockname()[1]
        flags = {"--port": "0", "--control": "tcp://127.0.0.1:0", "--workers": "2"}
        flags[flag] = str(port) if flag == "--port" else f"tcp://127.0.0.1:{port}"
        command = [sys.executable, "-m", "pdx.router.main", *(word for pair in flags.items() for word in pair)]
        environment = {**os.environ, "PDX_RUN_DIR": str(tmp_path / "run")}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=20)
    assert done.returncode == 2
    assert done.stderr.startswith("pdx-router: can't listen on ")
    assert len(done.stderr.splitlines()) == 1

"""The program: flags, refusals in one line, what it publishes, and that it ends when told."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import zmq
import zmq.asyncio
from engine_fakes import KEY, FakeDaemon, FakeEngine, daemon_ref, fleet, until, within

from pdx.curve import lock
from pdx.router.main import main
from pdx.wire import MAGIC, WIRE_VERSION, Welcome


@pytest.fixture(autouse=True)
def run_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PDX_RUN_DIR", str(tmp_path / "run"))


@contextmanager
def program(*flags: str) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-m", "pdx.router.main", *flags]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        yield process
    finally:
        process.kill()
        process.communicate(timeout=10)


def published(path: Path) -> dict[str, str]:
    deadline = time.monotonic() + 10
    while not path.exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return json.loads(path.read_bytes())


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_listens_publishes_and_ends(tmp_path: Path, number: int) -> None:
    file = tmp_path / "router.json"
    with program("--port", "0", "--control", "tcp://127.0.0.1:0", "--publish", str(file)) as process:
        where = published(file)
        assert where["control"].startswith("tcp://127.0.0.1:")
        with urllib.request.urlopen(where["http"] + "/health", timeout=5) as reply:
            assert reply.status == 200
        process.send_signal(number)
        assert process.wait(10) == 0
        assert process.stderr is not None
        assert "Traceback" not in process.stderr.read()


@pytest.mark.parametrize("flag", ["--port", "--control"])
def test_taken_port(flag: str, capfd: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        flags = {"--port": "0", "--control": "tcp://127.0.0.1:0"}
        flags[flag] = str(port) if flag == "--port" else f"tcp://127.0.0.1:{port}"
        with program(*(word for pair in flags.items() for word in pair)) as process:
            assert process.wait(10) == 2
            assert process.stderr is not None
            lines = process.stderr.read().splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("pdx-router: can't listen on ")
    assert str(port) in lines[0]


@pytest.mark.parametrize(
    "flags",
    [
        ["--host", "0.0.0.0"],
        ["--control", "tcp://10.0.0.1:5700"],
        ["--control", "ipc:///x"],
        ["--key-file", "/no"],
        ["--publish", "/no/such/x"],
        ["--publish", "/"],
    ],
)
def test_refusals_are_one_line(flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(flags) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("pdx-router: ")


@pytest.mark.parametrize(
    "flags", [["--port", "70000"], ["--handoff-total-s", "-1"], ["--policy", "random"], ["--max-waiting", "-1"]]
)
def test_bad_flags(flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(flags)
    assert ended.value.code == 2


@within(20)
async def test_daemons_are_welcomed_and_strangers_ignored() -> None:
    engine, stranger = FakeEngine("d0", "decode"), FakeEngine("x0", "decode")
    async with fleet(engine) as router:
        daemon = router.daemons[0]
        await until(lambda: any(isinstance(message, Welcome) for message in daemon.heard), "welcome")
        for frame in (b"", b"garbage", b"PDX\x02\xff", b"PDX\x63"):
            await daemon.socket.send(frame)
        await daemon.socket.send_multipart([b"two", b"frames"])
        await router.reaches("pdx_router_bad_frames_total", 5)
        await stranger.start()
        try:
            other = FakeDaemon(daemon_ref("other"), [stranger], key=b"another key than ours")
            async with other.announcing(router.published.control):
                before = len(daemon.heard)
                await until(lambda: len(daemon.heard) > before + 2, "two more announcements answered")
                assert not other.heard
            await router.seen(1)
        finally:
            await stranger.stop()


@within(20)
async def test_a_daemon_of_another_version_is_named_once_and_told(caplog: pytest.LogCaptureFixture) -> None:
    async with fleet() as router:
        with zmq.asyncio.Context() as context, context.socket(zmq.DEALER) as socket:
            socket.linger = 0
            socket.setsockopt(zmq.IDENTITY, b"gpu7:pdx/0123/7")
            lock(socket, KEY, server=False)
            socket.connect(router.published.control)
            for _ in range(3):
                await socket.send(MAGIC + bytes([WIRE_VERSION + 1]) + b"\x80")
                assert (await socket.recv())[:4] == MAGIC + bytes([WIRE_VERSION]), "from which it sees the same"
        assert await router.metric("pdx_router_bad_frames_total") == 3
    both = f"gpu7:pdx/0123/7 is not heard: peer speaks wire version {WIRE_VERSION + 1}, this side {WIRE_VERSION}"
    assert caplog.text.count(both) == 1


@within(20)
async def test_a_daemon_that_comes_back_is_told_under_its_new_name() -> None:
    p, d = FakeEngine("p0", "prefill"), FakeEngine("d0", "decode")
    async with fleet(p, d) as router:
        p.fault = "500"
        again = FakeDaemon(daemon_ref("d0", incarnation=2), [p, d])
        router.daemons[0].engines = []
        router.daemons[0].ref = daemon_ref("unheard", 9)
        async with again.announcing(router.published.control):
            await until(lambda: bool(again.heard), "welcome")
            status, _, _ = await router.ask({"model": "smol", "prompt": "x"})
            assert status == 200
            await until(lambda: bool(again.cancels), "cancel")
            assert not router.daemons[0].cancels

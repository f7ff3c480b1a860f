"""Forks daemons off a process that has imported them: an import takes a third of a second, and tests start hundreds.

Each is a process of its own with its own environment, folder and log, in which pdxd's own main() runs. See `Forked`.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from selectors import EVENT_READ, DefaultSelector
from typing import Any

ADDRESS = "TESTS_FORKSERVER"  # the variable that names its socket
ASKED_BYTES_MAX = 1 << 17
START_S = 30.0


@contextlib.contextmanager
def forkserver(folder: Path) -> Iterator[None]:
    """While it runs, `Forked` works in this process and in those that it starts."""
    address = folder / "forkserver"
    command = [sys.executable, str(Path(__file__).resolve()), str(address)]
    path = os.pathsep.join(filter(None, [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")]))
    server = subprocess.Popen(command, stdin=subprocess.PIPE, env={**os.environ, "PYTHONPATH": path})
    os.environ[ADDRESS] = str(address)
    try:
        yield
    finally:
        del os.environ[ADDRESS]
        assert server.stdin is not None
        server.stdin.close()  # it ends
        server.wait(START_S)


class Forked:
    """A daemon, with what tests need of `subprocess.Popen`."""

    def __init__(self, flags: list[str], log: Path) -> None:
        self.returncode: int | None = None
        self._told = socket.socket(socket.AF_UNIX)
        end = time.monotonic() + START_S
        while self._told.connect_ex(os.environ[ADDRESS]):
            assert time.monotonic() < end, "the server does not start"
            time.sleep(0.005)
        self._told.settimeout(START_S)
        self._lines = self._told.makefile("r")
        asked = {"flags": flags, "log": str(log), "folder": os.getcwd(), "environment": dict(os.environ)}
        self._told.sendall(json.dumps(asked).encode() + b"\n")
        self.pid = int(self._lines.readline())

    def poll(self) -> int | None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.wait(0)
        return self.returncode

    def wait(self, timeout: float) -> int:
        """Raises subprocess.TimeoutExpired."""
        if self.returncode is None:
            with DefaultSelector() as selector:
                selector.register(self._told, EVENT_READ)
                if not selector.select(timeout):
                    raise subprocess.TimeoutExpired("pdxd", timeout)
            self.returncode = int(self._lines.readline())
            self._lines.close()
            self._told.close()
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)


def serve(listener: socket.socket) -> dict[str, Any] | None:
    """Returns in every process that it forks, with what was asked for; and None in its own, once its input ends."""
    waking, wakes = socket.socketpair()
    wakes.setblocking(False)
    signal.set_wakeup_fd(wakes.fileno(), warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    askers: dict[int, socket.socket] = {}
    with DefaultSelector() as selector:
        for each in (0, listener, waking):
            selector.register(each, EVENT_READ)
        while True:
            ready = {key.fd for key, _ in selector.select()}
            if 0 in ready:
                return None
            if waking.fileno() in ready:
                waking.recv(4096)
                tell_of_ended(askers)
            if listener.fileno() in ready:
                asker, _ = listener.accept()
                asked = json.loads(asker.makefile("r").readline(ASKED_BYTES_MAX))
                pid = os.fork()
                if not pid:
                    signal.set_wakeup_fd(-1)
                    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                    for held in (listener, waking, wakes, asker, *askers.values()):
                        held.close()
                    return asked
                askers[pid] = asker
                asker.sendall(b"%d\n" % pid)


def tell_of_ended(askers: Mapping[int, socket.socket]) -> None:
    with contextlib.suppress(ChildProcessError):
        while (ended := os.waitpid(-1, os.WNOHANG))[0]:
            pid, status = ended
            with contextlib.suppress(OSError), askers[pid] as asker:
                asker.sendall(b"%d\n" % os.waitstatus_to_exitcode(status))


def become(asked: Mapping[str, Any]) -> None:
    """What a new program would have: its environment, its folder, no input, and a file for what it says."""
    os.environ.clear()
    os.environ.update(asked["environment"])
    os.chdir(asked["folder"])
    for path, flags, number in ((os.devnull, os.O_RDONLY, 0), (asked["log"], os.O_WRONLY | os.O_APPEND, 1)):
        opened = os.open(path, flags)
        os.dup2(opened, number)
        os.close(opened)
    os.dup2(1, 2)


def program(address: str) -> int:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(address)
        import pdx.buffer.store
        import pdx.daemon.service
        import pdx.tiers.disk
        import pdx.transport.tcp  # noqa: F401 - main() imports these, when it needs them
        from pdx.daemon.main import main

        gc.freeze()
        listener.listen(64)
        asked = serve(listener)
    if asked is None:
        return 0
    become(asked)
    return main(asked["flags"])


if __name__ == "__main__":
    sys.exit(program(sys.argv[1]))

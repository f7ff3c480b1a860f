"""A daemon that is waited for, by who starts none: how long, and what for."""

from __future__ import annotations

import fcntl
import socket
import threading
import time
from contextlib import suppress
from pathlib import Path

import msgspec
import pytest
from daemon.fleet import DEADLINE_S

from pdx.client import DaemonClient
from pdx.config import LOCK_NAME, SOCKET_NAME, Config, load
from pdx.errors import DaemonGone
from pdx.wire import Attach

TOOL = Attach(kind="tool")


@pytest.fixture
def settings(tmp_path: Path) -> Config:
    return load({"run_dir": str(tmp_path / "run"), "arena": "4MiB"}, environ={})


def test_a_daemon_that_starts_has_time_to_touch_its_arena(settings: Config) -> None:
    """Whoever else starts one waits as long for it."""
    settings.run_path.mkdir(mode=0o700)
    larger, began = msgspec.structs.replace(settings, arena="64MiB"), time.monotonic()
    with (settings.run_path / LOCK_NAME).open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(DaemonGone, match="no pdxd answers"):
            DaemonClient.attach(larger, TOOL, deadline_s=0.1)
    assert time.monotonic() - began >= 0.1 + 0.64


def test_one_that_closes_every_connection_is_given_up_in_time(settings: Config) -> None:
    """Each time it may be about to leave, and the next one may answer: until the time is over."""
    settings.run_path.mkdir(mode=0o700)
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(str(settings.run_path / SOCKET_NAME))
        listener.listen()

        def close_all() -> None:
            with suppress(OSError):
                while True:
                    listener.accept()[0].close()

        closing = threading.Thread(target=close_all)
        closing.start()
        began = time.monotonic()
        try:
            with pytest.raises(DaemonGone, match="does not answer"):
                DaemonClient.attach(settings, TOOL, deadline_s=0.2, start=False)
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            closing.join()
    assert time.monotonic() - began < DEADLINE_S

"""A guard ends its command's whole group: on a signal, on the command's death, and on its own parent's."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys

import pytest

from pdx.launch import guard

WAIT_S = 10.0
# A command with a child of its own; both announce themselves, and the child ignores SIGTERM.
FAMILY = """
import os, signal, sys
told, tell = os.pipe()
if os.fork() == 0:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    print("child", os.getpid(), flush=True)
    os.write(tell, b"!")
    while True:
        signal.pause()
os.read(told, 1)
print("leader", os.getpid(), flush=True)
{body}
"""


def start(command: list[str], *, grace_s: float = 5.0, cpus: str = "") -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, guard.__file__, str(os.getpid()), str(grace_s), cpus, *command],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
    )  # fmt: skip


def family(body: str) -> list[str]:
    return [sys.executable, "-c", FAMILY.format(body=body)]


def pidfds_of(process: subprocess.Popen[str]) -> dict[str, int]:
    """Of the leader and the child, once both have announced themselves."""
    assert process.stdout is not None
    pairs = [process.stdout.readline().split() for _ in range(2)]
    return {name: os.pidfd_open(int(pid)) for name, pid in pairs}


def assert_gone(pidfds: dict[str, int]) -> None:
    for name, pidfd in pidfds.items():
        assert select.select([pidfd], [], [], WAIT_S)[0], f"{name} lives"
        os.close(pidfd)


def test_exit_code_is_the_commands() -> None:
    with start([sys.executable, "-c", "raise SystemExit(7)"]) as process:
        assert process.wait(WAIT_S) == 7


def test_an_ignored_sigchld_that_is_inherited_loses_no_exit_code() -> None:
    before = signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    try:
        process = start(["sh", "-c", "exit 7"])
    finally:
        signal.signal(signal.SIGCHLD, before)
    with process:
        assert process.wait(WAIT_S) == 7


def test_a_command_that_does_not_exist() -> None:
    with start(["/nowhere/engine"]) as process:
        out, _ = process.communicate(timeout=WAIT_S)
    assert process.returncode == guard.EXIT_CANNOT_START
    assert out == "/nowhere/engine: No such file or directory\n"


def test_what_a_command_leaves_is_killed() -> None:
    with start(family("signal.setitimer(signal.ITIMER_REAL, 0.1); signal.pause()")) as process:
        pidfds = pidfds_of(process)
        assert process.wait(WAIT_S) == 128 + signal.SIGALRM
        assert_gone(pidfds)


def test_a_signal_reaches_the_leader_first() -> None:
    body = "signal.signal(signal.SIGTERM, lambda *_: sys.exit(3))\nprint('ready', flush=True)\nsignal.pause()"
    with start(family(body)) as process:
        pidfds = pidfds_of(process)
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.terminate()
        assert process.wait(WAIT_S) == 3
        assert_gone(pidfds)


def test_a_command_that_ignores_signals_is_killed_after_the_grace() -> None:
    body = "signal.signal(signal.SIGTERM, signal.SIG_IGN)\nprint('ready', flush=True)\nwhile True: signal.pause()"
    with start(family(body), grace_s=0.2) as process:
        pidfds = pidfds_of(process)
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.terminate()
        assert process.wait(WAIT_S) == 128 + signal.SIGKILL
        assert_gone(pidfds)


def test_nothing_survives_a_killed_parent() -> None:
    """The parent here is a process between us and the guard; it is killed and can clean up nothing."""
    parent_code = (
        "import os, subprocess, sys\n"
        f"subprocess.Popen([sys.executable, {guard.__file__!r}, str(os.getpid()), '0.2', '', *sys.argv[1:]],"
        " start_new_session=True).wait()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", parent_code, *family("signal.pause()")], stdout=subprocess.PIPE, text=True
    ) as parent:
        pidfds = pidfds_of(parent)
        parent.kill()
        parent.wait(WAIT_S)
        assert_gone(pidfds)


def test_pins() -> None:
    core = min(os.sched_getaffinity(0))
    code = "import os; print(os.sched_getaffinity(0))"
    with start([sys.executable, "-c", code], cpus=str(core)) as process:
        out, _ = process.communicate(timeout=WAIT_S)
    assert out == f"{{{core}}}\n"


def test_parse_cpus() -> None:
    assert guard.parse_cpus("0,2-4") == {0, 2, 3, 4}
    for text in ("all", "3-1", "0-99999999999", "-1", ""):
        with pytest.raises(ValueError):
            guard.parse_cpus(text)

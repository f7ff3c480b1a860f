"""Real small processes under a supervisor: logs, readiness, deaths, signals, and that nothing is left."""

from __future__ import annotations

import io
import os
import select
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from pdx.launch import processes
from pdx.launch.supervise import ChildDied, Interrupted, NotReady, Supervisor

SLEEPER = [sys.executable, "-c", "import signal; print('up', flush=True); signal.pause()"]
WAIT_S = 10.0


def says(text: str, *, code: int = 0) -> list[str]:
    return [sys.executable, "-c", f"print({text!r}, flush=True); raise SystemExit({code})"]


def logged(path: Path, text: str) -> bool:
    return path.exists() and text in path.read_text()


def start_sleepers(supervisor: Supervisor, log_dir: Path, *names: str) -> None:
    for name in names:
        supervisor.start(name, SLEEPER)
    probes = {name: lambda log=log_dir / f"{name}.log": logged(log, "up") for name in names}
    supervisor.wait_ready(probes, deadline_s=WAIT_S)


def test_ready_then_stopped(tmp_path: Path) -> None:
    with Supervisor(out=io.StringIO(), log_dir=tmp_path) as supervisor:
        start_sleepers(supervisor, tmp_path, "a", "b")
        stopped = supervisor.stop()
    assert str(stopped) == "stopped 2 processes, 0 left"


def test_lines_are_prefixed_and_kept(tmp_path: Path) -> None:
    out = io.StringIO()
    with Supervisor(out=out, log_dir=tmp_path) as supervisor:
        supervisor.start("prefill-0", says("one\ntwo"))
        with pytest.raises(ChildDied):
            supervisor.wait(WAIT_S)
    assert out.getvalue() == "prefill-0 | one\nprefill-0 | two\n"
    assert (tmp_path / "prefill-0.log").read_text() == "one\ntwo\n"


def test_a_terminal_gets_colours(tmp_path: Path) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    out = Terminal()
    with Supervisor(out=out) as supervisor:
        supervisor.start("a", says("x"))
        with pytest.raises(ChildDied):
            supervisor.wait(WAIT_S)
    assert out.getvalue() == "\x1b[36ma\x1b[0m | x\n"


def test_the_dead_one_is_named_with_its_last_lines() -> None:
    with Supervisor(out=io.StringIO(), echo=False) as supervisor:
        supervisor.start("good", SLEEPER)
        supervisor.start("bad", says("no such model", code=3))
        with pytest.raises(ChildDied) as death:
            supervisor.wait_ready({"good": lambda: False}, deadline_s=WAIT_S)
    assert str(death.value) == "bad ended with exit code 3; its last lines:\n  bad | no such model"
    assert supervisor.stopped.left == 0


def test_not_ready_in_time() -> None:
    with Supervisor(out=io.StringIO()) as supervisor:
        supervisor.start("slow", SLEEPER)
        with pytest.raises(NotReady, match="slow: no answer within 0 s"):
            supervisor.wait_ready({"slow": lambda: False}, deadline_s=0.1)


@pytest.fixture
def hangups() -> Iterator[None]:
    """These tests may run under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.mark.usefixtures("hangups")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_interrupts_the_wait(number: signal.Signals) -> None:
    handler = signal.getsignal(number)
    with Supervisor(out=io.StringIO()) as supervisor:
        supervisor.start("a", SLEEPER)
        timer = threading.Timer(0.1, os.kill, (os.getpid(), number))
        timer.start()
        with pytest.raises(Interrupted):
            supervisor.wait(WAIT_S)
        timer.join()
    assert signal.getsignal(number) is handler
    assert supervisor.stopped.left == 0


@pytest.mark.usefixtures("hangups")
def test_a_hangup_is_told_once_and_not_to_who_ignores_it() -> None:
    with Supervisor(out=io.StringIO()) as supervisor:
        signal.raise_signal(signal.SIGHUP)
        with pytest.raises(Interrupted):
            supervisor.wait(0)
        signal.raise_signal(signal.SIGHUP)
        supervisor.wait(0)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with Supervisor(out=io.StringIO()) as supervisor:
        signal.raise_signal(signal.SIGHUP)
        supervisor.wait(0)
    assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN


def test_who_was_started_with_sigchld_ignored_hears_of_deaths() -> None:
    before = signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    try:
        with Supervisor(out=io.StringIO()) as supervisor:
            supervisor.start("a", ["sh", "-c", "exit 3"])
            with pytest.raises(ChildDied, match="exit code 3"):
                supervisor.wait(WAIT_S)
        assert signal.getsignal(signal.SIGCHLD) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGCHLD, before)


def test_a_stubborn_one_is_killed_after_the_grace(tmp_path: Path) -> None:
    code = (
        "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True)\nwhile 1: signal.pause()"
    )
    with Supervisor(out=io.StringIO(), log_dir=tmp_path, grace_s=0.2) as supervisor:
        supervisor.start("mule", [sys.executable, "-c", code])
        supervisor.wait_ready({"mule": lambda: logged(tmp_path / "mule.log", "up")}, deadline_s=WAIT_S)
        assert supervisor.stop().left == 0


def test_who_outlives_the_others_is_told_last(tmp_path: Path) -> None:
    """The one's last act needs the other: an engine's answers go to its daemon's disk."""
    code = """
import pathlib, signal, sys
mine, other = (pathlib.Path(name) for name in sys.argv[1:])
signal.signal(signal.SIGTERM, lambda *_: sys.exit(print("other is", "gone" if other.exists() else "here", flush=True)))
print("up", flush=True)
try:
    signal.pause()
finally:
    mine.touch()
"""
    files = [str(tmp_path / name) for name in "ab"]
    with Supervisor(out=io.StringIO(), log_dir=tmp_path) as supervisor:
        supervisor.start("engine", [sys.executable, "-c", code, *files])
        supervisor.start("daemon", [sys.executable, "-c", code, *reversed(files)], outlives=True)
        probes = {name: lambda log=tmp_path / f"{name}.log": logged(log, "up") for name in ("engine", "daemon")}
        supervisor.wait_ready(probes, deadline_s=WAIT_S)
        assert supervisor.stop().left == 0
    assert (tmp_path / "engine.log").read_text() == "up\nother is here\n"
    assert (tmp_path / "daemon.log").read_text() == "up\nother is gone\n"


def test_a_second_signal_cuts_short_only_those_that_are_waited_for(tmp_path: Path) -> None:
    """An impatient operator gives up an engine that does not end; its daemon still writes what it has."""
    mule = (
        "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True)\nwhile 1: signal.pause()"
    )
    writer = """
import signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: sys.exit((time.sleep(0.3), print("written", flush=True))[1]))
print("up", flush=True)
signal.pause()
"""
    with Supervisor(out=io.StringIO(), log_dir=tmp_path) as supervisor:
        supervisor.start("engine", [sys.executable, "-c", mule])
        supervisor.start("daemon", [sys.executable, "-c", writer], outlives=True)
        probes = {name: lambda log=tmp_path / f"{name}.log": logged(log, "up") for name in ("engine", "daemon")}
        supervisor.wait_ready(probes, deadline_s=WAIT_S)
        timer = threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT))
        timer.start()
        assert supervisor.stop().left == 0
        timer.join()
    assert logged(tmp_path / "daemon.log", "written")


def test_a_killed_guard_leaves_nothing(tmp_path: Path) -> None:
    with Supervisor(out=io.StringIO(), log_dir=tmp_path) as supervisor:
        supervisor.start("a", SLEEPER)
        supervisor.wait_ready({"a": lambda: logged(tmp_path / "a.log", "up")}, deadline_s=WAIT_S)
        guard_pid = supervisor._children[0].process.pid
        os.kill(guard_pid, signal.SIGKILL)
        with pytest.raises(ChildDied, match="exit code -9"):
            supervisor.wait(WAIT_S)
        supervisor.stop()
        assert processes.of_sessions({guard_pid}) == []


def test_what_was_in_shared_memory_before_stays_there(tmp_path: Path) -> None:
    """A model, say, that a command maps: its own segments are removed, nobody else's."""
    code = (
        "import mmap, signal, sys; files = [open(name, 'r+b' if number else 'w+b') for number, name in"
        " enumerate(sys.argv[1:])]; files[0].truncate(4096); maps = [mmap.mmap(file.fileno(), 4096) for file in files];"
        "print('up', flush=True); signal.pause()"
    )
    own, theirs = (processes.SHARED_MEMORY / f"pdx-test-{os.getpid()}-{which}" for which in ("own", "theirs"))
    theirs.write_bytes(bytes(4096))
    try:
        with Supervisor(out=io.StringIO(), log_dir=tmp_path) as supervisor:
            supervisor.start("a", [sys.executable, "-c", code, str(own), str(theirs)])
            supervisor.wait_ready({"a": lambda: logged(tmp_path / "a.log", "up")}, deadline_s=WAIT_S)
        assert not own.exists()
        assert theirs.exists()
    finally:
        theirs.unlink()


def test_one_may_have_a_longer_grace_than_others(tmp_path: Path) -> None:
    slow = (
        "import select, signal; signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM]); print('up', flush=True);"
        "signal.sigwait([signal.SIGTERM]); select.select([], [], [], 1.5); print('written', flush=True)"
    )
    with Supervisor(out=io.StringIO(), log_dir=tmp_path, grace_s=0.2) as supervisor:
        supervisor.start("a", [sys.executable, "-c", slow], grace_s=WAIT_S, outlives=True)
        supervisor.wait_ready({"a": lambda: logged(tmp_path / "a.log", "up")}, deadline_s=WAIT_S)
    assert logged(tmp_path / "a.log", "written")


def test_who_is_buried_leaves_nothing(tmp_path: Path) -> None:
    """A guard that is killed takes only its command along, which may have started others."""
    code = f"import subprocess, sys; subprocess.run([sys.executable, *{SLEEPER[1:]!r}])"
    with Supervisor(out=io.StringIO(), log_dir=tmp_path) as supervisor:
        supervisor.start("a", [sys.executable, "-c", code])
        supervisor.wait_ready({"a": lambda: logged(tmp_path / "a.log", "up")}, deadline_s=WAIT_S)
        guard_pid = supervisor.session_of("a")
        os.kill(guard_pid, signal.SIGKILL)
        with pytest.raises(ChildDied, match="exit code -9"):
            supervisor.wait(WAIT_S)
        supervisor.bury("a")
        assert processes.of_sessions({guard_pid}) == []


def test_a_log_that_takes_nothing_more_ends_itself_only(tmp_path: Path) -> None:
    (tmp_path / "a.log").symlink_to("/dev/full")
    out = io.StringIO()
    with Supervisor(out=out, log_dir=tmp_path, echo=False) as supervisor:
        supervisor.start("a", [sys.executable, "-c", "print('one'); print('two'); input()"])
        with pytest.raises(ChildDied, match="two"):
            supervisor.wait(WAIT_S)
    assert out.getvalue() == "pdx: the log of a ends here: No space left on device\n"


def test_a_full_log_makes_room_for_the_next(tmp_path: Path) -> None:
    with Supervisor(out=io.StringIO(), log_dir=tmp_path, log_bytes_max=7) as supervisor:
        supervisor.start("a", says("one\ntwo\nthree\nfour\nfive"))
        with pytest.raises(ChildDied):
            supervisor.wait(WAIT_S)
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {
        "a.log": "five\n",
        "a.log.1": "three\nfour\n",
    }


def test_environment_is_added_to_ours() -> None:
    out = io.StringIO()
    with Supervisor(out=out) as supervisor:
        code = "import os; print(os.environ['PDX_X'], 'PATH' in os.environ)"
        supervisor.start("a", [sys.executable, "-c", code], env={"PDX_X": "7"})
        with pytest.raises(ChildDied):
            supervisor.wait(WAIT_S)
    assert out.getvalue() == "a | 7 True\n"


def test_a_last_line_without_end_is_kept() -> None:
    with Supervisor(out=io.StringIO(), echo=False) as supervisor:
        supervisor.start("a", [sys.executable, "-c", "print('one'); print('last', end='')"])
        with pytest.raises(ChildDied, match=r"a \| one\n  a \| last$"):
            supervisor.wait(WAIT_S)


def test_a_line_without_end_does_not_grow_us() -> None:
    out = io.StringIO()
    with Supervisor(out=out) as supervisor:
        supervisor.start("a", [sys.executable, "-c", "print('x' * 1_000_000, end='', flush=True)"])
        with pytest.raises(ChildDied):
            supervisor.wait(WAIT_S)
    assert max(map(len, out.getvalue().splitlines())) < 200_000
    assert out.getvalue().count("x") == 1_000_000


def test_of_two_that_die_at_once_both_are_told(tmp_path: Path) -> None:
    with Supervisor(out=io.StringIO(), log_dir=tmp_path) as supervisor:
        start_sleepers(supervisor, tmp_path, "a", "b")
        for child in supervisor._children:
            os.kill(child.process.pid, signal.SIGKILL)
            os.waitid(os.P_PIDFD, child.pidfd, os.WEXITED | os.WNOWAIT)
        supervisor._turn(WAIT_S)
        for name in ("a", "b"):
            with pytest.raises(ChildDied, match=f"{name} ended"):
                supervisor.wait(0)
            supervisor.bury(name)


def test_whose_time_is_over_looks_once(tmp_path: Path) -> None:
    """Probes, and the look at who maps what, may take longer than the time between two of them."""
    with Supervisor(out=io.StringIO(), log_dir=tmp_path) as supervisor:
        supervisor.start("a", ["sh", "-c", "echo up; exec sleep 99"])
        assert select.select([supervisor._children[0].process.stdout], [], [], WAIT_S)[0]
        supervisor.wait(0)
        assert logged(tmp_path / "a.log", "up")

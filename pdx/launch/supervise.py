"""Runs several commands as one thing: prefixed logs, readiness, and an end that leaves no process behind.

Each command runs under a guard (guard.py) in a session of its own, so that Ctrl-C reaches only the supervisor, which
then ends everything in order. One thread, one selector: log pipes, process exits (pidfds) and signals are all file
descriptors, so nothing here polls except readiness probes. What is shown, another thread writes (screen.py). Knows
nothing of engines, daemons or routers.

Use from the main thread only (it installs signal handlers).
"""

from __future__ import annotations

import collections
import contextlib
import os
import selectors
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType, TracebackType
from typing import IO, Any, TextIO

from pdx.errors import PdxError
from pdx.launch import guard, processes
from pdx.launch.screen import Screen

GRACE_S = 20.0  # a vLLM server that is told to stop ends its engine process in 5-10 s
PROBE_EVERY_S = 0.5
PROGRESS_EVERY_S = 10.0
NOTE_EVERY_S = 1.0
KILL_ROUNDS_MAX = 5  # one process may have started another just then
LAST_LINES = 25  # enough for a Python traceback's end
PIPE_READ_BYTES = 65536  # one full pipe
LINE_BYTES_MAX = 64 * 1024  # a longer line is cut: a child can't make us grow
LOG_BYTES_MAX = 64 << 20  # of one command's file; the one before it is kept as NAME.log.1
COLOURS = (36, 33, 35, 32, 34, 31)


class ChildDied(PdxError):
    """A supervised command ended by itself. The message carries its name, exit code and last log lines."""

    def __init__(self, name: str, message: str) -> None:
        super().__init__(message)
        self.name = name


class NotReady(PdxError):
    """A command is alive but did not answer its probe in time."""


class Interrupted(PdxError):
    """SIGINT, SIGTERM or SIGHUP came while waiting. End what was started."""


@dataclass
class Child:
    """One command under its guard."""

    name: str
    process: subprocess.Popen[bytes]
    pidfd: int
    colour: int
    log: IO[bytes] | None
    outlives: bool  # it is told to stop when those that do not have ended
    grace_s: float
    last_lines: collections.deque[str] = field(default_factory=lambda: collections.deque(maxlen=LAST_LINES))
    partial: bytes = b""  # of a line whose end has not come yet


@dataclass(frozen=True)
class Stopped:
    """What stop() did."""

    processes: int
    left: int

    def __str__(self) -> str:
        return f"stopped {self.processes} processes, {self.left} left"


class Supervisor:
    """Starts commands, waits for them, ends them. A context manager: leaving it ends everything.

    `log_dir` gets one plain file per command, of bounded size; `echo` also copies every line, prefixed, to `out`.
    """

    def __init__(
        self,
        *,
        out: TextIO | None = None,
        log_dir: Path | None = None,
        log_bytes_max: int = LOG_BYTES_MAX,
        echo: bool = True,
        grace_s: float = GRACE_S,
    ) -> None:
        self._screen = Screen(out or sys.stderr)
        self._log_dir = log_dir
        self._log_bytes_max = log_bytes_max
        self._echo = echo
        self._grace_s = grace_s
        self._children: list[Child] = []
        self._selector = selectors.DefaultSelector()
        self._wake_read, self._wake_write = socket.socketpair()
        self._signalled = False
        self.stopped = Stopped(processes=0, left=0)  # what the last stop() that ended something did
        self._restore: dict[int, Any] = {}
        self._shared: set[Path] = set()  # files in shared memory that commands have made
        self._others_shared: set[int] = set()  # those that were there before, by inode: a model may be one

    def __enter__(self) -> Supervisor:
        self._screen.start()
        self._others_shared = processes.shared_memory()
        for end in (self._wake_read, self._wake_write):
            end.setblocking(False)
        self._selector.register(self._wake_read, selectors.EVENT_READ, None)
        self._old_wakeup = signal.set_wakeup_fd(self._wake_write.fileno())
        # An ignored SIGCHLD, which programs inherit, would leave nobody's exit status to be asked.
        handlers: dict[int, Any] = {signal.SIGCHLD: signal.SIG_DFL}
        handlers |= dict.fromkeys((signal.SIGINT, signal.SIGTERM), self._on_signal)
        if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # as under nohup
            handlers[signal.SIGHUP] = self._on_signal
        self._restore = {number: signal.signal(number, handler) for number, handler in handlers.items()}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()
        self._screen.stop()
        signal.set_wakeup_fd(self._old_wakeup)
        for number, handler in self._restore.items():
            signal.signal(number, handler)
        self._selector.close()
        self._wake_read.close()
        self._wake_write.close()

    def start(
        self,
        name: str,
        command: list[str],
        *,
        env: Mapping[str, str] | None = None,
        cpus: str = "",
        outlives: bool = False,
        grace_s: float | None = None,
    ) -> None:
        """Starts `command` with `env` added to the environment, pinned to `cpus` ("0,2-3") if given.

        `outlives`: others need it to their very end, so it is told to stop when they have ended. `grace_s`: where it
        needs longer for its end than others.
        """
        grace_s = self._grace_s if grace_s is None else grace_s
        guarded = [sys.executable, guard.__file__, str(os.getpid()), str(grace_s), cpus, *command]
        process = subprocess.Popen(
            guarded,
            env={**os.environ, **(env or {})},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        assert process.stdout is not None
        os.set_blocking(process.stdout.fileno(), False)
        log = (self._log_dir / f"{name}.log").open("ab") if self._log_dir else None
        colour = COLOURS[len(self._children) % len(COLOURS)]
        pidfd = os.pidfd_open(process.pid)
        child = Child(name, process, pidfd, colour, log, outlives, grace_s)
        self._children.append(child)
        self._selector.register(process.stdout, selectors.EVENT_READ, child)
        self._selector.register(child.pidfd, selectors.EVENT_READ, child)

    def wait_ready(self, probes: Mapping[str, Callable[[], bool]], *, deadline_s: float) -> None:
        """Until every probe has answered True once. Raises ChildDied, NotReady or Interrupted."""
        started = time.monotonic()
        next_progress = started + PROGRESS_EVERY_S
        next_note = started
        waiting = dict(probes)
        while True:
            waiting = {name: probe for name, probe in waiting.items() if not probe()}
            self._tell_ends()  # of one that has died, somebody else answers
            if not waiting:
                self._note_shared()
                return
            now = time.monotonic()
            names = ", ".join(sorted(waiting))
            if now - started > deadline_s:
                raise NotReady(f"{names}: no answer within {deadline_s:.0f} s{self._tail_of(next(iter(waiting)))}")
            if now >= next_progress:
                next_progress = now + PROGRESS_EVERY_S
                self.say(f"waiting for {names} ({now - started:.0f} s)")
            if now >= next_note:  # who dies while it starts can't be asked any more
                next_note = now + NOTE_EVERY_S
                self._note_shared()
            self._watch(now + PROBE_EVERY_S)

    def wait(self, timeout_s: float | None = None) -> None:
        """Until a command ends (raises ChildDied), a signal comes (raises Interrupted) or the time is over."""
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        self._watch(deadline)

    def stop(self) -> Stopped:
        """Ends every command: SIGTERM, a grace (cut short by another signal), SIGKILL to what is left. Idempotent.

        Those that outlive the others have a grace of their own, behind theirs: a signal cuts one of them.
        """
        if not self._children:
            return self.stopped
        sessions = self._note_shared()
        before = len(processes.of_sessions(sessions)) - len(self._alive(self._children))
        self._end([child for child in self._children if not child.outlives])
        self._signalled = False  # what cut this short is not meant for the rest
        self._end([child for child in self._children if child.outlives])
        self._note_shared()
        self._kill_all(sessions)
        for child in self._children:
            child.process.wait()
            self._forget(child)
        self._children.clear()
        processes.unlink_unused(self._shared)
        self.stopped = Stopped(processes=max(0, before), left=len(processes.of_sessions(sessions)))
        return self.stopped

    def _end(self, children: Sequence[Child]) -> None:
        """Tells them to, and waits until they have, the grace is over, or a signal comes."""
        for child in reversed(self._alive(children)):
            child.process.terminate()
        # The guards kill their groups after the grace themselves; the second is for them to do it.
        deadline = time.monotonic() + max((child.grace_s for child in children), default=0.0) + 1.0
        while self._alive(children) and not self._signalled and (left_s := deadline - time.monotonic()) > 0:
            self._turn(left_s)

    def bury(self, name: str) -> None:
        """Forgets a command that has died, with what it has left running, so that waiting for the others can go on."""
        for child in [child for child in self._children if child.name == name]:
            self._kill_all({child.process.pid})
            child.process.wait()
            self._forget(child)
            self._children.remove(child)
        processes.unlink_unused(self._shared)

    def _kill_all(self, sessions: set[int]) -> None:
        """Whom one of them has started meanwhile too."""
        for _ in range(KILL_ROUNDS_MAX):
            left = processes.of_sessions(sessions)
            if not left:
                return
            processes.kill(left)

    def session_of(self, name: str) -> int:
        """The session that all processes of a command belong to."""
        return next(child.process.pid for child in self._children if child.name == name)

    def say(self, line: str) -> None:
        """One line of the supervisor's own."""
        self._screen.say(f"pdx: {line}")

    def _watch(self, deadline: float | None) -> None:
        """At least one turn, however late it is: who asks has been busy, and logs and signals wait meanwhile."""
        left_s = None
        while left_s != 0:
            self._tell_ends()  # before the turn too: the last may have seen several, of which one was told
            left_s = None if deadline is None else max(0.0, deadline - time.monotonic())
            self._turn(left_s)

    def _tell_ends(self) -> None:
        """Raises Interrupted or ChildDied if there is one to tell."""
        if self._signalled:
            self._signalled = False
            raise Interrupted("stopped by a signal")
        for child in self._children:
            if child.process.poll() is not None:
                self._drain_whole(child)
                code = child.process.returncode
                raise ChildDied(child.name, f"{child.name} ended with exit code {code}{self._tail_of(child.name)}")

    def _turn(self, timeout_s: float | None) -> None:
        """Handles what is ready within `timeout_s`: log bytes, exits, signals."""
        for key, _ in self._selector.select(timeout_s):
            if key.data is None:
                self._wake_read.recv(4096)
            elif key.fd == key.data.pidfd:
                key.data.process.poll()
                self._selector.unregister(key.fd)
            else:
                self._drain(key.data)

    def _drain_whole(self, child: Child) -> None:
        """Of a command whose group has ended: all that it has left in its pipe."""
        while self._drain(child):
            continue

    def _drain(self, child: Child) -> bool:
        """Takes what one read gives; False if that was nothing."""
        assert child.process.stdout is not None
        if child.process.stdout.closed:
            return False
        try:
            data = os.read(child.process.stdout.fileno(), PIPE_READ_BYTES)
        except BlockingIOError:
            return False
        if not data:
            self._selector.unregister(child.process.stdout)
            child.process.stdout.close()
        *whole, child.partial = (child.partial + data).split(b"\n")
        if child.partial and (not data or len(child.partial) > LINE_BYTES_MAX):
            whole.append(child.partial)
            child.partial = b""
        for line in whole:
            self._log(child, line)
        return bool(data)

    def _log(self, child: Child, line: bytes) -> None:
        if child.log:
            try:
                child.log.write(line + b"\n")
                child.log.flush()
                if child.log.tell() >= self._log_bytes_max:
                    child.log = self._turned_over(child.log)
            except OSError as error:  # a full disk: the engines serve on
                with contextlib.suppress(OSError):
                    child.log.close()
                child.log = None
                self.say(f"the log of {child.name} ends here: {error.strerror or error}")
        text = line.decode("utf-8", "replace").rstrip("\r")
        child.last_lines.append(text)
        if self._echo:
            prefix = f"\x1b[{child.colour}m{child.name}\x1b[0m" if self._screen.is_terminal else child.name
            self._screen.say(f"{prefix} | {text}")

    @staticmethod
    def _turned_over(full: IO[bytes]) -> IO[bytes]:
        """A new log in the place of a full one."""
        full.close()
        path = Path(full.name)
        path.replace(path.with_name(f"{path.name}.1"))
        return path.open("wb")

    def _tail_of(self, name: str) -> str:
        lines = next((child.last_lines for child in self._children if child.name == name), ())
        if not lines or self._echo:  # echoed lines stand on the screen already
            return ""
        return "; its last lines:\n" + "\n".join(f"  {name} | {line}" for line in lines)

    def _note_shared(self) -> set[int]:
        """Looks what shared memory the commands use while they can still be asked. Returns their sessions."""
        sessions = {child.process.pid for child in self._children}
        self._shared |= processes.shared_memory_of(processes.of_sessions(sessions), but=self._others_shared)
        return sessions

    @staticmethod
    def _alive(children: Sequence[Child]) -> list[Child]:
        return [child for child in children if child.process.poll() is None]

    def _forget(self, child: Child) -> None:
        self._drain_whole(child)
        assert child.process.stdout is not None
        for file in (child.process.stdout, child.pidfd):
            try:
                self._selector.unregister(file)
            except (KeyError, ValueError):  # already gone from the selector
                continue
        child.process.stdout.close()
        os.close(child.pidfd)
        if child.log:
            with contextlib.suppress(OSError):
                child.log.close()

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGHUP:  # a closing terminal says it twice, by the shell and by the kernel: no impatience
            signal.signal(number, signal.SIG_IGN)
        self._signalled = True

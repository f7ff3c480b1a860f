"""The process between a supervisor and one command: it ends the command's whole group when either of them is gone.

A supervisor that is killed with SIGKILL can't clean up, and a model server that crashes leaves its own children. The
kernel tells a guard of its parent's death (PR_SET_PDEATHSIG), so neither leaves anything running. Run by path, so it
imports nothing of pdx:

    python guard.py PARENT_PID GRACE_S CPUS COMMAND...        CPUS is e.g. "0,2-3", or "" for no pinning
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time

PR_SET_PDEATHSIG = 1
WATCHED = {signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGCHLD}
EXIT_CANNOT_START = 127
CORES_MAX = 1 << 16
KILLED_LOOK_S = 1.0
FOREVER_S = 3600.0  # a look at the command once an hour costs nothing


def main(argv: list[str]) -> int:
    parent_pid, grace_s, cpus, command = int(argv[0]), float(argv[1]), argv[2], argv[3:]
    # Ignored, as it may be inherited, the command's death would be told to nobody, and its exit status lost.
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    unblocked = signal.pthread_sigmask(signal.SIG_BLOCK, WATCHED)
    die_with_parent(signal.SIGTERM)
    if os.getppid() != parent_pid:  # it died before the line above
        return EXIT_CANNOT_START
    if cpus:
        os.sched_setaffinity(0, parse_cpus(cpus))

    guard_pid = os.getpid()

    def in_child() -> None:
        die_with_parent(signal.SIGKILL)
        if os.getppid() != guard_pid:  # it died before the line above
            os._exit(EXIT_CANNOT_START)
        signal.pthread_sigmask(signal.SIG_SETMASK, unblocked)

    try:
        # This process has one thread, so preexec_fn is safe.
        child = subprocess.Popen(command, process_group=0, preexec_fn=in_child)
    except OSError as error:
        print(f"{command[0]}: {error.strerror}", file=sys.stderr, flush=True)
        return EXIT_CANNOT_START
    _wait(child.pid, grace_s)
    # Not reaped yet, so the group's number can't belong to anybody else.
    _signal_group(child.pid, signal.SIGKILL)
    code = child.wait()
    return code if code >= 0 else 128 - code


def parse_cpus(text: str) -> set[int]:
    """The cores of "0,2-3". Raises ValueError."""
    cores: set[int] = set()
    for part in text.split(","):
        first, _, last = part.partition("-")
        span = range(int(first), int(last or first) + 1)
        if not span or span.stop > CORES_MAX:
            raise ValueError(f"{part} names no cores")
        cores.update(span)
    return cores


def _wait(pid: int, grace_s: float) -> None:
    """Until `pid` has exited; a first signal is passed on, and after `grace_s` more the group is killed."""
    deadline: float | None = None
    while os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT | os.WNOHANG) is None:
        timeout_s = max(0.0, deadline - time.monotonic()) if deadline is not None else FOREVER_S
        received = signal.sigtimedwait(WATCHED, timeout_s)
        if received is None and deadline is not None:
            _signal_group(pid, signal.SIGKILL)
            deadline = time.monotonic() + KILLED_LOOK_S  # one may hang in the kernel
        elif received is not None and received.si_signo != signal.SIGCHLD and deadline is None:
            deadline = time.monotonic() + grace_s
            # Only the leader: a server that is told ends its own workers in order.
            os.kill(pid, signal.SIGTERM)


def _signal_group(group: int, number: int) -> None:
    try:
        os.killpg(group, number)
    except ProcessLookupError:
        return


def die_with_parent(number: int) -> None:
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, number, 0, 0, 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

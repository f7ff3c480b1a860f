"""Which processes belong to a session, and how to end them for sure. Knows nothing of who started them."""

from __future__ import annotations

import os
import select
import signal
from collections.abc import Collection
from pathlib import Path

KILLED_MS = 5000  # SIGKILL takes effect once the kernel has freed the process's memory

_STATE, _SESSION = 0, 3  # fields of /proc/PID/stat after the command's name


def of_sessions(sessions: Collection[int]) -> list[int]:
    """The living processes of these sessions, zombies left out."""
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            stat = (entry / "stat").read_text(encoding="utf-8", errors="replace")
        except OSError:  # it ended while we looked
            continue
        fields = stat.rpartition(")")[2].split()
        if int(fields[_SESSION]) in sessions and fields[_STATE] not in "ZX":
            found.append(int(entry.name))
    return found


def kill(pids: Collection[int]) -> None:
    """SIGKILL to each, then waits (5 s at most for each) until it is gone."""
    for pid in pids:
        try:
            pidfd = os.pidfd_open(pid)
        except ProcessLookupError:
            continue
        try:
            signal.pidfd_send_signal(pidfd, signal.SIGKILL)
            exited = select.poll()
            exited.register(pidfd, select.POLLIN)
            exited.poll(KILLED_MS)
        except ProcessLookupError:
            continue
        finally:
            os.close(pidfd)

"""Which processes belong to a session, how to end them for sure, and what shared memory they would leave behind.

Knows nothing of who started them.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import time
from collections.abc import Collection
from pathlib import Path

KILLED_S = 5.0  # SIGKILL takes effect once the kernel has freed the process's memory

SHARED_MEMORY = Path("/dev/shm")  # noqa: S108 - looked at, and only files of our own processes are removed

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
    """SIGKILL to all, then waits until they are gone: 5 s at most, for one may hang in the kernel."""
    exited, left = select.poll(), set[int]()
    with contextlib.ExitStack() as opened:
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                pidfd = os.pidfd_open(pid)
                opened.callback(os.close, pidfd)
                signal.pidfd_send_signal(pidfd, signal.SIGKILL)
                exited.register(pidfd, select.POLLIN)
                left.add(pidfd)
        deadline = time.monotonic() + KILLED_S
        while left and (left_s := deadline - time.monotonic()) > 0:
            for pidfd, _ in exited.poll(left_s * 1000):
                exited.unregister(pidfd)
                left.remove(pidfd)


def shared_memory() -> set[int]:
    """The files under /dev/shm that there are, by inode."""
    return {_inode_of(path) for path in SHARED_MEMORY.iterdir()}


def shared_memory_of(pids: Collection[int], *, but: Collection[int] = ()) -> set[Path]:
    """The files of ours under /dev/shm that these processes map, `but` these. An engine that is killed has no time to
    unlink its own."""
    mapped = {inode for pid in pids for inode in _mapped_inodes(str(pid))} - set(but)
    return {path for path in SHARED_MEMORY.iterdir() if _inode_of(path) in mapped}


def unlink_unused(paths: Collection[Path]) -> None:
    """Removes those of `paths` that are still there and that no process maps any more."""
    left = {path for path in paths if _inode_of(path)}
    if not left:
        return
    mapped = {
        inode for entry in Path("/proc").iterdir() if entry.name.isdigit() for inode in _mapped_inodes(entry.name)
    }
    for path in left:
        if _inode_of(path) not in mapped:
            path.unlink(missing_ok=True)


def _mapped_inodes(pid: str) -> set[int]:
    """By inode, not by name: a semaphore is mapped under the name it had before it was linked into place."""
    try:
        lines = Path(f"/proc/{pid}/maps").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:  # it ended, or is not ours
        return set()
    return {int(line.split(maxsplit=5)[4]) for line in lines if f" {SHARED_MEMORY}/" in line}


def _inode_of(path: Path) -> int:
    """0: it is gone, or not ours."""
    try:
        found = path.stat()
    except OSError:
        return 0
    return found.st_ino if found.st_uid == os.getuid() else 0

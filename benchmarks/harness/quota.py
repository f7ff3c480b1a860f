"""Shares of a core for processes, by the kernel's cpu controller (version 1 or 2). Needs root, or a delegated group."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

V1, V2 = Path("/sys/fs/cgroup/cpu"), Path("/sys/fs/cgroup")
PERIOD_US = 10_000
GONE_S = 5.0


def why_not() -> str:
    """Why shares can't be given here; empty if they can."""
    try:
        with limited([], 0.5):
            return ""
    except OSError as error:
        return f"the cpu controller can't be used here ({error.strerror})"


@contextlib.contextmanager
def limited(pids: Sequence[int], share: float) -> Iterator[None]:
    """Each process has at most this share of a core, whichever it runs on. Raises OSError."""
    folders = []
    try:
        for number, pid in enumerate(pids or [0]):
            folder = _root() / f"pdx-bench-{os.getpid()}-{number}"
            folder.mkdir()
            folders.append(folder)
            if _root() == V1:
                (folder / "cpu.cfs_period_us").write_text(str(PERIOD_US))
                (folder / "cpu.cfs_quota_us").write_text(str(int(PERIOD_US * share)))
            else:
                (folder / "cpu.max").write_text(f"{int(PERIOD_US * share)} {PERIOD_US}")
            if pid:
                (folder / "cgroup.procs").write_text(str(pid))
        yield
    finally:
        for folder in folders:
            _left(folder)


def _root() -> Path:
    return V1 if (V1 / "cpu.cfs_quota_us").exists() or (V1 / "cgroup.procs").exists() else V2


def _left(folder: Path) -> None:
    with contextlib.suppress(OSError):
        for pid in (folder / "cgroup.procs").read_text().split():
            (_root() / "cgroup.procs").write_text(pid)
    deadline = time.monotonic() + GONE_S
    while folder.exists() and time.monotonic() < deadline:
        with contextlib.suppress(OSError):
            folder.rmdir()

"""What a killed process leaves in shared memory is found while it lives and removed when nobody maps it any more."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from select import poll
from signal import SIGKILL, pidfd_send_signal

import pytest

from pdx.launch import processes

SLEEPER = [sys.executable, "-c", "import sys; sys.stdin.read()"]
HOLDER = """
import multiprocessing, multiprocessing.shared_memory, sys
memory = multiprocessing.shared_memory.SharedMemory(create=True, size=4096)
lock = multiprocessing.get_context("spawn").Lock()
print(memory.name, flush=True)
sys.stdin.read()
"""


def test_segments_and_semaphores_of_a_killed_process_are_removed() -> None:
    command = [sys.executable, "-c", HOLDER]
    holder = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True)
    assert holder.stdout is not None
    assert holder.stdin is not None
    segment = Path("/dev/shm") / holder.stdout.readline().strip()
    try:
        shared = processes.shared_memory_of([holder.pid])
        assert segment in shared
        assert [path.name[:7] for path in shared - {segment}] == ["sem.mp-"]
        processes.unlink_unused(shared)
        assert all(path.exists() for path in shared), "still mapped: not ours to remove"
    finally:
        processes.kill(processes.of_sessions({holder.pid}))  # Python's resource tracker too, which would clean up
        holder.wait()
        holder.stdin.close()
        holder.stdout.close()
    processes.unlink_unused(shared)
    assert not any(path.exists() for path in shared)


def test_all_are_killed_before_one_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that hangs in the kernel must not keep the others alive."""
    done: list[str] = []

    class Waiting:
        def __init__(self) -> None:
            self._poll = poll()
            self.register, self.unregister = self._poll.register, self._poll.unregister

        def poll(self, timeout_ms: float) -> list[tuple[int, int]]:
            done.append("waited")
            return self._poll.poll(timeout_ms)

    def send(pidfd: int, number: int) -> None:
        done.append("killed")
        pidfd_send_signal(pidfd, number)

    sleepers = [subprocess.Popen(SLEEPER, stdin=subprocess.PIPE) for _ in range(2)]
    monkeypatch.setattr(processes.select, "poll", Waiting)
    monkeypatch.setattr(processes.signal, "pidfd_send_signal", send)
    processes.kill([sleepers[0].pid, 1 << 22, sleepers[1].pid])
    assert done[:3] == ["killed", "killed", "waited"]
    monkeypatch.undo()
    for sleeper in sleepers:
        with sleeper:
            assert sleeper.wait(20) == -SIGKILL

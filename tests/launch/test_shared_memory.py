"""What a killed process leaves in shared memory is found while it lives and removed when nobody maps it any more."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from pdx.launch import processes

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

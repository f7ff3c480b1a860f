"""One started program and all of its processes: signals, cores, CPU time, its end. Knows nothing of what it is."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pdx.launch import processes
from pdx.launch.guard import parse_cpus as cores_of


@dataclass(eq=False)
class Part:
    """One started program, in a session of its own so that all of its processes can be found."""

    name: str
    process: subprocess.Popen[bytes]
    log: Path
    url: str = ""
    cpus: str = ""  # the cores that all of its threads are to stay on; "" is anywhere

    @property
    def pids(self) -> list[int]:
        return processes.of_sessions({self.process.pid})

    def signal(self, number: int) -> None:
        for pid in self.pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    def pin(self) -> None:
        """`taskset -a` of every thread there is now: vLLM pins its OMP threads by itself, and no others."""
        for thread in self._threads() if self.cpus else ():
            with contextlib.suppress(ProcessLookupError):
                if not os.sched_getaffinity(thread) <= cores_of(self.cpus):  # one OMP thread a core stays so
                    os.sched_setaffinity(thread, cores_of(self.cpus))

    @contextlib.contextmanager
    def moved(self, cpus: str) -> Iterator[None]:
        """All of its threads on other cores for a while."""
        usual, self.cpus = self.cpus, cpus
        self.pin()
        try:
            yield
        finally:
            self.cpus = usual
            self.pin()

    def cores(self) -> str:
        """The cores that its threads may run on, all taken together."""
        found: set[int] = set()
        for thread in self._threads():
            with contextlib.suppress(ProcessLookupError):
                found |= os.sched_getaffinity(thread)
        return ",".join(map(str, sorted(found)))

    def cpu_seconds(self) -> float:
        """User and system time of all its processes and of the children that they have waited for."""
        ticks = 0
        for pid in self.pids:
            with contextlib.suppress(OSError):
                stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
                ticks += sum(int(field) for field in stat.rpartition(")")[2].split()[11:15])
        return ticks / os.sysconf("SC_CLK_TCK")

    def thread_ticks(self) -> dict[int, int]:
        """User and system time of each thread, in clock ticks."""
        ticks = {}
        for thread in self._threads():
            with contextlib.suppress(OSError):
                stat = Path(f"/proc/{thread}/stat").read_text(encoding="utf-8", errors="replace")
                ticks[thread] = sum(int(field) for field in stat.rpartition(")")[2].split()[11:13])
        return ticks

    def _threads(self) -> list[int]:
        found = []
        for pid in self.pids:
            with contextlib.suppress(OSError):
                found += [int(entry.name) for entry in Path(f"/proc/{pid}/task").iterdir()]
        return found

    def kill(self) -> None:
        """kill -9 of every process of it."""
        shared = processes.shared_memory_of(self.pids)
        processes.kill(self.pids)
        self.process.wait(10)
        processes.unlink_unused(shared)

    def stop(self, *, grace_s: float = 30.0) -> None:
        shared = processes.shared_memory_of(self.pids)
        self.signal(signal.SIGCONT)
        with contextlib.suppress(ProcessLookupError):
            self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(grace_s)
        except subprocess.TimeoutExpired:
            pass
        self.kill()
        processes.unlink_unused(shared)

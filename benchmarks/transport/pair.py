"""An arm: two pinned processes that share nothing but the network, and what their moves took."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from benchmarks.harness.netns import Host
from benchmarks.harness.rig import REPOSITORY
from benchmarks.transport.shapes import Shape

START_S, ANSWER_S = 60.0, 90.0
SOURCE_CPU, TARGET_CPU = 0, 1


@dataclass(frozen=True)
class Move:
    """Seconds from the first put to the last byte's arrival, and CPU seconds of all threads of both processes."""

    seconds: float
    cpu_s: float


class Pair:
    """See Shape for what is moved. Between uses it is stopped, so that what spins costs others nothing.

    `hosts`: the namespaces in which source and target live.
    """

    def __init__(
        self,
        arm: str,
        memories: tuple[int, int],
        environment: Mapping[str, str],
        *,
        hosts: tuple[Host, Host] | None = None,
    ) -> None:
        self.arm = arm
        self._sides: dict[str, subprocess.Popen[bytes]] = {}
        self._heard = {"source": b"", "target": b""}
        for number, (side, cpu) in enumerate((("source", SOURCE_CPU), ("target", TARGET_CPU))):
            within, address = (hosts[number].prefix, [hosts[number].wire]) if hosts else ((), [])
            memory_fd = memories[number]
            self._sides[side] = subprocess.Popen(
                [*within, sys.executable, "-m", "benchmarks.transport.worker", arm, side, str(cpu), str(memory_fd),
                 *address],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, pass_fds=(memory_fd,), bufsize=0, cwd=REPOSITORY,
                env={**os.environ, **environment},
            )  # fmt: skip
        try:
            for side in self._sides:
                self._hear(side, START_S)
            hellos = {side: self._call(side, do="hello")["hello"] for side in self._sides}
            self._tell("target", do="meet", hello=hellos["source"])
            self._tell("source", do="meet", hello=hellos["target"])
            for side in self._sides:
                self._hear(side)
        except BaseException:
            self.close()
            raise
        self._signal(signal.SIGSTOP)

    def move(self, shape: Shape) -> Move:
        with self._awake():
            for side in ("target", "source"):
                self._tell(side, do="move", shape=[shape.span_bytes, shape.batch])
                self._hear(side)
            source, target = self._hear("source"), self._hear("target")
        return Move(target["ended"] - source["started"], source["cpu_s"] + target["cpu_s"])

    def round_trips(self, rounds: int) -> list[float]:
        """Seconds of each, for one slab there and back."""
        with self._awake():
            for side in ("target", "source"):
                self._tell(side, do="latency", rounds=rounds)
            seconds: list[float] = self._hear("source")["seconds"]
            self._hear("target")
        return seconds

    def across(self, source: dict[str, Any], arrivals: int) -> tuple[Any, list[tuple[float, str]]]:
        """When the source began to put what it was told to, and when so many puts arrived, on one clock."""
        with self._awake():
            self._tell("target", do="arrivals", count=arrivals)
            began = self._call("source", **source)["began"]
            return began, self._hear("target")["arrivals"]

    def close(self) -> None:
        for process in self._sides.values():
            process.kill()
            process.wait(10)
            for pipe in (process.stdin, process.stdout):
                assert pipe is not None
                with contextlib.suppress(OSError):
                    pipe.close()

    @contextlib.contextmanager
    def _awake(self) -> Iterator[None]:
        self._signal(signal.SIGCONT)
        yield
        self._signal(signal.SIGSTOP)

    def _signal(self, number: signal.Signals) -> None:
        for process in self._sides.values():
            process.send_signal(number)

    def _call(self, side: str, **call: Any) -> dict[str, Any]:
        self._tell(side, **call)
        return self._hear(side)

    def _tell(self, side: str, **call: Any) -> None:
        pipe = self._sides[side].stdin
        assert pipe is not None
        pipe.write(json.dumps(call).encode() + b"\n")

    def _hear(self, side: str, wait_s: float = ANSWER_S) -> dict[str, Any]:
        """The next line. Raises SystemExit: without its answer there is nothing to report."""
        pipe = self._sides[side].stdout
        assert pipe is not None
        while b"\n" not in self._heard[side]:
            if not select.select([pipe], [], [], wait_s)[0]:
                raise SystemExit(f"{self.arm}: its {side} says nothing for {wait_s:g} s")
            data = os.read(pipe.fileno(), 1 << 20)
            if not data:
                raise SystemExit(f"{self.arm}: its {side} has ended")
            self._heard[side] += data
        line, _, self._heard[side] = self._heard[side].partition(b"\n")
        answer: dict[str, Any] = json.loads(line)
        return answer
